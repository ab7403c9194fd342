# mypy: ignore-errors
"""Triton kernels of the mixing of residual streams: one pass over a token's streams per direction.

A token's streams ``x`` (S, D) lie in registers. The columns of the mix are taken one after another:
j = 0 makes the branch's input, 1 to S the mixed streams, S + 1 the weights of the next branch.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(1e-24)  # squared norm


@triton.jit
def _read(base, columns, D: tl.constexpr, BLOCK_D: tl.constexpr):
    # (BLOCK_D,) in float32, zeros from D on
    if BLOCK_D == D:
        return tl.load(base + columns).to(tl.float32)
    return tl.load(base + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def _write(base, columns, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    if BLOCK_D == D:
        tl.store(base + columns, value.to(base.dtype.element_ty))
    else:
        tl.store(base + columns, value.to(base.dtype.element_ty), mask=columns < D)


@triton.jit
def _streams(streams, beta, branch, token, S: tl.constexpr, D: tl.constexpr,
             BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    # A token's streams with the branch's output added.
    stream = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    where = streams + token * (S * D) + stream[:, None] * D + columns[None, :]
    if BLOCK_S == S and BLOCK_D == D:
        x = tl.load(where).to(tl.float32)
    else:
        mask = (stream < S)[:, None] & (columns < D)[None, :]
        x = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    if branch is not None:
        factor = tl.load(beta + token * S + stream, mask=stream < S, other=0.0).to(tl.float32)
        x += factor[:, None] * _read(branch + token * D, columns, D, BLOCK_D)[None, :]
    return x


@triton.jit
def hyper_forward_kernel(
    streams, beta, branch, weights, scales, offsets, branch_input, mixed, beta_out, kept, inverse,
    S: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A token's outputs; for the gradient z and its tanh, kept (N, 2, S, S + 2), and 1/|x| (N, S).

    The inverse of a stream shorter than 1e-12 is -1e12: it is divided by a constant.
    """
    token = tl.program_id(0).to(tl.int64)
    stream = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    real = stream < S
    x = _streams(streams, beta, branch, token, S, D, BLOCK_S, BLOCK_D)
    square = tl.sum(x * x, axis=1)
    short = square <= SMALLEST
    norm = tl.rsqrt(tl.maximum(square, SMALLEST))
    tl.store(inverse + token * S + stream, tl.where(short, -norm, norm), mask=real)
    kept += token * (2 * S * (S + 2))
    for j in tl.static_range(S + 2):
        z = tl.sum(x * _read(weights + j * D, columns, D, BLOCK_D)[None, :], axis=1) * norm
        e = tl.exp2(tl.abs(z) * (-2.0 * LOG2E))
        tanh = (1.0 - e) / (1.0 + e)
        tanh = tl.where(z < 0.0, -tanh, tanh)
        tl.store(kept + stream * (S + 2) + j, z, mask=real)
        tl.store(kept + (S + stream) * (S + 2) + j, tanh, mask=real)
        offset = tl.load(offsets + stream * (S + 2) + j, mask=real, other=0.0).to(tl.float32)
        weight = tl.load(scales + j).to(tl.float32) * tanh + offset
        if j == S + 1:
            out = weight.to(beta_out.dtype.element_ty)
            tl.store(beta_out + token * S + stream, out, mask=real)
        else:
            if j == 0:
                row = branch_input + token * D
            else:
                row = mixed + (token * S + j - 1) * D
            _write(row, columns, tl.sum(weight[:, None] * x, axis=0), D, BLOCK_D)


