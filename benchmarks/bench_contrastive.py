"""Contrastive losses, forward and backward, d = 128: time, and memory beyond the inputs'.

``python -m benchmarks.bench_contrastive`` on a CPU: B = 8,192 in float32, ours against the live
musiclm-pytorch (compiled kernels against its modules), decoupled and sigmoid. Beside it stands the
bound: four products of B x B x d by torch.mm and two exponentials of B x B by torch.exp, in pieces
that stay in the cache, timed in the same rounds. Ours can be faster than that where its own
products are faster than torch's.

``--device cuda``: B = 65,536 in bfloat16, ours against siglip-kernel (sigmoid), inf-cl and memeff
(softmax); a peer that is not installed or does not run is listed with the reason. The goal on an
H100 is 25 ms and 200 MB.

Loss and gradients are compared with the float64 definition first (B = 512): without it no row.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings
from musiclm_fast import testing
from musiclm_fast.ops import contrastive_loss

DEPTH = 128
SIZES = {"cpu": (8192, torch.float32), "cuda": (65536, torch.bfloat16)}
Step = Callable[[], Any]


def make(kind: str, batch: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    inputs = testing.contrastive_inputs(batch, DEPTH, dtype=dtype, device=device)
    if kind == "sigmoid":
        inputs["bias"] = torch.tensor([-10.0], device=device, requires_grad=True)
    else:
        del inputs["bias"]
    return inputs


def ours(kind: str, batch: int, dtype: torch.dtype, device: str) -> Step:
    inputs = make(kind, batch, dtype, device)

    def step() -> None:
        loss = contrastive_loss(**inputs, kind=kind)
        testing.gradients(loss, inputs, torch.ones((), device=device))

    return step


def theirs(kind: str, batch: int, dtype: torch.dtype, device: str) -> Step:
    """The live reference's module on the same latents."""
    from tests.reference import live

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
    """Four products and two exponentials of B x B, in pieces of 1,024 x 1,024."""
    side = 1024
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


def siglip_kernel(batch: int) -> Step:
    from siglip_kernel import fused_siglip_loss

    inputs = make("sigmoid", batch, torch.bfloat16, "cuda")
    parameters = [
        torch.tensor(x, device="cuda", requires_grad=True) for x in (math.log(10.0), -10.0)
    ]
    leaves = [inputs["audio"], inputs["text"], *parameters]
    return lambda: torch.autograd.grad(fused_siglip_loss(*leaves), leaves)


def inf_cl(batch: int) -> Step:
    from inf_cl import cal_flash_loss

    inputs = make("softmax", batch, torch.bfloat16, "cuda")
    audio, text, factor = inputs["audio"], inputs["text"], inputs["temperature"]

    def step() -> None:
        scale = factor.to(audio.dtype)
        both = cal_flash_loss(audio, text, scale=scale, head_dim=DEPTH).mean()
        both = both + cal_flash_loss(text, audio, scale=scale, head_dim=DEPTH).mean()
        torch.autograd.grad(both, [audio, text, factor])

    return step


def memeff(batch: int) -> Step:
    from memeff import MemoryEfficientCLIPLoss

    inputs = make("softmax", batch, torch.bfloat16, "cuda")
    loss = MemoryEfficientCLIPLoss(temperature=0.1, normalized_inputs=True, stable=False)
    leaves = [inputs["audio"], inputs["text"]]
    return lambda: torch.autograd.grad(loss(*leaves), leaves)


def check_parity(dtype: torch.dtype, device: str) -> None:
    """Raise unless loss and gradients of a small batch agree with the float64 definition."""
    for kind in ("softmax", "decoupled", "sigmoid"):
        inputs = make(kind, 512, dtype, device)
        wide = testing.to_float64(inputs)
        found = []
        for given, backend in ((inputs, None), (inputs, "torch"), (wide, "torch")):
            loss = contrastive_loss(**given, kind=kind, backend=backend)
            grads = testing.gradients(loss, given, torch.ones((), device=device))
            found.append({"loss": loss, **grads})
        for name in found[0]:
            testing.assert_close_to_oracle(f"{kind} {name}", *(f[name] for f in found), dtype=dtype)


