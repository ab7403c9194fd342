"""Imports for a fresh process: torch, this package and upstream. They take ten seconds;
:func:`benchmarks.harness.in_fresh_process` imports them once and then forks. Nothing may compute
here: a process forked from one with threads hangs in its first parallel loop."""

import contextlib

from musiclm_fast import MuLaN, audiolm

IMPORTED = (MuLaN, audiolm.SemanticTransformer)

with contextlib.suppress(ImportError):  # not installed: who asks for it is told
    from tests.upstream import live

    live.load()
