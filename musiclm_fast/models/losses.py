"""Modules around the contrastive losses: learned temperatures, and the loss over all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from musiclm_fast._checks import check_choice, check_positive, check_positive_int
from musiclm_fast.nn.transformer import LayerNorm
from musiclm_fast.ops import distributed_contrastive_loss
from musiclm_fast.ops.contrastive.distributed import STRATEGIES

Labels = Tensor | tuple[Tensor, Tensor]


class _CapFromAbove(torch.autograd.Function):
    """min(x, cap), whose gradient still flows where it leads back below the cap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cap: float) -> Tensor:
        ctx.save_for_backward(x > cap)
        return x.clamp(max=cap)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (above,) = ctx.saved_tensors
        # A step goes against the gradient: a positive one lowers x.
        return grad.masked_fill(above & (grad < 0), 0.0), None


class _ContrastiveLearning(nn.Module):
    """Learned temperatures, and how the loss is spread over ranks.

    The latents of all ranks of the process group make one batch; whether there is a group is looked
    up in every call, see :func:`musiclm_fast.ops.distributed_contrastive_loss`.
    """

    def __init__(
        self,
        layers: int,
        init_temp: float,
        max_temperature: float | None,
        strategy: str,
        process_group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        check_positive_int("layers", layers)
        check_positive("init_temp", init_temp)
        check_choice("strategy", strategy, STRATEGIES)
        if max_temperature is not None:
            check_positive("max_temperature", max_temperature)
        self.temperatures = nn.Parameter(torch.ones(layers, 1, 1) * math.log(init_temp))
        self.max_temperature = max_temperature
        self.strategy = strategy
        self.process_group = process_group

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.temperatures.device

    def _loss(
        self, audio: Tensor, text: Tensor, kind: str, parameters: Mapping[str, Tensor] | None,
        labels: Labels | None,
    ) -> Tensor:  # fmt: skip
        if parameters is None:
            parameters = dict(self.named_parameters())
        logarithm = parameters["temperatures"].flatten()
        bias = parameters["bias"].flatten() if kind == "sigmoid" else None
        if self.max_temperature is not None:
            logarithm = _CapFromAbove.apply(logarithm, math.log(self.max_temperature))
        loss: Tensor = distributed_contrastive_loss(
            audio, text, logarithm.exp(), bias,
            kind=kind, labels=labels, strategy=self.strategy, group=self.process_group,
        )  # fmt: skip
        return loss


class SoftmaxContrastiveLearning(_ContrastiveLearning):
    """Symmetric softmax loss with a learned temperature per layer.

    Sources: https://arxiv.org/abs/2103.00020, https://arxiv.org/abs/2110.06848 (decoupled).

    Args:
        layers: number of layers whose losses are summed.
        decoupled_contrastive_learning: leave the positive pair out of the denominators.
        init_temp: initial factor of the similarities.
        max_temperature: cap on the learned factor (CLIP: 100); None leaves it free.
        strategy: ``"all_gather"``, ``"ring"`` or ``"local"``; how ranks share a batch.
        process_group: the ranks that share a batch; None is the default group.
    """

    def __init__(
        self,
        *,
        layers: int = 1,
        decoupled_contrastive_learning: bool = False,
        init_temp: float = 10,
        max_temperature: float | None = None,
        strategy: str = "all_gather",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(layers, init_temp, max_temperature, strategy, process_group)
        self.decoupled_contrastive_learning = decoupled_contrastive_learning

    def forward(
        self,
        audio_latents: Tensor,
        text_latents: Tensor,
        *,
        parameters: Mapping[str, Tensor] | None = None,
        labels: Labels | None = None,
    ) -> Tensor:
        """Loss of l2-normed latents ``(B, d)`` or ``(layers, B, d)``; see
        :func:`musiclm_fast.ops.contrastive_loss`, also for ``labels``. ``parameters`` by name stand
        in for the module's own, as gradient caching wants it."""
        kind = "decoupled" if self.decoupled_contrastive_learning else "softmax"
        return self._loss(audio_latents, text_latents, kind, parameters, labels)


class SigmoidContrastiveLearning(_ContrastiveLearning):
    """Sigmoid loss with a learned temperature and bias per layer. https://arxiv.org/abs/2303.15343

    Args:
        layers: number of layers whose losses are summed.
        init_temp: initial factor of the similarities.
        init_bias: initial bias of the similarities.
        max_temperature: cap on the learned factor; None leaves it free.
        strategy: ``"all_gather"``, ``"ring"`` or ``"local"``; how ranks share a batch.
        process_group: the ranks that share a batch; None is the default group.
    """

    def __init__(
        self,
        *,
        layers: int = 1,
        init_temp: float = 10,
        init_bias: float = -10,
        max_temperature: float | None = None,
        strategy: str = "all_gather",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(layers, init_temp, max_temperature, strategy, process_group)
        self.bias = nn.Parameter(torch.ones(layers, 1, 1) * init_bias)

    def forward(
        self,
        audio_latents: Tensor,
        text_latents: Tensor,
        *,
        parameters: Mapping[str, Tensor] | None = None,
        labels: Labels | None = None,
    ) -> Tensor:
        """Loss of l2-normed latents ``(B, d)`` or ``(layers, B, d)``; see
        :func:`musiclm_fast.ops.contrastive_loss`, also for ``labels``. ``parameters`` by name stand
        in for the module's own, as gradient caching wants it."""
        return self._loss(audio_latents, text_latents, "sigmoid", parameters, labels)


def make_contrastive_loss(
    layers: int,
    decoupled: bool,
    sigmoid: bool,
    max_temperature: float | None = None,
    strategy: str = "all_gather",
) -> SoftmaxContrastiveLearning | SigmoidContrastiveLearning:
    """The loss module that MuLaN's flags ask for; sigmoid wins over decoupled."""
    shared: dict[str, Any] = dict(layers=layers, max_temperature=max_temperature, strategy=strategy)
    if sigmoid:
        return SigmoidContrastiveLearning(**shared)
    return SoftmaxContrastiveLearning(decoupled_contrastive_learning=decoupled, **shared)


def interspersed_indices(layers: int, total_layers: int) -> Tensor:
    """``layers`` indices spread evenly over ``total_layers``: ``floor(i * total / layers)``."""
    return (torch.arange(layers) * (total_layers / layers)).floor().long()


class MultiLayerContrastiveLoss(nn.Module):
    """Contrastive loss at several layers of both towers. https://arxiv.org/abs/2208.13628

    Args:
        audio_dim, text_dim: widths of the towers.
        dim_latent: width of the latents.
        layers: number of layers.
        decoupled_contrastive_learning, sigmoid_contrastive_loss: the kind of loss.
        max_temperature, strategy: as in :class:`SoftmaxContrastiveLearning`.
    """

    def __init__(
        self,
        *,
        audio_dim: int,
        text_dim: int,
        dim_latent: int,
        layers: int,
        decoupled_contrastive_learning: bool = False,
        sigmoid_contrastive_loss: bool = False,
        max_temperature: float | None = None,
        strategy: str = "all_gather",
    ) -> None:
        super().__init__()
        self.layers = layers
        self.audio_norm = LayerNorm(audio_dim, scale=False)
        self.audio_gamma = nn.Parameter(torch.ones(layers, 1, audio_dim))
        self.audio_latent_weight = nn.Parameter(torch.randn(layers, audio_dim, dim_latent))
        self.audio_latent_bias = nn.Parameter(torch.randn(layers, 1, dim_latent))
        self.text_norm = LayerNorm(text_dim, scale=False)
        self.text_gamma = nn.Parameter(torch.ones(layers, 1, text_dim))
        self.text_latent_weight = nn.Parameter(torch.randn(layers, text_dim, dim_latent))
        self.text_latent_bias = nn.Parameter(torch.randn(layers, 1, dim_latent))
        self.contrast = make_contrastive_loss(
            layers, decoupled_contrastive_learning, sigmoid_contrastive_loss, max_temperature,
            strategy,
        )  # fmt: skip

    def forward(
        self,
        *,
        audio_layers: Tensor,
        text_layers: Tensor,
        audio_tokens: Tensor | None = None,
        labels: Labels | None = None,
    ) -> Tensor:
        """Loss of ``audio_layers (layers, B, n, audio_dim)``, which are averaged over n, and
        ``text_layers (layers, B, 1 + m, text_dim)``, whose first token is read. Of the n, a clip's
        own are the first ``audio_tokens (B,)``, where given, and zeros follow. ``labels`` as for
        :func:`musiclm_fast.ops.contrastive_loss`."""
        latents = self.latents(audio_layers, text_layers, audio_tokens)
        loss: Tensor = self.contrast(*latents, labels=labels)
        return loss

    def latents(
        self, audio_layers: Tensor, text_layers: Tensor, audio_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors ``(layers, B, dim_latent)`` of both sides; arguments as in forward."""
        if audio_tokens is None:
            pooled = audio_layers.mean(dim=2)
        else:
            pooled = audio_layers.sum(dim=2) / audio_tokens[:, None]
        audio = self.audio_norm(pooled) * self.audio_gamma
        audio = torch.baddbmm(self.audio_latent_bias, audio, self.audio_latent_weight)
        text = self.text_norm(text_layers[:, :, 0]) * self.text_gamma
        text = torch.baddbmm(self.text_latent_bias, text, self.text_latent_weight)
        return F.normalize(audio, dim=-1), F.normalize(text, dim=-1)
