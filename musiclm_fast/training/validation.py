"""Validation during training: the loss and recall of a model on rows that it does not train on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from musiclm_fast.datasets.collation import collate
from musiclm_fast.datasets.sampling import SeededRows
from musiclm_fast.evaluation.metrics import retrieval
from musiclm_fast.models.losses import SigmoidContrastiveLearning, SoftmaxContrastiveLearning
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.nn.modes import evaluation_mode
from musiclm_fast.training.accelerated import Accelerator, gather_object

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
    found = []
    with evaluation_mode(model):
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
    audio, text = (torch.cat([pair[side] for pair, _ in in_order]).float() for side in (0, 1))
    result = {"valid_loss": sum(losses) / len(losses)}
    there, back = _recall(audio, text, [each for _, texts in in_order for each in texts])
    for k in RECALL_AT:
        result[f"valid_recall@{k}"] = (there[k] + back[k]) / 2
        result[f"valid_audio_to_text_recall@{k}"] = there[k]
        result[f"valid_text_to_audio_recall@{k}"] = back[k]
    return result


def _recall(
    audio: Tensor, text: Tensor, texts: Sequence[Any]
) -> tuple[dict[int, float], dict[int, float]]:
    # Clips for their text among all different ones, and different texts for one of their clips.
    # audio, text (n, d); of the n texts equal ones are one.
    number: dict[Any, int] = {}
    owner = torch.tensor([number.setdefault(each, len(number)) for each in texts])  # (n,)
    different = text[torch.tensor([texts.index(each) for each in number])]  # (u, d)
    pairs = torch.stack((torch.arange(len(owner)), owner), dim=1)
    there = retrieval(audio, different, pairs, RECALL_AT)
    return there.recall, retrieval(different, audio, pairs.flip(1), RECALL_AT).recall


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
