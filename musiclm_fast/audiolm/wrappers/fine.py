"""The fine stage with its codec and conditioner: loss and sampling from sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import describe, fail
from musiclm_fast._wording import plural
from musiclm_fast.audiolm.fine import FineTransformer
from musiclm_fast.audiolm.generation import Prompt, generate_tokens
from musiclm_fast.audiolm.sampling import Sampling
from musiclm_fast.audiolm.wrappers.base import Wrapper, check_codebook, inference
from musiclm_fast.audiolm.wrappers.decoding import decode_rows


class FineTransformerWrapper(Wrapper):
    """Trains and samples a :class:`FineTransformer`, with upstream's arguments.

    Args:
        transformer: the stage.
        codec: codec of the acoustic tokens; needed to read and decode waves.
        audio_conditioner: embeds the clips.
        coarse_cross_entropy_loss_weight: weight of the coarse tokens in the loss.
        pad_id: id of padding.
        mask_prob: share of keys hidden in training (forgetful causal mask).
    """

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
        check_codebook(codec, transformer, "codebook_size")
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
        as_upstream: bool = False,
    ) -> Any:
        """Generate fine tokens for coarse ones.

        Args:
            coarse_token_ids: ``(B, steps, quantizers)`` or interleaved, -1 is padding.
            prime_wave: ``(B, samples)``, the audio prompt to continue.
            prime_wave_input_sample_hz: rate of prime_wave; None is the codec's.
            prime_fine_token_ids: ``(B, n)`` tokens in place of prime_wave.
            text, text_embeds: the condition.
            cond_scale, filter_thres, temperature: see
                :class:`musiclm_fast.audiolm.sampling.Sampling`.
            reconstruct_wave: return waves of coarse and fine tokens.
            use_kv_cache: ignored; the cache does not change the result.
            mask_out_generated_fine_tokens: set -1 where all coarse tokens of a time step are
                padding.
            seed: of the noise; None draws from the default generator.
            progress: show a progress bar.
            as_upstream: do as upstream: generate tokens for padding too, and allow the last code,
                which upstream mistakes for an end token, only for the first quantizer of a time
                step after the first.

        Returns:
            ``(B, steps, quantizers)``, -1 for padding. With reconstruct_wave ``(B, samples)``, or
            if lengths differ a list of one wave per row, None for an empty row.
        """
        sampling = Sampling(temperature, filter_thres, cond_scale)
        coarse = coarse_token_ids.to(self.device).flatten(1)
        batch, length = coarse.shape
        if length == 0 or length % self.num_coarse_quantizers:
            fail(
                "coarse_token_ids",
                describe(coarse_token_ids),
                f"a multiple of {plural(self.num_coarse_quantizers, 'token')} per row, above 0",
            )
        prime = self._acoustic_prime(
            prime_wave, prime_wave_input_sample_hz, prime_fine_token_ids, batch,
            slice(self.num_coarse_quantizers, None), "prime_fine_token_ids",
        )  # fmt: skip
        condition = self._prompt_condition(
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
            mask = F.pad(seen, (1, 1 + first), value=True)
        grouped = coarse.unflatten(1, (-1, self.num_coarse_quantizers))
        padding = (grouped == self.pad_id).all(dim=-1)  # (B, time steps)
        row_steps = None
        if not as_upstream and bool(padding.any()):
            used = (~padding).long() * torch.arange(1, time_steps + 1, device=coarse.device)
            row_steps = (used.amax(dim=1) - primed).clamp_min(0) * self.num_fine_quantizers

        def banned(step: int) -> int | None:
            index = first + step
            free = index % self.num_fine_quantizers == 0 and index > 0
            return stage.codebook_size - 1 if as_upstream and not free else None

        written = generate_tokens(
            stage,
            Prompt(
                tokens, mask, *condition, index=first,
                positions=stage.positions(length, first + steps, condition[0]),
            ),
            steps,
            sampling=sampling,
            banned=banned,
            row_steps=row_steps,
            seed=seed,
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
            text, text_embeds: the condition, without an audio_conditioner.
            return_loss: return the mean cross entropy in place of the logits.
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
        mask = self._forgetful_mask(coarse.shape[0], coarse.shape[1] + fine.shape[1] + 2)
        coarse_logits, fine_logits = self.transformer(
            coarse_token_ids=coarse, fine_token_ids=fine, self_attn_mask=mask, text=text,
            text_embeds=text_embeds, **kwargs,
        )  # fmt: skip
        if not return_loss:
            return coarse_logits, fine_logits
        weight = self.coarse_cross_entropy_loss_weight
        return self._loss(
            (fine_logits, fine_labels, fine_labels.shape[1], 1.0),
            (coarse_logits, coarse_labels, coarse_labels.shape[1], weight),
        )
