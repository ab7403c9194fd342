"""MusicLM: text to music through a quantized joint embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from musiclm_fast._checks import check_positive_int, describe, fail
from musiclm_fast._wording import plural
from musiclm_fast.audio.resampling import resample
from musiclm_fast.audiolm.audio_lm import AudioLM
from musiclm_fast.models.quantizer import MuLaNEmbedQuantizer
from musiclm_fast.tokenizer import tokenizer

# An audio tower may refuse a wave of fewer samples as shorter than a patch.
_SHORT = 16_000


class Sample(NamedTuple):
    """A generated wave ``(1, samples)``, None if empty, and its similarity to the text."""

    wave: Tensor | None
    score: float


class MusicLM(nn.Module):
    """Generates music for a text and returns the sample with the highest MuLaN similarity.

    Source: https://arxiv.org/abs/2301.11325.

    Args:
        audio_lm: an AudioLM, of this package or of audiolm-pytorch, without an audio_conditioner.
            It is called as ``audio_lm(text_embeds=..., **kwargs)``.
        mulan_embed_quantizer: the quantizer used in training the stages.

    Raises:
        ValueError: audio_lm already has a conditioner.
    """

    def __init__(self, audio_lm: nn.Module, mulan_embed_quantizer: MuLaNEmbedQuantizer) -> None:
        super().__init__()
        if getattr(audio_lm, "audio_conditioner", None) is not None:
            fail(
                "audio_lm",
                "an AudioLM with its own audio_conditioner",
                "one without: MusicLM embeds the text itself",
            )
        self.mulan_embed_quantizer = mulan_embed_quantizer
        self.audio_lm = audio_lm

    @property
    def device(self) -> torch.device:
        return next(self.mulan_embed_quantizer.parameters()).device

    @overload
    def forward(
        self, text: str, num_samples: int = 1, *, return_all: Literal[True], **kwargs: Any
    ) -> list[Sample]: ...

    @overload
    def forward(self, text: str, num_samples: int = 1, **kwargs: Any) -> Any: ...

    @torch.no_grad()
    def forward(
        self,
        text: str,
        num_samples: int = 1,
        *,
        return_all: bool = False,
        single_namespace: bool = False,
        **audio_lm_kwargs: Any,
    ) -> Any:
        """Generate music.

        Args:
            text: description of the music.
            num_samples: number of samples, generated in one batch; the best one is returned.
            return_all: return all samples with their scores, best first.
            single_namespace: condition every stage on the default namespace and generate the
                samples one by one, as upstream does. This is wrong for stages that were trained on
                their own namespaces.
            **audio_lm_kwargs: arguments of the AudioLM: ``seconds``, ``sampling``, ``seed`` for
                this package's, ``max_length`` for any.

        Returns:
            ``(1, samples)`` at the codec's rate, None if it is empty; with ``return_all`` a list of
            :class:`Sample`. One sample of an audio_lm of another kind is returned unchanged.

        Raises:
            ValueError, TypeError: the text is empty or too long, num_samples is 0, the quantizer is
                not fitted, or the stages were trained with another MuLaN.
        """
        check_positive_int("num_samples", num_samples)
        stages = stages_of(self.audio_lm)
        latent = self._text_latent(text, stages)
        if num_samples > 1 or return_all:
            self._check_rates(stages)
        if not stages or single_namespace:
            text_embeds = self.mulan_embed_quantizer.embed_latents(latent)
            samples = [
                self.audio_lm(text_embeds=text_embeds, **audio_lm_kwargs)
                for _ in range(num_samples)
            ]
            if num_samples == 1 and not return_all:
                return samples[0]
            waves: list[Tensor | None] = [_as_batch(music) for music in samples]
        else:
            samples = None
            waves = self._generate(stages, latent, num_samples, audio_lm_kwargs)
        if num_samples == 1 and not return_all:
            return waves[0]
        scores = self._scores(waves, latent)
        if return_all:
            order = scores.argsort(descending=True, stable=True).tolist()
            return [Sample(waves[i], float(scores[i])) for i in order]
        best = int(scores.argmax())
        return waves[best] if samples is None else samples[best]

    @torch.no_grad()
    def stream_to_file(
        self, text: str, path: str | Path, *, seconds: float, **kwargs: Any
    ) -> float:
        """Generate a long piece in windows and write each to a sound file at once.

        Args:
            text: description of the music.
            path: the file.
            seconds: length of the piece.
            **kwargs: see :meth:`musiclm_fast.audiolm.AudioLM.stream`: ``window_seconds``,
                ``prime_seconds``, ``sampling``, ``seed``.

        Returns:
            The seconds written, fewer than requested if the model ends the piece.

        Raises:
            ValueError, TypeError: as in a call; no file is written.
        """
        if not isinstance(self.audio_lm, AudioLM):
            fail("audio_lm", f"a {type(self.audio_lm).__module__} object",
                 "musiclm_fast.audiolm.AudioLM, which can continue a prompt")  # fmt: skip
        stages = stages_of(self.audio_lm)
        embeds = self._embeds(stages, self._text_latent(text, stages), 1)
        given: Any = {"text_embeds": embeds} if embeds else {}
        return self.audio_lm.stream_to_file(path, seconds=seconds, **given, **kwargs)

    def _text_latent(self, text: str, stages: dict[str, Any]) -> Tensor:
        # MuLaN's latent of the text (1, dim_latent), after all checks; also sets eval mode.
        if not isinstance(text, str):
            fail("text", describe(text), "a string", TypeError)
        if not text.strip():
            fail("text", repr(text), "a text that says something")
        if stages:
            self._check_stages(stages)
        self.eval()
        mulan = self.mulan_embed_quantizer.mulan
        length = getattr(getattr(mulan, "text", None), "max_seq_len", None)
        if length is None:
            return mulan.get_text_latents(raw_texts=[text])
        ids = tokenizer.encode(text)
        if not ids:
            fail("text", repr(text), "a text that says something")
        if len(ids) > length:
            fail("text", f"one of {plural(len(ids), 'token')}", f"at most MuLaN's {length}")
        return mulan.get_text_latents(torch.tensor([ids], device=self.device))

    def _check_stages(self, stages: dict[str, Any]) -> None:
        quantizer = self.mulan_embed_quantizer
        if not quantizer.fitted:
            fail("mulan_embed_quantizer", "one that is not fitted", "fit() or its checkpoint first")
        own = None
        for name, stage in stages.items():
            if not stage.transformer.has_condition:
                continue
            width = quantizer.conditioning_dims[quantizer.namespaces.index(self._namespace(name))]
            wanted = getattr(stage.transformer, "cond_dim", width)
            if wanted != width:
                fail("audio_lm", f"a {name} stage for a condition of {wanted}",
                     f"the quantizer's width {width}")  # fmt: skip
            trained_with = getattr(stage.transformer, "conditioner_fingerprint", None)
            own = own or (quantizer.fingerprint() if trained_with else None)
            if trained_with not in (None, own):
                fail("audio_lm", f"a {name} stage trained with MuLaN and codebooks {trained_with}",
                     f"one trained with these, {own}")  # fmt: skip

    def _check_rates(self, stages: dict[str, Any]) -> None:
        # MuLaN scores the waves, which may need resampling to its rate.
        codec = getattr(stages.get("fine"), "codec", None)
        rate = self.mulan_embed_quantizer.sample_hz
        if codec is not None and rate and getattr(codec, "target_sample_hz", None) is None:
            fail("audio_lm", f"a {type(codec).__name__} without target_sample_hz",
                 f"a codec that says its rate: MuLaN's is {rate} Hz")  # fmt: skip

    def _namespace(self, stage: str) -> str:
        quantizer = self.mulan_embed_quantizer
        default: str = quantizer._default_namespace
        return stage if stage in quantizer.namespaces else default

    def _embeds(self, stages: dict[str, Any], latent: Tensor, count: int) -> dict[str, Tensor]:
        # The condition (count, quantizers, dim) of each conditioned stage, in its own namespace.
        embed = self.mulan_embed_quantizer.embed_latents
        return {
            name: embed(latent, self._namespace(name)).expand(count, -1, -1)
            for name, stage in stages.items()
            if stage.transformer.has_condition
        }

    def _generate(
        self, stages: dict[str, Any], latent: Tensor, count: int, kwargs: dict[str, Any]
    ) -> list[Tensor | None]:
        # One wave (1, samples) per sample, None if empty
        embeds = self._embeds(stages, latent, count)
        if isinstance(self.audio_lm, AudioLM):
            given: Any = {"text_embeds": embeds} if embeds else {}
            music = self.audio_lm(batch_size=count, **given, **kwargs)
        else:
            music = _run_stages(stages, embeds, count, **kwargs)
        return [None if wave is None else wave.reshape(1, -1) for wave in music]

    def _scores(self, waves: list[Tensor | None], latent: Tensor) -> Tensor:
        # Cosine similarity of each sample and the text. Empty samples rank last.
        quantizer = self.mulan_embed_quantizer
        codec = getattr(stages_of(self.audio_lm).get("fine"), "codec", None)
        rate = getattr(codec, "target_sample_hz", None)
        scores = []
        for wave in waves:
            if wave is None or wave.numel() == 0:
                scores.append(latent.new_tensor(-torch.inf))
                continue
            if quantizer.sample_hz is not None:
                wave = resample(wave, rate, quantizer.sample_hz)
            try:
                scores.append((quantizer.mulan.get_audio_latents(wave) * latent).sum())
            except ValueError:
                if wave.shape[-1] >= _SHORT:
                    raise
                scores.append(latent.new_tensor(-torch.inf))  # too short for the audio tower
        return torch.stack(scores)


def stages_of(audio_lm: nn.Module) -> dict[str, Any]:
    """The wrappers of an AudioLM's stages by name; empty for any other module."""
    names = ("semantic", "coarse", "fine")
    stages = {name: getattr(audio_lm, name, None) for name in names}
    whole = all(hasattr(stage, "transformer") for stage in stages.values())
    return stages if whole else {}


