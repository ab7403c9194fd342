"""What a parity check of a contrastive loss needs: random arguments and the effect of rounding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from musiclm_fast.ops.contrastive.reference import loss_of_similarities, positive_weights


def contrastive_inputs(
    batch: int,
    depth: int,
    layers: int | None = None,
    *,
    temperature: float = 10.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments for :func:`musiclm_fast.ops.contrastive_loss`; all require gradients.

    Unit latents whose positives are alike; the parameters differ by layer.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, depth) if layers is None else (layers, batch, depth)
    audio = torch.randn(shape, generator=generator)
    text = audio + torch.randn(shape, generator=generator)
    latents = {"audio": audio, "text": text}
    arguments = {
        name: (x / x.norm(dim=-1, keepdim=True)).to(device=device, dtype=dtype)
        for name, x in latents.items()
    }
    count = layers or 1
    arguments["temperature"] = temperature * torch.linspace(1.0, 0.5, count, device=device)
    arguments["bias"] = torch.linspace(-3.0, 1.0, count, device=device)
    return {name: x.requires_grad_() for name, x in arguments.items()}


def contrastive_labels(
    batch: int, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random labels of audio and text ``(B,)``: a third as many as pairs, each on both sides."""
    generator = torch.Generator().manual_seed(seed)
    clips = max(batch // 3, 2)
    names = torch.randint(-(1 << 40), 1 << 40, (clips,), generator=generator)
    sides = []
    for _ in range(2):
        more = torch.randint(clips, (batch - clips,), generator=generator)
        order = torch.randperm(batch, generator=generator)
        sides.append(names[torch.cat((torch.arange(clips), more))[order]].to(device))
    return sides[0], sides[1]


def contrastive_rounding(
    arguments: dict[str, Any],
    kind: str,
    dtype: torch.dtype | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """Effect of rounding similarities and their gradient on each result of a contrastive loss.

    With ``s = temperature <audio_i, text_j> + bias`` and ``ds = dloss / ds_ij``, both exact. Every
    algorithm rounds s and lse in float32, by ``eps32 S`` where ``S = max|s|`` or, with an lse,
    ``max|s| + ln B``, before it takes differences ``s - lse``, so that each ds is known to that
    relative error. ds is rounded to the latents' dtype before it enters a product. A result is a
    sum over pairs, so to first order it is known to ``(eps32 S + eps(dtype))`` times the sum of its
    terms' absolute values::

        loss         sum |ds|                      (its derivative by s is ds)
        audio        max_ik temperature sum_j |ds_ij| |text_jk|,  text likewise
        temperature  sum |ds| |<audio_i, text_j>|
        bias         sum |ds|

    With labels the softmax loss's ds of a positive is a difference, ``e^(s - lse) - 1 / |P|``:
    ``eps32 S`` counts for the absolute values of both, ``eps(dtype)`` for ds.

    Args:
        arguments: of :func:`musiclm_fast.ops.contrastive_loss`, tensors alone.
        kind: the loss.
        dtype: in which ds enters its products (default: the latents').
        labels: of audio and of text.

    Returns:
        The bound by result: ``loss`` and each argument's name.
    """
    wide = {name: value.detach().double() for name, value in arguments.items()}
    audio, text = (wide[n] if wide[n].ndim == 3 else wide[n][None] for n in ("audio", "text"))
    factor = wide["temperature"][:, None, None]
    dots = audio @ text.transpose(1, 2)  # (L, B, B)
    sims = dots * factor
    if wide.get("bias") is not None and kind == "sigmoid":
        sims = sims + wide["bias"][:, None, None]
    with torch.enable_grad():
        leaf = sims.requires_grad_()
        loss = loss_of_similarities(leaf, kind, labels)
        ds = torch.autograd.grad(loss, leaf)[0].abs()
    largest = sims.detach().abs().max().item()
    if kind != "sigmoid":
        largest += math.log(audio.shape[1])
    parts = ds  # absolute values of what ds adds up
    if labels is not None and kind == "softmax":
        same = labels[0][:, None] == labels[1][None, :]
        parts = ds + 2 * positive_weights(same, ds.dtype) / audio.shape[1]
    parts = torch.finfo(torch.float32).eps * largest * parts
    ds = parts + torch.finfo(dtype or arguments["audio"].dtype).eps * ds
    terms = {
        "loss": ds.sum(),
        "audio": ((ds @ text.abs()) * factor).max(),
        "text": ((ds.transpose(1, 2) @ audio.abs()) * factor).max(),
        "temperature": (ds * dots.abs()).sum(dim=(1, 2)).max(),
        "bias": ds.sum(dim=(1, 2)).max(),
    }
    return {name: term.item() for name, term in terms.items()}
