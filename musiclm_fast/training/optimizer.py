"""Optimizers with their groups of weights, learning-rate schedules, and averages of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from musiclm_fast._checks import fail
from musiclm_fast._optional import require
from musiclm_fast.training.options import OptimizerConfig, RunOptions


def make_optimizer(
    model: nn.Module,
    options: OptimizerConfig,
    *,
    parameters: Sequence[tuple[str, nn.Parameter]] | None = None,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """An optimizer of the parameters that are trained.

    Args:
        model: whose parameters; those that need no gradient are left out.
        options: ``adam`` (decay is added to the gradient), ``adamw`` (decoupled) or ``lion``.
            https://arxiv.org/abs/1711.05101, https://arxiv.org/abs/2302.06675
        parameters: the named parameters that are trained, if not all of the model's.
        fused: one kernel for all parameters (Adam and AdamW).

    Raises:
        ValueError: there is nothing to train.
        ImportError: lion_pytorch is not installed, where it is asked for.
    """
    named = [*model.named_parameters()] if parameters is None else parameters
    named = [(name, p) for name, p in named if p.requires_grad]
    if not named:
        fail("model", "no parameter that needs a gradient", "some to train")
    trained: Any = [p for _, p in named]
    decay = options.weight_decay
    if decay > 0:
        every = options.decay_all_matrices
        trained = weight_groups(named, decay, set() if every else embeddings_of(model), every)
    shared: dict[str, Any] = dict(lr=options.learning_rate, betas=options.betas, weight_decay=decay)
    if options.name == "lion":
        lion: torch.optim.Optimizer = require("lion_pytorch").Lion(trained, **shared)
        return lion
    kind = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
    return kind(trained, **shared, fused=True if fused else None)


def embeddings_of(model: nn.Module) -> set[int]:
    """The ``id`` of every parameter of an embedding."""
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return {id(p) for table in tables for p in table.parameters()}


def weight_groups(
    named: Sequence[tuple[str, Tensor]],
    weight_decay: float,
    embeddings: set[int],
    all_matrices: bool = False,
) -> list[dict[str, Any]]:
    """Parameters that decay and those that do not, as groups for an optimizer.

    Weight matrices decay. Norms, biases, scales, temperatures, embeddings and single vectors such
    as the class token do not: pulling them to zero regularises nothing.

    Args:
        named: the trained parameters with their names.
        weight_decay: of those that decay.
        embeddings: ``id`` of parameters that are tables of embeddings.
        all_matrices: whatever has two dimensions or more decays, as in audiolm-pytorch.
    """
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in named:
        weight = name.endswith("weight") and id(p) not in embeddings
        (decayed if p.ndim >= 2 and (weight or all_matrices) else others).append(p)
    groups = [(decayed, weight_decay), (others, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def schedule_factor(step: int, options: RunOptions) -> float:
    """What the learning rate is multiplied with at a step, counted from 0.

    ``(step + 1) / warmup_steps`` up to 1, then constant, or down to ``final`` at the last step
    in a line or along half a cosine.

    Source of the cosine: https://arxiv.org/abs/1608.03983.
    """
    schedule = options.schedule
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    after = max(1, options.training.steps - schedule.warmup_steps)
    done = min(1.0, (step - schedule.warmup_steps) / after)
    left = 1 - done if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.final + (1 - schedule.final) * left


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
