"""Residual streams: a plain residual and upstream's hyper-connections."""

from __future__ import annotations

from dataclasses import dataclass
from random import randrange

import torch
from torch import Tensor, nn

from musiclm_fast.ops import hyper_connection


@dataclass(frozen=True)
class Streams:
    """Residual streams, and a branch's output that the next connection adds to them.

    Args:
        residual: ``(..., streams, dim)``.
        beta: ``(..., streams)``, weights of the branch's output; None if there is no output yet.
        branch: ``(..., dim)``, or None.
    """

    residual: Tensor
    beta: Tensor | None = None
    branch: Tensor | None = None

    def total(self) -> Tensor:
        """The sum of the streams, ``(..., dim)``."""
        total = self.residual.sum(dim=-2)
        if self.beta is None or self.branch is None:
            return total
        return torch.addcmul(total, self.beta.sum(dim=-1, keepdim=True), self.branch)


class Residual(nn.Module):
    """A branch with one plain residual stream; the interface of :class:`HyperConnection`."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def constants(self) -> None:
        """None: a plain residual has no mixing weights."""

    def width(self, streams: Streams, _: None) -> tuple[Tensor, Streams]:
        """The branch's input and the residual."""
        return streams.residual[..., 0, :], streams

    def depth(self, out: Tensor, streams: Streams) -> Streams:
        """The residual with the branch's output added."""
        return Streams(streams.residual + out[..., None, :])


class _Norm(nn.Module):
    # Scale of an RMS norm, stored as gain - 1 under the hyper-connections package's key
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))


class HyperConnection(nn.Module):
    """Several residual streams, mixed before a branch and fed by it, with learned weights.

    ::

        z         = rms_norm(x)                                     per token and stream
        alpha     = scale_a * tanh(z @ A) + alpha_0                 (streams, 1 + streams)
        beta      = scale_b * tanh(z @ b) + beta_0                  (streams,)
        input     = sum_s alpha[s, 0] x[s]
        x'[t]     = sum_s alpha[s, 1 + t] x[s] + beta[t] branch(input)

    The norm is folded into A and b and divided out of their product. The next connection adds a
    branch's output (:func:`musiclm_fast.ops.hyper_connection`). So the streams are the only tensors
    of their size that are stored. Source: https://arxiv.org/abs/2409.19606, algorithm 2. Parameters
    and their names are those of the hyper-connections package.
    """

    def __init__(self, num_residual_streams: int, *, dim: int, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.norm = _Norm(dim)
        streams = num_residual_streams
        first = torch.zeros(streams, 1)
        first[randrange(streams)] = 1.0
        self.static_alpha = nn.Parameter(torch.cat((first, torch.eye(streams)), dim=1))
        self.dynamic_alpha_fn = nn.Parameter(torch.zeros(dim, streams + 1))
        self.dynamic_alpha_scale = nn.Parameter(torch.ones(()) * 1e-2)
        self.static_beta = nn.Parameter(torch.ones(streams))
        self.dynamic_beta_fn = nn.Parameter(torch.zeros(dim))
        self.dynamic_beta_scale = nn.Parameter(torch.ones(()) * 1e-2)

    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, scales and offsets of the mix, computed once per forward pass.

        Returns:
            ``(dim, streams + 2)`` with the norm's gain, ``(streams + 2,)``,
            ``(streams, streams + 2)``.
        """
        gain = (self.norm.gamma + 1) * self.norm.gamma.shape[0] ** 0.5
        weights = torch.cat((self.dynamic_alpha_fn, self.dynamic_beta_fn[:, None]), dim=1)
        streams = self.static_beta.shape[0]
        scales = torch.cat(
            (self.dynamic_alpha_scale.expand(streams + 1), self.dynamic_beta_scale[None])
        )
        offsets = torch.cat((self.static_alpha, self.static_beta[:, None]), dim=1)
        return weights * gain[:, None], scales, offsets

    def width(
        self, streams: Streams, constants: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Streams]:
        """The branch's input ``(..., dim)`` and the mixed streams, with the output's weights."""
        branch_input, mixed, beta = hyper_connection(
            streams.residual, streams.beta, streams.branch, *constants
        )
        return branch_input, Streams(mixed, beta)

    def depth(self, out: Tensor, streams: Streams) -> Streams:
        """The mixed streams, with the branch's output still to be added by its weights."""
        return Streams(streams.residual, streams.beta, out)
