"""The coarse stage with tokenizer, codec and conditioner: loss and sampling from sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_positive_int, fail
from musiclm_fast.audiolm.coarse import CoarseTransformer
from musiclm_fast.audiolm.generation import Prompt, generate_tokens
from musiclm_fast.audiolm.sampling import Sampling, append_id, unique_consecutive
from musiclm_fast.audiolm.wrappers.base import Wrapper, check_codebook, check_rates, inference
from musiclm_fast.audiolm.wrappers.decoding import decode_rows


class CoarseTransformerWrapper(Wrapper):
    """Trains and samples a :class:`CoarseTransformer`, with upstream's arguments.

    Args:
        transformer: the stage.
        codec: codec of the acoustic tokens; needed to read and decode waves.
        wav2vec: semantic tokenizer; needed to read waves.
        audio_conditioner: embeds the clips.
        pad_id: id of padding.
        unique_consecutive: remove consecutive repeats of semantic tokens.
        semantic_cross_entropy_loss_weight: weight of the semantic tokens in the loss.
        mask_prob: share of keys hidden in training (forgetful causal mask).
    """

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
        check_codebook(wav2vec, transformer, "num_semantic_tokens")
        check_codebook(codec, transformer, "codebook_size")
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
        as_upstream: bool = False,
    ) -> Any:
        """Generate coarse tokens.

        Args:
            semantic_token_ids: ``(B, n)``, -1 is padding.
            prime_wave: ``(B, samples)``, the audio prompt to continue.
            prime_wave_input_sample_hz: rate of prime_wave; None is the codec's.
            prime_coarse_token_ids: ``(B, n)`` tokens in place of prime_wave.
            text, text_embeds: the condition.
            max_time_steps: maximum number of codec frames, without the prompt's.
            cond_scale, filter_thres, temperature: see
                :class:`musiclm_fast.audiolm.sampling.Sampling`.
            reconstruct_wave: return waves.
            use_kv_cache: ignored; the cache does not change the result.
            seed: of the noise; None draws from the default generator.
            progress: show a progress bar.
            as_upstream: do as upstream: attend to the padding of the semantic tokens, which is
                masked in training, and return all time steps.

        Returns:
            ``(B, steps, quantizers)``, -1 from the end on. With reconstruct_wave
            ``(B, samples)``, or if lengths differ a list of one wave per row, None for an empty
            row.
        """
        check_positive_int("max_time_steps", max_time_steps)
        sampling = Sampling(temperature, filter_thres, cond_scale)
        semantic = semantic_token_ids.to(self.device).flatten(1)
        batch = semantic.shape[0]
        prime = self._acoustic_prime(
            prime_wave, prime_wave_input_sample_hz, prime_coarse_token_ids, batch,
            slice(None, self.num_coarse_quantizers), "prime_coarse_token_ids",
        )  # fmt: skip
        condition = self._prompt_condition(
            batch, text, text_embeds, prime_wave, prime_wave_input_sample_hz, cond_scale
        )
        if self.unique_consecutive:
            semantic = unique_consecutive(semantic, self.pad_id)
        stage = self.transformer
        tokens = torch.cat((stage.embed_semantic(semantic), stage.embed_coarse(prime)), dim=1)
        seen = (semantic != self.pad_id) & (semantic != self.semantic_eos_id)
        mask = None
        if not as_upstream and not bool(seen.all()):
            mask = F.pad(seen, (1, 1 + prime.shape[1]), value=True)
        steps = max_time_steps * self.num_coarse_quantizers
        first = prime.shape[1]

        def banned(step: int) -> int | None:
            # The end token may only follow a whole time step.
            at_end = step % self.num_coarse_quantizers == 0 and step > 0
            return None if at_end else self.coarse_eos_id

        written = generate_tokens(
            stage,
            Prompt(
                tokens, mask, *condition, index=first,
                positions=stage.positions(semantic.shape[1] + 1, first + steps, condition[0]),
            ),
            steps,
            sampling=sampling,
            end_id=self.coarse_eos_id,
            banned=banned,
            seed=seed,
            progress=progress,
        )  # fmt: skip
        written = written.masked_fill(written == self.coarse_eos_id, -1)
        # Drop an unfinished time step: the one in which the last row drew its end token.
        whole = written.shape[1] // self.num_coarse_quantizers * self.num_coarse_quantizers
        written = written[:, :whole]
        if as_upstream:
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
            raw_wave_for_codec: the same wave at the codec's rate; default raw_wave.
            text, text_embeds: the condition, without an audio_conditioner.
            coarse_token_ids: ``(B, steps, quantizers)``, in place of a wave.
            return_loss: return the mean cross entropy in place of the logits.
            input_sample_hz: rate of raw_wave, to resample it for tokenizer, codec and conditioner.

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
                check_rates(self.wav2vec, self.codec)
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
        forgetful = self._forgetful_mask(*mask.shape)
        mask = mask if forgetful is None else mask & forgetful
        semantic_logits, coarse_logits = self.transformer(
            semantic_token_ids=semantic, coarse_token_ids=coarse, self_attn_mask=mask, text=text,
            text_embeds=text_embeds, **kwargs,
        )  # fmt: skip
        if not return_loss:
            return semantic_logits, coarse_logits
        # Upstream counts tokens with unique_consecutive, and time steps without.
        coarse_count: Any = coarse_labels.numel()
        semantic_count: Any = (semantic_labels != self.pad_id).sum()
        if not self.unique_consecutive:
            coarse_count = coarse_logits.shape[1]
            semantic_count = 0 if semantic_logits is None else semantic_logits.shape[1]
        weight = self.semantic_cross_entropy_loss_weight
        return self._loss(
            (coarse_logits, coarse_labels, coarse_count, 1.0),
            (semantic_logits, semantic_labels, semantic_count, weight),
        )
