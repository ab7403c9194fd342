"""Contrastive losses, forward and backward, d = 128: time, and memory beyond the inputs'.

On a CPU: B = 8,192 in float32, ours against the live musiclm-pytorch (compiled kernels against its
modules), decoupled and sigmoid; in full mode softmax too. The bound is the time of four products of
B x B x d by torch.mm and two exponentials of B x B by torch.exp, in tiles that fit in the cache, of
the fastest size. Ours exceeds it if its own products are faster than torch's; the sigmoid loss also
needs only three products and one exponential.

On a GPU: B = 65,536 in bfloat16, ours against siglip-kernel (sigmoid), inf-cl and memeff (softmax)
and against torch with the similarities in memory; the sigmoid loss also at d = 768, for which
siglip-kernel's authors quote theirs. A peer that is not installed (requirements/peers.txt),
computes something else or does not run is listed with the reason. The goal on an H100 is 25 ms and
200 MB at d = 128.

Loss and gradients of B = 512 are compared with the float64 reference first.
Operations are four products for every contender.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import contrastive_peers, harness
from benchmarks.harness import Contender, Result, Settings
from musiclm_fast import testing
from musiclm_fast.ops import contrastive_loss
from musiclm_fast.ops.contrastive._triton import MAX_DEPTH

DEPTH = 128
WIDE = 768  # of siglip-kernel's own figures
SIZES = {"cpu": 8192, "cuda": 65536}  # the quoted sizes
KINDS = ("decoupled", "sigmoid", "softmax")
OURS, THEIRS = "ours", "musiclm-pytorch"
GOAL = "goal on an H100: 25 ms, 200 MB"
Step = Callable[[], Any]


def make(
    kind: str, batch: int, dtype: torch.dtype, device: str, depth: int = DEPTH
) -> dict[str, Any]:
    inputs = testing.contrastive_inputs(batch, depth, dtype=dtype, device=device)
    if kind == "sigmoid":
        inputs["bias"] = torch.tensor([-10.0], device=device, requires_grad=True)
    else:
        del inputs["bias"]
    return inputs


def ours(
    kind: str, batch: int, dtype: torch.dtype, device: str, backend: str | None = None,
    depth: int = DEPTH,
) -> Step:  # fmt: skip
    inputs = make(kind, batch, dtype, device, depth)

    def step() -> None:
        loss = contrastive_loss(**inputs, kind=kind, backend=backend)
        testing.gradients(loss, inputs, torch.ones((), device=device))

    return step


def theirs(kind: str, batch: int, dtype: torch.dtype, device: str) -> Step:
    """Upstream's module on the same latents."""
    from tests.upstream import live

    package = live.load().musiclm
    inputs = make(kind, batch, dtype, device)
    if kind == "sigmoid":
        module = package.SigmoidContrastiveLearning()
    else:
        module = package.SoftmaxContrastiveLearning(
            decoupled_contrastive_learning=kind == "decoupled"
        )
    leaves = [inputs["audio"], inputs["text"], *module.parameters()]
    return lambda: torch.autograd.grad(module(*leaves[:2]), leaves)


