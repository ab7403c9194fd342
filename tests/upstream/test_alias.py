"""Old scripts and the real audiolm-pytorch work with our classes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import musiclm_fast
from tests.upstream import live
from tests.upstream.test_parity_conditioning import trained_pair, waves

OLD_SCRIPT = """
import musiclm_fast; musiclm_fast.install_as_musiclm_pytorch()

import torch
import musiclm_pytorch
from musiclm_pytorch import MuLaN, AudioSpectrogramTransformer, TextTransformer
from musiclm_pytorch import MuLaNEmbedQuantizer, MusicLM, MuLaNTrainer
from musiclm_pytorch import SigmoidContrastiveLearning, SoftmaxContrastiveLearning
from musiclm_pytorch.musiclm_pytorch import MuLaN as MuLaNByItsHome
from musiclm_pytorch.trainer import MuLaNTrainer as TrainerByItsHome
import musiclm_pytorch.trainer

assert musiclm_pytorch.MuLaN is MuLaN is MuLaNByItsHome is musiclm_fast.MuLaN
assert musiclm_pytorch.trainer.MuLaNTrainer is MuLaNTrainer is TrainerByItsHome

audio_transformer = AudioSpectrogramTransformer(
    dim = 32, depth = 2, heads = 2, dim_head = 16,
    spec_n_fft = 128, spec_win_length = 24, spec_aug_stretch_factor = 0.8
)
text_transformer = TextTransformer(dim = 32, depth = 2, heads = 2, dim_head = 16)
mulan = MuLaN(audio_transformer = audio_transformer, text_transformer = text_transformer)

wavs = torch.randn(2, 1024)
texts = torch.randint(0, 20000, (2, 256))
loss = mulan(wavs, texts)
loss.backward()

embeds = mulan.get_audio_latents(wavs)
assert embeds.shape == mulan.get_text_latents(texts).shape == (2, 128)

quantizer = MuLaNEmbedQuantizer(
    mulan = mulan,
    conditioning_dims = (1024, 1024, 1024),
    namespaces = ('semantic', 'coarse', 'fine')
)
conds = quantizer(wavs = wavs, namespace = 'semantic')
assert conds.shape == (2, 8, 1024)
"""


def test_an_old_script_runs_after_one_line():
    live.run_script(OLD_SCRIPT)


def test_the_alias_is_refused_once_the_real_package_is_in_use(upstream: live.Upstream):
    with pytest.raises(RuntimeError, match="already imported"):
        musiclm_fast.install_as_musiclm_pytorch()
    assert sys.modules["musiclm_pytorch"] is upstream.musiclm


def condition(upstream: live.Upstream, stage: str, **arguments: Any) -> nn.Module:
    """One of audiolm's transformers, conditioned on 16 numbers per code."""
    small = dict(dim=16, depth=1, heads=1, has_condition=True, cond_dim=16, cond_drop_prob=0.0)
    return getattr(upstream.audiolm, f"{stage}Transformer")(**small, **arguments)


