"""What a fresh process finds imported: torch, this package and upstream, ten seconds of
work that :func:`benchmarks.harness.in_fresh_process` does once and then forks. Nothing may compute
here: a process forked from one that has threads hangs in its first parallel loop."""

import contextlib

from musiclm_fast import MuLaN, audiolm

IMPORTED = (MuLaN, audiolm.SemanticTransformer)

with contextlib.suppress(ImportError):  # not installed: who asks for it is told
    from tests.reference import live

    live.load()
