"""The base of the three wrappers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import describe, fail
from musiclm_fast.audio.resampling import resample
from musiclm_fast.audiolm.sampling import forgetful_mask
from musiclm_fast.audiolm.stage import Stage
from musiclm_fast.nn.modes import evaluation_mode

_Function = TypeVar("_Function", bound=Callable[..., Any])


def inference(method: _Function) -> _Function:
    """Run a method in eval mode and without gradients, then restore each module's mode."""

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with evaluation_mode(self), torch.no_grad():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class Wrapper(nn.Module):
    """A stage with its tokenizer, codec and conditioner: reads waves, resampled as needed.

    Args:
        transformer: the stage.
        wav2vec: semantic tokenizer.
        codec: codec of the acoustic tokens.
        audio_conditioner: embeds the clips.
        pad_id: id of padding.
        mask_prob: share of keys hidden in training (forgetful causal mask).
    """

    transformer: Any

    def __init__(
        self,
        transformer: Stage,
        wav2vec: nn.Module | None,
        codec: nn.Module | None,
        audio_conditioner: nn.Module | None,
        pad_id: int,
        mask_prob: float,
    ) -> None:
        super().__init__()
        if audio_conditioner is not None and not transformer.has_condition:
            fail("transformer", "one without condition", "has_condition=True beside a conditioner")
        if not 0 <= mask_prob < 1:
            fail("mask_prob", mask_prob, "a share in [0, 1)")
        self.wav2vec = wav2vec
        self.codec = codec
        self.transformer = transformer
        self.to(transformer.device)
        self.audio_conditioner = audio_conditioner
        self.pad_id = pad_id
        self.mask_prob = mask_prob

    @property
    def namespace(self) -> str:
        """The stage's name, which selects its conditioning embeddings."""
        namespace: str = self.transformer.namespace
        return namespace

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        device: torch.device = self.transformer.device
        return device

    def embed_text(self, text: str | list[str]) -> Tensor:
        """Embed texts with the transformer's T5."""
        embeds: Tensor = self.transformer.embed_text(text, output_device=self.device)
        return embeds

    def _semantic_ids(self, wave: Tensor, input_sample_hz: int | None) -> Tensor:
        if self.wav2vec is None:
            fail("wav2vec", None, "a semantic tokenizer, to read a wave")
        self.wav2vec.eval()
        with torch.no_grad():
            ids = self.wav2vec(
                resample(wave, input_sample_hz, getattr(self.wav2vec, "target_sample_hz", None)),
                flatten=False,
            )
        return ids.flatten(1).clone()

    def _acoustic_ids(self, wave: Tensor, input_sample_hz: int | None) -> Tensor:
        # (B, steps, quantizers)
        if self.codec is None:
            fail("codec", None, "a codec, to read a wave")
        self.codec.eval()
        with torch.no_grad():
            wave = resample(wave, input_sample_hz, getattr(self.codec, "target_sample_hz", None))
            _, ids, _ = self.codec(wave, return_encoded=True)
        if ids.ndim == 4:  # groups of quantizers
            ids = ids.permute(1, 2, 0, 3).flatten(2)
        return ids.clone()

    def _conditioning(
        self, wave: Tensor | None, input_sample_hz: int | None, text: Any, text_embeds: Any
    ) -> Tensor:
        # Conditioning embeddings of the clips in this stage's namespace
        assert self.audio_conditioner is not None
        if wave is None:
            fail("raw_wave", None, "clips, which the audio_conditioner embeds")
        if text is not None or text_embeds is not None:
            fail("text, text_embeds", "given", "neither beside an audio_conditioner")
        rate = getattr(self.audio_conditioner, "sample_hz", None)
        if input_sample_hz is None and rate is not None:
            # None means the rate of the tokenizer that reads the same wave.
            first = self.codec if self.wav2vec is None else self.wav2vec
            input_sample_hz = getattr(first, "target_sample_hz", None)
        wave = resample(wave, input_sample_hz, rate)
        embeds: Tensor = self.audio_conditioner(wavs=wave, namespace=self.namespace)
        return embeds

    def _prompt_condition(
        self, batch: int, text: list[str] | None, text_embeds: Tensor | None,
        prime_wave: Tensor | None, prime_hz: int | None, cond_scale: float,
    ) -> tuple[Tensor | None, Tensor | None, bool]:  # fmt: skip
        if (
            self.audio_conditioner is not None
            and prime_wave is not None
            and text is None
            and text_embeds is None
        ):
            text_embeds = self._conditioning(prime_wave, prime_hz, None, None)
        condition: tuple[Tensor | None, Tensor | None, bool] = self.transformer.guided_condition(
            batch, text, None if text_embeds is None else text_embeds.to(self.device), cond_scale
        )
        return condition

    def _prime_ids(
        self, read: Callable[[Tensor, int | None], Tensor], wave: Tensor | None, hz: int | None,
        ids: Tensor | None, name: str,
    ) -> Tensor | None:  # fmt: skip
        # The tokens of a prompt, from a wave or from ids
        if wave is not None and ids is not None:
            fail(name, "given", "None beside prime_wave")
        if wave is not None:
            ids = read(wave.to(self.device), hz)
        return None if ids is None else ids.to(self.device)

    def _acoustic_prime(
        self, wave: Tensor | None, hz: int | None, ids: Tensor | None, batch: int,
        quantizers: slice, name: str,
    ) -> Tensor:  # fmt: skip
        # The prompt's acoustic tokens (batch, n) of some quantizers, n = 0 without a prompt
        found = self._prime_ids(
            lambda wave, hz: self._acoustic_ids(wave, hz)[..., quantizers], wave, hz, ids, name
        )
        if found is None:
            return torch.empty(batch, 0, dtype=torch.long, device=self.device)
        if found.shape[0] not in (1, batch):
            fail(name, describe(found), f"1 row or {batch}")
        return found.expand(batch, *found.shape[1:]).flatten(1)

    def _forgetful_mask(self, batch: int, length: int) -> Tensor | None:
        if self.mask_prob == 0 or not self.training:
            return None
        return forgetful_mask((batch, length), self.mask_prob, self.device)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=self.pad_id)

    def _loss(self, *parts: tuple[Tensor | None, Tensor, Any, float]) -> Tensor:
        # Mean over the tokens of (logits, labels, tokens, weight), weights in the numerator only.
        # A part without logits or weight is left out.
        kept = [
            (self._cross_entropy(logits, labels), count, weight)
            for logits, labels, count, weight in parts
            if logits is not None and weight > 0
        ]
        total: Any = sum(loss * count * weight for loss, count, weight in kept)
        loss: Tensor = total / sum(count for _, count, _ in kept)
        return loss


def check_codebook(part: Any, transformer: Any, size: str) -> None:
    """Refuse a tokenizer or codec whose codebook size differs from the stage's ``size``."""
    own, wanted = getattr(part, "codebook_size", None), getattr(transformer, size)
    if own is not None and own != wanted:
        fail("transformer", f"{size}={wanted}", f"{type(part).__name__}'s codebook_size {own}")


def check_rates(first: Any, second: Any) -> None:
    """Refuse a tokenizer and a codec of different sample rates."""
    rates = [getattr(part, "target_sample_hz", None) for part in (first, second)]
    if None not in rates and rates[0] != rates[1]:
        fail(
            "raw_wave",
            f"one wave for a tokenizer of {rates[0]} Hz and a codec of {rates[1]} Hz",
            "raw_wave_for_codec too, or input_sample_hz, to resample the wave for both",
        )
