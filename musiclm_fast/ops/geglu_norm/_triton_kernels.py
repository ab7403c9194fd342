# mypy: ignore-errors
"""Triton kernels of the gated unit and its norm: a program takes a span of rows, one after another.

A row lies in registers between the unit and the norm. Its columns are two blocks, of FIRST and
SECOND: one block of the next power of two would be a third padding at the usual widths, 4/3 of a
power of two. FIRST is at most the hidden width, so that its loads need no mask. SECOND reads up to
the padded width, whose divisibility keeps the loads 16 bytes wide, and drops what it read beyond
the hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-5)  # torch.nn.functional.layer_norm's
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _upper_tail(a):
    # The normal distribution's probability above a >= 0 as 2^polynomial: of a fit with the least
    # absolute error, 8e-9; 6e-8 in float32. Beyond the fit's end at 6 it falls to 0.
    p = -2.7721912e-6 * a + 3.8622195e-5
    p = p * a - 1.8255341e-4
    p = p * a - 1.4585840e-4
    p = p * a + 7.0754592e-3
    p = p * a - 5.2505020e-2
    p = p * a - 4.5920491e-1
    p = p * a - 1.1511058
    p = p * a - 1.0
    return tl.exp2(p)


@triton.jit
def _read(row, columns, padded, MASKED: tl.constexpr):
    # Columns of a row in float32; beyond the padded width 0.
    if MASKED:
        return tl.load(row + columns, mask=columns < padded, other=0.0).to(tl.float32)
    return tl.load(row + columns).to(tl.float32)


@triton.jit
def _write(row, columns, padded, hidden, value, MASKED: tl.constexpr):
    # The same columns, zeros from the hidden to the padded width.
    if MASKED:
        value = tl.where(columns < hidden, value, 0.0)
        tl.store(row + columns, value.to(row.dtype.element_ty), mask=columns < padded)
    else:
        tl.store(row + columns, value.to(row.dtype.element_ty))


@triton.jit
def _unit(row, columns, padded, hidden, MASKED: tl.constexpr):
    # values * gelu(gates), 0 beyond the hidden width
    values = _read(row, columns, padded, MASKED)
    gates = _read(row + padded, columns, padded, MASKED)
    size = tl.abs(gates)
    unit = values * (tl.maximum(gates, 0.0) - size * _upper_tail(size))
    return tl.where(columns < hidden, unit, 0.0) if MASKED else unit


@triton.jit
def geglu_forward_kernel(
    x, gamma, beta, out, mean, rstd, rows, span, hidden, padded,
    FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Out (rows, padded), and each row's mean and reciprocal deviation, of x (rows, 2 padded)."""
    first = tl.arange(0, FIRST)
    second = FIRST + tl.arange(0, SECOND)
    inside = second < hidden
    gamma1 = tl.load(gamma + first).to(tl.float32)
    gamma2 = tl.load(gamma + second, mask=inside, other=0.0).to(tl.float32)
    beta1 = tl.load(beta + first).to(tl.float32)
    beta2 = tl.load(beta + second, mask=inside, other=0.0).to(tl.float32)
    begin = tl.program_id(0).to(tl.int64) * span
    for row in range(begin, tl.minimum(begin + span, rows)):
        x_row = x + row * (2 * padded)
        out_row = out + row * padded
        u1 = _unit(x_row, first, padded, hidden, False)
        u2 = _unit(x_row, second, padded, hidden, True)
        center = (tl.sum(u1) + tl.sum(u2)) / hidden
        u1 -= center
        u2 = tl.where(inside, u2 - center, 0.0)
        scale = tl.rsqrt((tl.sum(u1 * u1) + tl.sum(u2 * u2)) / hidden + NORM_EPS)
        _write(out_row, first, padded, hidden, u1 * scale * gamma1 + beta1, False)
        _write(out_row, second, padded, hidden, u2 * scale * gamma2 + beta2, True)
        tl.store(mean + row, center)
        tl.store(rstd + row, scale)


@triton.jit
def _terms(x_row, grad_row, columns, padded, hidden, gamma, center, scale, MASKED: tl.constexpr):
    # The output's gradient, normed values, their gradient, and the unit's slopes by values and
    # gates; the first three are 0 beyond the hidden width.
    values = _read(x_row, columns, padded, MASKED)
    gates = _read(x_row + padded, columns, padded, MASKED)
    dz = _read(grad_row, columns, padded, MASKED)
    tail = _upper_tail(tl.abs(gates))
    phi = tl.where(gates < 0.0, tail, 1.0 - tail)
    gelu = gates * phi
    slope = phi + gates * (tl.exp2(gates * gates * (-0.5 * LOG2E)) * 0.3989422804)
    normed = (values * gelu - center) * scale
    if MASKED:
        dz = tl.where(columns < hidden, dz, 0.0)
        normed = tl.where(columns < hidden, normed, 0.0)
    return dz, normed, dz * gamma, gelu, values * slope


@triton.jit
def geglu_backward_kernel(
    grad, x, gamma, mean, rstd, dx, partial, rows, span, hidden, padded,
    FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Dx (rows, 2 padded), and the span's sums for gamma and beta, partial (programs, 2, hidden).

    With y the normed values and dy = grad * gamma, a row's unit has the gradient
    ``(dy - mean(dy) - y mean(dy y)) * rstd``.
    """
    first = tl.arange(0, FIRST)
    second = FIRST + tl.arange(0, SECOND)
    inside = second < hidden
    gamma1 = tl.load(gamma + first).to(tl.float32)
    gamma2 = tl.load(gamma + second, mask=inside, other=0.0).to(tl.float32)
    dgamma1 = tl.zeros((FIRST,), tl.float32)
    dgamma2 = tl.zeros((SECOND,), tl.float32)
    dbeta1 = tl.zeros((FIRST,), tl.float32)
    dbeta2 = tl.zeros((SECOND,), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * span
    for row in range(begin, tl.minimum(begin + span, rows)):
        x_row = x + row * (2 * padded)
        dx_row = dx + row * (2 * padded)
        grad_row = grad + row * padded
        center = tl.load(mean + row)
        scale = tl.load(rstd + row)
        dz1, y1, dy1, by_values1, by_gates1 = _terms(
            x_row, grad_row, first, padded, hidden, gamma1, center, scale, False
        )
        dz2, y2, dy2, by_values2, by_gates2 = _terms(
            x_row, grad_row, second, padded, hidden, gamma2, center, scale, True
        )
        dgamma1 += dz1 * y1
        dgamma2 += dz2 * y2
        dbeta1 += dz1
        dbeta2 += dz2
        shift = (tl.sum(dy1) + tl.sum(dy2)) / hidden
        along = (tl.sum(dy1 * y1) + tl.sum(dy2 * y2)) / hidden
        du1 = (dy1 - shift - y1 * along) * scale
        du2 = (dy2 - shift - y2 * along) * scale
        _write(dx_row, first, padded, hidden, du1 * by_values1, False)
        _write(dx_row, second, padded, hidden, du2 * by_values2, True)
        _write(dx_row + padded, first, padded, hidden, du1 * by_gates1, False)
        _write(dx_row + padded, second, padded, hidden, du2 * by_gates2, True)
    partial += tl.program_id(0) * (2 * hidden)
    tl.store(partial + first, dgamma1)
    tl.store(partial + second, dgamma2, mask=inside)
    tl.store(partial + hidden + first, dbeta1)
    tl.store(partial + hidden + second, dbeta2, mask=inside)
