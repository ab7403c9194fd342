"""The benchmarks' peers on a CPU: a reason for each that cannot run, and the layouts that they are
called with, by stand-ins of their packages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import (
    attention_peers,
    bench_contrastive,
    bench_spectrogram_gpu,
    spectrogram_peers,
)
from benchmarks.attention_peers import PEERS
from benchmarks.bench_attention_gpu import make_inputs
from benchmarks.harness import Settings
from musiclm_fast.ops import mel_filters, spectrogram


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A stand-in for an installed package."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        path = ".".join(parts[:n])
        made = ModuleType(path)
        monkeypatch.setitem(sys.modules, path, made)
        if n > 1:
            setattr(sys.modules[".".join(parts[: n - 1])], parts[n - 1], made)
    vars(sys.modules[name]).update(members)


def absent(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Packages that are not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def rows_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of (B, N, H, D) tensors."""
    batch, length, heads, depth = q.shape
    assert (length, heads, depth) == (32, 3, 64)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias)
    return out.transpose(1, 2)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None
) -> Tensor:
    return rows_attention(q, k, v)


def flash_attn_cute(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    return rows_attention(q, k, v), None


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, p: float = 0.0,
    scale: float | None = None, *, op: Any = None,
) -> Tensor:  # fmt: skip
    assert op == "cutlass"
    assert attn_bias is not None
    assert attn_bias.shape == (2, 3, 32, 32)
    return rows_attention(query, key, value, attn_bias)


def triangle_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    assert q.shape == (1, 2, 3, 32, 64)
    assert bias.shape == (1, 1, 3, 32, 32)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


STAND_INS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "FlashAttention-2": [("flash_attn", {"flash_attn_func": flash_attn_func})],
    "FlashAttention-3": [("flash_attn_interface", {"flash_attn_func": flash_attn_func})],
    "FlashAttention-4": [("flash_attn.cute", {"flash_attn_func": flash_attn_cute})],
    "xformers + bias": [("xformers.ops.fmha", {
        "memory_efficient_attention": memory_efficient_attention,
        "MemoryEfficientAttentionCutlassOp": "cutlass",
    })],
    "cuEquivariance": [("cuequivariance_ops_torch", {}),
                       ("cuequivariance_torch", {"triangle_attention": triangle_attention})],
}  # fmt: skip


def small() -> dict[str, Any]:
    return make_inputs(2, 32, 3, "cpu", torch.float32, False, False)


@pytest.mark.parametrize("name", STAND_INS)
def test_attention_packages_get_their_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, members in STAND_INS[name]:
        module(monkeypatch, package, **members)
    PEERS[name].check(small())


