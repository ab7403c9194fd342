"""Validation during training: the loss and recall of a model on rows that it does not train on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from musiclm_fast.models.contrastive import SigmoidContrastiveLearning, SoftmaxContrastiveLearning
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.training.batches import SeededRows
from musiclm_fast.training.data import collate
from musiclm_fast.training.metrics import recall_at_k

RECALL_AT = (1, 5, 10)
#: What can make a checkpoint the best.
SCORES = ("valid_loss", *(f"valid_recall@{k}" for k in RECALL_AT))


@torch.no_grad()
def validate(
    model: MuLaN,
    dataset: Dataset[Any],
    inputs: Callable[[dict[str, Any]], dict[str, Any]],
    accelerator: Accelerator,
    *,
    rows: int,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
) -> dict[str, float]:
    """Loss and recall in evaluation mode; all processes must call it, and each takes its share.

    The same rows are drawn with the same seeds each time, and no generator moves.

    Args:
        model: not wrapped; its modes are put back.
        dataset: as for training.
        inputs: makes the model's keyword arguments of a batch.
        accelerator: of the processes.
        rows: most rows that are looked at, evenly spaced.
        batch_size: pairs of a loss.
        seed: of the draws.
        num_workers: processes that read rows ahead.

    Returns:
        ``valid_loss``, the mean over full batches; ``valid_audio_to_text_recall@k`` and
        ``valid_text_to_audio_recall@k``, the share of clips whose text, and of texts one of whose
        clips, is among the k nearest, and ``valid_recall@k``, their mean. The loss is NaN, and
        there is no recall, if the set holds fewer than two rows.
    """
    size = len(dataset)  # type: ignore[arg-type]
    count = min(size, rows)
    if count < 2:
        return {"valid_loss": float("nan")}
    chosen = [index * size // count for index in range(count)]
    each = min(batch_size, count)
    batches = [chosen[start : start + each] for start in range(0, count, each)]
    index, processes = accelerator.process_index, accelerator.num_processes
    loader = DataLoader(
        SeededRows(dataset, seed),
        batch_sampler=[[(row, row) for row in batch] for batch in batches[index::processes]],
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),  # else it would draw from the model's
    )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    found = []
    try:
        for batch in loader:
            ids = batch["texts"].tolist() if "texts" in batch else []
            texts = batch.get("raw_texts") or [tuple(filter(None, row)) for row in ids]
            latents, _ = model(**inputs(batch), return_loss_latents=True)
            found.append(([side.cpu() for side in latents], texts))
        everyone = gather_object([found])  # of each process, of each of its batches
        in_order = [everyone[i % processes][i // processes] for i in range(len(batches))]
        with _local_losses(model):
            losses = [
                model.loss_of_latents(*(side.to(accelerator.device) for side in latents)).item()
                for latents, texts in in_order
                if len(texts) == each
            ]
    finally:
        for module, mode in modes:
            module.training = mode
    audio, text = (torch.cat([pair[side] for pair, _ in in_order]).float() for side in (0, 1))
    there, back = pair_recall(audio @ text.t(), [text for _, texts in in_order for text in texts])
    result = {"valid_loss": sum(losses) / len(losses)}
    for k in RECALL_AT:
        result[f"valid_recall@{k}"] = (there[k] + back[k]) / 2
        result[f"valid_audio_to_text_recall@{k}"] = there[k]
        result[f"valid_text_to_audio_recall@{k}"] = back[k]
    return result


@contextlib.contextmanager
def _local_losses(model: MuLaN) -> Iterator[None]:
    # Every process has all latents, so the loss is its own affair.
    kinds = (SoftmaxContrastiveLearning, SigmoidContrastiveLearning)
    losses = [module for module in model.modules() if isinstance(module, kinds)]
    strategies = [loss.strategy for loss in losses]
    for loss in losses:
        loss.strategy = "local"
    try:
        yield
    finally:
        for loss, strategy in zip(losses, strategies, strict=True):
            loss.strategy = strategy


def pair_recall(
    similarity: Tensor, texts: Sequence[Any], ks: Sequence[int] = RECALL_AT
) -> tuple[dict[int, float], dict[int, float]]:
    """Recall where texts repeat: of clips for their text, and of different texts for a clip.

    Args:
        similarity: ``(n, n)``, of each clip (row) and each clip's text.
        texts: the n texts; equal ones are one.
        ks: how many of the best count.

    Returns:
        ``{k: recall}`` of clips among the different texts, and of the different texts among clips:
        the best of a text's own clips counts, and its others are no rivals.
    """
    number: dict[Any, int] = {}
    of_clip = torch.tensor([number.setdefault(text, len(number)) for text in texts])  # (n,)
    first = torch.tensor([texts.index(text) for text in number])  # (u,)
    there = recall_at_k(similarity[:, first], of_clip, ks)
    by_text = similarity.t()[first]  # (u, n)
    own = of_clip == torch.arange(len(number))[:, None]
    best = by_text.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    others = by_text.masked_fill(own, -torch.inf)
    zeros = torch.zeros(len(number), dtype=torch.int64)
    return there, recall_at_k(torch.cat((best, others), dim=1), zeros, ks)
