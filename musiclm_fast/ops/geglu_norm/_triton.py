"""The Triton backend: choice of blocks, launches, registration, self-check.

The kernels lie in ``_triton_kernels.py`` and are imported by the first call, so importing this
file needs neither Triton nor a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from musiclm_fast._oracle import first_difference, gradients, to_float64
from musiclm_fast._self_check import in_default_modes
from musiclm_fast.ops import _triton_target
from musiclm_fast.ops.geglu_norm import _autograd
from musiclm_fast.ops.geglu_norm._parity import geglu_norm_inputs
from musiclm_fast.ops.geglu_norm.reference import geglu_norm_reference

# Of x, twice the padded width: what 8 warps' registers hold of a row in the backward.
MAX_WIDTH = 6_144
# Eight and three for each of an H100's multiprocessors, as many as it holds at a time at width
# 1,365. In the backward each adds one row to the partial sums of gamma's and beta's gradients.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 1056, 396


def supports(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[bool, str]:
    """Whether the kernels take this call, from device, dtypes and widths alone."""
    if gamma.shape[0] == 0:
        return False, "there is no hidden unit"
    return _triton_target.supports(x, MAX_WIDTH, gamma=gamma, beta=beta)


def run(**arguments: Tensor) -> Tensor:
    """Run the op on arguments that :func:`supports` accepts."""
    return _autograd.run(torch.ops.musiclm_fast.geglu_norm_forward_triton, **arguments)


def forward(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``musiclm_fast::geglu_norm_forward_triton``."""
    out, mean, rstd = _autograd.empty_results(x)
    span = -(-x.shape[0] // FORWARD_PROGRAMS)
    _launch("geglu_forward_kernel", 24, span, x, gamma, beta=beta, out=out, mean=mean, rstd=rstd)
    return out, mean, rstd


def backward(
    grad: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``musiclm_fast::geglu_norm_backward_triton``."""
    dx = torch.empty_like(x)
    span = -(-x.shape[0] // BACKWARD_PROGRAMS)
    partial = x.new_empty(-(-x.shape[0] // max(span, 1)), 2, gamma.shape[0], dtype=torch.float32)
    _launch(
        "geglu_backward_kernel", 12, span, x, gamma, grad=grad, mean=mean, rstd=rstd, dx=dx,
        partial=partial,
    )  # fmt: skip
    dgamma, dbeta = partial.sum(dim=0)
    # Copies where no cast makes one: an op's results share no memory.
    return dx, dgamma.to(gamma.dtype, copy=True), dbeta.to(beta.dtype, copy=True)


def _launch(
    name: str, a_thread: int, span: int, x: Tensor, gamma: Tensor, **others: Tensor
) -> None:
    # A program per span of rows, its columns in two blocks, about that many of them a thread.
    from musiclm_fast.ops.geglu_norm import _triton_kernels

    rows, width = x.shape
    hidden, padded = gamma.shape[0], width // 2
    first = 1 << max((hidden - 1).bit_length() - 1, 0)
    second = 1 << max(padded - first - 1, 0).bit_length()
    amd = _triton_target.family(_triton_target.target(x.device)) == "amd"
    warps = -(-(first + second) // (a_thread * (64 if amd else 32)))
    options = dict(num_warps=min(1 << (warps - 1).bit_length(), 8), num_stages=1)
    if not amd:
        # Three programs of 4 warps; more where each value has its own address. Without a limit the
        # assembler may spill to fit one program more.
        options["maxnreg"] = 168 if padded % 8 == 0 else 255
    with _triton_target.device_guard(x.device):
        _triton_target.launch(
            getattr(_triton_kernels, name), -(-rows // max(span, 1)),
            dict(x=x, gamma=gamma, **others, rows=rows, span=span, hidden=hidden, padded=padded,
                 FIRST=first, SECOND=second),
            options,
        )  # fmt: skip


@in_default_modes
def self_check(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare output and all gradients with the float64 reference, with and without padding.

    Returns:
        None, or what went wrong first.
    """
    rows = 3000 if device.type == "cuda" else 8  # several a program; the interpreter is slow
    for hidden, padded in ((85, 96), (40, 40)):
        inputs = geglu_norm_inputs((rows,), hidden, padded, dtype=dtype, device=device)
        grad = torch.linspace(-1.0, 1.0, rows * padded, device=device).view(rows, padded)
        results = []
        for function, given in (
            (run, inputs),
            (geglu_norm_reference, inputs),
            (geglu_norm_reference, to_float64(inputs)),
        ):
            out = function(**given)
            results.append({"out": out, **gradients(out, given, grad)})
        problem = first_difference(f"{dtype}, {hidden} of {padded}", results, dtype=dtype)
        if problem is not None:
            return problem
    return None


_triton_target.define("geglu_norm_forward_triton", _autograd.FORWARD_SCHEMA, forward)
_triton_target.define("geglu_norm_backward_triton", _autograd.BACKWARD_SCHEMA, backward)
_autograd.register("_triton")
