"""The base of the coarse and fine stages, which write acoustic tokens after a given segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast.audiolm.positions import interleaved_offsets
from musiclm_fast.audiolm.stage import Stage
from musiclm_fast.audiolm.token_ids import per_quantizer_logits, quantizer_embedding

Logits = tuple[Tensor | None, Tensor]
Caches = tuple[Tensor, Tensor]


class AcousticStage(Stage):
    """A stage whose own segment interleaves the codes of several quantizers.

    A subclass has the weights ``<namespace>_embedding``, ``<namespace>_quantize_embedding`` and
    ``<namespace>_logit_weights``.
    """

    codebook_size: int

    def _own(self, weights: str) -> Any:
        return getattr(self, f"{self.namespace}_{weights}")

    def _embed(
        self, ids: Tensor, start: Tensor, codes: nn.Embedding, quantizers: nn.Embedding
    ) -> Tensor:
        # The start token and the embeddings of ids (B, n); (B, 1 + n, dim)
        length = ids.shape[1]
        offsets = interleaved_offsets(quantizers.num_embeddings, length, ids.device)
        embeds = codes(ids + self.codebook_size * offsets)
        embeds = embeds + quantizer_embedding(quantizers.weight, length)
        return torch.cat((start.expand(ids.shape[0], 1, -1), embeds), dim=1)

    def embed_next(self, ids: Tensor, index: int) -> Tensor:
        quantizers = self._own("quantize_embedding").weight
        quantizer = index % quantizers.shape[0]
        embeds: Tensor = self._own("embedding")(ids + quantizer * self.codebook_size)
        return embeds + quantizers[quantizer]

    def next_logits(self, hidden: Tensor, index: int) -> Tensor:
        weights = self._own("logit_weights")
        return F.linear(hidden, weights[index % weights.shape[0]])

    def _first_logits(self, hidden: Tensor) -> Tensor | None:
        raise NotImplementedError

    def _logits(self, hidden: Tensor, first: int, only_own: bool) -> Logits:
        own = per_quantizer_logits(self._own("logit_weights"), hidden[:, first + 1 :])
        return None if only_own else self._first_logits(hidden[:, :first]), own

    def _result(self, *args: Any, **kwargs: Any) -> Logits | tuple[Logits, Caches]:
        logits, caches = self._run(*args, **kwargs)
        return logits if caches is None else (logits, caches)
