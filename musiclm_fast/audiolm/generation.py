"""The sampling loop: one forward pass per token for all rows and both halves of guidance.

The position table is computed once, the memory of keys and values is allocated once, and finished
rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from musiclm_fast.audiolm.cache import Cache
from musiclm_fast.audiolm.decoder import TokenDecoder
from musiclm_fast.audiolm.positions import Positions
from musiclm_fast.audiolm.sampling import Sampling, draw
from musiclm_fast.audiolm.stage import Stage, apply_cfg, twice


@dataclass
class Prompt:
    """The input of a stage before the tokens to sample.

    Args:
        tokens: ``(B, n, dim)`` embeddings.
        mask: ``(B, n)`` bool, True for tokens that are seen; None for all.
        context, context_mask: the condition, of ``2B`` rows with ``halves``.
        halves: run both halves of guidance.
        positions: of the prompt and of all tokens to sample, or None.
        index: place of the first token to sample in the stage's own segment.
    """

    tokens: Tensor
    mask: Tensor | None
    context: Tensor | None
    context_mask: Tensor | None
    halves: bool
    positions: Positions | None
    index: int = 0


def generate_tokens(
    stage: Stage,
    prompt: Prompt,
    steps: int,
    *,
    sampling: Sampling,
    end_id: int | None = None,
    banned: Callable[[int], int | None] = lambda step: None,
    row_steps: Tensor | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Sample up to ``steps`` tokens per row.

    Args:
        stage: the transformer.
        prompt: its input.
        steps: maximum number of tokens.
        sampling: temperature, filter and guidance.
        end_id: a row that draws it is finished.
        banned: the token that a step must not draw.
        row_steps: ``(B,)`` number of tokens for each row, at most ``steps``.
        seed: of the noise; None draws from the device's default generator.
        progress: show a progress bar.

    Returns:
        ``(B, taken)`` ids with taken at most ``steps``: the end token where it was drawn, -1 after
        it and after a row's own number of steps.
    """
    halves = prompt.halves
    batch, length = prompt.tokens.shape[:2]
    device = prompt.tokens.device
    generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
    written = torch.full((batch, steps), -1, dtype=torch.long, device=device)
    rows = torch.arange(batch, device=device)
    if row_steps is not None:
        rows = rows[row_steps.to(device) > 0]
    if steps == 0 or rows.numel() == 0:
        return written[:, :0]
    x, context, context_mask = twice(prompt.tokens, halves), prompt.context, prompt.context_mask
    mask = None
    if prompt.mask is not None:
        mask = F.pad(twice(prompt.mask, halves), (0, steps - 1), value=True)
    if rows.numel() < batch:
        both = _both(rows, batch, halves)
        x = x[both]
        mask, context, context_mask = _rows(both, mask, context, context_mask)
    cache = stage.new_cache(x.shape[0], length + steps - 1, context)
    hidden = stage.transformer(
        x, context=context, context_mask=context_mask, cache=cache,
        self_attn_mask=None if mask is None else mask[:, :length],
        attn_bias=None if prompt.positions is None else prompt.positions.part(0, length),
    )[:, -1]  # fmt: skip
    decoder = TokenDecoder(stage.transformer, prompt.positions)
    ids = rows
    prefix_mask = context_mask if stage.transformer.cond_as_self_attn_prefix else None
    for step in tqdm(
        range(steps), desc=f"generating {stage.namespace}", leave=False, disable=not progress
    ):
        if step > 0:
            place = length + step - 1
            seen = _seen(place, mask, prefix_mask, cache, stage)
            x = twice(stage.embed_next(ids, prompt.index + step - 1), halves)
            hidden = decoder(x, place, seen, cache)
        logits = stage.next_logits(hidden, prompt.index + step)
        guided = apply_cfg(logits, sampling.cond_scale, halves)
        ban = banned(step)
        if ban is not None:
            guided[:, ban] = float("-inf")
        noise = None
        if sampling.temperature > 0:
            # Drawn for finished rows too, so that a row's noise does not depend on other rows.
            noise = torch.zeros(batch, guided.shape[-1], dtype=guided.dtype, device=device)
            noise = noise.uniform_(0, 1, generator=generator)
            noise = noise if rows.numel() == batch else noise[rows]
        ids = draw(guided, noise, sampling.temperature, sampling.filter_thres)
        written[rows, step] = ids
        if step + 1 == steps:
            break
        keep = None
        if end_id is not None:
            keep = ids != end_id
        if row_steps is not None:
            unfinished = row_steps.to(device)[rows] > step + 1
            keep = unfinished if keep is None else keep & unfinished
        if keep is not None and not bool(keep.all()):
            kept = keep.nonzero().squeeze(1)
            if kept.numel() == 0:
                return written[:, : step + 1]
            both = _both(kept, rows.numel(), halves)
            cache.keep_rows(both)
            mask, prefix_mask = _rows(both, mask, prefix_mask)
            rows, ids = rows[kept], ids[kept]
    return written


def _seen(
    place: int, mask: Tensor | None, prefix_mask: Tensor | None, cache: Cache, stage: Stage
) -> Tensor | None:
    # Key mask (B, keys) of the token at `place`: null keys, prefix, tokens; None if all are seen
    if mask is None and prefix_mask is None:
        return None
    nulls = stage.transformer.num_null_kv
    seen = torch.ones(
        cache.batch, nulls + cache.length + 1, dtype=torch.bool, device=cache.keys_values.device
    )
    if prefix_mask is not None:
        seen[:, nulls : nulls + prefix_mask.shape[1]] = prefix_mask
    if mask is not None:
        seen[:, -place - 1 :] = mask[:, : place + 1]
    return seen


def _both(rows: Tensor, batch: int, halves: bool) -> Tensor:
    # Indices of the rows in both halves of guidance
    return torch.cat((rows, rows + batch)) if halves else rows


def _rows(rows: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor[rows] for tensor in tensors]
