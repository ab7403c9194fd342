"""How time and memory grow with seconds of audio: upstream against ours.

``python -m benchmarks.bench_growth --output docs`` runs the audio tower, forward and backward in
training mode on one clip of 5, 10, 20 and 40 s, prints a table and writes ``growth.md`` and
``growth.png``. Upstream is run to ``--upstream-limit`` seconds (it needs 6 GB at 20 s).
Its longer figures are extrapolated by a parabola, since its bias is a tensor of patches x patches,
and marked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness, tables
from benchmarks.bench_audio_tower import build, peak, step

LENGTHS = (5.0, 10.0, 20.0, 40.0)


def measure(
    lengths: tuple[float, ...], limit: float, rounds: int
) -> dict[str, dict[float, tuple[float, float]]]:
    """``{contender: {seconds of audio: (median seconds, MiB)}}``, interleaved at each length."""
    towers = {kind: build(kind) for kind in ("ours", "upstream")}
    towers["ours"].load_state_dict(towers["upstream"].state_dict())
    found: dict[str, dict[float, tuple[float, float]]] = {kind: {} for kind in towers}
    for seconds in lengths:
        wav = torch.randn(1, int(seconds * 16_000))
        kinds = [kind for kind in towers if kind == "ours" or seconds <= limit]
        runs = {kind: step(towers[kind], wav) for kind in kinds}
        if len(runs) == 2:
            torch.testing.assert_close(
                runs["ours"](), runs["upstream"](), atol=2e-4, rtol=2e-4
            )  # before any timing
        times = harness.interleave(runs, rounds=rounds, warmup=0 if len(runs) == 2 else 1)
        for kind in kinds:
            needed = harness.in_fresh_process(peak, kind, seconds, 1)
            found[kind][seconds] = times[kind].median, needed / harness.MIB
            print(f"{kind:>10} {seconds:4.0f} s  {times[kind].median:8.2f} s  "
                  f"{needed / harness.MIB:8.0f} MiB", flush=True)  # fmt: skip
    return found


def extrapolated(
    measured: dict[float, tuple[float, float]], lengths: tuple[float, ...]
) -> dict[float, tuple[float, float]]:
    """A parabola through the last three measured lengths, evaluated at the unmeasured ones."""
    known = sorted(measured)[-3:]
    fits = [np.polyfit(known, [measured[s][i] for s in known], len(known) - 1) for i in (0, 1)]
    missing = [s for s in lengths if s not in measured]
    return {s: (float(np.polyval(fits[0], s)), float(np.polyval(fits[1], s))) for s in missing}


def table(found: dict[str, dict[float, tuple[float, float]]], guessed: dict[float, tuple]) -> str:
    lines = []
    for seconds, (time, memory) in found["ours"].items():
        mark = "*" if seconds in guessed else ""
        their_time, their_memory = {**found["upstream"], **guessed}[seconds]
        lines.append((
            f"{seconds:g} s", f"{time:.2f} s", f"{their_time:.2f} s{mark}",
            f"{their_time / time:.1f}x{mark}", f"{memory:.0f} MiB",
            f"{their_memory:,.0f} MiB{mark}", f"{their_memory / memory:.1f}x{mark}",
        ))  # fmt: skip
    heads = ("audio", "ours", "upstream", "faster", "ours", "upstream", "less")
    return tables.markdown(heads, lines)


def plot(
    found: dict[str, dict[float, tuple[float, float]]], guessed: dict[float, tuple], path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for index, (axis, label) in enumerate(
        zip(axes, ("seconds, forward and backward", "peak memory, MiB"), strict=True)
    ):
        for kind, colour in (("upstream", "tab:red"), ("ours", "tab:blue")):
            points = found[kind]
            axis.plot(
                list(points), [p[index] for p in points.values()], "o-", color=colour, label=kind
            )
        if guessed:
            last = max(found["upstream"])
            beyond = {last: found["upstream"][last], **guessed}
            axis.plot(
                list(beyond), [p[index] for p in beyond.values()], "o--", color="tab:red",
                markerfacecolor="none", label="upstream, extrapolated",
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="seconds of audio, one clip", ylabel=label)
        axis.set_xticks(list(found["ours"]), [f"{s:g}" for s in found["ours"]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds per length")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--upstream-limit", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--output", type=Path, help="folder of growth.md and growth.png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measure(LENGTHS, arguments.upstream_limit, arguments.rounds)
    guessed = extrapolated(found["upstream"], LENGTHS)
    text = table(found, guessed)
    print(f"\n{text}")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        plot(found, guessed, arguments.output / "growth.png")
        facts = ", ".join(f"{k} {v}" for k, v in harness.environment().items())
        (arguments.output / "growth.md").write_text(
            "# Growth with seconds of audio\n\nAudio tower (dim 512, depth 6, n_fft 512, hop 160, "
            "patch dropout 0.25), one clip, forward and backward in training mode, interleaved in "
            f"one run.\n\n{text}\n\n"
            "\\* extrapolated by a parabola through the measured lengths.\n\n"
            f"![time and memory against seconds of audio](growth.png)\n\n{facts}\n"
        )


if __name__ == "__main__":
    main()
