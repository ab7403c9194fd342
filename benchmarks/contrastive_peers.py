"""The peers' fused contrastive losses behind one interface: loss and gradients of a batch.

They are packages for CUDA GPUs (requirements/peers.txt). Each
differs slightly from ours: siglip-kernel learns ln(temperature); memeff's temperature is
a constant; inf-cl computes one direction, in float32, so the symmetric loss takes it twice.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], tuple[Tensor, dict[str, Tensor]]]  # loss, and gradients by name


def siglip_kernel(inputs: dict[str, Any]) -> Step:
    from siglip_kernel import fused_siglip_loss

    audio, text = inputs["audio"], inputs["text"]
    logarithm = inputs["temperature"].detach()[0].log().requires_grad_()
    bias = inputs["bias"].detach()[0].clone().requires_grad_()
    leaves = [audio, text, logarithm, bias]

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        loss = fused_siglip_loss(*leaves)
        found = torch.autograd.grad(loss, leaves)
        return loss, dict(zip(("audio", "text", "log temperature", "bias"), found, strict=True))

    return step


def inf_cl(inputs: dict[str, Any]) -> Step:
    from inf_cl import cal_flash_loss

    audio, text, factor = (inputs[name] for name in ("audio", "text", "temperature"))

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        scale = factor.to(audio.dtype)
        rows = cal_flash_loss(audio, text, scale=scale, head_dim=audio.shape[-1])
        columns = cal_flash_loss(text, audio, scale=scale, head_dim=audio.shape[-1])
        loss = (rows.mean() + columns.mean()) / 2
        found = torch.autograd.grad(loss, [audio, text, factor])
        return loss, dict(zip(("audio", "text", "temperature"), found, strict=True))

    return step


def memeff(inputs: dict[str, Any]) -> Step:
    from memeff import MemoryEfficientCLIPLoss

    audio, text = inputs["audio"], inputs["text"]
    module = MemoryEfficientCLIPLoss(
        temperature=1 / inputs["temperature"].item(), normalized_inputs=True, stable=False
    )

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        loss = module(audio, text)
        found = torch.autograd.grad(loss, [audio, text])
        return loss, dict(zip(("audio", "text"), found, strict=True))

    return step


# Package on PyPI: (kind of loss, its step).
PEERS: dict[str, tuple[str, Callable[[dict[str, Any]], Step]]] = {
    "siglip-kernel": ("sigmoid", siglip_kernel),
    "inf-cl": ("softmax", inf_cl),
    "memeff": ("softmax", memeff),
}


def version(name: str) -> str:
    """The step of an installed peer.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    return importlib.metadata.version(name)


def check(name: str, step: Step, oracle: Tensor, gradients: dict[str, Tensor]) -> None:
    """Raise unless a peer computes the loss that ours computes: within 3%, the effect of bfloat16
    latents and of another summation order.

    Raises:
        AssertionError: naming what differs.
    """
    loss, found = step()
    wanted = {"loss": oracle, **gradients}
    for what, value in {"loss": loss, **found}.items():
        want = wanted[what].double().to(value.device)
        off = (value.double() - want).norm() / want.norm().clamp_min(1e-30)
        if not off <= 0.03:
            raise AssertionError(f"{name}: {what} is off by {off.item():.1%}")
