"""Ctrl-C and SIGTERM as requests to stop, so a step is never interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM was received.

    A second one acts immediately. Outside the main thread, where Python allows no handlers, nothing
    is caught.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    earlier = {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        for each in signals:
            signal.signal(each, earlier[each])

    for number in signals:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number in signals:
            signal.signal(number, earlier[number])
