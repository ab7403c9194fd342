# mypy: ignore-errors
"""Triton kernels of the contrastive losses: a tile of rows against all columns, one side at a time.

``x`` (L, M, D) are the rows of a program, ``y`` (L, N, D) the columns that it runs through; row i's
positive is column i + offset. Each kernel is launched twice, the second time with audio and text
swapped and the offset negated: every result then belongs to one program, so that nothing is added
atomically and results are deterministic. A launch may cut the columns into splits, whose partial
results (SPLITS, L, M, ...) the caller adds up.

Shifts are subtracted before similarities are multiplied by log2(e) for the exponential instruction:
of two numbers near 1,000 the difference is then exact, which costs one more multiplication.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _place(rows, columns, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # This program's first row, its columns [begin, end), its layer, and its place (split, layer).
    blocks = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    first = (pid % blocks) * BLOCK_M
    split = (pid // blocks) % SPLITS
    layer = pid // (blocks * SPLITS)
    span = tl.cdiv(tl.cdiv(columns, BLOCK_N), SPLITS) * BLOCK_N
    begin = split * span
    end = tl.minimum(begin + span, columns)
    layers = tl.num_programs(0) // (blocks * SPLITS)
    return first, begin, end, layer.to(tl.int64), (split * layers + layer).to(tl.int64)


@triton.jit
def _load(base, first, count, stride, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    # Rows [first, first + BLOCK) as (BLOCK, BLOCK_D), zeros beyond count and D.
    rows = first + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None]
    if BLOCK_D != D:
        mask = mask & (dims < D)[None, :]
    where = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    return tl.load(where, mask=mask, other=0.0)


@triton.jit
def _product(x_tile, y_tile, PRECISION: tl.constexpr):
    # (BLOCK_M, BLOCK_N) = x y^T; the same bits in every kernel, and with the sides swapped.
    return tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)


@triton.jit
def logsumexp_kernel(
    x, y, temperature, lse, positive,
    stride_xl, stride_xm, stride_yl, stride_yn, rows, columns, offset,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each row over its split, without the positive: lse (SPLITS, L, M).

    positive (SPLITS, L, M), or None: the positive's similarity, 0 where the split has none; from
    the same product as the others, so that roundings of similarities that are alike cancel.
    """
    first, begin, end, layer, place = _place(rows, columns, SPLITS, BLOCK_M, BLOCK_N)
    factor = tl.load(temperature + layer)
    x_tile = _load(x + layer * stride_xl, first, rows, stride_xm, D, BLOCK_M, BLOCK_D)
    lanes = tl.arange(0, BLOCK_N)
    own = first + tl.arange(0, BLOCK_M) + offset  # column of each row's positive
    highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mine = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        y_tile = _load(y + layer * stride_yl, start, columns, stride_yn, D, BLOCK_N, BLOCK_D)
        s = _product(x_tile, y_tile, PRECISION) * factor
        column = (start + lanes)[None, :]
        hidden = column == own[:, None]
        if positive is not None:
            if (start < first + offset + BLOCK_M) & (start + BLOCK_N > first + offset):
                mine += tl.sum(tl.where(hidden & (column < columns), s, 0.0), axis=1)
        if not EVEN:
            hidden = hidden | (column >= columns)
        s = tl.where(hidden, float("-inf"), s)
        higher = tl.maximum(highest, tl.max(s, axis=1))
        e = tl.exp2((s - higher[:, None]) * LOG2E)
        total = total * tl.exp2((highest - higher) * LOG2E) + tl.sum(e, axis=1)
        highest = higher
    row = first + tl.arange(0, BLOCK_M)
    tl.store(lse + place * rows + row, highest + tl.log(total), mask=row < rows)
    if positive is not None:
        tl.store(positive + place * rows + row, mine, mask=row < rows)