def test_a_wrapper_trains_with_our_quantizer_as_with_theirs(upstream: live.Upstream):
    pair = trained_pair(conditioning_dims=(16, 16, 16))
    transformer = condition(upstream, "Semantic", num_semantic_tokens=10)
    semantic = torch.randint(0, 10, (4, 12), generator=torch.Generator().manual_seed(0))
    found: list[list[Tensor]] = []
    for quantizer in (pair.ours, pair.upstream):
        wrapper = upstream.audiolm.SemanticTransformerWrapper(
            transformer=transformer, audio_conditioner=quantizer, mask_prob=0.0
        )
        wrapper.eval()
        wrapper.zero_grad()
        quantizer.cond_embeddings.zero_grad()
        loss = wrapper(semantic_token_ids=semantic, raw_wave=waves(4), return_loss=True)
        loss.backward()
        found.append([loss.detach(), quantizer.cond_embeddings["semantic"].grad.clone()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found[0][1].any()


class Waves(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return waves(4)[index]


def test_a_trainer_takes_our_quantizer(
    upstream: live.Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer_module = __import__("audiolm_pytorch.trainer", fromlist=["trainer"])
    # audiolm allows one trainer per process
    monkeypatch.setattr(trainer_module, "ONE_TRAINER_INSTANTIATED", False)

    class Hubert(upstream.audiolm.HubertWithKmeans):
        """Stands for the semantic tokenizer, whose weights are not on this machine."""

        def __init__(self) -> None:
            nn.Module.__init__(self)

        @property
        def codebook_size(self) -> int:
            return 10

        def forward(self, wav: Tensor, **_: Any) -> Tensor:
            return (wav[:, ::100] * 3).long().remainder(10)

    quantizer = trained_pair(conditioning_dims=(16, 16, 16)).ours
    trainer = upstream.audiolm.SemanticTransformerTrainer(
        wav2vec=Hubert(),
        transformer=condition(upstream, "Semantic", num_semantic_tokens=10),
        audio_conditioner=quantizer,
        dataset=Waves(),
        valid_frac=0.0,
        num_train_steps=1,
        batch_size=2,
        results_folder=str(tmp_path),
        force_clear_prev_results=False,
        accelerate_kwargs=dict(cpu=True),
    )
    assert trainer.train_step()["loss"] > 0
    assert quantizer.cond_embeddings["semantic"].grad.any()


def small_audiolm(upstream: live.Upstream) -> nn.Module:
    """A whole AudioLM of random weights that makes 8 frames of 32 samples."""
    codec = upstream.audiolm.SoundStream(
        channels=4,
        strides=(4, 8),
        channel_mults=(1, 2),
        codebook_dim=8,
        codebook_size=64,
        rq_num_quantizers=2,
        use_local_attn=False,
        discr_multi_scales=(1,),
        multi_spectral_window_powers_of_two=(6,),
        multi_spectral_n_ffts=64,
        multi_spectral_n_mels=8,
    )
    codes = dict(codebook_size=64, num_coarse_quantizers=1)
    audio_lm = upstream.audiolm.AudioLM(
        wav2vec=None,
        codec=codec,
        semantic_transformer=condition(upstream, "Semantic", num_semantic_tokens=10),
        coarse_transformer=condition(upstream, "Coarse", num_semantic_tokens=10, **codes),
        fine_transformer=condition(upstream, "Fine", num_fine_quantizers=1, **codes),
    )
    for name, buffer in codec.named_buffers():  # empty codebooks decode all codes alike
        if name.endswith("_codebook.embed"):
            buffer.normal_()
        elif name.endswith("initted"):
            buffer.fill_(True)
    with torch.no_grad():  # a logit of 0 is never among the 10% that are sampled from: no early end
        audio_lm.coarse.transformer.coarse_logit_weights[:, -1] = 0
    audio_lm.coarse.generate = partial(audio_lm.coarse.generate, max_time_steps=8)
    return audio_lm


@pytest.mark.parametrize("num_samples", [1, 3])
def test_musiclm_over_a_real_audiolm(upstream: live.Upstream, num_samples: int):
    pair = trained_pair(num_tokens=49_408, conditioning_dims=(16, 16, 16))
    torch.manual_seed(0)
    audio_lm = small_audiolm(upstream)
    # left to itself ours sends every stage the embeddings of its own namespace
    versions: list[tuple[ModuleType, nn.Module, dict[str, Any]]] = [
        (musiclm_fast, pair.ours, dict(single_namespace=True)),
        (upstream.musiclm, pair.upstream, {}),
        (musiclm_fast, pair.ours, {}),
    ]
    music = []
    for package, quantizer, options in versions:
        musiclm = package.MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=quantizer)
        torch.manual_seed(1)
        music.append(musiclm("a slow waltz", num_samples=num_samples, max_length=6, **options))
    ours, theirs, ours_by_stage = music
    assert ours.shape == ours_by_stage.shape == (1, 256)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, ours_by_stage)
