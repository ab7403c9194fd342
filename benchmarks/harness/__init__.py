"""What every benchmark shares.

A benchmark is a file ``bench_<name>.py`` with ``results(settings) -> list[Result]``; ``python -m
benchmarks.run`` runs one or all and writes tables, JSON and charts. Most of ``results`` is a call
of :func:`measure` per case. It checks parity first, lists a contender that cannot run with its
reason, and times the others in turn.

records.py    Settings, Contender, Result
measuring.py  measure, and what a case is compared with
timing.py     interleaved timing
memory.py     peak memory
process.py    a fresh process
facts.py      device, versions, commit, date
"""

from benchmarks.harness.facts import ROOT, environment
from benchmarks.harness.measuring import PARITY_FAILED, measure, measure_against_copy, oracle
from benchmarks.harness.memory import (
    MIB,
    extra_memory,
    gpu_memory,
    need_memory,
    peak_memory,
)
from benchmarks.harness.process import in_fresh_process
from benchmarks.harness.records import MODES, Contender, Result, Settings
from benchmarks.harness.timing import Timing, interleave, one_thread, ratio, timed

__all__ = [
    "MIB",
    "MODES",
    "PARITY_FAILED",
    "ROOT",
    "Contender",
    "Result",
    "Settings",
    "Timing",
    "environment",
    "extra_memory",
    "gpu_memory",
    "in_fresh_process",
    "interleave",
    "measure",
    "measure_against_copy",
    "need_memory",
    "one_thread",
    "oracle",
    "peak_memory",
    "ratio",
    "timed",
]
