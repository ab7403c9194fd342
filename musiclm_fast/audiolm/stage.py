"""What the three stages share: their condition, guidance and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musiclm_fast._checks import check_ndim, check_positive_int, describe, fail
from musiclm_fast._wording import plural
from musiclm_fast.audiolm.cache import Cache
from musiclm_fast.audiolm.text_encoder import DEFAULT_T5_NAME, encoded_dim, t5_encode_text
from musiclm_fast.audiolm.transformer import Transformer, front_length

# The release of audiolm-pytorch whose checkpoints have our keys; its loader compares it.
CHECKPOINT_VERSION = "2.4.0"


def draw_keep(batch: int, prob: float, device: torch.device) -> Tensor:
    """``(batch,)`` bool, each True with probability ``prob``; certain cases draw nothing."""
    if prob in (0, 1):
        return torch.full((batch,), prob == 1, device=device)
    return torch.zeros(batch, device=device).uniform_(0, 1) < prob


class Stage(nn.Module):
    """A transformer over tokens with an optional condition.

    Args:
        dim: width.
        t5_name: the T5 that embeds given texts.
        cond_dim: width of the condition; default the T5's, or ``dim`` with audio_text_condition.
        has_condition: the stage is conditioned on ``text`` or ``text_embeds``.
        audio_text_condition: the condition is a joint embedding of audio and text.
        cond_drop_prob: share of rows that are trained without their condition.
        drop_text_embeds: given ``text_embeds`` are dropped too, and count as absent where zero.
            False is what audiolm-pytorch's semantic and fine stages do: there the condition is
            always seen, and guidance has no effect, unless texts are given.
    """

    transformer: Transformer
    proj_text_embed: nn.Module

    def __init__(
        self,
        *,
        dim: int,
        t5_name: str,
        cond_dim: int | None,
        has_condition: bool,
        audio_text_condition: bool,
        cond_drop_prob: float,
        drop_text_embeds: bool,
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
        self.conditioner_fingerprint: str | None = None  # of the quantizer it was trained with
        self.cond_dim = encoded_dim(t5_name) if cond_dim is None else cond_dim
        self._dim = dim

    def _text_projection(self) -> nn.Module:
        if self.cond_dim == self._dim:
            return nn.Identity()
        return nn.Linear(self.cond_dim, self._dim, bias=False)

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
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
            audio_conditioner: the quantizer that the stage was trained with; it is given the
                conditioning embeddings that were trained with the stage.

        Returns:
            All that the file holds.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such checkpoint, or another architecture's; the conditioner is
                not the one that the stage was trained with.
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
                     f"{trained['fingerprint']}, with which {path} was trained")  # fmt: skip
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
        """The projected condition ``(batch, c, dim)`` and which of it is seen ``(batch, c)``.

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
        return self._project(text_embeds), mask

    def _project(self, text_embeds: Tensor) -> Tensor:
        projected: Tensor = self.proj_text_embed(text_embeds)
        return projected

    def guided_condition(
        self, batch: int, text: list[str] | None, text_embeds: Tensor | None, cond_scale: float
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        """Condition and mask of both halves of guidance in one batch, and whether there are two.

        Where the condition cannot be hidden (no mask), or the scale is 1, one half is all: the
        other would equal it.
        """
        context, mask = self.condition(batch, text, text_embeds, cond_drop_prob=0.0)
        if context is None or mask is None or cond_scale == 1:
            return context, mask, False
        return torch.cat((context, context)), torch.cat((mask, torch.zeros_like(mask))), True

    def new_cache(self, batch: int, tokens: int, context: Tensor | None) -> Cache:
        """An empty cache for ``tokens`` tokens and the prefix."""
        transformer = self.transformer
        front = front_length(transformer, context) - transformer.num_null_kv
        weight = next(self.parameters())
        return Cache(
            len(transformer.layers), batch, front + tokens, transformer.dim_head, weight.dtype,
            weight.device,
        )  # fmt: skip

    def open_cache(
        self, stacked: Tensor | None, batch: int, tokens: int, context: Tensor | None, keep: bool
    ) -> Cache | None:
        """The cache of a call: from an earlier call's stacked form, new, or none."""
        if stacked is None:
            return self.new_cache(batch, tokens, context) if keep else None
        front = front_length(self.transformer, context) - self.transformer.num_null_kv
        return Cache.from_stacked(stacked, front + tokens)

    def held_tokens(self, cache: Cache | None, context: Tensor | None) -> int:
        """Tokens, without the prefix, that a cache holds."""
        if cache is None or cache.length == 0:
            return 0
        front = front_length(self.transformer, context) - self.transformer.num_null_kv
        return cache.length - front


def guide(logits: Tensor, cond_scale: float, halves: bool) -> Tensor:
    """Classifier-free guidance, ``null + (conditioned - null) * cond_scale``.

    Args:
        logits: ``(2B, ...)``, conditioned rows first, where ``halves``; else returned as they are.

    https://arxiv.org/abs/2207.12598
    """
    if not halves:
        return logits
    conditioned, null = logits.chunk(2)
    return null + (conditioned - null) * cond_scale


def twice(ids: Tensor, halves: bool) -> Tensor:
    """``ids`` for both halves of guidance."""
    return torch.cat((ids, ids)) if halves else ids


def split_stacked(stacked: Sequence[Tensor] | Tensor | None) -> Tensor | None:
    """audiolm-pytorch's caches ``(halves, depth, 2, B, n, d)`` as one of ``halves * B`` rows."""
    return None if stacked is None else torch.cat(tuple(stacked), dim=2)


def join_stacked(stacked: Tensor, halves: bool) -> Tensor:
    """The inverse of :func:`split_stacked`."""
    return torch.stack(stacked.chunk(2 if halves else 1, dim=2))


__all__ = [
    "CHECKPOINT_VERSION", "DEFAULT_T5_NAME", "Stage", "draw_keep", "guide", "join_stacked",
    "split_stacked", "twice",
]  # fmt: skip
