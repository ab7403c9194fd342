"""The audio tower, forward and backward in training mode: live reference against ours.

``python -m benchmarks.bench_audio_tower`` prints one row per length of audio: time and its ratio
over interleaved rounds, the bound that the matrix products alone allow, and the peak memory of a
fresh process each. The gradients of both are compared first; without agreement there is no row.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings

MODULE = "benchmarks.bench_audio_tower"
SAMPLE_HZ = 16_000
TOWER = dict(dim=512, depth=6, heads=8, dim_head=64, patch_dropout_prob=0.25)
FRONT = dict(spec_n_fft=512, spec_win_length=400, spec_hop_length=160)


def build(kind: str) -> torch.nn.Module:
    """The tower of the live reference or of this package, with equal weights."""
    torch.manual_seed(0)
    if kind == "ours":
        from musiclm_fast import AudioSpectrogramTransformer
    else:
        from tests.reference import live

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


def compare(seconds: float, batch: int, rounds: int) -> dict[str, float]:
    """One row of the table.

    Raises:
        AssertionError: outputs or gradients disagree.
    """
    wav = torch.randn(batch, int(seconds * SAMPLE_HZ))
    ours, theirs = build("ours"), build("reference")
    ours.load_state_dict(theirs.state_dict())
    run_ours, run_theirs = step(ours, wav), step(theirs, wav)
    torch.testing.assert_close(run_ours(), run_theirs(), atol=2e-4, rtol=2e-4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        if name != "dynamic_pos_bias_mlp.4.bias":  # exactly zero in theory: softmax is invariant
            error = (a.grad - b.grad).norm() / b.grad.norm()
            assert error < 2e-3, f"gradient of {name} is off by {error:.1e}"
    run_products, operations = products(seconds, batch)
    times = harness.interleave(
        {"ours": run_ours, "reference": run_theirs, "products": run_products}, rounds
    )
    faster, least, most = harness.ratio(times["reference"], times["ours"])
    bound = harness.ratio(times["reference"], times["products"])[0]
    arguments = (str(seconds), str(batch))
    memory = {
        kind: harness.in_fresh_process("benchmarks.bench_audio_tower", "--peak", kind, *arguments)
        for kind in ("ours", "reference")
    }
    return {
        "seconds": seconds,
        "batch": batch,
        "ours_s": times["ours"].median,
        "reference_s": times["reference"].median,
        "faster": faster,
        "least": least,
        "most": most,
        "bound": bound,
        "of_bound": faster / bound,
        "gflops": operations / times["ours"].median / 1e9,
        "ours_mib": memory["ours"] / harness.MIB,
        "reference_mib": memory["reference"] / harness.MIB,
    }


def check(seconds: float, batch: int) -> None:
    """Output and gradients are the reference's.

    Raises:
        AssertionError: they are not.
    """
    wav = torch.randn(batch, int(seconds * SAMPLE_HZ))
    ours, theirs = build("ours"), build("reference")
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(step(ours, wav)(), step(theirs, wav)(), atol=2e-4, rtol=2e-4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name != "dynamic_pos_bias_mlp.4.bias":  # exactly zero in theory: softmax is invariant
            assert a.grad is not None and b.grad is not None
            error = (a.grad - b.grad).norm() / b.grad.norm()
            assert error < 2e-3, f"gradient of {name} is off by {error:.1e}"


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
        for name, kind in (("ours", "ours"), ("musiclm-pytorch", "reference")):
            asked = ("--peak", kind, str(seconds), str(batch))
            contenders[name] = Contender(
                functools.partial(lambda kind, wav: step(build(kind), wav), kind, wav),
                memory=functools.partial(harness.in_fresh_process, MODULE, *asked),
                operations=operations if kind == "ours" else None,
                once=kind == "reference" and settings.mode == "quick" and seconds * batch > 10,
                role="ours" if kind == "ours" else "peer",
            )
        contenders["matrix products alone"] = Contender(
            lambda s=seconds, b=batch: products(s, b)[0], role="bound"
        )
        # The reference is four times slower on 20 s than on 10: values are compared on 3.
        found += harness.measure(
            "audio tower, forward and backward", f"{seconds} s x {batch}", contenders, settings,
            check=functools.partial(check, min(seconds, 3), batch), rounds=3,
            axes={"seconds of audio": seconds} if batch == 1 else {},
            headline=f"audio tower, dim 512, depth 6, {seconds} s x {batch}, forward and backward"
            if batch == 2
            else "",
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds per row")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument(
        "--rows", default="10x2,20x1", help="seconds x batch of each row, such as 10x2,20x1"
    )
    parser.add_argument("--peak", nargs=3, metavar=("KIND", "SECONDS", "BATCH"), help="internal")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        kind, seconds, batch = arguments.peak
        print(json.dumps(peak(kind, float(seconds), int(batch))))
        return
    for key, value in harness.environment().items():
        print(f"{key:<16}{value}")
    print(
        f"\n{'audio':>10} {'ours s':>8} {'ref s':>8} {'faster':>20} {'bound':>7} {'of it':>6} "
        f"{'GFLOP/s':>8} {'ours MiB':>9} {'ref MiB':>9} {'memory':>7}"
    )
    for row in arguments.rows.split(","):
        seconds, batch = row.split("x")
        r = compare(float(seconds), int(batch), arguments.rounds)
        spread = f"{r['faster']:.2f}x ({r['least']:.2f}-{r['most']:.2f})"
        print(
            f"{seconds + ' s x ' + batch:>10} {r['ours_s']:>8.2f} {r['reference_s']:>8.2f} "
            f"{spread:>20} {r['bound']:>6.2f}x {r['of_bound']:>6.0%} {r['gflops']:>8.0f} "
            f"{r['ours_mib']:>9.0f} {r['reference_mib']:>9.0f} "
            f"{r['reference_mib'] / r['ours_mib']:>6.1f}x"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
