"""Mixing of residual streams around a branch: contract, checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from musiclm_fast._checks import check_floating, check_same_device, check_shape, describe, fail
from musiclm_fast._dispatch import Dispatcher, torch_backend
from musiclm_fast.ops import _compiled, _triton_target
from musiclm_fast.ops.hyper_connection import _cpp, _triton
from musiclm_fast.ops.hyper_connection.reference import hyper_connection_reference


def hyper_connection(
    streams: Tensor,
    beta: Tensor | None,
    branch: Tensor | None,
    weights: Tensor,
    scales: Tensor,
    offsets: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a branch's output to its streams, then mix them for the next branch.

    ::

        x[t]     = streams[t] + beta[t] branch                       t of s streams
        w[t]     = scales * tanh(<x[t], weights> / max(|x[t]|, 1e-12)) + offsets[t]
        input    = sum_t w[t, 0] x[t]
        mixed[u] = sum_t w[t, 1 + u] x[t]
        beta'[u] = w[u, s + 1]

    The next branch takes ``input``; the next call takes its output, ``mixed`` and ``beta'``. Adding
    and mixing take one pass: the streams are read and written once.

    Args:
        streams: ``(..., s, dim)`` floating.
        beta: ``(..., s)``, or None if no branch comes before.
        branch: ``(..., dim)``, or None.
        weights: ``(dim, s + 2)``.
        scales: ``(s + 2,)``.
        offsets: ``(s, s + 2)``.
        backend: ``"cpp"``, ``"triton"`` or ``"torch"``; None takes the first that supports the
            call.

    Returns:
        ``input`` ``(..., dim)``, ``mixed`` ``(..., s, dim)`` and ``beta'`` ``(..., s)``. Gradients
        reach all arguments.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is not as above.
        BackendError: the named backend cannot run this call.

    Source: https://arxiv.org/abs/2409.19606, algorithm 2.
    """
    if not isinstance(streams, Tensor) or streams.ndim < 2:
        fail("streams", describe(streams), "shape (..., s, dim)")
    check_floating("streams", streams)
    *batch, count, dim = streams.shape
    if (beta is None) != (branch is None):
        fail("beta, branch", "one of them", "both or none")
    if beta is not None and branch is not None:
        check_shape("beta", beta, (*batch, count), "(..., s)")
        check_shape("branch", branch, (*batch, dim), "(..., dim)")
    check_shape("weights", weights, (dim, count + 2), "(dim, s + 2)")
    check_shape("scales", scales, (count + 2,), "(s + 2,)")
    check_shape("offsets", offsets, (count, count + 2), "(s, s + 2)")
    check_same_device(
        "streams", streams, beta=beta, branch=branch, weights=weights, scales=scales,
        offsets=offsets,
    )  # fmt: skip
    arguments = dict(
        streams=streams, beta=beta, branch=branch, weights=weights, scales=scales, offsets=offsets
    )
    result: tuple[Tensor, Tensor, Tensor]
    result = dispatcher.select(backend, streams.device, **arguments).run(**arguments)
    return result


dispatcher = Dispatcher(
    "hyper_connection",
    [
        _compiled.cpp_backend(_cpp.supports, _cpp.run),
        _triton_target.triton_backend(_triton.supports, _triton.run, _triton.self_check),
        torch_backend(hyper_connection_reference),
    ],
)
