"""The time of a call: the longer of its kernels, with gaps, and the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.harvest.cases import Case
from benchmarks.predict.kernels import costs
from benchmarks.predict.model import MODEL, Card
from benchmarks.predict.stored import Cost, Prediction
from benchmarks.predict.trace import Kernel


def host_ms(kernels: Sequence[Kernel]) -> float:
    """CPU time to launch a call's kernels."""
    microseconds = 0.0
    for k in kernels:
        if k.launch is None:
            microseconds += MODEL.operator_us
        else:
            microseconds += MODEL.launch_us + MODEL.argument_us * len(k.launch.arguments)
    if any(k.launch is not None for k in kernels):
        microseconds += MODEL.call_us
    return microseconds / 1e3


def call(case: str, contender: str, kernels: Sequence[Kernel], card: Card) -> Prediction:
    """The prediction of a call from its kernels."""
    found = costs(kernels, card)
    launches = sum(c.launches for c in found)
    busy = sum(c.ms * c.launches for c in found)
    host = host_ms(kernels)
    made = total(case, contender, busy, launches, host, parts(found), main_bound(found))
    equal: dict[Cost, int] = {}
    for c in found:
        if c.how:
            equal[c] = equal.get(c, 0) + 1
    return replace(made, kernels=[replace(c, launches=n) for c, n in equal.items()])


def total(
    case: str, contender: str, busy: float, launches: int, host: float, how: str, bound: str
) -> Prediction:
    """From the kernels' time and the CPU's to the time between events."""
    device = busy + (launches - 1) * MODEL.gap_us / 1e3 + MODEL.event_us / 1e3
    if host > device:
        bound = "host"
    how = f"kernels {busy:.3g} ms, with gaps {device:.3g}; CPU {host:.3g} ms; {how}"
    return Prediction(case, contender, max(device, host), busy, launches, bound, how)


def parts(found: Sequence[Cost]) -> str:
    """The kernels that take most, with their number."""
    sums: dict[str, list[float]] = {}
    for c in found:
        entry = sums.setdefault(c.name, [0.0, 0])
        entry[0] += c.ms * c.launches
        entry[1] += c.launches
    most = sorted(sums.items(), key=lambda item: -item[1][0])[:5]
    return ", ".join(f"{name} {ms:.3g} ms x {int(n)}" for name, (ms, n) in most)


def main_bound(found: Sequence[Cost]) -> str:
    """The bound of the kernels that take most."""
    sums: dict[str, float] = {}
    for c in found:
        sums[c.bound] = sums.get(c.bound, 0.0) + c.ms * c.launches
    return max(sums, key=lambda name: sums[name])


def simple(
    case: Case, contender: str, seconds: float, launches: int, bound: str, how: str,
    operators: int | None = None,
) -> Prediction:  # fmt: skip
    """A prediction from a rate."""
    host = (launches if operators is None else operators) * MODEL.operator_us / 1e3
    return total(case.name, contender, 1e3 * seconds, launches, host, how, bound)


def none(case: Case, contender: str, reason: str) -> Prediction:
    """A case without a prediction."""
    return Prediction(case.name, contender, None, None, None, "", f"no prediction: {reason}")