def contenders(batch: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Step]]:
    make_ours = {
        f"ours {kind}": functools.partial(ours, kind, batch, dtype, device)
        for kind in ("decoupled", "sigmoid")
    }
    if device == "cpu":
        make_theirs = {
            f"musiclm-pytorch {kind}": functools.partial(theirs, kind, batch, dtype, device)
            for kind in ("decoupled", "sigmoid")
        }
        return {**make_ours, **make_theirs, "bound": functools.partial(bound, batch)}
    peers = {"siglip-kernel sigmoid": siglip_kernel, "inf-cl softmax": inf_cl}
    peers["memeff softmax"] = memeff
    make_ours["ours softmax"] = functools.partial(ours, "softmax", batch, dtype, device)
    return make_ours | {name: functools.partial(peer, batch) for name, peer in peers.items()}


def results(settings: Settings) -> list[Result]:
    """A batch of 8,192 on a CPU, of 65,536 on a GPU; twice as many and more for the charts."""
    device = settings.device
    _, dtype = SIZES[device]
    found = []
    for batch in settings.pick([2048, 8192], gpu=[16_384, 65_536], tiny=[1024]):
        operations = 4 * 2.0 * batch**2 * DEPTH
        made: dict[str, Contender] = {}
        for name, build in contenders(batch, dtype, device).items():
            role = "ours" if name.startswith("ours") else "bound" if name == "bound" else "peer"
            asked = (name, build, device, batch)
            made[_with_mode(name)] = Contender(
                build, operations=operations, role=role,
                memory=None
                if role == "bound" or (settings.mode == "quick" and batch != SIZES[device][0])
                else functools.partial(memory_of, *asked),
                once=role == "peer" and settings.mode == "quick" and batch > 4096,
            )  # fmt: skip
        found += harness.measure(
            "contrastive loss, forward and backward", f"B = {batch:,}, d = {DEPTH}", made, settings,
            check=functools.partial(check_parity, dtype, device),
            rounds=settings.pick(3, full=5, gpu=5),
            axes={"pairs of a batch": batch},
            headline=f"contrastive loss, B = {batch:,}, d = {DEPTH}, forward and backward"
            if batch == SIZES[device][0]
            else "",
        )  # fmt: skip
    return found


def _with_mode(name: str) -> str:
    # "ours sigmoid" -> "ours (sigmoid)": a peer is compared with ours of its own kind
    who, _, kind = name.rpartition(" ")
    return f"{who} ({kind})" if who else name


def memory_of(name: str, build: Callable[[], Step], device: str, batch: int | None = None) -> int:
    """Bytes that a step needs beyond its inputs."""
    if device == "cpu":
        size = () if batch is None else ("--batch", str(batch))
        asked = ("--memory", name, *size)
        return int(harness.in_fresh_process("benchmarks.bench_contrastive", *asked))
    step = build()
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=SIZES)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    batch, dtype = SIZES[options.device]
    batch = options.batch or batch
    builders = contenders(batch, dtype, options.device)
    if options.memory:

        def build() -> Step:
            # Once at a small size: libraries and threads are not what is measured.
            contenders(64, dtype, options.device)[options.memory]()()
            return builders[options.memory]()

        print(json.dumps(harness.extra_memory(build)))
        return

    check_parity(dtype, options.device)
    facts = harness.environment() | {"batch": batch, "depth": DEPTH}
    print(json.dumps(facts), flush=True)
    steps, absent = {}, {}
    for name, build in builders.items():
        try:
            step = build()
            step()
            steps[name] = step
        except Exception as error:  # a peer that cannot run is listed with its reason
            if name.startswith("ours"):
                raise
            absent[name] = f"{type(error).__name__}: {error}"
    times = harness.interleave(steps, options.rounds)
    products = 4 * 2 * batch**2 * DEPTH
    for name, timing in times.items():
        speed = products / timing.median / 1e12
        row = f"{name:28} {timing.median * 1e3:9.1f} ms {speed:8.2f} TFLOP/s"
        if name != "bound":
            row += f" {memory_of(name, builders[name], options.device) / 1e6:9.1f} MB"
        for other in ("bound", name.replace("ours", "musiclm-pytorch")):
            if name.startswith("ours") and other in times:
                row += "   {} / ours {:.2f} ({:.2f} to {:.2f})".format(
                    other.split()[0], *harness.ratio(times[other], timing)
                )
        print(row, flush=True)
    for name, reason in absent.items():
        print(f"{name:28} absent: {reason}")


if __name__ == "__main__":
    sys.exit(main())
