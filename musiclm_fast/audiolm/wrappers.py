"""Training losses and generation of the three stages, from audio or from tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_positive_int, describe, fail
from musiclm_fast.audiolm.coarse import CoarseTransformer
from musiclm_fast.audiolm.fine import FineTransformer
from musiclm_fast.audiolm.generation import Prompt, generate_tokens, make_generator
from musiclm_fast.audiolm.sampling import (
    Sampling,
    align_right,
    append_id,
    forgetful_mask,
    unique_consecutive,
)
from musiclm_fast.audiolm.semantic import SemanticTransformer
from musiclm_fast.audiolm.stage import Stage, twice
from musiclm_fast.models.resample import resample

_Function = TypeVar("_Function", bound=Callable[..., Any])


def inference(method: _Function) -> _Function:
    """A method that runs in eval mode and without gradients, and leaves the mode as it was."""

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                return method(self, *args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training

    run.__doc__ = method.__doc__
    return run  # type: ignore[return-value]


class _Wrapper(nn.Module):
    # What the three wrappers share: tokenizers, conditioner, rates.

    namespace: str
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
    def device(self) -> torch.device:
        """Where the transformer lies."""
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
        # The joint embedding of the clips themselves, in this stage's namespace.
        assert self.audio_conditioner is not None
        if wave is None:
            fail("raw_wave", None, "clips, which the audio_conditioner embeds")
        if text is not None or text_embeds is not None:
            fail("text, text_embeds", "given", "neither beside an audio_conditioner")
        rate = getattr(self.audio_conditioner, "sample_hz", None)
        if input_sample_hz is None and rate is not None:
            # by contract the rate of the tokenizer that reads the same wave
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


def _check_rates(first: Any, second: Any) -> None:
    rates = [getattr(part, "target_sample_hz", None) for part in (first, second)]
    if None not in rates and rates[0] != rates[1]:
        fail(
            "raw_wave",
            f"one wave for a tokenizer of {rates[0]} Hz and a codec of {rates[1]} Hz",
            "raw_wave_for_codec too, or input_sample_hz, by which the wave is resampled for both",
        )


def _weighted(losses: list[tuple[Tensor, Any, float]]) -> Tensor:
    # (loss, tokens, weight) -> the mean over all tokens, weights in the numerator only
    total = sum(loss * count * weight for loss, count, weight in losses)
    return total / sum(count for _, count, _ in losses)  # type: ignore[operator, return-value]


class SemanticTransformerWrapper(_Wrapper):
    """Trains and samples a :class:`SemanticTransformer`; arguments of audiolm-pytorch.

    Args:
        transformer: the stage.
        wav2vec: semantic tokenizer; needed to read waves.
        audio_conditioner: embeds the clips, see
            :class:`musiclm_fast.models.quantizer.MuLaNEmbedQuantizer`.
        pad_id: of ids.
        unique_consecutive: leave out repeats of the token before.
        mask_prob: share of keys hidden in training (forgetful causal mask).
    """

    namespace = "semantic"
    transformer: SemanticTransformer

    def __init__(
        self,
        *,
        transformer: SemanticTransformer,
        wav2vec: nn.Module | None = None,
        audio_conditioner: nn.Module | None = None,
        pad_id: int = -1,
        unique_consecutive: bool = True,
        mask_prob: float = 0.15,
    ) -> None:
        super().__init__(transformer, wav2vec, None, audio_conditioner, pad_id, mask_prob)
        _check_semantic_sizes(wav2vec, transformer)
        self.unique_consecutive = unique_consecutive
        self.eos_id = transformer.eos_id

    @inference
    def generate(
        self,
        *,
        max_length: int,
        text: list[str] | None = None,
        text_embeds: Tensor | None = None,
        prime_wave: Tensor | None = None,
        prime_wave_input_sample_hz: int | None = None,
        prime_ids: Tensor | None = None,
        batch_size: int = 1,
        cond_scale: float = 3.0,
        filter_thres: float = 0.9,
        temperature: float = 1.0,
        use_kv_cache: bool = True,
        include_eos_in_output: bool = True,
        seed: int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Draw semantic tokens.

        Args:
            max_length: tokens at most, the prime's included.
            text: texts, one per row or one for all.
            text_embeds: ``(B or 1, c, cond_dim)``, the condition.
            prime_wave: ``(B, samples)``, what the tokens go on from.
            prime_wave_input_sample_hz: rate of prime_wave; None is the tokenizer's.
            prime_ids: ``(B, n)`` tokens in place of prime_wave; -1 is padding at the end.
            batch_size: rows, where nothing is primed.
            cond_scale, filter_thres, temperature: see
                :class:`musiclm_fast.audiolm.sampling.Sampling`.
            use_kv_cache, include_eos_in_output: ignored: the cache changes no result, and
                audiolm-pytorch ignores the latter.
            seed: of the noise; None draws from the default generator.
            progress: show a bar.

        Returns:
            ``(B, n)`` tokens, -1 from the end token on.
        """
        check_positive_int("max_length", max_length)
        check_positive_int("batch_size", batch_size)
        sampling = Sampling(temperature, filter_thres, cond_scale)
        if prime_wave is not None and prime_ids is not None:
            fail("prime_ids", "given", "None beside prime_wave")
        if prime_wave is not None:
            ids = self._semantic_ids(prime_wave.to(self.device), prime_wave_input_sample_hz)
        elif prime_ids is not None:
            ids = prime_ids.to(self.device)
        else:
            ids = torch.empty(batch_size, 0, dtype=torch.long, device=self.device)
        if self.unique_consecutive and ids.shape[1]:
            ids = unique_consecutive(ids, self.pad_id)
        batch, primed = ids.shape
        if primed >= max_length:
            fail("max_length", max_length, f"more than the prime's {primed} tokens")
        context, context_mask, halves = self._prompt_condition(
            batch, text, text_embeds, prime_wave, prime_wave_input_sample_hz, cond_scale
        )
        stage = self.transformer
        moved, lengths = align_right(ids, self.pad_id)
        # Positions are relative, so a shorter row's prime may as well stand at the right.
        seen = torch.arange(1 + primed, device=ids.device) >= primed - lengths[:, None]
        tokens = stage.embed(F.pad(moved, (1, 0)))
        at_start = torch.arange(1 + primed, device=ids.device) == primed - lengths[:, None]
        tokens = torch.where(at_start[..., None], stage.start_token, tokens)
        ragged = not bool(seen.all())
        steps = max_length - primed
        written = generate_tokens(
            stage,
            Prompt(
                twice(tokens, halves), twice(seen, halves) if ragged else None, context,
                context_mask, halves, stage.positions(primed + steps, context),
            ),
            steps,
            sampling=sampling,
            logits=lambda hidden, step: stage.to_logits(hidden),
            embed=lambda drawn, step: stage.semantic_embedding(drawn),
            end_id=self.eos_id,
            generator=make_generator(seed, ids.device),
            description="generating semantic",
            progress=progress,
        )  # fmt: skip
        written = written.masked_fill(written == self.eos_id, -1)
        if not ragged:
            return torch.cat((ids, written), dim=1)
        rows = [
            torch.cat((row[:length], new))
            for row, length, new in zip(ids, lengths.tolist(), written, strict=True)
        ]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def forward(
        self,
        *,
        semantic_token_ids: Tensor | None = None,
        raw_wave: Tensor | None = None,
        text: list[str] | None = None,
        text_embeds: Tensor | None = None,
        return_loss: bool = False,
        input_sample_hz: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Logits or loss of tokens or of clips.

        Args:
            semantic_token_ids: ``(B, n)``, -1 is padding.
            raw_wave: ``(B, samples)``, in place of the ids.
            text, text_embeds: the condition, where there is no audio_conditioner.
            return_loss: the mean cross entropy, in place of the logits.
            input_sample_hz: rate of raw_wave; None is the tokenizer's.

        Returns:
            A scalar, or ``(B, 1 + n, num_semantic_tokens + 1)``.
        """
        if raw_wave is None and semantic_token_ids is None:
            fail("raw_wave, semantic_token_ids", "neither", "one of them")
        if self.audio_conditioner is not None:
            text_embeds = self._conditioning(raw_wave, input_sample_hz, text, text_embeds)
        if semantic_token_ids is None:
            assert raw_wave is not None
            semantic_token_ids = self._semantic_ids(raw_wave, input_sample_hz)
        ids = semantic_token_ids.flatten(1)
        if self.training:
            ids = append_id(ids, self.eos_id)
        if self.unique_consecutive:
            ids = unique_consecutive(ids, self.pad_id)
        labels, ids = ids, ids[:, :-1] if return_loss else ids
        mask = None
        if self.mask_prob > 0 and self.training:
            mask = forgetful_mask((ids.shape[0], ids.shape[1]), self.mask_prob, ids.device)
        logits = self.transformer(
            ids=ids, text=text, text_embeds=text_embeds, self_attn_mask=mask, **kwargs
        )
        if not return_loss:
            return logits
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=self.pad_id)


def _check_semantic_sizes(wav2vec: Any, transformer: Any) -> None:
    size = getattr(wav2vec, "codebook_size", None)
    if size is not None and size != transformer.num_semantic_tokens:
        fail(
            "transformer",
            f"num_semantic_tokens={transformer.num_semantic_tokens}",
            f"the semantic tokenizer's codebook_size {size}",
        )


class CoarseTransformerWrapper(_Wrapper):
    """Trains and samples a :class:`CoarseTransformer`; arguments of audiolm-pytorch.

    Args:
        transformer: the stage.
        codec: codec of the acoustic tokens; needed to read waves and to make them.
        wav2vec: semantic tokenizer; needed to read waves.
        audio_conditioner: embeds the clips.
        pad_id: of ids.
        unique_consecutive: leave out repeats among the semantic tokens.
        semantic_cross_entropy_loss_weight: weight of the semantic tokens in the loss.
        mask_prob: share of keys hidden in training (forgetful causal mask).
    """

    namespace = "coarse"
    transformer: CoarseTransformer

    def __init__(
        self,
        *,
        transformer: CoarseTransformer,
        codec: nn.Module | None = None,
        wav2vec: nn.Module | None = None,
        audio_conditioner: nn.Module | None = None,
        pad_id: int = -1,
        unique_consecutive: bool = True,
        semantic_cross_entropy_loss_weight: float = 1.0,
        mask_prob: float = 0.15,
    ) -> None:
        super().__init__(transformer, wav2vec, codec, audio_conditioner, pad_id, mask_prob)
        _check_semantic_sizes(wav2vec, transformer)
        _check_codebook(codec, transformer)
        self.unique_consecutive = unique_consecutive
        self.semantic_cross_entropy_loss_weight = semantic_cross_entropy_loss_weight
        groups = getattr(codec, "rq_groups", 1)
        self.num_coarse_quantizers = transformer.num_coarse_quantizers * groups
        self.semantic_eos_id = transformer.semantic_eos_id
        self.coarse_eos_id = transformer.coarse_eos_id

    @inference
    def generate(
        self,
        *,
        semantic_token_ids: Tensor,
        prime_wave: Tensor | None = None,
        prime_wave_input_sample_hz: int | None = None,
        prime_coarse_token_ids: Tensor | None = None,
        text: list[str] | None = None,
        text_embeds: Tensor | None = None,
        max_time_steps: int = 512,
        cond_scale: float = 3.0,
        filter_thres: float = 0.9,
        temperature: float = 1.0,
        reconstruct_wave: bool = False,
        use_kv_cache: bool = True,
        seed: int | None = None,
        progress: bool = True,
        as_reference: bool = False,
    ) -> Any:
        """Draw coarse tokens.

        Args:
            semantic_token_ids: ``(B, n)``, -1 is padding.
            prime_wave: ``(B, samples)``, what the tokens go on from.
            prime_wave_input_sample_hz: rate of prime_wave; None is the codec's.
            prime_coarse_token_ids: ``(B, n)`` tokens in place of prime_wave.
            text, text_embeds: the condition.
            max_time_steps: codec frames to draw at most, the prime's excluded.
            cond_scale, filter_thres, temperature: see
                :class:`musiclm_fast.audiolm.sampling.Sampling`.
            reconstruct_wave: return waves.
            use_kv_cache: ignored: the cache changes no result.
            seed: of the noise; None draws from the default generator.
            progress: show a bar.
            as_reference: attend to the padding of the semantic tokens, which training hides, and
                return all time steps, as audiolm-pytorch does.

        Returns:
            ``(B, steps, quantizers)``, -1 from the end on; with reconstruct_wave ``(B, samples)``,
            or a list of one wave per row (None for an empty one) where their lengths differ.
        """
        check_positive_int("max_time_steps", max_time_steps)
        sampling = Sampling(temperature, filter_thres, cond_scale)
        semantic = semantic_token_ids.to(self.device).flatten(1)
        batch = semantic.shape[0]
        prime = prime_ids(
            self, prime_wave, prime_wave_input_sample_hz, prime_coarse_token_ids, batch,
            slice(None, self.num_coarse_quantizers), "prime_coarse_token_ids",
        )  # fmt: skip
        context, context_mask, halves = self._prompt_condition(
            batch, text, text_embeds, prime_wave, prime_wave_input_sample_hz, cond_scale
        )
        if self.unique_consecutive:
            semantic = unique_consecutive(semantic, self.pad_id)
        stage = self.transformer
        quantizers = stage.num_coarse_quantizers
        tokens = torch.cat((stage.embed_semantic(semantic), stage.embed_coarse(prime)), dim=1)
        seen = (semantic != self.pad_id) & (semantic != self.semantic_eos_id)
        mask = None
        if not as_reference and not bool(seen.all()):
            mask = twice(F.pad(seen, (1, 1 + prime.shape[1]), value=True), halves)
        steps = max_time_steps * self.num_coarse_quantizers
        first = prime.shape[1]
        weights, embeds = stage.coarse_logit_weights, stage.coarse_embedding

        def embed(drawn: Tensor, step: int) -> Tensor:
            quantizer = (first + step) % quantizers
            embedded: Tensor = embeds(drawn + quantizer * stage.codebook_size)
            return embedded + stage.coarse_quantize_embedding.weight[quantizer]

        def banned(step: int) -> int | None:
            # The end may come between time steps alone, and not before the first.
            at_end = step % self.num_coarse_quantizers == 0 and step > 0
            return None if at_end else self.coarse_eos_id

        written = generate_tokens(
            stage,
            Prompt(
                twice(tokens, halves), mask, context, context_mask, halves,
                stage.positions(semantic.shape[1] + 1, first + steps, context),
            ),
            steps,
            sampling=sampling,
            logits=lambda hidden, step: F.linear(hidden, weights[(first + step) % quantizers]),
            embed=embed,
            end_id=self.coarse_eos_id,
            banned=banned,
            generator=make_generator(seed, semantic.device),
            description="generating coarse",
            progress=progress,
        )  # fmt: skip
        written = written.masked_fill(written == self.coarse_eos_id, -1)
        # Leave the column out in which the last row drew its end.
        whole = written.shape[1] // self.num_coarse_quantizers * self.num_coarse_quantizers
        written = written[:, :whole]
        if as_reference:
            written = F.pad(written, (0, steps - whole), value=-1)
        ids = torch.cat((prime, written), dim=1).unflatten(1, (-1, self.num_coarse_quantizers))
        if not reconstruct_wave:
            return ids
        return decode_rows(self.codec, ids, (ids == -1).any(dim=-1))

    def forward(
        self,
        *,
        semantic_token_ids: Tensor | None = None,
        raw_wave: Tensor | None = None,
        raw_wave_for_codec: Tensor | None = None,
        text: list[str] | None = None,
        text_embeds: Tensor | None = None,
        coarse_token_ids: Tensor | None = None,
        return_loss: bool = False,
        input_sample_hz: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits or loss of tokens or of clips.

        Args:
            semantic_token_ids: ``(B, n)``, -1 is padding.
            raw_wave: ``(B, samples)`` at the semantic tokenizer's rate.
            raw_wave_for_codec: the same at the codec's rate; default raw_wave.
            text, text_embeds: the condition, where there is no audio_conditioner.
            coarse_token_ids: ``(B, steps, quantizers)``, in place of a wave.
            return_loss: the mean cross entropy, in place of the logits.
            input_sample_hz: rate of raw_wave, which is then resampled for everyone.

        Returns:
            A scalar, or semantic and coarse logits.
        """
        if raw_wave is None and semantic_token_ids is None:
            fail("raw_wave, semantic_token_ids", "neither", "one of them")
        if raw_wave_for_codec is None and raw_wave is None and coarse_token_ids is None:
            fail("raw_wave, coarse_token_ids", "neither", "one of them")
        given = (raw_wave, semantic_token_ids, coarse_token_ids)
        if all(value is not None for value in given):
            fail("raw_wave", "given", "None beside semantic_token_ids and coarse_token_ids")
        if self.audio_conditioner is not None:
            text_embeds = self._conditioning(raw_wave, input_sample_hz, text, text_embeds)
        codec_hz = input_sample_hz
        if raw_wave_for_codec is not None:
            codec_hz = None
        else:
            raw_wave_for_codec = raw_wave
        if semantic_token_ids is None:
            assert raw_wave is not None
            if coarse_token_ids is None and raw_wave_for_codec is raw_wave and codec_hz is None:
                _check_rates(self.wav2vec, self.codec)
            semantic_token_ids = self._semantic_ids(raw_wave, input_sample_hz)
        if coarse_token_ids is None:
            assert raw_wave_for_codec is not None
            ids = self._acoustic_ids(raw_wave_for_codec, codec_hz)
            coarse_token_ids = ids[..., : self.num_coarse_quantizers]
        semantic, coarse = semantic_token_ids.flatten(1), coarse_token_ids.flatten(1)
        if self.training:
            semantic = append_id(semantic, self.semantic_eos_id)
            coarse = append_id(coarse, self.coarse_eos_id)
        if self.unique_consecutive:
            semantic = unique_consecutive(semantic, self.pad_id)
        semantic_labels, coarse_labels = semantic, coarse
        if return_loss:
            coarse = coarse[:, :-1]
        seen = (semantic != self.pad_id) & (semantic != self.semantic_eos_id)
        semantic = semantic.masked_fill(~seen, 0)
        mask = F.pad(seen, (1, coarse.shape[1] + 1), value=True)
        if self.mask_prob > 0 and self.training:
            mask = mask & forgetful_mask(
                (mask.shape[0], mask.shape[1]), self.mask_prob, mask.device
            )
        semantic_logits, coarse_logits = self.transformer(
            semantic_token_ids=semantic, coarse_token_ids=coarse, self_attn_mask=mask, text=text,
            text_embeds=text_embeds, **kwargs,
        )  # fmt: skip
        if not return_loss:
            return semantic_logits, coarse_logits
        coarse_loss = F.cross_entropy(
            coarse_logits.transpose(1, 2), coarse_labels, ignore_index=self.pad_id
        )
        # audiolm-pytorch counts tokens with repeats left out, and time steps without.
        coarse_count: Any = coarse_labels.numel()
        semantic_count: Any = (semantic_labels != self.pad_id).sum()
        if not self.unique_consecutive:
            coarse_count = coarse_logits.shape[1]
            semantic_count = 0 if semantic_logits is None else semantic_logits.shape[1]
        losses = [(coarse_loss, coarse_count, 1.0)]
        if self.semantic_cross_entropy_loss_weight > 0 and semantic_logits is not None:
            semantic_loss = F.cross_entropy(
                semantic_logits.transpose(1, 2), semantic_labels, ignore_index=self.pad_id
            )
            losses.append((semantic_loss, semantic_count, self.semantic_cross_entropy_loss_weight))
        return _weighted(losses)


def _check_codebook(codec: Any, transformer: Any) -> None:
    size = getattr(codec, "codebook_size", None)
    if isinstance(size, int) and size != transformer.codebook_size:
        fail("transformer", f"codebook_size={transformer.codebook_size}", f"the codec's, {size}")


def prime_ids(
    wrapper: Any, wave: Tensor | None, hz: int | None, ids: Tensor | None, batch: int,
    quantizers: slice, name: str,
) -> Tensor:  # fmt: skip
    """The prime's acoustic tokens ``(batch, n)``, from a wave, from ids or none."""
    if wave is not None and ids is not None:
        fail(name, "given", "None beside prime_wave")
    if wave is not None:
        ids = wrapper._acoustic_ids(wave.to(wrapper.device), hz)[..., quantizers]
    if ids is None:
        return torch.empty(batch, 0, dtype=torch.long, device=wrapper.device)
    if ids.shape[0] != batch:
        if ids.shape[0] != 1:
            fail(name, describe(ids), f"1 row or {batch}")
        ids = ids.expand(batch, *ids.shape[1:])
    return ids.to(wrapper.device).flatten(1)


def decode_rows(codec: Any, ids: Tensor, padding: Tensor) -> Tensor | list[Tensor | None]:
    """Waves of acoustic tokens.

    Args:
        codec: has ``decode_from_codebook_indices``.
        ids: ``(B, steps, quantizers)``.
        padding: ``(B, steps)`` bool, time steps to leave out.

    Returns:
        ``(B, samples)``, or a list of ``(samples,)`` (None for an empty one) where there is
        padding.
    """
    if codec is None:
        fail("codec", None, "a codec, to make waves")
    if not bool(padding.any()):
        wave: Tensor = codec.decode_from_codebook_indices(ids)
        if wave.shape[0] != ids.shape[0]:
            # audiolm-pytorch's EncodecWrapper adds the rows of a batch up: one by one then
            rows = [codec.decode_from_codebook_indices(row[None]) for row in ids]
            wave = torch.cat(rows)
        return wave.reshape(ids.shape[0], -1)
    waves: list[Tensor | None] = []
    for row, left_out in zip(ids, padding, strict=True):
        row = row[~left_out]
        waves.append(
            codec.decode_from_codebook_indices(row[None]).reshape(-1) if len(row) else None
        )
    return waves


class FineTransformerWrapper(_Wrapper):
    """Trains and samples a :class:`FineTransformer`; arguments of audiolm-pytorch.

    Args:
        transformer: the stage.
        codec: codec of the acoustic tokens; needed to read waves and to make them.
        audio_conditioner: embeds the clips.
        coarse_cross_entropy_loss_weight: weight of the coarse tokens in the loss.
        pad_id: of ids.
        mask_prob: share of keys hidden in training (forgetful causal mask).
    """

    namespace = "fine"
    transformer: FineTransformer

    def __init__(
        self,
        *,
        transformer: FineTransformer,
        codec: nn.Module | None = None,
        audio_conditioner: nn.Module | None = None,
        coarse_cross_entropy_loss_weight: float = 1.0,
        pad_id: int = -1,
        mask_prob: float = 0.15,
    ) -> None:
        super().__init__(transformer, None, codec, audio_conditioner, pad_id, mask_prob)
        _check_codebook(codec, transformer)
        groups = getattr(codec, "rq_groups", 1)
        self.num_fine_quantizers = transformer.num_fine_quantizers * groups
        self.num_coarse_quantizers = transformer.num_coarse_quantizers * groups
        total = self.num_fine_quantizers + self.num_coarse_quantizers
        wanted = getattr(codec, "num_quantizers", total // groups) * groups
        if total != wanted:
            fail("transformer", f"{total} coarse and fine quantizers", f"the codec's {wanted}")
        self.eos_id = transformer.eos_id
        self.coarse_cross_entropy_loss_weight = coarse_cross_entropy_loss_weight

    @inference
    def generate(
        self,
        *,
        coarse_token_ids: Tensor,
        prime_wave: Tensor | None = None,
        prime_wave_input_sample_hz: int | None = None,
        prime_fine_token_ids: Tensor | None = None,
        text: list[str] | None = None,
        text_embeds: Tensor | None = None,
        cond_scale: float = 3.0,
        filter_thres: float = 0.9,
        temperature: float = 1.0,
        reconstruct_wave: bool = False,
        use_kv_cache: bool = True,
        mask_out_generated_fine_tokens: bool = False,
        seed: int | None = None,
        progress: bool = True,
        as_reference: bool = False,
    ) -> Any:
        """Draw fine tokens for given coarse ones.

        Args:
            coarse_token_ids: ``(B, steps, quantizers)`` or interleaved, -1 is padding.
            prime_wave: ``(B, samples)``, what the tokens go on from.
            prime_wave_input_sample_hz: rate of prime_wave; None is the codec's.
            prime_fine_token_ids: ``(B, n)`` tokens in place of prime_wave.
            text, text_embeds: the condition.
            cond_scale, filter_thres, temperature: see
                :class:`musiclm_fast.audiolm.sampling.Sampling`.
            reconstruct_wave: return waves of coarse and fine tokens.
            use_kv_cache: ignored: the cache changes no result.
            mask_out_generated_fine_tokens: -1 where all coarse tokens of a time step are padding.
            seed: of the noise; None draws from the default generator.
            progress: show a bar.
            as_reference: never draw the last code but for the first quantizer of each later time
                step (audiolm-pytorch takes it for an end token), and draw tokens for padding.

        Returns:
            ``(B, steps, quantizers)``, -1 for padding; with reconstruct_wave ``(B, samples)``, or
            a list of one wave per row (None for an empty one) where their lengths differ.
        """
        sampling = Sampling(temperature, filter_thres, cond_scale)
        coarse = coarse_token_ids.to(self.device).flatten(1)
        batch, length = coarse.shape
        if length == 0 or length % self.num_coarse_quantizers:
            fail(
                "coarse_token_ids",
                describe(coarse_token_ids),
                f"a multiple of {self.num_coarse_quantizers} tokens per row, above 0",
            )
        prime = prime_ids(
            self, prime_wave, prime_wave_input_sample_hz, prime_fine_token_ids, batch,
            slice(self.num_coarse_quantizers, None), "prime_fine_token_ids",
        )  # fmt: skip
        context, context_mask, halves = self._prompt_condition(
            batch, text, text_embeds, prime_wave, prime_wave_input_sample_hz, cond_scale
        )
        stage = self.transformer
        time_steps = length // self.num_coarse_quantizers
        primed = min(prime.shape[1] // self.num_fine_quantizers, time_steps)
        steps = (time_steps - primed) * self.num_fine_quantizers
        first = primed * self.num_fine_quantizers
        prime = prime[:, :first]
        coarse_tokens, seen = stage.embed_coarse(coarse)
        tokens = torch.cat((coarse_tokens, stage.embed_fine(prime)), dim=1)
        mask = None
        if not bool(seen.all()):
            mask = twice(F.pad(seen, (1, 1 + first), value=True), halves)
        quantizers, weights = stage.num_fine_quantizers, stage.fine_logit_weights
        grouped = coarse.unflatten(1, (-1, self.num_coarse_quantizers))
        padding = (grouped == self.pad_id).all(dim=-1)  # (B, time steps)
        row_steps = None
        if not as_reference and bool(padding.any()):
            used = (~padding).long() * torch.arange(1, time_steps + 1, device=coarse.device)
            row_steps = (used.amax(dim=1) - primed).clamp_min(0) * self.num_fine_quantizers

        def embed(drawn: Tensor, step: int) -> Tensor:
            quantizer = (first + step) % quantizers
            embedded: Tensor = stage.fine_embedding(drawn + quantizer * stage.codebook_size)
            return embedded + stage.fine_quantize_embedding.weight[quantizer]

        def banned(step: int) -> int | None:
            index = first + step
            free = index % self.num_fine_quantizers == 0 and index > 0
            return stage.codebook_size - 1 if as_reference and not free else None

        written = generate_tokens(
            stage,
            Prompt(
                twice(tokens, halves), mask, context, context_mask, halves,
                stage.positions(length, first + steps, context),
            ),
            steps,
            sampling=sampling,
            logits=lambda hidden, step: F.linear(hidden, weights[(first + step) % quantizers]),
            embed=embed,
            banned=banned,
            row_steps=row_steps,
            generator=make_generator(seed, coarse.device),
            description="generating fine",
            progress=progress,
        )  # fmt: skip
        written = F.pad(written, (0, steps - written.shape[1]), value=self.pad_id)
        fine = torch.cat((prime, written), dim=1).unflatten(1, (-1, self.num_fine_quantizers))
        if mask_out_generated_fine_tokens:
            fine = fine.masked_fill(padding[..., None], self.pad_id)
        if not reconstruct_wave:
            return fine
        both = torch.cat((grouped, fine), dim=-1)
        return decode_rows(self.codec, both, (both == self.pad_id).any(dim=-1))

    def forward(
        self,
        *,
        raw_wave: Tensor | None = None,
        text: list[str] | None = None,
        text_embeds: Tensor | None = None,
        token_ids: Tensor | None = None,
        coarse_token_ids: Tensor | None = None,
        fine_token_ids: Tensor | None = None,
        return_loss: bool = False,
        input_sample_hz: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits or loss of tokens or of clips.

        Args:
            raw_wave: ``(B, samples)``; or
            token_ids: ``(B, steps, quantizers)``; or
            coarse_token_ids, fine_token_ids: the same in two parts.
            text, text_embeds: the condition, where there is no audio_conditioner.
            return_loss: the mean cross entropy, in place of the logits.
            input_sample_hz: rate of raw_wave; None is the codec's.

        Returns:
            A scalar, or coarse and fine logits.
        """
        parts = coarse_token_ids is not None and fine_token_ids is not None
        if sum((raw_wave is not None, token_ids is not None, parts)) != 1:
            fail(
                "raw_wave, token_ids, coarse_token_ids, fine_token_ids",
                "none or several",
                "a wave, or token_ids, or coarse and fine ids",
            )
        if self.audio_conditioner is not None:
            text_embeds = self._conditioning(raw_wave, input_sample_hz, text, text_embeds)
        if raw_wave is not None:
            token_ids = self._acoustic_ids(raw_wave, input_sample_hz)
        if token_ids is not None:
            coarse_token_ids = token_ids[..., : self.num_coarse_quantizers]
            fine_token_ids = token_ids[..., self.num_coarse_quantizers :]
        assert coarse_token_ids is not None and fine_token_ids is not None
        coarse, fine = coarse_token_ids.flatten(1), fine_token_ids.flatten(1)
        coarse_labels, fine_labels = coarse, fine
        if return_loss:
            fine = fine[:, :-1]
        mask = None
        if self.mask_prob > 0 and self.training:
            shape = (coarse.shape[0], coarse.shape[1] + fine.shape[1] + 2)
            mask = forgetful_mask(shape, self.mask_prob, coarse.device)
        coarse_logits, fine_logits = self.transformer(
            coarse_token_ids=coarse, fine_token_ids=fine, self_attn_mask=mask, text=text,
            text_embeds=text_embeds, **kwargs,
        )  # fmt: skip
        if not return_loss:
            return coarse_logits, fine_logits
        fine_loss = F.cross_entropy(
            fine_logits.transpose(1, 2), fine_labels, ignore_index=self.pad_id
        )
        losses: list[tuple[Tensor, Any, float]] = [(fine_loss, fine_logits.shape[1], 1.0)]
        if self.coarse_cross_entropy_loss_weight > 0 and coarse_logits is not None:
            coarse_loss = F.cross_entropy(
                coarse_logits.transpose(1, 2), coarse_labels, ignore_index=self.pad_id
            )
            losses.append(
                (coarse_loss, coarse_logits.shape[1], self.coarse_cross_entropy_loss_weight)
            )
        return _weighted(losses)
