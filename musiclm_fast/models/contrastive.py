"""Modules around the contrastive losses: learned temperatures, and the loss over all layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast.models.layers import LayerNorm
from musiclm_fast.ops import contrastive_loss


class SoftmaxContrastiveLearning(nn.Module):
    """Symmetric softmax loss with a learned temperature per layer.

    Sources: https://arxiv.org/abs/2103.00020, https://arxiv.org/abs/2110.06848 (decoupled).

    Args:
        layers: number of layers whose losses are summed.
        decoupled_contrastive_learning: leave the positive pair out of the denominators.
        init_temp: initial factor of the similarities.
    """

    def __init__(
        self,
        *,
        layers: int = 1,
        decoupled_contrastive_learning: bool = False,
        init_temp: float = 10,
    ) -> None:
        super().__init__()
        self.temperatures = nn.Parameter(torch.ones(layers, 1, 1) * math.log(init_temp))
        self.decoupled_contrastive_learning = decoupled_contrastive_learning

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.temperatures.device

    def forward(self, audio_latents: Tensor, text_latents: Tensor) -> Tensor:
        """Loss of l2-normed latents ``(B, d)`` or ``(layers, B, d)``; see
        :func:`musiclm_fast.ops.contrastive_loss`."""
        kind = "decoupled" if self.decoupled_contrastive_learning else "softmax"
        temperature = self.temperatures.flatten().exp()
        return contrastive_loss(audio_latents, text_latents, temperature, kind=kind)


class SigmoidContrastiveLearning(nn.Module):
    """Sigmoid loss with a learned temperature and bias per layer. https://arxiv.org/abs/2303.15343

    Args:
        layers: number of layers whose losses are summed.
        init_temp: initial factor of the similarities.
        init_bias: initial bias of the similarities.
    """

    def __init__(self, *, layers: int = 1, init_temp: float = 10, init_bias: float = -10) -> None:
        super().__init__()
        self.temperatures = nn.Parameter(torch.ones(layers, 1, 1) * math.log(init_temp))
        self.bias = nn.Parameter(torch.ones(layers, 1, 1) * init_bias)

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.temperatures.device

    def forward(self, audio_latents: Tensor, text_latents: Tensor) -> Tensor:
        """Loss of l2-normed latents ``(B, d)`` or ``(layers, B, d)``; see
        :func:`musiclm_fast.ops.contrastive_loss`."""
        temperature = self.temperatures.flatten().exp()
        return contrastive_loss(
            audio_latents, text_latents, temperature, self.bias.flatten(), kind="sigmoid"
        )


def make_contrastive_loss(
    layers: int, decoupled: bool, sigmoid: bool
) -> SoftmaxContrastiveLearning | SigmoidContrastiveLearning:
    """The loss module that MuLaN's flags ask for; sigmoid wins over decoupled."""
    if sigmoid:
        return SigmoidContrastiveLearning(layers=layers)
    return SoftmaxContrastiveLearning(layers=layers, decoupled_contrastive_learning=decoupled)


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
            layers, decoupled_contrastive_learning, sigmoid_contrastive_loss
        )

    def forward(
        self, *, audio_layers: Tensor, text_layers: Tensor, audio_tokens: Tensor | None = None
    ) -> Tensor:
        """Loss of ``audio_layers (layers, B, n, audio_dim)``, which are averaged over n, and
        ``text_layers (layers, B, 1 + m, text_dim)``, whose first token is read. Of the n, a clip's
        own are the first ``audio_tokens (B,)``, where given, and zeros follow."""
        if audio_tokens is None:
            pooled = audio_layers.mean(dim=2)
        else:
            pooled = audio_layers.sum(dim=2) / audio_tokens[:, None]
        audio = self.audio_norm(pooled) * self.audio_gamma
        audio = torch.baddbmm(self.audio_latent_bias, audio, self.audio_latent_weight)
        text = self.text_norm(text_layers[:, :, 0]) * self.text_gamma
        text = torch.baddbmm(self.text_latent_bias, text, self.text_latent_weight)
        loss: Tensor = self.contrast(F.normalize(audio, dim=-1), F.normalize(text, dim=-1))
        return loss
