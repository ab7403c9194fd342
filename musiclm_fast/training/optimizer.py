"""Optimizers with their groups of weights, learning-rate schedules, and averages of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from musiclm_fast._checks import check_choice, check_positive, fail
from musiclm_fast._optional import require

OPTIMIZERS = ("adam", "adamw", "lion")
SCHEDULES = ("constant", "linear", "cosine")


def make_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """An optimizer of the parameters that are trained.

    Args:
        model: whose parameters; those that need no gradient are left out.
        name: ``"adam"`` (decay is added to the gradient), ``"adamw"`` (decoupled), both fused, or
            ``"lion"``. https://arxiv.org/abs/1711.05101, https://arxiv.org/abs/2302.06675
        lr, betas: of the optimizer.
        weight_decay: of matrices; see :func:`weight_groups`.

    Raises:
        ValueError: an unknown name, or a number out of range.
        ImportError: lion_pytorch is not installed, where it is asked for.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    check_positive("lr", lr)
    if not 0 <= weight_decay < math.inf:
        fail("weight_decay", weight_decay, "at least 0")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        fail("betas", betas, "two numbers in [0, 1)")
    trained: Any = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        fail("model", "no parameter that needs a gradient", "some to train")
    if weight_decay > 0:
        trained = weight_groups(model, weight_decay)
    if name == "lion":
        lion: Any = require("lion_pytorch").Lion
        optimizer: torch.optim.Optimizer = lion(
            trained, lr=lr, betas=betas, weight_decay=weight_decay
        )
        return optimizer
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(trained, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def weight_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay and those that do not, as groups for an optimizer.

    Weight matrices decay. Norms, biases, scales, temperatures, embeddings and single vectors such
    as the class token do not: pulling them to zero regularises nothing.
    """
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and name.endswith("weight") and id(parameter) not in embeddings
        (decayed if matrix else others).append(parameter)
    groups = [(decayed, weight_decay), (others, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def schedule_factor(
    step: int, *, kind: str, warmup_steps: int, total_steps: int, final: float
) -> float:
    """What the learning rate is multiplied with at a step, counted from 0.

    ``(step + 1) / warmup_steps`` up to 1, then constant, or down to ``final`` at ``total_steps``
    in a line or along half a cosine.

    Source of the cosine: https://arxiv.org/abs/1608.03983.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    left = 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return final + (1 - final) * left


class WeightAverage(AveragedModel):
    """An exponential moving average of a model's weights, as a model in evaluation mode.

    ``average = d * average + (1 - d) * weights`` with ``d = min(decay, (1 + n) / (10 + n))`` at the
    n-th update, so that a short run is no average of its initial weights.

    Args:
        model: is copied.
        decay: in (0, 1).

    Raises:
        ValueError: the decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if isinstance(decay, bool) or not 0 < decay < 1:
            fail("ema_decay", decay, "a number in (0, 1)")
        self.decay = decay
        super().__init__(model, multi_avg_fn=self._mix)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> WeightAverage:
        """Stay in evaluation mode, also where the average is part of what is trained."""
        super().train(False)
        return self

    def _mix(self, averages: Sequence[Tensor], weights: Sequence[Tensor], _: Any) -> None:
        updates = int(self.n_averaged)  # on the CPU
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