def bound(batch: int) -> Step:
    """Four products and two exponentials of B x B, in square tiles of the fastest size."""

    def pieces(side: int) -> Step:
        rows, columns = torch.randn(2, side, DEPTH)
        tile, out = torch.empty(side, side), torch.empty(side, DEPTH)

        def step() -> None:
            for _ in range((batch // side) ** 2):
                torch.mm(rows, columns.t(), out=tile)
                torch.exp(tile.mul_(1e-3), out=tile)
                torch.mm(rows, columns.t(), out=tile)
                torch.exp(tile.mul_(1e-3), out=tile)
                torch.mm(tile, columns, out=out)
                torch.mm(tile.t(), rows, out=out)

        return step

    sizes = [side for side in (512, 1024, 2048) if side <= batch] or [batch]
    steps = {str(side): pieces(side) for side in sizes}
    if len(steps) == 1:
        return next(iter(steps.values()))
    found = harness.interleave(steps, rounds=2)
    return steps[min(found, key=lambda side: found[side].median)]


def peer(name: str, batch: int, depth: int = DEPTH) -> Step:
    """Another package's step, compared with the reference first.

    Raises:
        Exception: it is not installed, computes something else or does not run.
    """
    contrastive_peers.version(name)
    kind, build = contrastive_peers.PEERS[name]
    inputs = make(kind, 512, torch.bfloat16, "cuda", depth)
    wide = testing.to_float64(inputs)
    loss = contrastive_loss(**wide, kind=kind, backend="torch")
    gradients = testing.gradients(loss, wide, torch.ones((), device="cuda"))
    gradients["log temperature"] = gradients["temperature"] * wide["temperature"].detach()
    contrastive_peers.check(name, build(inputs), loss, gradients)
    return build(make(kind, batch, torch.bfloat16, "cuda", depth))


def check_parity(
    kind: str, dtype: torch.dtype, device: str, backend: str | None, depth: int = DEPTH
) -> None:
    """Raise unless loss and gradients of a small batch agree with the float64 reference.

    Raises:
        AssertionError: naming what differs.
    """
    batch = 512 if backend != "triton" or device == "cuda" else 40
    inputs = make(kind, batch, dtype, device, depth)
    wide = testing.to_float64(inputs)
    found = []
    for given, name in ((inputs, backend), (inputs, "torch"), (wide, "torch")):
        loss = contrastive_loss(**given, kind=kind, backend=name)
        grads = testing.gradients(loss, given, torch.ones((), device=device))
        found.append({"loss": loss, **grads})
    for name in found[0]:
        testing.assert_close_to_oracle(f"{kind} {name}", *(f[name] for f in found), dtype=dtype)


def peak(name: str, kind: str, batch: int) -> int:
    """Peak memory of a step on the CPU in bytes; call in a fresh process."""
    build = ours if name == OURS else theirs

    def prepare() -> Step:
        build(kind, 64, torch.float32, "cpu")()  # warms up
        return build(kind, batch, torch.float32, "cpu")

    return harness.extra_memory(prepare)


def on_cpu(kind: str, batch: int, settings: Settings) -> list[Result]:
    quick = settings.mode == "quick"
    given = (kind, batch, torch.float32, "cpu")
    contenders = {
        name: Contender(
            functools.partial(build, *given),
            memory=None
            if quick and batch != SIZES["cpu"]
            else functools.partial(harness.in_fresh_process, peak, name, kind, batch),
            once=quick and name == THEIRS and batch > 4096,
            operations=8.0 * batch**2 * DEPTH,
            role="ours" if name == OURS else "peer",
        )
        for name, build in ((OURS, ours), (THEIRS, theirs))
    }
    contenders["four products, two exponentials"] = Contender(
        functools.partial(bound, batch), operations=8.0 * batch**2 * DEPTH, role="bound"
    )
    return harness.measure(
        "contrastive loss, forward and backward", f"{kind}, B = {batch:,}, d = {DEPTH}",
        contenders, settings, rounds=settings.pick(3, full=5),
        check=functools.partial(check_parity, kind, torch.float32, "cpu", None),
        axes={"pairs of a batch": batch}, headline=headline(kind, batch, SIZES["cpu"]),
    )  # fmt: skip


def on_gpu(kind: str, batch: int, settings: Settings, depth: int = DEPTH) -> list[Result]:
    """On a CPU the kernels run in Triton's interpreter, as a test of this code."""
    device = settings.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    given = (kind, batch, dtype, device)
    job = "contrastive loss, forward and backward"
    case = f"{kind}, B = {batch:,}, d = {depth}"
    # No fallback to torch under ours' name: wider latents than the kernels take are listed so.
    refused = f"latents of width {depth}, not 1 to {MAX_DEPTH}" if depth > MAX_DEPTH else ""
    builds: dict[str, Callable[[], Step]] = {
        "torch, B x B in memory": functools.partial(ours, *given, "torch", depth)
    }
    if not refused:
        builds = {OURS: functools.partial(ours, *given, "triton", depth), **builds}
    for name, (their_kind, _) in contrastive_peers.PEERS.items():
        if their_kind == kind:
            builds[name] = functools.partial(peer, name, batch, depth)
    contenders = {
        name: Contender(
            build,
            memory=functools.partial(harness.gpu_memory, build) if device == "cuda" else None,
            operations=8.0 * batch**2 * depth,
            role="ours" if name == OURS else "peer",
        )
        for name, build in builds.items()
    }
    backend = "torch" if refused else "triton"
    found = harness.measure(
        job, f"{case} ({GOAL})" if (batch, depth) == (SIZES["cuda"], DEPTH) else case,
        contenders, settings,
        check=functools.partial(check_parity, kind, dtype, device, backend, depth),
        rounds=7, warmup=2, axes={"pairs of a batch": batch} if depth == DEPTH else None,
        headline=headline(kind, batch, SIZES["cuda"]) if depth == DEPTH else "",
    )  # fmt: skip
    return [Result(job, case, OURS, reason=refused), *found] if refused and found else found


def headline(kind: str, batch: int, shown: int) -> str:
    """What README's table calls a case; only the largest batch is in it."""
    if batch != shown:
        return ""
    return f"{kind} contrastive loss, B = {batch:,}, d = {DEPTH}, forward and backward"


def results(settings: Settings) -> list[Result]:
    """Each kind of loss, at the quoted size and at a quarter of it, for the charts."""
    kinds = settings.pick(KINDS[:2], full=KINDS, gpu=KINDS)
    measure, sizes = on_cpu, [SIZES["cpu"] // 4, SIZES["cpu"]]
    if settings.mode == "gpu":
        measure, sizes = on_gpu, [SIZES["cuda"] // 4, SIZES["cuda"]]
    if settings.tiny or (settings.mode == "gpu" and settings.device == "cpu"):
        sizes = [40]
    found = [r for kind in kinds for batch in sizes for r in measure(kind, batch, settings)]
    if settings.mode == "gpu":
        found += on_gpu("sigmoid", sizes[-1], settings, WIDE)
    return found
