"""A whole training step of MuLaN, forward, backward and optimizer: upstream against ours.

The case "README" is the configuration of upstream's README: clips of 1,024 samples, batch 8.
The others are clips of 10 and 30 s at 16 kHz (window 400 of 512, hop 160). Texts have 256 tokens.
Loss and gradients are compared first. Two bounds are timed: the matrix products of the towers'
blocks alone in upstream's step, and those in ours (its last text block computes the class token
alone). Memory is the peak of forward and backward, without the optimizer's state.

On a GPU also: the largest batch that fits, and the share of the device's peak at dim 768 and 1,024.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings
from musiclm_fast import cost

JOB = "MuLaN training step"
SAMPLE_HZ = 16_000
ADAM = dict(lr=3e-4, betas=(0.9, 0.99))  # both trainers' defaults
OURS, THEIRS = "ours", "musiclm-pytorch"


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of a step: clips of ``samples``, a front end, and the towers' width and depth."""

    samples: int
    batch: int
    n_fft: int = 512
    win_length: int = 400
    hop_length: int = 160
    dim: int = 512
    depth: int = 6
    text_tokens: int = 256

    @property
    def tower(self) -> dict[str, int]:
        return dict(dim=self.dim, depth=self.depth, heads=self.dim // 64, dim_head=64)

    def counted(self) -> cost.Step:
        """The shapes, for operations and products."""
        tower = cost.Tower(**self.tower)
        return cost.mulan_step(
            self.samples, self.batch, text_tokens=self.text_tokens, audio=tower, text=tower,
            n_fft=self.n_fft, hop_length=self.hop_length,
        )  # fmt: skip


CASES = {
    "README": Case(1024, 8, n_fft=128, win_length=24, hop_length=12),
    "10 s x 2": Case(10 * SAMPLE_HZ, 2),
    "30 s x 1": Case(30 * SAMPLE_HZ, 1),
}
TINY = {
    "tiny": Case(1024, 2, n_fft=128, win_length=24, hop_length=12, dim=64, depth=2, text_tokens=8)
}
ON_GPU = {
    "10 s x 4": Case(10 * SAMPLE_HZ, 4),
    "10 s x 16": Case(10 * SAMPLE_HZ, 16),
    "10 s x 64": Case(10 * SAMPLE_HZ, 64),
    "10 s x 64, dim 768": Case(10 * SAMPLE_HZ, 64, dim=768),
    "10 s x 64, dim 1,024": Case(10 * SAMPLE_HZ, 64, dim=1024),
}
MODES = {
    "": (None, False),
    " (bf16)": (torch.bfloat16, False),
    " (torch.compile)": (None, True),
    " (bf16, torch.compile)": (torch.bfloat16, True),
}


def build(kind: str, case: Case, device: str = "cpu") -> torch.nn.Module:
    """MuLaN of upstream or of this package, with equal weights."""
    torch.manual_seed(0)
    if kind == OURS:
        import musiclm_fast as package
    else:
        from tests.upstream import live

        package = live.load().musiclm
    model = package.MuLaN(
        package.AudioSpectrogramTransformer(
            **case.tower,
            spec_n_fft=case.n_fft,
            spec_win_length=case.win_length,
            spec_hop_length=case.hop_length,
        ),
        package.TextTransformer(**case.tower),
    )
    return model.to(device).train()


def inputs(case: Case, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    wavs = torch.randn(case.batch, case.samples, generator=generator)
    texts = torch.randint(1, 20_000, (case.batch, case.text_tokens), generator=generator)
    return dict(wavs=wavs.to(device), texts=texts.to(device))


def gradients(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], mode: str = ""
) -> Callable[[], Any]:
    """Forward and backward, with the same masks and dropped patches each time."""
    dtype, compiled = MODES[mode]
    forward = torch.compile(model) if compiled else model
    # One pair has no negatives: for a batch of one the loss is the cosine.
    alone = len(batch["wavs"]) == 1
    device = batch["wavs"].device.type

    def run() -> torch.Tensor:
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype) if dtype else contextlib.nullcontext():
            loss = forward(**batch, return_similarities=alone).sum()
        loss.backward()
        return loss.detach()

    return run


