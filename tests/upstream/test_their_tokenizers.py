"""audiolm-pytorch's own codecs and semantic tokenizer do for our stages, as they are."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from musiclm_fast import MusicLM
from musiclm_fast import audiolm as ours
from tests.audiolm.test_tokenizers import notes
from tests.upstream.test_parity_audiolm import quantizer_of_clips

pytestmark = pytest.mark.upstream

SEMANTIC = 7


class _FairseqModel(nn.Module):
    """What fairseq's HuBERT gives: features of frames of 320 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(
            "basis", torch.randn(320, 8, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, wave: Tensor, **options: Any) -> dict[str, Tensor]:
        assert options == dict(features_only=True, mask=False, output_layer=9)
        return {"x": wave.unfold(-1, 320, 320) @ self.basis}


@pytest.fixture
def hubert(upstream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    joblib = pytest.importorskip("joblib")
    cluster = pytest.importorskip("sklearn.cluster")
    points = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    joblib.dump(cluster.KMeans(SEMANTIC, n_init=1).fit(points), tmp_path / "km.bin")
    torch.save({}, tmp_path / "hubert.pt")
    utils = types.SimpleNamespace(
        load_model_ensemble_and_task=lambda loaded: ([_FairseqModel()], None, None)
    )
    module = sys.modules["audiolm_pytorch.hubert_kmeans"]
    monkeypatch.setattr(module.fairseq, "checkpoint_utils", utils, raising=False)
    return upstream.audiolm.HubertWithKmeans(
        str(tmp_path / "hubert.pt"), str(tmp_path / "km.bin"), seq_len_multiple_of=320
    )


def soundstream(upstream: Any) -> nn.Module:
    torch.manual_seed(0)
    codec = upstream.audiolm.SoundStream(
        channels=4, strides=(4, 8), channel_mults=(1, 2), codebook_dim=8, codebook_size=64,
        rq_num_quantizers=4, use_local_attn=False, discr_multi_scales=(1,),
        multi_spectral_window_powers_of_two=(6,), multi_spectral_n_ffts=64,
        multi_spectral_n_mels=8, target_sample_hz=24_000,
    )  # fmt: skip
    for name, buffer in codec.named_buffers():  # empty codebooks decode all codes alike
        if name.endswith("_codebook.embed"):
            buffer.normal_()
        elif name.endswith("initted"):
            buffer.fill_(True)
    return codec


def encodec(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    module = sys.modules["audiolm_pytorch.encodec"]
    build = module.EncodecModel.encodec_model_24khz
    untrained = staticmethod(lambda: build(pretrained=False).eval())
    monkeypatch.setattr(module.EncodecModel, "encodec_model_24khz", untrained)
    torch.manual_seed(0)
    codec = upstream.audiolm.EncodecWrapper(bandwidth=3.0)
    for name, buffer in codec.model.named_buffers():
        if name.endswith("_codebook.embed"):
            buffer.normal_()
    return codec.eval()


@pytest.mark.parametrize("kind", ["SoundStream", "EncodecWrapper"])
def test_a_whole_musiclm_over_their_objects(
    kind: str, upstream: Any, hubert: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = soundstream(upstream) if kind == "SoundStream" else encodec(upstream, monkeypatch)
    assert type(codec) is getattr(upstream.audiolm, kind)
    clips = notes(6, 0.2)
    quantizer = quantizer_of_clips().fit(clips, progress=False)
    sizes: dict[str, Any] = dict(dim=32, depth=1, heads=2, dim_head=16, audio_text_condition=True)
    codebook_size = 64 if kind == "SoundStream" else 1024
    codes: dict[str, Any] = dict(codebook_size=codebook_size, num_coarse_quantizers=2)
    semantic = ours.SemanticTransformer(**sizes, num_semantic_tokens=SEMANTIC)
    coarse = ours.CoarseTransformer(**sizes, **codes, num_semantic_tokens=SEMANTIC)
    fine = ours.FineTransformer(**sizes, **codes, num_fine_quantizers=2)
    options: dict[str, Any] = dict(
        num_train_steps=1, batch_size=2, dataset=clips, audio_conditioner=quantizer,
        results_folder=tmp_path / "out", data_sample_hz=16_000, accelerate_kwargs={"cpu": True},
    )  # fmt: skip
    trainers: list[Any] = [
        ours.SemanticTransformerTrainer(hubert, semantic, **options),
        ours.CoarseTransformerTrainer(coarse, codec, hubert, **options),
        ours.FineTransformerTrainer(fine, codec, **options),
    ]
    for trainer in trainers:
        assert trainer.train_step()["loss"] > 0

    semantic.to_logits.bias.data[-1] = -1e9
    coarse.coarse_logit_weights.data[:, -1] = 0.0
    audio_lm = ours.AudioLM(
        wav2vec=hubert, codec=codec, semantic_transformer=semantic, coarse_transformer=coarse,
        fine_transformer=fine,
    )  # fmt: skip
    musiclm = MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=quantizer)
    steps = 0.1 * 24_000 / codec.downsample_factor
    wave = musiclm("a slow waltz", num_samples=2, seconds=0.1, seed=0, progress=False)
    assert wave.shape == (1, round(steps) * codec.downsample_factor)
    assert torch.isfinite(wave).all()
    prime = torch.stack(clips[:1])
    longer = audio_lm(
        text_embeds={s: quantizer(wavs=prime, namespace=s) for s in ("semantic", "coarse", "fine")},
        seconds=0.05, prime_wave=prime, prime_wave_input_sample_hz=16_000, seed=0, progress=False,
    )  # fmt: skip
    assert isinstance(longer, list) or longer.shape[1] > 0.2 * 24_000
