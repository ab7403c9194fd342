"""A fresh process."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function(*arguments)`` returns, or raises, in a fresh process.

    It is forked from a server that has imported :mod:`benchmarks.preload` and has no threads. A
    fork of this process would inherit its state. torch gets as many threads there as here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    with ProcessPoolExecutor(1, context, _settle, (torch.get_num_threads(),)) as pool:
        return pool.submit(function, *arguments).result()


def _settle(threads: int) -> None:
    # Upstream prints and warns; that would land in the middle of a table.
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