@triton.jit
def _gradient_tiles(
    acc, x_tile, y_base, stride_yn, begin, end, columns, factor, own, weight, shift, positive,
    y_weight, y_shift, D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
    BOUNDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        y_tile = _load(y_base, start, columns, stride_yn, D, BLOCK_N, BLOCK_D)
        column = start + lanes
        in_range = column < columns
        other = tl.load(y_weight + column, mask=in_range, other=0.0)
        dots = _product(x_tile, y_tile, PRECISION)
        if BOUNDED:
            ds = tl.exp2(dots * (factor * LOG2E)) * (weight[:, None] + other[None, :])
        else:
            s = dots * factor
            other_shift = tl.load(y_shift + column, mask=in_range, other=0.0)
            ds = weight[:, None] * tl.exp2((s - shift[:, None]) * LOG2E)
            ds += other[None, :] * tl.exp2((s - other_shift[None, :]) * LOG2E)
            if not EVEN:  # s = 0 there, which may lie far above the row's shift
                ds = tl.where(in_range[None, :], ds, 0.0)
        ds = tl.where(column[None, :] == own[:, None], positive[:, None], ds)
        acc = tl.dot(ds.to(y_tile.dtype), y_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def gradient_kernel(
    x, y, temperature, bounded, x_weight, x_shift, y_weight, y_shift, positive, dx,
    stride_xl, stride_xm, stride_yl, stride_yn, rows, columns, offset,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Dx (SPLITS, L, M, D) = ds @ y, without the factor temperature.

    ``ds = x_weight_i e^(s - x_shift_i) + y_weight_j e^(s - y_shift_j)``, and positive_i for row i's
    positive. Where ``bounded`` (L,) the weights hold e^-shift, and one exponential serves both.
    """
    first, begin, end, layer, place = _place(rows, columns, SPLITS, BLOCK_M, BLOCK_N)
    factor = tl.load(temperature + layer)
    x_tile = _load(x + layer * stride_xl, first, rows, stride_xm, D, BLOCK_M, BLOCK_D)
    row = first + tl.arange(0, BLOCK_M)
    valid = row < rows
    own = row + offset
    weight = tl.load(x_weight + layer * rows + row, mask=valid, other=0.0)
    shift = tl.load(x_shift + layer * rows + row, mask=valid, other=0.0)
    grad = tl.load(positive + layer * rows + row, mask=valid, other=0.0)
    y_base = y + layer * stride_yl
    y_weight += layer * columns
    y_shift += layer * columns
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if tl.load(bounded + layer) != 0:
        acc = _gradient_tiles(
            acc, x_tile, y_base, stride_yn, begin, end, columns, factor, own, weight, shift, grad,
            y_weight, y_shift, D, BLOCK_D, EVEN, True, PRECISION, BLOCK_N,
        )  # fmt: skip
    else:
        acc = _gradient_tiles(
            acc, x_tile, y_base, stride_yn, begin, end, columns, factor, own, weight, shift, grad,
            y_weight, y_shift, D, BLOCK_D, EVEN, False, PRECISION, BLOCK_N,
        )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    where = dx + (place * rows + row)[:, None] * D + dims[None, :]
    tl.store(where, acc, mask=valid[:, None] & (dims < D)[None, :])


@triton.jit
def sigmoid_kernel(
    x, y, temperature, bias, loss, ds_sum, dx,
    stride_xl, stride_xm, stride_yl, stride_yn, rows, columns, offset,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    LOSS: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each row's sums of softplus(-y s) and of ds (SPLITS, L, M), and dx = ds @ y.

    ``ds`` is sigmoid(s), and -sigmoid(-s) for the positive; dx lacks the factor temperature.
    """
    first, begin, end, layer, place = _place(rows, columns, SPLITS, BLOCK_M, BLOCK_N)
    factor = tl.load(temperature + layer)
    shift = 0.0 if bias is None else tl.load(bias + layer)
    x_tile = _load(x + layer * stride_xl, first, rows, stride_xm, D, BLOCK_M, BLOCK_D)
    row = first + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_N)
    own = row + offset
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    loss_sum = tl.zeros((BLOCK_M,), tl.float32)
    grad_sum = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        y_tile = _load(y + layer * stride_yl, start, columns, stride_yn, D, BLOCK_N, BLOCK_D)
        s = _product(x_tile, y_tile, PRECISION) * factor + shift
        column = (start + lanes)[None, :]
        mine = column == own[:, None]
        s = tl.where(mine, -s, s)  # softplus(-s) for the positive
        if not EVEN:
            s = tl.where(column < columns, s, float("-inf"))  # softplus and sigmoid are 0
        t = tl.exp2(-tl.abs(s) * LOG2E)
        # One division for sigmoid and log1p: r = 1 / ((1 + t)(2 + t)).
        once = 1.0 + t
        twice = 2.0 + t
        r = 1.0 / (once * twice)
        if LOSS:
            # log1p(t) = 2 atanh(z), z = t / (2 + t): keeps the digits of a small t. Chebyshev fit
            # of atanh(z) / z in z^2 on [0, 1/9], relative error 4e-9.
            z = t * once * r
            square = z * z
            p = 0.14087329 * square + 0.13980709
            p = p * square + 0.20012427
            p = p * square + 0.33333158
            p = p * square + 1.0
            loss_sum += tl.sum(tl.maximum(s, 0.0) + 2.0 * z * p, axis=1)
        if GRADIENT:
            ds = tl.where(s > 0.0, 1.0, t) * twice * r
            ds = tl.where(mine, -ds, ds)
            if LOSS:
                grad_sum += tl.sum(ds, axis=1)
            acc = tl.dot(ds.to(y_tile.dtype), y_tile, acc, input_precision=PRECISION)
    valid = row < rows
    if LOSS:
        tl.store(loss + place * rows + row, loss_sum, mask=valid)
        if GRADIENT:
            tl.store(ds_sum + place * rows + row, grad_sum, mask=valid)
    if GRADIENT:
        dims = tl.arange(0, BLOCK_D)
        where = dx + (place * rows + row)[:, None] * D + dims[None, :]
        tl.store(where, acc, mask=valid[:, None] & (dims < D)[None, :])
