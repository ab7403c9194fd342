"""The Triton backend: choice of blocks, launches, registration, self-check.

The kernels lie in ``_triton_kernels.py`` and are imported by the first call, so importing this
file needs neither Triton nor a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast._oracle import first_difference, to_float64
from musiclm_fast._self_check import in_default_modes
from musiclm_fast.ops import _triton_target
from musiclm_fast.ops.hyper_connection import _autograd
from musiclm_fast.ops.hyper_connection._parity import hyper_connection_inputs
from musiclm_fast.ops.hyper_connection.reference import hyper_connection_reference

MAX_STREAMS = 8
# Programs of a backward: eight for each of an H100's multiprocessors, as many as it holds at a
# time. Each adds a row of (s + 2) (dim + 2 s) to the partial sums of the parameters' gradients.
PROGRAMS = 1056
KEPT = (2,)  # z and its tanh


def supports(streams: Tensor, **others: Tensor | None) -> tuple[bool, str]:
    """Whether the kernels take this call, from device, dtypes and sizes alone."""
    count = streams.shape[-2]
    if not 0 < count <= MAX_STREAMS:
        return False, f"{count} streams, not 1 to {MAX_STREAMS}"
    return _triton_target.supports(streams, widest(count), **others)


def widest(count: int) -> int:
    """The largest dim: in the backward, registers hold the sums of s + 2 weights of each column."""
    return 2048 if count <= 4 else 1024


def run(**arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op on arguments that :func:`supports` accepts."""
    return _autograd.run(torch.ops.musiclm_fast.hyper_connection_forward_triton, **arguments)


def forward(
    streams: Tensor, beta: Tensor | None, branch: Tensor | None, weights: Tensor, scales: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``musiclm_fast::hyper_connection_forward_triton``."""
    tokens, count, dim = streams.shape
    branch_input, mixed, beta_out, kept, inverse = _autograd.empty_results(streams, KEPT)
    block_s = _power_of_two(count)
    _launch(
        "hyper_forward_kernel", tokens, block_s * _power_of_two(dim) // 64,
        streams=streams, beta=beta, branch=branch, weights=weights, scales=scales,
        offsets=offsets, branch_input=branch_input, mixed=mixed, beta_out=beta_out, kept=kept,
        inverse=inverse, S=count, D=dim, BLOCK_S=block_s, BLOCK_D=_power_of_two(dim),
    )  # fmt: skip
    return branch_input, mixed, beta_out, kept, inverse


def backward(
    grad_input: Tensor, grad_mixed: Tensor, grad_beta: Tensor, streams: Tensor,
    beta: Tensor | None, branch: Tensor | None, weights: Tensor, scales: Tensor, offsets: Tensor,
    kept: Tensor, inverse: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``musiclm_fast::hyper_connection_backward_triton``."""
    tokens, count, dim = streams.shape
    dx, dbeta, dbranch = _autograd.empty_gradients(streams, beta, branch)
    # A thread's columns. Half as many of float32, which moves twice the bytes in the same time.
    columns = 4 if count > 4 else 16 if dim <= 512 and streams.dtype.itemsize == 2 else 8
    span = -(-tokens // PROGRAMS)
    programs = -(-tokens // max(span, 1))
    partial = streams.new_empty(programs, (count + 2) * (dim + 2 * count), dtype=torch.float32)
    _launch(
        "hyper_backward_kernel", programs, _power_of_two(dim) // columns,
        grad_input=grad_input, grad_mixed=grad_mixed, grad_beta=grad_beta, streams=streams,
        beta=beta, branch=branch, weights=weights, scales=scales, offsets=offsets, kept=kept,
        inverse=inverse, dx=dx, dbeta=dbeta, dbranch=dbranch, partial=partial, tokens=tokens,
        span=span, count=count, S=count, D=dim, BLOCK_D=_power_of_two(dim),
        BLOCK_MIX=_power_of_two(count * (count + 2)),
    )  # fmt: skip
    dweights, dmix = partial.sum(dim=0).split([weights.numel(), 2 * offsets.numel()])
    doffsets, dscaled = dmix.view(2, count, count + 2)
    # Copies where no cast makes one: an op's results share no memory.
    return (
        dx, dbeta, dbranch, dweights.view_as(weights).to(weights.dtype, copy=True),
        dscaled.sum(dim=0).to(scales.dtype), doffsets.to(offsets.dtype, copy=True),
    )  # fmt: skip


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _launch(name: str, programs: int, threads: int, **arguments: Any) -> None:
    from musiclm_fast.ops.hyper_connection import _triton_kernels

    device = arguments["streams"].device
    amd = _triton_target.family(_triton_target.target(device)) == "amd"
    options = dict(num_warps=min(max(threads // (64 if amd else 32), 1), 16), num_stages=1)
    if not amd:  # without a limit the assembler spills to fit one program more
        options["maxnreg"] = 255
    with _triton_target.device_guard(device):
        _triton_target.launch(getattr(_triton_kernels, name), programs, arguments, options)


@in_default_modes
def self_check(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare outputs and all gradients with the float64 reference, with a branch and without.

    Returns:
        None, or what went wrong first.
    """
    tokens = 3000 if device.type == "cuda" else 8  # several a program; the interpreter is slow
    for streams, dim, branch in ((4, 64, True), (3, 37, False)):
        inputs = hyper_connection_inputs(
            (tokens,), streams, dim, branch, dtype=dtype, device=device
        )
        results = []
        for function, given in (
            (run, inputs),
            (hyper_connection_reference, inputs),
            (hyper_connection_reference, to_float64(inputs)),
        ):
            outputs = function(**given)
            leaves = {name: leaf for name, leaf in given.items() if leaf is not None}
            grads = [
                torch.linspace(-1.0, 1.0, x.numel(), device=device).view(x.shape).to(x.dtype)
                for x in outputs
            ]
            found = torch.autograd.grad(outputs, list(leaves.values()), grads)
            named = zip(("input", "mixed", "beta'"), outputs, strict=True)
            results.append({**dict(named), **dict(zip(leaves, found, strict=True))})
        problem = first_difference(f"{dtype}, {streams} x {dim}", results, dtype=dtype)
        if problem is not None:
            return problem
    return None


_triton_target.define("hyper_connection_forward_triton", _autograd.FORWARD_SCHEMA, forward)
_triton_target.define("hyper_connection_backward_triton", _autograd.BACKWARD_SCHEMA, backward)
_autograd.register("_triton", KEPT)
