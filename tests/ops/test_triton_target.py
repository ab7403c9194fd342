"""Which GPUs the Triton backends take, and what they say to the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from musiclm_fast.ops import _triton_target
from musiclm_fast.ops.attention import _triton as attention
from musiclm_fast.ops.contrastive import _triton as contrastive


def set_device(patch: pytest.MonkeyPatch, name: str) -> None:
    """Make torch report one GPU of that architecture."""
    amd = name.startswith("gfx")
    patch.setattr(torch.version, "hip", "6.4" if amd else None)
    properties = SimpleNamespace(gcnArchName=f"{name}:sramecc+:xnack-")
    patch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    def capability(_: torch.device) -> tuple[int, int]:
        assert not amd, "AMD's versions are no compute capabilities"
        return divmod(int(name.removeprefix("sm_")), 10)

    patch.setattr(torch.cuda, "get_device_capability", capability)
    patch.setattr(_triton_target, "_architecture", _triton_target._architecture.__wrapped__)


@pytest.mark.parametrize(
    ("name", "family", "words"),
    [
        ("sm_75", "ampere", "compute capability 7.5 is below 8.0"),
        ("sm_80", "ampere", ""),
        ("sm_89", "ampere", ""),
        ("sm_90", "hopper", ""),
        ("sm_100", "blackwell", ""),
        ("sm_103", "blackwell", ""),
        ("sm_120", "ampere", ""),
        ("gfx90a", "amd", ""),
        ("gfx942", "amd", ""),
        ("gfx1100", "amd", "gfx90a and gfx942, not gfx1100"),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, name: str, family: str, words: str) -> None:
    set_device(monkeypatch, name)
    device = torch.device("cuda")
    assert _triton_target.target(device) == name
    assert _triton_target.family(name) == family
    # No build of torch makes tensors on a device that is not there.
    x: Any = SimpleNamespace(
        device=device, is_cpu=False, is_cuda=True, dtype=torch.bfloat16, shape=(1, 4, 64)
    )
    for ok, reason in (attention.supports(q=x), contrastive.supports(audio=x)):
        assert ok == (not words)
        assert words in reason and bool(reason) == bool(words)


def test_recorded_target_comes_first() -> None:
    with _triton_target.recorded_launches(lambda *_: None, "gfx942"):
        assert _triton_target.target(torch.device("meta")) == "gfx942"
    assert _triton_target.target(torch.device("meta")) == "sm_90"


@pytest.mark.aot
@pytest.mark.skipif(_triton_target.INTERPRET, reason="compiles for real")
def test_a_kept_launch_has_what_triton_specialises_on() -> None:
    pytest.importorskip("triton")
    from benchmarks.bench_launch import launching_nothing
    from musiclm_fast.ops.attention._triton_kernels import normalize_kernel

    memory = torch.zeros(4096)

    def launcher(x: torch.Tensor, **changed: int) -> Any:
        numbers = dict(
            stride_xb=512, stride_xh=512, stride_xn=16, heads=1, length=17,
            HEAD_DIM=16, BLOCK_D=16, BLOCK=16,
        )  # fmt: skip
        arguments = dict(x=x, scale=memory[-16:], y=memory[1024:]) | numbers | changed
        return _triton_target.launch(normalize_kernel, 2, arguments, dict(num_warps=4))

    with launching_nothing() as stub:
        first = launcher(memory[512:])
        assert first is not None
        assert launcher(memory[:512]) is first
        others = [
            launcher(memory[1:]), launcher(memory.bfloat16()), launcher(memory, heads=2),
            launcher(memory, length=32), launcher(memory, BLOCK=32),
        ]  # fmt: skip
        assert len({first, *others}) == 6
        assert stub.launches == 7
