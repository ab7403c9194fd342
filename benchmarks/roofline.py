"""Compares the cost model with measurements: operations, bytes, predicted and measured seconds.

    python -m benchmarks.roofline                       # the steps of bench_training_step
    python -m benchmarks.roofline --ops "10 s x 2"      # every op of one step

A step takes at least the sum over its ops of the longer of operations / rate and bytes / bandwidth
(``musiclm_fast.cost``). NVIDIA's rates are those of its data sheets; this processor's are
measured: one product of 2,048 x 2,048, and a copy of 256 MB. What was measured on a device comes
from ``results/<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from benchmarks import bench_training_step as bench
from benchmarks import harness, report, tables
from benchmarks.run import RESULTS, THREADS
from musiclm_fast import cost


def this_processor(rounds: int = 5) -> cost.Device:
    """Rates of this CPU as measured."""
    torch.set_num_threads(THREADS)
    square = torch.randn(2048, 2048)
    half = square.bfloat16()
    source, target = torch.ones(2**26), torch.empty(2**26)
    elements = torch.ones(2**16)  # fits in the cache

    def arithmetic() -> None:
        for _ in range(1000):
            elements.mul_(1.0)

    runs = {
        "float32": lambda: square @ square,
        "bf16": lambda: half @ half,
        "copy": lambda: target.copy_(source),
        "arithmetic": arithmetic,
    }
    best = {name: min(t.seconds) for name, t in harness.interleave(runs, rounds).items()}
    products = {name: 2.0 * 2048**3 / best[name] for name in ("float32", "bf16")}
    bandwidth = 2 * source.numel() * 4 / best["copy"]
    name = harness.environment()["device"]
    return cost.Device(name, products, 1000 * elements.numel() / best["arithmetic"], bandwidth)


def measured(device: str) -> dict[str, float]:
    """Median seconds of ours in each case of the training step, from the results of a device."""
    store = RESULTS / f"{report.slug(device)}.json"
    if not store.exists():
        return {}
    sections = json.loads(store.read_text())
    if "training_step" not in sections:
        return {}
    found = report.read(sections["training_step"])
    return {r.case: r.timing.median for r in found if r.contender == bench.OURS and r.seconds}


def table_of_steps(devices: Sequence[cost.Device]) -> str:
    """A row per case: operations, bytes, predicted and measured seconds per device."""
    names = [device.name for device in devices]
    seen = {device.name: measured(device.name) for device in devices}
    heads = [
        "case",
        "TFLOP",
        "GB",
        *(f"{name} {p}, ms" for name in names for p in cost.VALUE_BYTES),
    ]
    heads += [f"{name}, measured ms" for name in names if seen[name]]
    lines = []
    for name, case in {**bench.CASES, **bench.ON_GPU}.items():
        step = case.counted()
        ops = cost.step_ops(step)
        row = [name, f"{sum(op.operations for op in ops) / 1e12:.3g}"]
        row.append(f"{sum(op.traffic for op in ops) / 1e9:.3g}")
        row += [
            f"{1e3 * cost.seconds(ops, device, precision):.4g}"
            for device in devices
            for precision in cost.VALUE_BYTES
        ]
        for device in names:
            if seen[device]:
                found = seen[device].get(name)
                row.append("" if found is None else f"{1e3 * found:.4g}")
        lines.append(row)
    return tables.markdown(heads, lines)


def table_of_ops(case: str, device: cost.Device) -> str:
    """A row per op of a case: operations, bytes, and the one that bounds it on a device."""
    lines = []
    for op in cost.step_ops({**bench.CASES, **bench.ON_GPU}[case].counted()):
        seconds = cost.seconds([op], device)
        moving = op.traffic / device.bandwidth >= seconds
        lines.append([
            op.name, f"{op.operations / 1e9:.3g}", f"{op.traffic / 1e6:.3g}",
            f"{1e3 * seconds:.3g}", "memory" if moving else "arithmetic",
        ])  # fmt: skip
    return tables.markdown(["op", "GFLOP", "MB", "at least, ms", "bound by"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline")
    parser.add_argument("--ops", choices=[*bench.CASES, *bench.ON_GPU], metavar="CASE")
    args = parser.parse_args(argv)
    here = this_processor()
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in here.products.items())
    print(f"{here.name}: products in {rates}; copies {here.bandwidth / 1e9:.3g} GB/s\n")
    print(table_of_ops(args.ops, here) if args.ops else table_of_steps(
        [here, *cost.DEVICES.values()]
    ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
