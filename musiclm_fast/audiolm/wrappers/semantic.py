"""The semantic stage with its tokenizer and conditioner: loss and sampling from sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_positive_int, fail
from musiclm_fast._wording import plural
from musiclm_fast.audiolm.generation import Prompt, generate_tokens
from musiclm_fast.audiolm.sampling import (
    Sampling,
    align_right,
    append_id,
    unique_consecutive,
)
from musiclm_fast.audiolm.semantic import SemanticTransformer
from musiclm_fast.audiolm.wrappers.base import Wrapper, check_codebook, inference


class SemanticTransformerWrapper(Wrapper):
    """Trains and samples a :class:`SemanticTransformer`, with upstream's arguments.

    Args:
        transformer: the stage.
        wav2vec: semantic tokenizer; needed to read waves.
        audio_conditioner: embeds the clips, see
            :class:`musiclm_fast.models.quantizer.MuLaNEmbedQuantizer`.
        pad_id: id of padding.
        unique_consecutive: remove consecutive repeats.
        mask_prob: share of keys hidden in training (forgetful causal mask).
    """

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
        check_codebook(wav2vec, transformer, "num_semantic_tokens")
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
        """Generate semantic tokens.

        Args:
            max_length: maximum number of tokens, the prompt's included.
            text: texts, one per row or one for all.
            text_embeds: ``(B or 1, c, cond_dim)``, the condition.
            prime_wave: ``(B, samples)``, the audio prompt to continue.
            prime_wave_input_sample_hz: rate of prime_wave; None is the tokenizer's.
            prime_ids: ``(B, n)`` tokens in place of prime_wave, with -1 as padding at the end.
            batch_size: number of rows without a prompt.
            cond_scale, filter_thres, temperature: see
                :class:`musiclm_fast.audiolm.sampling.Sampling`.
            use_kv_cache, include_eos_in_output: ignored; the cache does not change the result,
                and upstream ignores the latter.
            seed: of the noise; None draws from the default generator.
            progress: show a progress bar.

        Returns:
            ``(B, n)`` tokens, -1 from the end token on.
        """
        check_positive_int("max_length", max_length)
        check_positive_int("batch_size", batch_size)
        sampling = Sampling(temperature, filter_thres, cond_scale)
        ids = self._prime_ids(
            self._semantic_ids, prime_wave, prime_wave_input_sample_hz, prime_ids, "prime_ids"
        )
        if ids is None:
            ids = torch.empty(batch_size, 0, dtype=torch.long, device=self.device)
        if self.unique_consecutive and ids.shape[1]:
            ids = unique_consecutive(ids, self.pad_id)
        batch, primed = ids.shape
        if primed >= max_length:
            fail("max_length", max_length, f"more than the prime's {plural(primed, 'token')}")
        condition = self._prompt_condition(
            batch, text, text_embeds, prime_wave, prime_wave_input_sample_hz, cond_scale
        )
        stage = self.transformer
        moved, lengths = align_right(ids, self.pad_id)
        # Positions are relative, so a shorter prompt can be aligned to the right.
        seen = torch.arange(1 + primed, device=ids.device) >= primed - lengths[:, None]
        tokens = stage.embed(F.pad(moved, (1, 0)))
        at_start = torch.arange(1 + primed, device=ids.device) == primed - lengths[:, None]
        tokens = torch.where(at_start[..., None], stage.start_token, tokens)
        ragged = not bool(seen.all())
        steps = max_length - primed
        written = generate_tokens(
            stage,
            Prompt(
                tokens, seen if ragged else None, *condition,
                positions=stage.positions(primed + steps, condition[0]),
            ),
            steps,
            sampling=sampling,
            end_id=self.eos_id,
            seed=seed,
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
            text, text_embeds: the condition, without an audio_conditioner.
            return_loss: return the mean cross entropy in place of the logits.
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
        logits = self.transformer(
            ids=ids, text=text, text_embeds=text_embeds,
            self_attn_mask=self._forgetful_mask(*ids.shape), **kwargs,
        )  # fmt: skip
        return self._cross_entropy(logits, labels) if return_loss else logits
