"""What a parity check of attention needs: random arguments and the effect of rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast._oracle import to_float64
from musiclm_fast.ops.attention.reference import attention_reference, offset_index


def attention_inputs(
    batch: int = 2,
    heads: int = 2,
    queries: int = 17,
    keys: int | None = None,
    head_dim: int = 32,
    *,
    kv_heads: int | None = None,
    radius: int | None = 8,
    codes_per_sample: bool = False,
    key_mask: bool = False,
    lengths: bool = False,
    qk_norm: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments for :func:`musiclm_fast.ops.attention`; floats require gradients.

    ``radius=None`` leaves the bias out. q, k and v are strided views of ``(B, N, H, D)`` tensors,
    as the modules make them.
    """
    keys = queries if keys is None else keys
    kv_heads = heads if kv_heads is None else kv_heads
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, shift: float = 0.0, to: torch.dtype = dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator) + shift
        return values.to(device=device, dtype=to).requires_grad_()

    arguments: dict[str, Any] = {
        "q": normal(batch, queries, heads, head_dim).transpose(1, 2),
        "k": normal(batch, keys, kv_heads, head_dim).transpose(1, 2),
        "v": normal(batch, keys, kv_heads, head_dim).transpose(1, 2),
    }
    for name in ("q", "k", "v"):
        arguments[name] = arguments[name].detach().requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if radius is not None:
        arguments["bias_table"] = normal(heads, 2 * radius + 1, to=wide)
        for name, length in (("q_codes", queries), ("k_codes", keys)):
            shape = (batch, length) if codes_per_sample else (length,)
            codes = torch.randint(
                0, radius + radius // 2 + 1, shape, generator=generator, dtype=torch.int32
            )
            arguments[name] = codes.sort(-1).values.to(device)
    if key_mask:
        mask = torch.rand(batch, keys, generator=generator) < 0.7
        arguments["key_padding_mask"] = mask.to(device)
    if lengths:
        own = torch.randint(0, keys + 1, (batch,), generator=generator, dtype=torch.int32)
        arguments["key_lengths"] = own.to(device)
    if qk_norm:
        arguments["q_scale"] = normal(head_dim, shift=1.0, to=wide)
        arguments["k_scale"] = normal(head_dim, shift=1.0, to=wide)
    return arguments


def attention_rounding(arguments: dict[str, Any], grad: Tensor, **options: Any) -> dict[str, float]:
    """Effect of rounding ``ds = dloss / dsimilarity`` on gradients that add up all pairs' ds.

    The gradient of a bias entry is the sum of ds over the pairs that read it; that of a QK norm
    scale is the sum of ``ds q k``. Terms cancel: where all keys of a query share an entry, they add
    up to exactly zero. ``ds = P (dP - delta)``, with ``dP = <dO, v>`` and ``delta = sum P dP``, is
    known to eps of the inputs' dtype, in which it enters a product, and to float32's eps of the
    terms of its sums, ``P (<|dO|, |v|> + sum P <|dO|, |v|>)``. The gradient is known to the sum of
    these errors over its pairs.

    Args:
        arguments: of :func:`musiclm_fast.ops.attention`, tensors alone.
        grad: ``(B, H, M, D)``, the output's gradient.
        **options: its other arguments.

    Returns:
        The bound for ``bias_table``, ``q_scale`` and ``k_scale``, where they are given.
    """
    wide = {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in to_float64(arguments).items()
    }
    q, k, v = wide["q"], wide["k"], wide["v"]
    (batch, heads), (kv_heads, keys) = q.shape[:2], k.shape[1:3]
    identity = torch.eye(keys, dtype=q.dtype, device=q.device).expand(batch, kv_heads, -1, -1)
    kept = attention_reference(**{**wide, "v": identity}, **options)  # P, without what is dropped
    weights = attention_reference(**{**wide, "v": identity}, **{**options, "dropout_p": 0.0})
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    d_out = grad.double()
    dp = d_out @ v.mT  # (B, H, M, N)
    ds = (kept * dp - weights * (kept * dp).sum(-1, keepdim=True)).abs()
    dp = d_out.abs() @ v.abs().mT
    added = kept * dp + weights * (kept * dp).sum(-1, keepdim=True)
    eps, eps32 = (torch.finfo(t).eps for t in (arguments["q"].dtype, torch.float32))
    error = eps * ds + min(eps, eps32) * added
    sizes = {}
    if "bias_table" in wide:
        table = torch.zeros_like(wide["bias_table"])
        index = offset_index(wide["q_codes"], wide["k_codes"], table.shape[1] // 2)
        index = index.expand(batch, -1, -1).flatten()  # (B M N)
        sizes["bias_table"] = table.index_add_(1, index, error.transpose(0, 1).flatten(1))
    if "q_scale" in wide:
        scale = options.get("scale")
        error = error * abs(q.shape[-1] ** -0.5 if scale is None else scale)
        q, k = (F.normalize(x, dim=-1).abs() for x in (q, k))
        terms = (q * (error @ k)).sum((0, 1, 2))  # (D,), without either scale
        sizes["q_scale"] = terms * wide["k_scale"].abs()
        sizes["k_scale"] = terms * wide["q_scale"].abs()
    return {name: x.max().item() if x.numel() else 0.0 for name, x in sizes.items()}
