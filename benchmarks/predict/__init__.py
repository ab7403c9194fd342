"""Predicts what the harvest will measure, without a GPU.

    PYTHONPATH=.venvs/triton-3.6.0 python -m benchmarks.predict              # h100 and h200
    PYTHONPATH=.venvs/triton-3.6.0 python -m benchmarks.predict --card h200  # one of them

writes ``results/<card>-predicted.json`` and its page, ``.md``. :func:`load` reads them and needs
neither torch nor Triton.

A kernel takes the longest of three times: its instructions through the schedulers and pipes of the
busiest SM, its products through the tensor cores, its bytes through the memory. A call takes the
longer of its kernels, with the gaps between them, and the CPU time of their launches.

launches.py     a recorded launch of a Triton kernel, compiled without a GPU
disassembly.py  the loops and instructions of its machine code
trace.py        which kernels a call launches, from fake tensors
model.py        every constant of the cost model, with its source
kernels.py      the time of one kernel
calls.py        the time of a call
rules.py        a rule per stage of the harvest, from a case to its prediction
stages.py       the seconds of each stage
stored.py       the predictions on file
page.py         their page
"""

from benchmarks.predict.model import CARDS, MODEL, Card
from benchmarks.predict.stored import RESULTS, Cost, Prediction, load, read

__all__ = ["CARDS", "MODEL", "RESULTS", "Card", "Cost", "Prediction", "load", "read"]
