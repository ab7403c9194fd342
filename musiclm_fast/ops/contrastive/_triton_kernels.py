# mypy: ignore-errors
"""Triton kernels of the contrastive losses: tiles of rows against tiles of columns.

``x`` (L, M, D) are the rows of a program, ``y`` (L, N, D) the columns that it runs through; row i's
positive is column i + offset or, with labels (M,) and (N,), every column of its label. A launch may
cut the columns into splits, whose partial results (SPLITS, L, M, ...) the caller adds up. The
kernels with gradients are launched twice, the second time with audio and text swapped and the
offset negated: every result then belongs to one program, so that nothing is added atomically and
results are deterministic.

A loop runs through tiles without a positive and without a row or column past the end, and masks
nothing; a second loop takes the rest: with labels all.

Exponents are of base 2 and ``temperature * log2(e)`` is one factor ``scale``: an exponential is one
multiply-add and one instruction of the special function unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _place(rows, columns, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # This program's block of rows, its tiles of columns [begin, end), its layer, and its place
    # (split, layer).
    blocks = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    split = (pid // blocks) % SPLITS
    layer = pid // (blocks * SPLITS)
    tiles = tl.cdiv(columns, BLOCK_N)
    span = tl.cdiv(tiles, SPLITS)
    begin = tl.minimum(split * span, tiles)
    end = tl.minimum(begin + span, tiles)
    layers = tl.num_programs(0) // (blocks * SPLITS)
    return pid % blocks, begin, end, layer.to(tl.int64), (split * layers + layer).to(tl.int64)


@triton.jit
def _schedule(
    first, begin, end, rows, columns, offset, EVERY: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Of the tiles [begin, end), the masked ones: ``held`` of them from ``lead`` on, which have a
    # positive of these rows, and the last if it has columns past the end. All of them if EVERY tile
    # may have positives, or where rows lie past the end. Returns lead, held and their number.
    if EVERY:
        return begin, end - begin, end - begin
    low = tl.maximum(first + offset, 0)
    high = tl.maximum(first + offset + BLOCK_M, 0)
    lead = tl.minimum(tl.maximum(low // BLOCK_N, begin), end)
    stop = tl.minimum(tl.maximum(tl.cdiv(high, BLOCK_N), lead), end)
    past = first + BLOCK_M > rows
    lead = tl.where(past, begin, lead)
    stop = tl.where(past, end, stop)
    ragged = (end * BLOCK_N > columns) & (stop < end)
    return lead, stop - lead, stop - lead + ragged.to(tl.int32)


@triton.jit
def _start(turn, begin, end, lead, held, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    # First column of a turn of the loop over the masked tiles, or over the others.
    if MASKED:
        tile = tl.where(turn < held, lead + turn, end - 1)
    else:
        tile = begin + turn
        tile += tl.where(tile >= lead, held, 0)
    return tile * BLOCK_N


@triton.jit
def _load(
    base, first, count, stride, depth, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    # Rows [first, first + BLOCK), numbers [depth, depth + BLOCK_D) of each; zeros beyond D and, if
    # MASKED, beyond count.
    # The tile's own offsets are of 32 bits, and the same in every turn of a loop.
    lanes = tl.arange(0, BLOCK)
    dims = depth + tl.arange(0, BLOCK_D)
    rows = first + lanes
    where = base + tl.cast(first, tl.int64) * stride + (lanes[:, None] * stride + dims[None, :])
    if D % BLOCK_D != 0:
        if MASKED:
            return tl.load(where, mask=(rows < count)[:, None] & (dims < D)[None, :], other=0.0)
        return tl.load(where, mask=(dims < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(where, mask=(rows < count)[:, None], other=0.0)
    return tl.load(where)


@triton.jit
def _product(x_tile, y_tile, PRECISION: tl.constexpr):
    # (rows, columns) = x y^T; the same bits in every kernel, and with the sides swapped.
    return tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)


@triton.jit
def _deep_product(
    x, first, rows, stride_xm, y, start, columns, stride_yn, D: tl.constexpr,
    BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The same for rows that are longer than BLOCK_D, a piece after the other.
    dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for depth in range(0, D, BLOCK_D):
        x_tile = _load(x, first, rows, stride_xm, depth, D, BLOCK_M, BLOCK_D, MASKED)
        y_tile = _load(y, start, columns, stride_yn, depth, D, BLOCK_N, BLOCK_D, MASKED)
        dots = tl.dot(x_tile, tl.trans(y_tile), dots, input_precision=PRECISION)
    return dots


@triton.jit
def _store(
    out, ds, first, start, rows, columns, MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # A tile of ds into (rows, columns), in the latents' dtype.
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    where = out + (tl.cast(first, tl.int64) * columns + start)
    where += row[:, None] * columns + column[None, :]
    ds = ds.to(out.dtype.element_ty)
    if MASKED:
        inside = (first + row < rows)[:, None] & (start + column < columns)[None, :]
        tl.store(where, ds, mask=inside)
    else:
        tl.store(where, ds)


@triton.jit
def _positives(row, column, x_labels, y_labels, rows, columns, offset):
    # Which pairs are positive, and which lie inside the block.
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if y_labels is None:
        same = column[None, :] == (row + offset)[:, None]
    else:
        x_label = tl.load(x_labels + row, mask=row < rows, other=0)
        y_label = tl.load(y_labels + column, mask=column < columns, other=0)
        same = x_label[:, None] == y_label[None, :]
    return same & inside, inside


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    # 1 / x of a normal number, to one unit in the last place. Triton's division also scales large
    # divisors: five more instructions.
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def _negatives(
    x, x_tile, x_labels, y, y_tile, y_labels, first, start, rows, columns, offset, stride_xm,
    stride_yn, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
    INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Dot products of a part of the rows, -inf where none is summed; each row's sum over positives.
    if D <= BLOCK_D:
        dots = _product(x_tile, y_tile, PRECISION)
    else:
        dots = _deep_product(
            x, first, rows, stride_xm, y, start, columns, stride_yn, D, BLOCK_D, MASKED, PRECISION,
            PART, BLOCK_N,
        )  # fmt: skip
    found = tl.zeros((PART,), tl.float32)
    if MASKED:
        row = first + tl.arange(0, PART)
        column = start + tl.arange(0, BLOCK_N)
        same, inside = _positives(row, column, x_labels, y_labels, rows, columns, offset)
        found = tl.sum(tl.where(same, dots, 0.0), axis=1)
        shown = inside if INCLUSIVE else inside & (same == 0)
        dots = tl.where(shown, dots, float("-inf"))
    return dots, found


@triton.jit
def _statistics(
    x, x_tiles, x_labels, y, y_labels, sums, highest, total, positive, count, begin, end, lead,
    held, first, rows, columns, offset, scale, stride_xm, stride_yn, D: tl.constexpr,
    BLOCK_D: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, INCLUSIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    # One loop of logsumexp_kernel.
    for turn in range(count):
        start = _start(turn, begin, end, lead, held, MASKED, BLOCK_N)
        column = start + tl.arange(0, BLOCK_N)
        y_tile = None
        if D <= BLOCK_D:
            y_tile = _load(y, start, columns, stride_yn, 0, D, BLOCK_N, BLOCK_D, MASKED)
        dots = ()
        new_positive = ()
        for p in tl.static_range(BLOCK_M // PART):
            part, found = _negatives(
                x, x_tiles[p], x_labels, y, y_tile, y_labels, first + p * PART, start, rows,
                columns, offset, stride_xm, stride_yn, D, BLOCK_D, MASKED, INCLUSIVE, PRECISION,
                PART, BLOCK_N,
            )  # fmt: skip
            dots += (part,)
            new_positive += (positive[p] + found,)
        positive = new_positive
        if not BOUNDED:
            most = dots[0]
            for p in tl.static_range(1, BLOCK_M // PART):
                most = tl.maximum(most, dots[p])
            shift = tl.maximum(tl.max(most, axis=0) * scale, LOWEST)
        of_columns = tl.zeros((PART, BLOCK_N), tl.float32)
        new_highest = ()
        new_total = ()
        for p in tl.static_range(BLOCK_M // PART):
            if BOUNDED:
                e = tl.exp2(dots[p] * scale)
                of_columns += e
                new_highest += (highest[p],)
                new_total += (total[p] + tl.sum(e, axis=1),)
            else:
                of_columns += tl.exp2(dots[p] * scale - shift[None, :])
                higher = tl.maximum(highest[p], tl.max(dots[p], axis=1))
                own = tl.maximum(higher * scale, LOWEST)
                e = tl.exp2(dots[p] * scale - own[:, None])
                before = total[p] * tl.exp2(tl.maximum(highest[p] * scale, LOWEST) - own)
                new_highest += (higher,)
                new_total += (before + tl.sum(e, axis=1),)
        highest = new_highest
        total = new_total
        result = tl.sum(of_columns, axis=0)
        if not BOUNDED:
            result = shift + tl.log2(result)
        tl.store(sums + column, result, mask=column < columns)
    return highest, total, positive


@triton.jit
def logsumexp_kernel(
    x, y, x_labels, y_labels, temperature, bounded, lse, positive, sums,
    stride_xl, stride_xm, stride_yl, stride_yn, rows, columns, offset,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, INCLUSIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each row over its split and of each column over its block of rows.

    lse (SPLITS, L, M), and positive likewise: the sum of the row's positives' similarities, 0 where
    the split has none. sums (blocks, L, N), for merge_kernel: where ``bounded`` (L,) the sum of
    e^s itself, else its logarithm to base 2. Positives are left out unless INCLUSIVE.

    A block of BLOCK_M rows is cut into parts. A column's sum over the parts stays in registers, so
    that threads exchange their shares of it once a block.
    """
    block, begin, end, layer, place = _place(rows, columns, SPLITS, BLOCK_M, BLOCK_N)
    PARTS: tl.constexpr = BLOCK_M // PART
    first = block * BLOCK_M
    scale = tl.load(temperature + layer) * LOG2E
    x += layer * stride_xl
    y += layer * stride_yl
    sums += (block * (tl.num_programs(0) // (tl.cdiv(rows, BLOCK_M) * SPLITS)) + layer) * columns
    lead, held, masked = _schedule(
        first, begin, end, rows, columns, offset, y_labels is not None, BLOCK_M, BLOCK_N
    )
    x_tiles = ()
    highest = ()
    total = ()
    mine = ()
    for p in tl.static_range(PARTS):
        if D <= BLOCK_D:
            x_tiles += (_load(x, first + p * PART, rows, stride_xm, 0, D, PART, BLOCK_D, True),)
        else:
            x_tiles += (0,)
        highest += (tl.full((PART,), float("-inf"), tl.float32),)
        total += (tl.zeros((PART,), tl.float32),)
        mine += (tl.zeros((PART,), tl.float32),)
    if tl.load(bounded + layer) != 0:
        if y_labels is None:
            highest, total, mine = _statistics(
                x, x_tiles, x_labels, y, y_labels, sums, highest, total, mine,
                end - begin - masked, begin, end, lead, held, first, rows, columns, offset, scale,
                stride_xm, stride_yn, D, BLOCK_D, False, True, INCLUSIVE, PRECISION, BLOCK_M,
                BLOCK_N, PART,
            )  # fmt: skip
        highest, total, mine = _statistics(
            x, x_tiles, x_labels, y, y_labels, sums, highest, total, mine,
            masked, begin, end, lead, held, first, rows, columns, offset, scale,
            stride_xm, stride_yn, D, BLOCK_D, True, True, INCLUSIVE, PRECISION, BLOCK_M,
            BLOCK_N, PART,
        )  # fmt: skip
    else:
        if y_labels is None:
            highest, total, mine = _statistics(
                x, x_tiles, x_labels, y, y_labels, sums, highest, total, mine,
                end - begin - masked, begin, end, lead, held, first, rows, columns, offset, scale,
                stride_xm, stride_yn, D, BLOCK_D, False, False, INCLUSIVE, PRECISION, BLOCK_M,
                BLOCK_N, PART,
            )  # fmt: skip
        highest, total, mine = _statistics(
            x, x_tiles, x_labels, y, y_labels, sums, highest, total, mine,
            masked, begin, end, lead, held, first, rows, columns, offset, scale,
            stride_xm, stride_yn, D, BLOCK_D, True, False, INCLUSIVE, PRECISION, BLOCK_M,
            BLOCK_N, PART,
        )  # fmt: skip
    for p in tl.static_range(PARTS):
        row = first + p * PART + tl.arange(0, PART)
        where = place * rows + row
        # highest is -inf where the bounded loops ran, or where a row has no column
        shift = tl.where(highest[p] == float("-inf"), 0.0, highest[p] * scale)
        tl.store(lse + where, (shift + tl.log2(total[p])) * LN2, mask=row < rows)
        tl.store(positive + where, mine[p] * scale * LN2, mask=row < rows)


@triton.jit
def merge_kernel(sums, bounded, lse, blocks, columns, layers, BLOCK: tl.constexpr):
    """Log-sum-exp of each column (L, N) from logsumexp_kernel's sums over blocks of rows."""
    tiles = tl.cdiv(columns, BLOCK)
    layer = tl.program_id(0) // tiles
    column = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sums += tl.cast(layer, tl.int64) * columns + column
    if tl.load(bounded + layer) != 0:
        highest = tl.zeros((BLOCK,), tl.float32)
        for _ in range(blocks):
            total += tl.load(sums, mask=inside, other=0.0)
            sums += tl.cast(layers, tl.int64) * columns
    else:
        for _ in range(blocks):
            value = tl.load(sums, mask=inside, other=0.0)
            higher = tl.maximum(highest, value)
            total = total * tl.exp2(highest - higher) + tl.exp2(value - higher)
            highest = higher
            sums += tl.cast(layers, tl.int64) * columns
    where = lse + tl.cast(layer, tl.int64) * columns + column
    tl.store(where, (highest + tl.log2(total)) * LN2, mask=inside)


@triton.jit
def _gradients(
    acc, x, x_tile, x_labels, y, y_labels, ds_base, count, begin, end, lead, held, first, rows,
    columns, offset, scale, stride_xm, stride_yn, weight, shift, own, y_weight, y_shift, y_own,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
    INCLUSIVE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One loop of gradient_kernel.
    row = first + tl.arange(0, BLOCK_M)
    for turn in range(count):
        start = _start(turn, begin, end, lead, held, MASKED, BLOCK_N)
        column = start + tl.arange(0, BLOCK_N)
        inside = column < columns
        if D <= BLOCK_D:
            y_tile = _load(y, start, columns, stride_yn, 0, D, BLOCK_N, BLOCK_D, MASKED)
            dots = _product(x_tile, y_tile, PRECISION)
        else:
            dots = _deep_product(
                x, first, rows, stride_xm, y, start, columns, stride_yn, D, BLOCK_D, MASKED,
                PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if MASKED:
            other = tl.load(y_weight + column, mask=inside, other=0.0)
        else:
            other = tl.load(y_weight + column)
        if BOUNDED:
            ds = tl.exp2(dots * scale) * (weight[:, None] + other[None, :])
        else:
            if MASKED:
                other_shift = tl.load(y_shift + column, mask=inside, other=0.0)
            else:
                other_shift = tl.load(y_shift + column)
            ds = weight[:, None] * tl.exp2(dots * scale - shift[:, None])
            ds += other[None, :] * tl.exp2(dots * scale - other_shift[None, :])
        if MASKED:
            same, valid = _positives(row, column, x_labels, y_labels, rows, columns, offset)
            if y_own is None:
                positive = own[:, None]
            else:
                positive = tl.load(y_own + column, mask=inside, other=0.0)[None, :]
            if INCLUSIVE:
                # before ds is rounded: the sum of a positive's two terms can be far smaller
                ds += tl.where(same, positive, 0.0)
            else:
                ds = tl.where(same, positive, ds)
            ds = tl.where(valid, ds, 0.0)  # s = 0 there, which may lie far above a shift
        if D <= BLOCK_D:
            acc = tl.dot(ds.to(y_tile.dtype), y_tile, acc, input_precision=PRECISION)
        else:
            _store(ds_base, ds, first, start, rows, columns, MASKED, BLOCK_M, BLOCK_N)
    return acc


@triton.jit
def gradient_kernel(
    x, y, x_labels, y_labels, temperature, bounded, x_weight, x_shift, x_positive, y_weight,
    y_shift, y_positive, out, stride_xl, stride_xm, stride_yl, stride_yn, rows, columns, offset,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, INCLUSIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Dx (SPLITS, L, M, D) = ds @ y without the factor temperature; of deep rows ds (L, M, N).

    ``ds = x_weight_i e^(s - x_shift_i) + y_weight_j e^(s - y_shift_j)``. At the positives
    x_positive_i, or y_positive_j where given, takes its place or, if INCLUSIVE, is added. Where
    ``bounded`` (L,) the weights hold e^-shift, and one exponential serves both. Shifts are of base
    2.
    """
    block, begin, end, layer, place = _place(rows, columns, SPLITS, BLOCK_M, BLOCK_N)
    first = block * BLOCK_M
    scale = tl.load(temperature + layer) * LOG2E
    x += layer * stride_xl
    y += layer * stride_yl
    lead, held, masked = _schedule(
        first, begin, end, rows, columns, offset, y_labels is not None, BLOCK_M, BLOCK_N
    )
    row = first + tl.arange(0, BLOCK_M)
    valid = row < rows
    x_tile = None
    acc = 0.0
    ds_base = out
    if D <= BLOCK_D:
        x_tile = _load(x, first, rows, stride_xm, 0, D, BLOCK_M, BLOCK_D, True)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    else:
        ds_base += layer * rows * columns
    weight = tl.load(x_weight + layer * rows + row, mask=valid, other=0.0)
    shift = tl.load(x_shift + layer * rows + row, mask=valid, other=0.0)
    own = None
    if y_positive is None:
        own = tl.load(x_positive + layer * rows + row, mask=valid, other=0.0)
    else:
        y_positive += layer * columns
    y_weight += layer * columns
    y_shift += layer * columns
    if tl.load(bounded + layer) != 0:
        if y_labels is None:
            acc = _gradients(
                acc, x, x_tile, x_labels, y, y_labels, ds_base, end - begin - masked, begin, end,
                lead, held, first, rows, columns, offset, scale, stride_xm, stride_yn, weight,
                shift, own, y_weight, y_shift, y_positive, D, BLOCK_D, False, True, INCLUSIVE,
                PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        acc = _gradients(
            acc, x, x_tile, x_labels, y, y_labels, ds_base, masked, begin, end,
            lead, held, first, rows, columns, offset, scale, stride_xm, stride_yn, weight,
            shift, own, y_weight, y_shift, y_positive, D, BLOCK_D, True, True, INCLUSIVE,
            PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        if y_labels is None:
            acc = _gradients(
                acc, x, x_tile, x_labels, y, y_labels, ds_base, end - begin - masked, begin, end,
                lead, held, first, rows, columns, offset, scale, stride_xm, stride_yn, weight,
                shift, own, y_weight, y_shift, y_positive, D, BLOCK_D, False, False, INCLUSIVE,
                PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        acc = _gradients(
            acc, x, x_tile, x_labels, y, y_labels, ds_base, masked, begin, end,
            lead, held, first, rows, columns, offset, scale, stride_xm, stride_yn, weight,
            shift, own, y_weight, y_shift, y_positive, D, BLOCK_D, True, False, INCLUSIVE,
            PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if D <= BLOCK_D:
        dims = tl.arange(0, BLOCK_D)
        where = out + (place * rows + row)[:, None] * D + dims[None, :]
        tl.store(where, acc, mask=valid[:, None] & (dims < D)[None, :])


@triton.jit
def _log_of_products(t, FAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # Sums over the rows of ln(1 + t), 0 <= t <= 1, with the digits of small t. Factors are first
    # multiplied in pairs, 1 + q = (1 + a)(1 + b): two instructions a factor and one logarithm for
    # BLOCK_N / 4 of them. The halves of a row down to 8 columns, and neighbours, lie in a thread.
    q = t
    for step in tl.static_range(4):
        if BLOCK_N >> step > 8:
            halves = tl.reshape(q, (BLOCK_M, 2, BLOCK_N >> (step + 1)))
            a, b = tl.split(tl.permute(halves, (0, 2, 1)))
            q = a * b + (a + b)
    a, b = tl.split(tl.reshape(q, (BLOCK_M, 4, 2)))
    q = a * b + (a + b)
    # ln(1 + q) = 2 atanh(z), z = q / (2 + q), for small q. Chebyshev fit of atanh(z) / z in z^2 on
    # [0, 1/9], relative error 4e-9.
    z = q * _reciprocal(2.0 + q, FAST)
    square = z * z
    p = 0.14087329 * square + 0.13980709
    p = p * square + 0.20012427
    p = p * square + 0.33333158
    p = p * square + 1.0
    return tl.sum(tl.where(q > 1.0, tl.log(1.0 + q), 2.0 * z * p), axis=1)


@triton.jit
def _sigmoids(
    acc, loss_sum, most_sum, grad_sum, x, x_tile, x_labels, y, y_labels, ds_base, count, begin, end,
    lead, held, first, rows, columns, offset, scale, shift, stride_xm, stride_yn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, LOSS: tl.constexpr,
    GRADIENT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One loop of sigmoid_kernel.
    row = first + tl.arange(0, BLOCK_M)
    for turn in range(count):
        start = _start(turn, begin, end, lead, held, MASKED, BLOCK_N)
        column = start + tl.arange(0, BLOCK_N)
        if D <= BLOCK_D:
            y_tile = _load(y, start, columns, stride_yn, 0, D, BLOCK_N, BLOCK_D, MASKED)
            dots = _product(x_tile, y_tile, PRECISION)
        else:
            dots = _deep_product(
                x, first, rows, stride_xm, y, start, columns, stride_yn, D, BLOCK_D, MASKED,
                PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        s = dots * scale + shift  # to base 2
        if MASKED:
            same, inside = _positives(row, column, x_labels, y_labels, rows, columns, offset)
            s = tl.where(same, -s, s)  # softplus(-s) for positives
            s = tl.where(inside, s, float("-inf"))  # softplus and sigmoid are 0
        if LOSS:
            t = tl.exp2(-tl.abs(s))
            most_sum += tl.sum(tl.maximum(s, 0.0), axis=1)
            loss_sum += _log_of_products(t, FAST, BLOCK_M, BLOCK_N)
        if GRADIENT:
            if LOSS:
                ds = tl.where(s > 0.0, 1.0, t) * _reciprocal(1.0 + t, FAST)
            else:
                ds = _reciprocal(1.0 + tl.exp2(-s), FAST)
            if MASKED:
                ds = tl.where(same, -ds, ds)
            if LOSS:
                grad_sum += tl.sum(ds, axis=1)
            if D <= BLOCK_D:
                acc = tl.dot(ds.to(y_tile.dtype), y_tile, acc, input_precision=PRECISION)
            else:
                _store(ds_base, ds, first, start, rows, columns, MASKED, BLOCK_M, BLOCK_N)
    return acc, loss_sum, most_sum, grad_sum


@triton.jit
def sigmoid_kernel(
    x, y, x_labels, y_labels, temperature, bias, loss, ds_sum, out,
    stride_xl, stride_xm, stride_yl, stride_yn, rows, columns, offset,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, LOSS: tl.constexpr,
    GRADIENT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each row's sums of softplus(-y s) and of ds (SPLITS, L, M), and dx = ds @ y.

    ``ds`` is sigmoid(s), and -sigmoid(-s) for positives; dx (SPLITS, L, M, D) lacks the factor
    temperature. Of deep rows ds (L, M, N) itself.
    """
    block, begin, end, layer, place = _place(rows, columns, SPLITS, BLOCK_M, BLOCK_N)
    first = block * BLOCK_M
    scale = tl.load(temperature + layer) * LOG2E
    shift = 0.0 if bias is None else tl.load(bias + layer) * LOG2E
    x += layer * stride_xl
    y += layer * stride_yl
    lead, held, masked = _schedule(
        first, begin, end, rows, columns, offset, y_labels is not None, BLOCK_M, BLOCK_N
    )
    row = first + tl.arange(0, BLOCK_M)
    valid = row < rows
    x_tile = None
    acc = 0.0
    ds_base = out
    if D <= BLOCK_D:
        x_tile = _load(x, first, rows, stride_xm, 0, D, BLOCK_M, BLOCK_D, True)
        if GRADIENT:
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    elif GRADIENT:
        ds_base += layer * rows * columns
    loss_sum = tl.zeros((BLOCK_M,), tl.float32)
    most_sum = tl.zeros((BLOCK_M,), tl.float32)
    grad_sum = tl.zeros((BLOCK_M,), tl.float32)
    if y_labels is None:
        acc, loss_sum, most_sum, grad_sum = _sigmoids(
            acc, loss_sum, most_sum, grad_sum, x, x_tile, x_labels, y, y_labels, ds_base,
            end - begin - masked, begin, end, lead, held, first, rows, columns, offset, scale,
            shift, stride_xm, stride_yn, D, BLOCK_D, False, LOSS, GRADIENT, FAST, PRECISION,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    acc, loss_sum, most_sum, grad_sum = _sigmoids(
        acc, loss_sum, most_sum, grad_sum, x, x_tile, x_labels, y, y_labels, ds_base,
        masked, begin, end, lead, held, first, rows, columns, offset, scale,
        shift, stride_xm, stride_yn, D, BLOCK_D, True, LOSS, GRADIENT, FAST, PRECISION,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if LOSS:
        tl.store(loss + place * rows + row, loss_sum + most_sum * LN2, mask=valid)
        if GRADIENT:
            tl.store(ds_sum + place * rows + row, grad_sum, mask=valid)
    if GRADIENT and D <= BLOCK_D:
        dims = tl.arange(0, BLOCK_D)
        where = out + (place * rows + row)[:, None] * D + dims[None, :]
        tl.store(where, acc, mask=valid[:, None] & (dims < D)[None, :])
