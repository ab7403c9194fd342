"""The base of the three stages: condition, forward pass, guidance and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musiclm_fast._checks import check_ndim, check_positive_int, describe, fail
from musiclm_fast._wording import plural
from musiclm_fast.audiolm.cache import Cache
from musiclm_fast.audiolm.positions import Positions
from musiclm_fast.audiolm.text_encoder import DEFAULT_T5_NAME, encoded_dim, t5_encode_text
from musiclm_fast.audiolm.token_ids import check_ids
from musiclm_fast.audiolm.transformer import Transformer, front_length

# The release of audiolm-pytorch whose checkpoint keys ours match. Its loader compares it.
CHECKPOINT_VERSION = "2.4.0"


def draw_keep(batch: int, prob: float, device: torch.device) -> Tensor:
    """``(batch,)`` bool, each True with probability ``prob``. 0 and 1 draw no random number."""
    if prob in (0, 1):
        return torch.full((batch,), prob == 1, device=device)
    return torch.zeros(batch, device=device).uniform_(0, 1) < prob


class Stage(nn.Module):
    """A transformer over tokens with an optional condition.

    Args:
        dim: width.
        depth: layers.
        heads: attention heads.
        t5_name: the T5 that embeds texts.
        cond_dim: width of the condition. Default: the T5's, or ``dim`` with audio_text_condition.
        has_condition: the stage is conditioned on ``text`` or ``text_embeds``.
        audio_text_condition: the condition is a joint embedding of audio and text.
        cond_as_self_attn_prefix: prepend the condition to the self-attention keys; no cross
            attention.
        cond_drop_prob: share of rows that are trained without their condition.
        drop_text_embeds: also drop ``text_embeds``, and mask their all-zero rows. False is
            upstream's behaviour in the semantic and fine stages: they always see ``text_embeds``,
            so guidance acts on ``text`` alone.
        **kwargs: see :class:`musiclm_fast.audiolm.transformer.Transformer`.
    """

    namespace: str
    _id_dims: tuple[int, ...] = (2, 3)  # dimensions of token ids that a call accepts

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int = 8,
        t5_name: str = DEFAULT_T5_NAME,
        cond_dim: int | None = None,
        has_condition: bool = False,
        audio_text_condition: bool = False,
        cond_as_self_attn_prefix: bool = False,
        cond_drop_prob: float = 0.5,
        drop_text_embeds: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_positive_int("dim", dim)
        if not 0 <= cond_drop_prob <= 1:
            fail("cond_drop_prob", cond_drop_prob, "a probability")
        if audio_text_condition:
            has_condition = True
            cond_dim = dim if cond_dim is None else cond_dim
        self.has_condition = has_condition
        self.t5_name = t5_name
        self.cond_drop_prob = cond_drop_prob
        self.drop_text_embeds = drop_text_embeds
        self.conditioner_fingerprint: str | None = None  # of the quantizer used in training
        self.cond_dim = encoded_dim(t5_name) if cond_dim is None else cond_dim
        self._transformer_options: dict[str, Any] = dict(
            dim=dim, depth=depth, heads=heads, cond_as_self_attn_prefix=cond_as_self_attn_prefix,
            cross_attend=has_condition and not cond_as_self_attn_prefix, **kwargs,
        )  # fmt: skip

    def _add_transformer(self) -> None:
        # A subclass calls it after its embeddings, so that a seed draws upstream's weights.
        dim = self._transformer_options["dim"]
        self.proj_text_embed: nn.Module = (
            nn.Identity() if self.cond_dim == dim else nn.Linear(self.cond_dim, dim, bias=False)
        )
        self.transformer = Transformer(**self._transformer_options)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def embed_text(
        self, text: str | list[str], output_device: torch.device | str | None = None
    ) -> Tensor:
        """Embed texts with the stage's T5."""
        return t5_encode_text(text, name=self.t5_name, output_device=output_device)

    def load(self, path: str | Path, audio_conditioner: Any = None) -> dict[str, Any]:
        """Load a checkpoint of a trainer, of this package or of audiolm-pytorch.

        Args:
            path: the file.
            audio_conditioner: the quantizer used in training. Its conditioning embeddings are
                set to those trained with the stage.

        Returns:
            The contents of the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a stage's checkpoint or holds another architecture; the
                conditioner is not the one used in training.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"path: no checkpoint at {path}")
        try:
            package = torch.load(path, map_location=self.device, weights_only=True)
            weights = package["model"]
        except Exception as error:
            raise ValueError(f"path: {path} is not a readable checkpoint: {error}") from error
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"path: {path} holds another architecture: {error}") from error
        trained: dict[str, Any] = package.get("conditioning") or {}
        self.conditioner_fingerprint = trained.get("fingerprint")
        if audio_conditioner is not None and trained:
            own = audio_conditioner.fingerprint()
            if own != trained["fingerprint"]:
                fail("audio_conditioner", f"MuLaN and codebooks {own}",
                     f"{trained['fingerprint']}, used in training {path}")  # fmt: skip
            with torch.no_grad():
                table = audio_conditioner.cond_embeddings[trained["namespace"]]
                table.copy_(trained["embeds"])
        checked: dict[str, Any] = package
        return checked

    def condition(
        self,
        batch: int,
        text: list[str] | None,
        text_embeds: Tensor | None,
        cond_drop_prob: float | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The projected condition ``(batch, c, dim)`` and its mask ``(batch, c)``, True if seen.

        Raises:
            ValueError: a condition is missing, unwanted or of the wrong shape.
        """
        given = text is not None or text_embeds is not None
        if given != self.has_condition:
            wanted = "text or text_embeds" if self.has_condition else "neither"
            fail("text, text_embeds", "given" if given else "neither", f"{wanted}: has_condition "
                 f"is {self.has_condition}")  # fmt: skip
        if not given:
            return None, None
        mask = None
        if text_embeds is None:
            assert text is not None
            text_embeds = self.embed_text(text, output_device=self.device)
            mask = (text_embeds != 0).any(dim=-1)
        else:
            check_ndim("text_embeds", text_embeds, 3, "(B, c, cond_dim)")
            if text_embeds.shape[-1] != self.cond_dim or text_embeds.shape[1] == 0:
                fail("text_embeds", describe(text_embeds), f"shape (B, c, {self.cond_dim})")
            if self.drop_text_embeds:
                mask = (text_embeds != 0).any(dim=-1)
        if text_embeds.shape[0] != batch:
            if text_embeds.shape[0] != 1:
                fail("text, text_embeds", plural(text_embeds.shape[0], "row"), f"1 row or {batch}")
            text_embeds = text_embeds.expand(batch, -1, -1)
            mask = None if mask is None else mask.expand(batch, -1)
        drop = self.cond_drop_prob if cond_drop_prob is None else cond_drop_prob
        if mask is not None and drop > 0:
            mask = draw_keep(batch, 1 - drop, mask.device)[:, None] & mask
        return self.proj_text_embed(text_embeds), mask

    def guided_condition(
        self, batch: int, text: list[str] | None, text_embeds: Tensor | None, cond_scale: float
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        """Condition and mask of a guided batch, and whether it has an unconditioned half.

        The second half is omitted if it would equal the first: the condition cannot be hidden (no
        mask), or the scale is 1.
        """
        context, mask = self.condition(batch, text, text_embeds, cond_drop_prob=0.0)
        if context is None or mask is None or cond_scale == 1:
            return context, mask, False
        return torch.cat((context, context)), torch.cat((mask, torch.zeros_like(mask))), True

    def new_cache(self, batch: int, tokens: int, context: Tensor | None) -> Cache:
        """An empty cache for ``tokens`` tokens and the prefix."""
        weight = next(self.parameters())
        return Cache(
            len(self.transformer.layers), batch, self._prefix_length(context) + tokens,
            self.transformer.dim_head, weight.dtype, weight.device,
        )  # fmt: skip

    def _prefix_length(self, context: Tensor | None) -> int:
        return front_length(self.transformer, context) - self.transformer.num_null_kv

    def embed_next(self, ids: Tensor, index: int) -> Tensor:
        """Embeddings ``(rows, dim)`` of ids ``(rows,)`` at place ``index`` of the own segment."""
        raise NotImplementedError

    def next_logits(self, hidden: Tensor, index: int) -> Tensor:
        """Logits ``(rows, codes)`` of place ``index`` of the own segment."""
        raise NotImplementedError

    def _read(
        self, ids: Sequence[Tensor], self_attn_mask: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Positions | None]:
        # Embeddings (B, n, dim) of the segments with their start tokens, mask and positions
        raise NotImplementedError

    def _logits(self, hidden: Tensor, first: int, only_own: bool) -> tuple[Tensor | None, Tensor]:
        # Logits of the first segment of `first` ids (None if only_own), and of the own segment
        raise NotImplementedError

    def _run(
        self, ids: Mapping[str, Tensor], text: list[str] | None, text_embeds: Tensor | None,
        self_attn_mask: Tensor | None, kv_cache: Tensor | None, keep: bool, *,
        embed_cache: Tensor | None = None, only_own: bool = False,
        cond_drop_prob: float | None = None, cond_scale: float | None = None,
    ) -> tuple[tuple[Tensor | None, Tensor], tuple[Tensor, Tensor] | None]:  # fmt: skip
        # Logits of both segments, and the caches (keys and values, outputs) if there are any. With
        # cond_scale both halves of guidance run, and the caches' first dimension is the halves.
        for name, value in ids.items():
            check_ids(name, value, self._id_dims)
        segments = [value.flatten(1) for value in ids.values()]
        batch, first = segments[0].shape
        halves = False
        if cond_scale is None:
            context, context_mask = self.condition(batch, text, text_embeds, cond_drop_prob)
        else:
            context, context_mask, halves = self.guided_condition(
                batch, text, text_embeds, cond_scale
            )
            segments = [twice(segment, halves) for segment in segments]
            self_attn_mask = None if self_attn_mask is None else twice(self_attn_mask, halves)
            kv_cache = None if kv_cache is None else torch.cat(tuple(kv_cache), dim=2)
            embed_cache = None if embed_cache is None else embed_cache.flatten(0, 1)
        tokens, mask, positions = self._read(segments, self_attn_mask, context)
        length, held = tokens.shape[1], 0
        cache = self.new_cache(tokens.shape[0], length, context) if keep else None
        if kv_cache is not None:
            prefix = self._prefix_length(context)
            cache = Cache.from_stacked(kv_cache, prefix + length)
            held = cache.length - prefix if cache.length else 0
        hidden = self.transformer(
            tokens[:, held:], self_attn_mask=mask, context=context, context_mask=context_mask,
            cache=cache, attn_bias=None if positions is None else positions.part(held, length),
        )  # fmt: skip
        if embed_cache is not None:
            hidden = torch.cat((embed_cache, hidden), dim=1)
        first_logits, logits = self._logits(hidden, first, only_own)
        stacked = None if cache is None else cache.stacked()
        if cond_scale is not None:
            if first_logits is not None:
                first_logits = apply_cfg(first_logits, cond_scale, halves)
            logits = apply_cfg(logits, cond_scale, halves)
            count = 2 if halves else 1
            hidden = hidden.unflatten(0, (count, -1))
            stacked = None if stacked is None else torch.stack(stacked.chunk(count, dim=2))
        return (first_logits, logits), None if stacked is None else (stacked, hidden)


def apply_cfg(logits: Tensor, cond_scale: float, halves: bool) -> Tensor:
    """Classifier-free guidance, ``null + (conditioned - null) * cond_scale``.

    Args:
        logits: ``(2B, ...)``, conditioned rows first. Returned unchanged without ``halves``.

    https://arxiv.org/abs/2207.12598
    """
    if not halves:
        return logits
    conditioned, null = logits.chunk(2)
    return null + (conditioned - null) * cond_scale


def twice(ids: Tensor, halves: bool) -> Tensor:
    """``ids`` for both halves of guidance."""
    return torch.cat((ids, ids)) if halves else ids
