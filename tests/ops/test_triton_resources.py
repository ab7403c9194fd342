"""Every Triton kernel compiled ahead of time, for NVIDIA and AMD: no spills, and it fits."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from tests.ops import triton_resources as compiled

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles for real"),
]
TARGETS = list(compiled.SHARED_LIMIT)
OPS = list(compiled.USUAL)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_the_usual_call(op: str, target: str) -> None:
    print(f"\n{compiled.HEADER}")
    kernels = set()
    for variant, found in compiled.table(op, [compiled.USUAL[op]], [target]):
        print(compiled.line(found))
        assert not compiled.problems(variant, found)
        kernels.add(found.kernel)
    wanted = {"attention": 7, "contrastive": 6, "geglu_norm": 2, "hyper_connection": 2}
    assert len(kernels) == wanted[op]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_every_variant(op: str, target: str) -> None:
    found = compiled.table(op, compiled.every_variant(op), [target])
    assert not [p for variant, kernel in found for p in compiled.problems(variant, kernel)]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_spill_is_seen(target: str) -> None:
    """64 x 64 similarities and their gradients do not fit into one warp's registers."""
    variant = compiled.USUAL["attention"]
    launch = next(
        launch
        for launch in compiled.launches(variant, target)
        if launch.name == "backward_kv_kernel"
    )
    arguments = launch.arguments | {"BLOCK_M": 64, "BLOCK_N": 64}
    crowded = replace(launch, arguments=arguments, options=launch.options | {"num_warps": 1})
    found = compiled.resources(crowded, target)
    assert found.spilled_bytes > 0
    (problem,) = compiled.problems(variant, found)
    assert "spilled" in problem


def test_what_a_launcher_would_refuse_is_refused() -> None:
    """Triton's compiler takes more than its launcher does."""
    launch = compiled.launches(compiled.USUAL["attention"], "sm_90")[0]
    with pytest.raises(ValueError, match="normalize_kernel has no arguments nothing"):
        compiled.resources(replace(launch, arguments=launch.arguments | {"nothing": 1}), "sm_90")
    limited = replace(launch, options=launch.options | {"maxnreg": 255})
    with pytest.raises(ValueError, match="normalize_kernel has no options maxnreg on gfx942"):
        compiled.resources(limited, "gfx942")


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_two_forward_programs_share_a_multiprocessor(target: str, dropout_p: float) -> None:
    """At head dim 64 in 16-bit, so that one's softmax overlaps with the other's products."""
    launch = next(
        launch
        for launch in compiled.launches(compiled.Attention(dropout_p=dropout_p), target)
        if launch.name == "forward_kernel"
    )
    found = compiled.resources(launch, target)
    assert 2 * 32 * found.num_warps * found.registers <= 65536
    assert 2 * (found.shared_bytes + 1024) <= 228 * 1024
