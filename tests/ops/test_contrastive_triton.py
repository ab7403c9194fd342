"""The contrastive Triton kernels without a GPU: in the interpreter, and what they allocate."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from musiclm_fast import testing
from musiclm_fast.ops import _triton_target, contrastive_loss
from musiclm_fast.ops.contrastive import _triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="this run is inside the interpreter already")
@pytest.mark.parametrize(
    "marks", ["gpu and not slow", pytest.param("gpu and slow", marks=pytest.mark.slow)]
)
def test_in_the_interpreter(marks: str) -> None:
    """test_contrastive.py again, with TRITON_INTERPRET=1: the tests that a GPU runs too."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("test_contrastive.py"))],
        cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


class Allocations(TorchDispatchMode):
    """Bytes of the storages that calls make, at most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if self.holds(t)}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if self.holds(t)):
            key = id(storage)
            if key not in given and key not in self.live:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key)
        self.peak = max(self.peak, sum(self.live.values()))
        return out

    @staticmethod
    def holds(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.device.type == "meta"


def test_the_count_of_allocations() -> None:
    with Allocations() as counted:
        x = torch.empty(1000, device="meta")  # 4,000 bytes
        y = x[:10].view(2, 5) + x[:10].view(2, 5)  # 40
        del x
        torch.empty(500, device="meta")  # 2,000, while y lives
    assert y.shape == (2, 5)
    assert counted.peak == 4040 and sum(counted.live.values()) == 40


@pytest.mark.skipif(INTERPRETED, reason="counts what a launch on a device needs")
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_memory_of_65536_pairs(kind: str) -> None:
    """Forward and backward in bfloat16, counted on meta tensors: below 200 MB beyond the inputs."""
    latents = torch.empty(1, 65536, 128, dtype=torch.bfloat16, device="meta")
    factor = torch.empty(1, device="meta")
    with (
        Allocations() as counted,
        _triton_target.recorded_launches(lambda *_: None, "sm_90"),
    ):
        if kind == "sigmoid":
            loss, *kept = _triton.sigmoid(latents, latents, factor, factor, 0, True)
            grads = [g * loss for g in kept]  # beside those that autograd keeps
        else:
            row, column, positive = _triton.logsumexp(latents, latents, factor, 0)
            weights = [torch.empty_like(s) for s in (row, column, positive)]
            grads = _triton.logsumexp_backward(*weights, latents, latents, factor, row, column, 0)
        grads = [g.to(latents.dtype) for g in grads]
    assert 2 * latents.nbytes < counted.peak < 200e6, counted.peak


def test_importing_does_not_import_the_kernels() -> None:
    script = (
        "import sys, musiclm_fast.ops; "
        "assert 'musiclm_fast.ops.contrastive._triton_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(device="cpu"), "CUDA"),
        (dict(device="meta"), "meta"),
    ],
)
def test_refusals_say_why(change: dict[str, Any], words: str) -> None:
    if INTERPRETED:
        pytest.skip("the interpreter runs on CPU tensors")
    ok, reason = _triton.supports(audio=torch.empty(1, 4, 8, **change))
    assert not ok and words in reason


def test_few_rows_are_cut_into_splits() -> None:
    """Enough programs for a device, never more partial results than the cap."""
    for rows, columns in ((64, 65536), (1024, 1 << 20), (65536, 65536), (5, 7), (0, 9), (9, 0)):
        x, y = (
            torch.empty(1, n, 128, dtype=torch.bfloat16, device="meta") for n in (rows, columns)
        )
        side = _triton._Side(x, y, torch.empty(1), 0, (None, None), 1)
        splits = side.splits(4 * 128)
        tiles = -(-columns // side.config.block_n)
        assert 1 <= splits <= max(tiles, 1)
        assert splits == 1 or splits * rows * 128 * 4 <= _triton.PARTIAL_BYTES
        if columns == 65536:
            assert side.blocks * splits >= 200


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", _triton_target.DTYPES)
def test_self_check_on_a_gpu(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert _triton.self_check(torch.device("cuda"), dtype) is None


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device: counts its memory")
@pytest.mark.parametrize("kind", ["softmax", "decoupled", "sigmoid"])
def test_a_step_of_65536_pairs_takes_less_than_200_mb(kind: str, gpu: str) -> None:
    inputs = testing.contrastive_inputs(65_536, 128, dtype=torch.bfloat16, device=gpu)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    loss = contrastive_loss(**inputs, kind=kind, backend="triton")
    testing.gradients(loss, inputs, torch.ones_like(loss))
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before < 200e6
