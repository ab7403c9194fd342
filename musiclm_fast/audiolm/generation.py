"""The loop that writes tokens: one forward per token for all rows and both halves of guidance.

The position table is computed once, keys and values are stored in memory that is allotted once,
and rows that are done are taken out of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast.audiolm.cache import Cache
from musiclm_fast.audiolm.decoder import Stepper
from musiclm_fast.audiolm.positions import Positions
from musiclm_fast.audiolm.sampling import Sampling, draw
from musiclm_fast.audiolm.stage import Stage, apply_cfg, twice


@dataclass
class Prompt:
    """What a stage has read before it writes.

    Args:
        tokens: ``(rows, n, dim)`` embeddings; with guidance, rows of both halves.
        mask: ``(rows, n)`` bool of the tokens that are seen, or None for all.
        context, context_mask: the condition of all rows.
        halves: whether the rows are the two halves of guidance.
        positions: of prompt and everything that follows, or None.
    """

    tokens: Tensor
    mask: Tensor | None
    context: Tensor | None
    context_mask: Tensor | None
    halves: bool
    positions: Positions | None


def generate_tokens(
    stage: Stage,
    prompt: Prompt,
    steps: int,
    *,
    sampling: Sampling,
    logits: Callable[[Tensor, int], Tensor],
    embed: Callable[[Tensor, int], Tensor],
    end_id: int | None = None,
    banned: Callable[[int], int | None] = lambda step: None,
    row_steps: Tensor | None = None,
    generator: torch.Generator | None = None,
    description: str = "generating",
    progress: bool = True,
) -> Tensor:
    """Write up to ``steps`` tokens per row.

    Args:
        stage: the transformer.
        prompt: what stands before.
        steps: tokens at most.
        sampling: how they are drawn.
        logits: ``logits(hidden (rows, dim), step)`` gives ``(rows, codes)``.
        embed: ``embed(ids (rows,), step)`` gives the embedding ``(rows, dim)`` of step's token.
        end_id: a row that draws it is done.
        banned: a token that a step must not draw.
        row_steps: ``(B,)`` tokens that each row needs, at most ``steps``.
        generator: of the noise; None is the device's default.
        description: of the progress bar.
        progress: show one.

    Returns:
        ``(B, taken)`` ids, taken at most ``steps``: the end token where it was drawn, -1 after it
        and after a row's own number of steps.
    """
    halves = prompt.halves
    batch = prompt.tokens.shape[0] // (2 if halves else 1)
    device = prompt.tokens.device
    length = prompt.tokens.shape[1]
    written = torch.full((batch, steps), -1, dtype=torch.long, device=device)
    rows = torch.arange(batch, device=device)
    if row_steps is not None:
        rows = rows[row_steps.to(device) > 0]
    if steps == 0 or rows.numel() == 0:
        return written[:, :0]
    x, mask, context, context_mask = prompt.tokens, prompt.mask, prompt.context, prompt.context_mask
    if mask is not None:
        mask = F.pad(mask, (0, steps - 1), value=True)
    if rows.numel() < batch:
        both = _both(rows, batch, halves)
        x = x[both]
        mask, context, context_mask = _rows(both, mask, context, context_mask)
    cache = stage.new_cache(x.shape[0], length + steps - 1, context)
    hidden = stage.transformer(
        x, context=context, context_mask=context_mask, cache=cache,
        self_attn_mask=None if prompt.mask is None else mask[:, :length],  # type: ignore[index]
        attn_bias=None if prompt.positions is None else prompt.positions.part(0, length),
    )[:, -1]  # fmt: skip
    stepper = Stepper(stage.transformer, prompt.positions)
    ids = rows
    prefix_mask = context_mask if stage.transformer.cond_as_self_attn_prefix else None
    for step in _shown(range(steps), description) if progress else range(steps):
        if step > 0:
            index = length + step - 1
            seen = _seen(index, mask, prefix_mask, cache, stage)
            hidden = stepper(twice(embed(ids, step - 1), halves), index, seen, cache)
        guided = apply_cfg(logits(hidden, step), sampling.cond_scale, halves)
        ban = banned(step)
        if ban is not None:
            guided[:, ban] = float("-inf")
        noise = None
        if sampling.temperature > 0:
            # Drawn for all rows, done or not, so that a row's noise depends on no other row.
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


def _shown(steps: Iterable[int], description: str) -> Iterable[int]:
    from tqdm.auto import tqdm

    bar: Iterable[int] = tqdm(steps, desc=description, leave=False)
    return bar


def _seen(
    index: int, mask: Tensor | None, prefix_mask: Tensor | None, cache: Cache, stage: Stage
) -> Tensor | None:
    # (B, keys) of the token at index: null keys, prefix, tokens; None where all are seen
    if mask is None and prefix_mask is None:
        return None
    nulls = stage.transformer.num_null_kv
    seen = torch.ones(
        cache.batch, nulls + cache.length + 1, dtype=torch.bool, device=cache.keys_values.device
    )
    if prefix_mask is not None:
        seen[:, nulls : nulls + prefix_mask.shape[1]] = prefix_mask
    if mask is not None:
        seen[:, -index - 1 :] = mask[:, : index + 1]
    return seen


def _both(rows: Tensor, batch: int, halves: bool) -> Tensor:
    # Rows of the batch, in both halves of guidance.
    return torch.cat((rows, rows + batch)) if halves else rows


def _rows(rows: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor[rows] for tensor in tensors]


def make_generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    """A generator of a seed, or None for the device's own."""
    return None if seed is None else torch.Generator(device=device).manual_seed(seed)