def _run_stages(
    stages: dict[str, Any],
    embeds: dict[str, Tensor],
    count: int,
    *,
    max_length: int = 2048,
    return_coarse_generated_wave: bool = False,
    mask_out_generated_fine_tokens: bool = False,
    **prime: Any,
) -> Any:
    # Upstream's AudioLM takes one embedding for all stages, so its stages are called one by one.
    semantic = stages["semantic"].generate(
        text_embeds=embeds.get("semantic"), batch_size=count, max_length=max_length, **prime
    )
    coarse = stages["coarse"].generate(
        text_embeds=embeds.get("coarse"), semantic_token_ids=semantic,
        reconstruct_wave=return_coarse_generated_wave, **prime,
    )  # fmt: skip
    if return_coarse_generated_wave:
        return coarse
    return stages["fine"].generate(
        text_embeds=embeds.get("fine"), coarse_token_ids=coarse, reconstruct_wave=True,
        mask_out_generated_fine_tokens=mask_out_generated_fine_tokens, **prime,
    )  # fmt: skip


def _as_batch(music: Tensor | list[Tensor]) -> Tensor:
    # An AudioLM returns (1, n), (1, 1, n) or a list of one wave per row.
    wave = music[0] if isinstance(music, (list, tuple)) else music
    return wave.reshape(1, -1)
