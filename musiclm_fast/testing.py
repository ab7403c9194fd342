"""Tools for parity tests and benchmarks: the tolerance oracle, poisoned memory, input makers.

The rule for every kernel: its error against the float64 reference is at most twice the error of
the same-dtype torch path, plus a floor of a few units in the last place of the largest value::

    max|ours - oracle| <= 2 max|same_dtype - oracle| + floor_ulps * eps(dtype) * max|oracle|

The factor lets a kernel sum in another order; the floor covers outputs on which the torch path
happens to be exact. Where an intermediate result is rounded and the output is sensitive to it, the
floor also has that rounding's effect: eps times a condition number, computed in float64 from the
inputs (:func:`attention_rounding`, :func:`contrastive_rounding`). Nothing here is tuned per op,
device or shape.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

FLOOR_ULPS = 8.0


def assert_close_to_oracle(
    name: str,
    actual: Tensor,
    same_dtype: Tensor,
    oracle: Tensor,
    *,
    floor_ulps: float = FLOOR_ULPS,
    dtype: torch.dtype | None = None,
    rounding: float = 0.0,
) -> None:
    """Check ``actual`` against a float64 oracle by the module's rule.

    Args:
        name: what is compared, for the message.
        actual: the kernel's result.
        same_dtype: the torch path's result, computed in the kernel's dtype.
        oracle: the torch path's result in float64.
        floor_ulps: the floor, in units of eps(dtype) * max|oracle|.
        dtype: whose eps counts (default: ``actual``'s); the input's dtype where a kernel returns
            float32 gradients of values that were computed from half precision.
        rounding: a bound on the effect of rounding intermediate results, added to the floor.

    Raises:
        AssertionError: shapes differ, ``actual`` is not finite where the oracle is, or the error
            is too large; with all three numbers.
    """
    if actual.shape != oracle.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)} != {tuple(oracle.shape)}")
    if oracle.numel() == 0:
        return
    eps = torch.finfo(dtype or actual.dtype).eps
    oracle = oracle.detach().double()
    error = (actual.detach().double() - oracle).abs().max().item()
    yardstick = (same_dtype.detach().double() - oracle).abs().max().item()
    floor = floor_ulps * eps * oracle.abs().max().item() + rounding
    floor += torch.finfo(torch.float32).tiny
    if not error <= 2.0 * yardstick + floor:
        raise AssertionError(
            f"{name}: error {error:.3e} > 2 x {yardstick:.3e} (torch path) + {floor:.3e} (floor)"
        )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every new uninitialised tensor with NaN (integers with their maximum).

    An output that a kernel does not write then shows. Only as a warning does torch then say what
    it cannot do deterministically: on CUDA that would be every product of matrices.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fill


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


def attention_rounding(arguments: dict[str, Any], grad: Tensor, **options: Any) -> dict[str, float]:
    """Effect of rounding ``ds = dloss / dsimilarity`` on gradients that add up all pairs' ds.

    A bias table's entry has the sum of ds over the pairs that read it, a scale of the QK norm the
    sum of ``ds q k``, with signs: where all keys of a query share an entry, its part is exactly
    zero. ``ds = P (dP - delta)``, with ``dP = <dO, v>`` and ``delta = sum P dP``, is known to eps
    of the inputs' dtype, in which it enters a product, and to float32's eps of what its sums add
    up, ``P (<|dO|, |v|> + sum P <|dO|, |v|>)``; the gradient to the sum of these over its pairs.

    Args:
        arguments: of :func:`musiclm_fast.ops.attention`, tensors alone.
        grad: ``(B, H, M, D)``, the output's gradient.
        **options: its other arguments.

    Returns:
        The bound for ``bias_table``, ``q_scale`` and ``k_scale``, where they are given.
    """
    from musiclm_fast.ops.attention.reference import attention_reference, offset_index

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
        q, k = (nn.functional.normalize(x, dim=-1).abs() for x in (q, k))
        terms = (q * (error @ k)).sum((0, 1, 2))  # (D,), without either scale
        sizes["q_scale"] = terms * wide["k_scale"].abs()
        sizes["k_scale"] = terms * wide["q_scale"].abs()
    return {name: x.max().item() if x.numel() else 0.0 for name, x in sizes.items()}


def contrastive_rounding(
    arguments: dict[str, Any], kind: str, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Effect of rounding similarities and their gradient on each result of a contrastive loss.

    With ``s = temperature <audio_i, text_j> + bias`` and ``ds = dloss / ds_ij``, both exact. Every
    algorithm rounds s and lse in float32, by ``eps32 S`` where ``S = max|s|`` or, with an lse,
    ``max|s| + ln B``, before it takes differences ``s - lse``, so that each ds is known to that
    relative error; and ds is rounded to the latents' dtype before it enters a product. A result
    is a sum over pairs, so to first order it is known to ``(eps32 S + eps(dtype))`` times its sum
    of absolute values::

        loss         sum |ds|                      (its derivative by s is ds)
        audio        max_ik temperature sum_j |ds_ij| |text_jk|,  text likewise
        temperature  sum |ds| |<audio_i, text_j>|
        bias         sum |ds|

    Args:
        arguments: of :func:`musiclm_fast.ops.contrastive_loss`, tensors alone.
        kind: the loss.
        dtype: in which ds enters its products (default: the latents').

    Returns:
        The bound by result: ``loss`` and each argument's name.
    """
    from musiclm_fast.ops.contrastive.reference import loss_of_similarities

    wide = {name: value.detach().double() for name, value in arguments.items()}
    audio, text = (wide[n] if wide[n].ndim == 3 else wide[n][None] for n in ("audio", "text"))
    factor = wide["temperature"][:, None, None]
    dots = audio @ text.transpose(1, 2)  # (L, B, B)
    sims = dots * factor
    if wide.get("bias") is not None and kind == "sigmoid":
        sims = sims + wide["bias"][:, None, None]
    with torch.enable_grad():
        leaf = sims.requires_grad_()
        ds = torch.autograd.grad(loss_of_similarities(leaf, kind), leaf)[0].abs()
    largest = sims.detach().abs().max().item()
    if kind != "sigmoid":
        largest += math.log(audio.shape[1])
    relative = torch.finfo(torch.float32).eps * largest
    relative += torch.finfo(dtype or arguments["audio"].dtype).eps
    terms = {
        "loss": ds.sum(),
        "audio": ((ds @ text.abs()) * factor).max(),
        "text": ((ds.transpose(1, 2) @ audio.abs()) * factor).max(),
        "temperature": (ds * dots.abs()).sum(dim=(1, 2)).max(),
        "bias": ds.sum(dim=(1, 2)).max(),
    }
    return {name: relative * term.item() for name, term in terms.items()}


def to_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with every floating tensor in float64, as new leaves."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def gradients(output: Tensor, arguments: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """Gradients of ``<output, grad>`` for every argument that requires one, by name."""
    names = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad]
    found = torch.autograd.grad(
        output, [arguments[n] for n in names], grad.to(output.dtype), allow_unused=True
    )
    return {
        n: torch.zeros_like(arguments[n]) if g is None else g
        for n, g in zip(names, found, strict=True)
    }
