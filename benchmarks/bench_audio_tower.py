"""The audio tower, forward and backward in training mode: upstream against ours.

One case per length of audio. The bound is the time of the matrix products alone. Peak memory is
that of a fresh process. Outputs and gradients are compared first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings

SAMPLE_HZ = 16_000
TOWER = dict(dim=512, depth=6, heads=8, dim_head=64, patch_dropout_prob=0.25)
FRONT = dict(spec_n_fft=512, spec_win_length=400, spec_hop_length=160)


def build(kind: str) -> torch.nn.Module:
    """The tower of upstream or of this package, with equal weights."""
    torch.manual_seed(0)
    if kind == "ours":
        from musiclm_fast import AudioSpectrogramTransformer
    else:
        from tests.upstream import live

        AudioSpectrogramTransformer = live.load().musiclm.AudioSpectrogramTransformer
    return AudioSpectrogramTransformer(**TOWER, **FRONT).train()


def step(tower: torch.nn.Module, wav: torch.Tensor) -> Callable[[], Any]:
    """One forward and backward pass, with the same masks and dropped patches each time."""
    direction = torch.randn(TOWER["dim"], generator=torch.Generator().manual_seed(2))

    def run() -> torch.Tensor:
        torch.manual_seed(1)
        tower.zero_grad(set_to_none=True)
        out = tower(wav)
        (out * direction).sum().backward()
        return out.detach()

    return run


def products(seconds: float, batch: int) -> tuple[Callable[[], Any], float]:
    """Only the matrix products of a step (forward, and two of that size backward), and their
    floating-point operations."""
    frames = int(seconds * SAMPLE_HZ) // 160 + 1
    n = max(1, int((257 // 16) * (frames // 16) * 0.75))
    dim, heads, depth = TOWER["dim"], TOWER["heads"], TOWER["depth"]
    hidden = int(dim * 4 * 2 / 3)
    rows = torch.randn(batch * n, dim)
    weights = [torch.randn(dim, w) for w in (dim, 2 * dim, dim, 2 * hidden)]
    wide, down = torch.randn(batch * n, hidden), torch.randn(hidden, dim)
    q = torch.randn(batch * heads, n, dim // heads)
    keys = q.transpose(1, 2).contiguous()
    block = min(n, 256)  # attention's products tile by tile, as a fused kernel does them
    scores = torch.randn(batch * heads, block, n)
    pairs = [(rows, w) for w in weights] + [(wide, down)]
    grads = [(torch.randn(len(a), w.shape[1]), a, w) for a, w in pairs]
    operations = 3 * sum(2.0 * a.shape[0] * w.numel() for a, w in pairs)
    # Two products forward, five backward (the scores are computed again).
    operations += 7 * 2.0 * batch * heads * n * n * (dim // heads)

    def run() -> None:
        for _ in range(depth):
            for grad, a, w in grads:
                a @ w
                grad @ w.t()
                a.t() @ grad
            for start in range(0, n, block):
                part = q[:, start : start + block]
                score = scores[:, : part.shape[1]]
                for _ in range(3):
                    part @ keys
                for _ in range(2):
                    score @ q
                for _ in range(2):
                    score.transpose(1, 2) @ part

    return run, operations * depth


def peak(kind: str, seconds: float, batch: int) -> int:
    """Peak memory of a step in bytes; call in a fresh process."""
    wav = torch.randn(batch, int(seconds * SAMPLE_HZ))
    return harness.extra_memory(lambda: step(build(kind), wav))


def check(seconds: float, batch: int) -> None:
    """Output and gradients are upstream's.

    Raises:
        AssertionError: they are not.
    """
    wav = torch.randn(batch, int(seconds * SAMPLE_HZ))
    ours, theirs = build("ours"), build("upstream")
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(step(ours, wav)(), step(theirs, wav)(), atol=2e-4, rtol=2e-4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name != "dynamic_pos_bias_mlp.4.bias":  # exactly zero in theory: softmax is invariant
            assert a.grad is not None and b.grad is not None
            error = (a.grad - b.grad).norm() / b.grad.norm()
            assert error < 2e-3, f"gradient of {name} is off by {error:.1e}"


def contender(kind: str, wav: torch.Tensor) -> Callable[[], Any]:
    """A step of the tower, if this machine has the memory for it."""
    if kind == "upstream":  # 6 GB at 20 s, quadratic in the length
        harness.need_memory(6.4e9 * len(wav) * (wav.shape[1] / SAMPLE_HZ / 20) ** 2)
    return step(build(kind), wav)


def results(settings: Settings) -> list[Result]:
    """Clips of several lengths, and batches of 10 s; a GPU's are those of the training step."""
    if settings.mode == "gpu":
        return []
    found = []
    sizes = settings.pick(
        [(2, 1), (5, 1), (10, 2)], full=[(5, 1), (10, 1), (10, 2), (20, 1), (40, 1)],
        tiny=[(1, 1)],
    )  # fmt: skip
    for seconds, batch in sizes:
        wav = torch.randn(batch, int(seconds * SAMPLE_HZ))
        operations = products(seconds, batch)[1]
        contenders = {}
        for name, kind in (("ours", "ours"), ("musiclm-pytorch", "upstream")):
            contenders[name] = Contender(
                functools.partial(contender, kind, wav),
                memory=functools.partial(harness.in_fresh_process, peak, kind, seconds, batch),
                operations=operations if kind == "ours" else None,
                role="ours" if kind == "ours" else "peer",
            )
        contenders["matrix products alone"] = Contender(
            lambda s=seconds, b=batch: products(s, b)[0], role="bound"
        )
        # Upstream is four times slower on 20 s than on 10: values are compared on 3.
        found += harness.measure(
            "audio tower, forward and backward", f"{seconds} s x {batch}", contenders, settings,
            check=functools.partial(check, min(seconds, 3), batch), rounds=3,
            axes={"seconds of audio": seconds} if batch == 1 else {},
            headline=f"audio tower, dim 512, depth 6, {seconds} s x {batch}, forward and backward"
            if batch == 2
            else "",
        )  # fmt: skip
    return found