@triton.jit
def hyper_backward_kernel(
    grad_input, grad_mixed, grad_beta, streams, beta, branch, weights, scales, offsets, kept,
    inverse, dx, dbeta, dbranch, partial, tokens, span, count,
    S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_MIX: tl.constexpr,
):  # fmt: skip
    """The gradients of a span of tokens, and its sums for the parameters.

    partial (programs, (S + 2) (D + 2 S)): sums for the weights (S + 2, D); of the mix's gradient
    (S, S + 2); of that times the tanh. One stream is taken after another: beside the sums for the
    weights, registers do not hold all of them.
    """
    MIX: tl.constexpr = S * (S + 2)
    # Four in a row for every dtype, so that all tiles are spread over the threads alike.
    lanes = tl.arange(0, BLOCK_D)
    columns = lanes // 4 * 4 + lanes % 4
    place = tl.arange(0, BLOCK_MIX)
    dweights = (tl.zeros((BLOCK_D,), tl.float32),) * (S + 2)
    dmix = tl.zeros((BLOCK_MIX,), tl.float32)
    dscaled = tl.zeros((BLOCK_MIX,), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * span
    for token in range(begin, tl.minimum(begin + span, tokens)):
        mix = tl.zeros((BLOCK_MIX,), tl.float32)
        if branch is not None:
            by_branch = tl.zeros((BLOCK_D,), tl.float32)
        for t in range(count):  # S, but not unrolled: registers are scarce
            x = _read(streams + (token * S + t) * D, columns, D, BLOCK_D)
            if branch is not None:
                factor = tl.load(beta + token * S + t).to(tl.float32)
                x += factor * _read(branch + token * D, columns, D, BLOCK_D)
            signed = tl.load(inverse + token * S + t)
            norm = tl.abs(signed)
            radial = 0.0
            grad_x = tl.zeros((BLOCK_D,), tl.float32)
            row_mix = tl.zeros((BLOCK_MIX,), tl.float32)
            for j in tl.static_range(S + 2):
                where = kept + token * (2 * MIX) + t * (S + 2) + j
                z = tl.load(where)
                tanh = tl.load(where + MIX)
                scale = tl.load(scales + j).to(tl.float32)
                if j == S + 1:
                    grad_mix = tl.load(grad_beta + token * S + t).to(tl.float32)
                else:
                    if j == 0:
                        row = grad_input + token * D
                    else:
                        row = grad_mixed + (token * S + j - 1) * D
                    grad = _read(row, columns, D, BLOCK_D)
                    grad_mix = tl.sum(x * grad)
                    offset = tl.load(offsets + t * (S + 2) + j).to(tl.float32)
                    grad_x += (scale * tanh + offset) * grad
                row_mix = tl.where(place % (S + 2) == j, grad_mix, row_mix)
                grad_z = grad_mix * scale * (1.0 - tanh * tanh)
                radial += grad_z * z
                grad_z *= norm
                grad_x += grad_z * _read(weights + j * D, columns, D, BLOCK_D)
                dweights = dweights[:j] + (dweights[j] + grad_z * x,) + dweights[j + 1 :]
            mix = tl.where(place // (S + 2) == t, row_mix, mix)
            grad_x -= tl.where(signed < 0.0, 0.0, radial * norm * norm) * x
            _write(dx + (token * S + t) * D, columns, grad_x, D, BLOCK_D)
            if branch is not None:  # read again: registers are scarce
                added = _read(branch + token * D, columns, D, BLOCK_D)
                by_beta = tl.sum(grad_x * added).to(dbeta.dtype.element_ty)
                tl.store(dbeta + token * S + t, by_beta)
                by_branch += factor * grad_x
        if branch is not None:
            _write(dbranch + token * D, columns, by_branch, D, BLOCK_D)
        dmix += mix
        dscaled += mix * tl.load(
            kept + token * (2 * MIX) + MIX + place, mask=place < MIX, other=0.0
        )
    partial += tl.program_id(0).to(tl.int64) * ((S + 2) * (D + 2 * S))
    for j in tl.static_range(S + 2):
        _write(partial + j * D, columns, dweights[j], D, BLOCK_D)
    partial += (S + 2) * D
    tl.store(partial + place, dmix, mask=place < MIX)
    tl.store(partial + MIX + place, dscaled, mask=place < MIX)