@pytest.mark.parametrize("name", ["flash", "SDPA + bias"])
def test_a_wrong_attention_peer_is_refused(name: str) -> None:
    peer = PEERS[name]
    peer.check(small())

    def wrong(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda inputs: run(inputs) * 1.05

    with pytest.raises(AssertionError, match="output is off by"):
        attention_peers.Peer(wrong(peer.run), peer.biased).check(small())


def test_a_peer_without_the_bias_is_no_biased_peer() -> None:
    with pytest.raises(AssertionError, match="output is off by"):
        attention_peers.Peer(
            lambda inputs: (
                attention_peers.flash(inputs) + 0 * attention_peers.bias_of(inputs).sum()
            ),
            True,
        ).check(small())


@pytest.mark.parametrize("name", [n for n in PEERS if n not in ("flash", "SDPA + bias")])
def test_attention_peers_say_why_they_do_not_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(
        monkeypatch, "flash_attn", "flash_attn_interface", "xformers", "cuequivariance_ops_torch"
    )
    with pytest.raises((ImportError, RuntimeError)) as raised:
        PEERS[name].check(small())
    assert str(raised.value)


def test_cudnn_describes_both_directions() -> None:
    pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    inputs = small()
    q = inputs["q"].bfloat16()
    given = {"q": q, "k": q, "v": q, "bias": attention_peers.bias_of(inputs),
             "o": q, "stats": q.new_empty(*q.shape[:3], 1)}  # fmt: skip
    gradients = {"do": q, "dq": q, "dk": q, "dv": q, "dbias": given["bias"]}
    for direction, tensors in (("forward", given), ("backward", given | gradients)):
        layouts = attention_peers._layouts(tensors)
        attention_peers.describe(direction, torch.bfloat16, layouts).graph.validate()
    with pytest.raises(RuntimeError, match=r"not torch\.float32"):
        attention_peers.describe("forward", torch.float32, attention_peers._layouts(given))


class MelSpectrogram(torch.nn.Module):
    """flashmel's, with its own mel filters."""

    def __init__(
        self, sample_rate: int = 16_000, n_fft: int = 400, win_length: int | None = None,
        hop_length: int | None = None, f_min: float = 0.0, f_max: float | None = None,
        pad: int = 0, n_mels: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        assert (sample_rate, n_mels) == (16_000, 64)
        assert win_length is not None
        self.options: dict[str, Any] = dict(
            n_fft=n_fft, win_length=win_length, hop_length=hop_length,
            window=torch.hann_window(win_length), mel=mel_filters(sample_rate, n_fft, n_mels),
        )  # fmt: skip

    def forward(self, wav: Tensor) -> Tensor:
        assert not wav.requires_grad
        return spectrogram(wav, backend="torch", **self.options)


class STFT(torch.nn.Module):
    """nnAudio's: real and imaginary parts."""

    def __init__(
        self, n_fft: int = 2048, win_length: int | None = None, freq_bins: int | None = None,
        hop_length: int | None = None, window: str = "hann", output_format: str = "Complex",
        verbose: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        assert (window, output_format, verbose) == ("hann", "Complex", False)
        assert win_length is not None
        self.options: dict[str, Any] = dict(
            n_fft=n_fft, hop_length=hop_length, win_length=win_length,
            window=torch.hann_window(win_length), return_complex=True,
        )  # fmt: skip

    def forward(self, wav: Tensor) -> Tensor:
        return torch.view_as_real(torch.stft(wav, **self.options))


@pytest.mark.parametrize("n_fft, log_mel", [(128, False), (400, True), (512, False), (512, True)])
def test_spectrogram_packages_compute_ours(
    n_fft: int, log_mel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(monkeypatch, "nnAudio.features", STFT=STFT)
    module(monkeypatch, "flashmel", MelSpectrogram=MelSpectrogram)
    given = bench_spectrogram_gpu.options(n_fft, 16_000, "cpu", log_mel)

    def reference(wav: Tensor) -> Tensor:
        return spectrogram(wav, backend="torch", **given)

    spectrogram_peers.check("nnAudio", given, reference)
    if log_mel:
        spectrogram_peers.check("flashmel", given, reference)
    else:
        with pytest.raises(RuntimeError, match="mel bands alone"):
            spectrogram_peers.check("flashmel", given, reference)
    with pytest.raises(AssertionError, match="nnAudio is off by"):
        spectrogram_peers.check("nnAudio", given, lambda wav: 1.01 * reference(wav))


@pytest.mark.parametrize("variant", ["values and gradient", "log-mel"])
def test_spectrogram_peers_say_why_they_do_not_run(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(monkeypatch, "nnAudio", "flashmel")
    wav = torch.randn(1, 8000, requires_grad="gradient" in variant)
    found = bench_spectrogram_gpu.contenders(wav, 512, variant, "cpp", 1, checked=True)
    with pytest.raises(ModuleNotFoundError, match="nnAudio"):
        found["nnAudio"].build()
    reason = "no gradient" if "gradient" in variant else "flashmel"
    with pytest.raises((RuntimeError, ModuleNotFoundError), match=reason):
        found["flashmel"].build()


def test_wide_latents_are_listed_without_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_contrastive, "MAX_DEPTH", 16)
    settings = Settings("gpu", "cpu", tiny=True)
    found = bench_contrastive.on_gpu("sigmoid", 40, settings, depth=32)
    named = {r.contender: r for r in found}
    assert named["ours"].reason == "latents of width 32, not 1 to 16"
    assert named["torch, B x B in memory"].seconds
    assert "siglip" in named["siglip-kernel"].reason
