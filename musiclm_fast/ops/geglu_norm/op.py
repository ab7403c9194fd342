"""The gated unit of a feed-forward and the norm after it: contract, checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from musiclm_fast._checks import (
    check_floating,
    check_ndim,
    check_same_device,
    check_shape,
    describe,
    fail,
)
from musiclm_fast._dispatch import Dispatcher, torch_backend
from musiclm_fast.ops import _compiled, _triton_target
from musiclm_fast.ops.geglu_norm import _cpp, _triton
from musiclm_fast.ops.geglu_norm.reference import geglu_norm_reference


def geglu_norm(x: Tensor, gamma: Tensor, beta: Tensor, *, backend: str | None = None) -> Tensor:
    """A GEGLU with exact gelu, followed by a layer norm.

    ::

        values, gates = halves of x, the first h of each
        out           = layer_norm(values * gelu(gates)) * gamma + beta,   then zeros up to p

    The padding from h to p serves the matrix products on either side, which are slow for widths
    such as 1365. Only x is kept for the gradient.

    Args:
        x: ``(..., 2p)`` floating, p at least h; entries beyond h in each half are ignored.
        gamma: ``(h,)``.
        beta: ``(h,)``.
        backend: ``"cpp"``, ``"triton"`` or ``"torch"``; None takes the first that supports the
            call.

    Returns:
        ``(..., p)``. Gradients reach all three.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is not as above.
        BackendError: the named backend cannot run this call.

    Sources: https://arxiv.org/abs/2002.05202 (GEGLU), https://arxiv.org/abs/2110.09456 (the norm).
    """
    check_ndim("gamma", gamma, 1, "(h,)")
    check_floating("x", x)
    if x.ndim == 0 or x.shape[-1] % 2 or x.shape[-1] < 2 * gamma.shape[0]:
        fail("x", describe(x), f"shape (..., 2p), p at least h = {gamma.shape[0]}")
    check_shape("beta", beta, (gamma.shape[0],), "(h,)")
    check_same_device("x", x, gamma=gamma, beta=beta)
    arguments = dict(x=x, gamma=gamma, beta=beta)
    out: Tensor = dispatcher.select(backend, x.device, **arguments).run(**arguments)
    return out


dispatcher = Dispatcher(
    "geglu_norm",
    [
        _compiled.cpp_backend(_cpp.supports, _cpp.run),
        _triton_target.triton_backend(_triton.supports, _triton.run, _triton.self_check),
        torch_backend(geglu_norm_reference),
    ],
)