def adam(kind: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """As either trainer makes it."""
    return torch.optim.Adam(model.parameters(), **ADAM, fused=kind == OURS or None)


def step(
    kind: str, case: Case, device: str = "cpu", mode: str = "", model: torch.nn.Module | None = None
) -> Callable[[], Any]:
    """A whole step."""
    model = build(kind, case, device) if model is None else model
    run = gradients(model, inputs(case, device), mode)
    update = adam(kind, model)

    def both() -> torch.Tensor:
        loss: torch.Tensor = run()
        update.step()
        return loss

    return both


def products(step: cost.Step, all_of_them: bool) -> Callable[[], Any]:
    """Only the matrix products of both towers' blocks, forward and backward: of upstream's
    step (``all_of_them``), or of ours, whose last text block computes the class token alone."""
    text = dataclasses.replace(step.text, reads="all") if all_of_them else step.text
    wanted = cost.products(step.audio, step.batch, step.audio_tokens)
    wanted += cost.products(text, step.batch, step.text_tokens)
    runs = [run for p in wanted for run in _runs(p)]
    return lambda: [run() for run in runs]


def _runs(p: cost.Product) -> list[Callable[[], Any]]:
    """One run per block. Attention is computed for a few heads at once, whose scores fit in the
    cache, into preallocated memory."""
    if not p.keys:
        a, w = torch.randn(p.rows, p.inner), torch.randn(p.columns, p.inner)
        grad = torch.randn(p.rows, p.columns)

        def linear() -> None:
            a @ w.t()
            grad @ w
            grad.t() @ a

        return [linear] * p.count
    heads = max(1, min(p.together, 2**22 // (p.rows * p.keys)))
    q, keys = torch.randn(heads, p.rows, p.inner), torch.randn(heads, p.keys, p.inner)
    turned = keys.transpose(1, 2)
    scores = torch.empty(heads, p.rows, p.keys)
    of_queries, of_keys = torch.empty_like(q), torch.empty_like(keys)

    def attention() -> None:
        for _ in range(p.together // heads):
            for _ in range(3):
                torch.bmm(q, turned, out=scores)
            for _ in range(2):
                torch.bmm(scores, keys, out=of_queries)
            for _ in range(2):
                torch.bmm(scores.transpose(1, 2), q, out=of_keys)

    return [attention] * p.count


def peak(model: torch.nn.Module, case: Case, mode: str) -> int:
    """Peak memory of forward and backward on the CPU in bytes; call in a fresh process."""

    def prepare() -> Callable[[], Any]:
        samples = max(16 * case.hop_length, 1024)
        short = dataclasses.replace(case, samples=samples, batch=2, text_tokens=8)
        gradients(model, inputs(short), mode)()  # warms up
        model.zero_grad(set_to_none=True)
        return gradients(model, inputs(case), mode)

    return harness.extra_memory(prepare)


def alone(kind: str, case: Case, timed: bool, mode: str) -> tuple[float, int]:
    """Seconds of a step (of the second, which is like all later ones; 0 if not ``timed``) and the
    peak memory of forward and backward in bytes; call in a fresh process."""
    model = build(kind, case)
    used = peak(model, case, mode)
    if not timed:
        return 0.0, used
    update = adam(kind, model)
    update.step()
    run = gradients(model, inputs(case), mode)
    start = time.perf_counter()
    run()
    update.step()
    return time.perf_counter() - start, used


def memory(kind: str, case: Case, device: str, mode: str) -> int:
    """Peak memory of forward and backward in bytes."""
    if device == "cuda":
        model = build(kind, case, device)
        return harness.gpu_memory(
            lambda: gradients(model, inputs(case, device), mode),
            between=lambda: model.zero_grad(set_to_none=True),
        )
    return apart(kind, case, timed=False, mode=mode)[1]


def apart(kind: str, case: Case, timed: bool = True, mode: str = "") -> tuple[float, int]:
    """:func:`alone` in a fresh process."""
    seconds, used = harness.in_fresh_process(alone, kind, case, timed, mode)
    return seconds, used


@functools.cache
def check(case: Case, device: str) -> None:
    """Loss and gradients agree with upstream's.

    Raises:
        AssertionError: they do not.
    """
    given = inputs(case, device)
    ours = build(OURS, case, device)
    theirs, backend = harness.oracle(
        lambda: build(THEIRS, case, device), lambda: build(OURS, case, device)
    )
    ours.load_state_dict(theirs.state_dict())
    loss = gradients(ours, given)()
    with backend:
        expected = gradients(theirs, given)()
    torch.testing.assert_close(loss, expected, atol=2e-4, rtol=2e-4)
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if name.endswith("dynamic_pos_bias_mlp.4.bias"):
            continue  # exactly zero in theory: softmax is invariant
        a, b = p.grad, wanted[name].grad
        if a is None or b is None:
            assert a is b, f"one of both has no gradient of {name}"
            continue
        error = (a - b).norm() / b.norm().clamp(min=1e-12)
        assert error < 2e-3, f"gradient of {name} is off by {error:.1e}"


def modes(kind: str, case: Case, settings: Settings) -> list[str]:
    """The modes of ``kind``. On a GPU only some batches are compiled, to stay within ten
    minutes."""
    if settings.mode != "gpu":
        return settings.pick([""], full=list(MODES))
    if case.dim > 512:
        return [" (bf16)"] if kind == OURS else []
    eager = ["", " (bf16)"]
    compiled = [" (bf16, torch.compile)"]
    return eager + (compiled if case.batch == 4 or (case.batch == 64 and kind == OURS) else [])


def contenders(case: Case, settings: Settings) -> dict[str, Contender]:
    """Both in each mode, and the products alone."""
    device = settings.device
    counted = case.counted()
    operations = sum(op.operations for op in cost.step_ops(counted))
    slow = case.samples * case.batch > 20 * SAMPLE_HZ and device == "cpu"
    found = {}
    for kind in (OURS, THEIRS):
        for mode in modes(kind, case, settings):
            found[kind + mode] = Contender(
                functools.partial(step, kind, case, device, mode),
                # On a CPU the peak would include the compiler's memory.
                memory=None
                if device == "cpu" and MODES[mode][1]
                else functools.partial(memory, kind, case, device, mode),
                operations=operations if kind == OURS else None,
                apart=functools.partial(apart, kind, case)
                if kind == THEIRS and slow and settings.mode == "quick"
                else None,
                role="ours" if kind == OURS else "peer",
            )
    if device == "cpu":
        for name, whole in (("matrix products alone", True), ("of these, ours has left", False)):
            found[name] = Contender(
                functools.partial(products, counted, whole),
                once=slow and settings.mode == "quick",
                role="bound",
            )
    return found


def largest_batch(kind: str, case: Case, device: str, mode: str, limit: int = 2**16) -> int:
    """The largest batch up to ``limit`` whose step runs, by doubling and then halving the gap; 0 if
    not even two pairs do."""

    def fits(batch: int) -> bool:
        try:
            step(kind, dataclasses.replace(case, batch=batch), device, mode)()
        except torch.OutOfMemoryError:
            return False
        finally:
            if device == "cuda":
                torch.cuda.empty_cache()
        return True

    low, high = 0, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


HEADLINES = {
    "README": "8 clips of 1,024 samples, texts of 256 tokens",
    "10 s x 2": "2 clips of 10 s",
    "30 s x 1": "1 clip of 30 s",
}


def results(settings: Settings) -> list[Result]:
    """Every case of the mode; on a GPU the largest batches too."""
    found = []
    cases = settings.pick(CASES, gpu=ON_GPU, tiny=TINY)
    for name, case in cases.items():
        # On a CPU length and batch change together: bench_audio_tower has the curves.
        axes = (
            {"pairs of a batch": case.batch} if settings.mode == "gpu" and case.dim == 512 else {}
        )
        # Values are compared on clips that upstream can afford.
        small = case
        if settings.mode != "full" and case.samples > 3 * SAMPLE_HZ:
            small = dataclasses.replace(case, samples=3 * SAMPLE_HZ, batch=2)
        found += harness.measure(
            JOB, name, contenders(case, settings), settings,
            check=functools.partial(check, small, settings.device),
            # The check has run both. The first round compiles.
            rounds=settings.pick(3, gpu=5), warmup=settings.pick(0, full=1, gpu=1), axes=axes,
            headline=f"MuLaN training step, {HEADLINES.get(name, name)}",
        )  # fmt: skip
    if settings.mode == "gpu":
        case = next(iter(cases.values()))
        limit = 4 if settings.tiny else 2**16
        for kind, mode in ((OURS, " (bf16)"), (OURS, ""), (THEIRS, " (bf16)"), (THEIRS, "")):
            if settings.only_ours and kind != OURS:
                continue
            known = Result(f"{JOB}: largest batch", "10 s", kind + mode,
                           "ours" if kind == OURS else "peer")  # fmt: skip
            try:
                most = largest_batch(kind, case, settings.device, mode, limit)
            except ImportError as error:  # upstream is not installed
                found.append(dataclasses.replace(known, reason=str(error)))
            else:
                found.append(dataclasses.replace(known, note=f"{most} pairs fit"))
    return found
