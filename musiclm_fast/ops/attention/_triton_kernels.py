# mypy: ignore-errors
"""Triton kernels of the attention op; README.md beside this file derives them.

Shapes below use B samples, H heads, Hkv key heads (G = H / Hkv query heads share one), M queries,
N keys, D head dim. Similarities are kept in base 2: ``s2 = s * log2(e)``, so that every
exponential is one ``exp2`` instruction; the saved row statistic ``lse2`` is the base-2 logarithm of
the row's sum. Optional inputs are None, which Triton treats as a compile-time constant.
"""

from __future__ import annotations

import triton
import triton.language as tl

# l2norm's floor on the norm, as in torch.nn.functional.normalize.
NORM_EPS = tl.constexpr(1e-12)


@triton.jit
def _mix32(x):
    # MurmurHash3's 32-bit finaliser; reference.dropout_keep defines the function.
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    x ^= x >> 16
    return x


@triton.jit
def _row_key(seed, row):
    # row: int64 index into the (B, H, M) rows; only its low 32 bits count.
    value = tl.load(seed)
    low = (value & 0xFFFFFFFF).to(tl.uint32)
    high = ((value >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mix32(_mix32((row & 0xFFFFFFFF).to(tl.uint32) ^ low) ^ high)


@triton.jit
def _column_key(column):
    return column.to(tl.uint32) * 0x9E3779B9


@triton.jit
def _kept(row_key, column_key, threshold):
    # threshold arrives less 2^31, so that it always is an int32.
    limit = (tl.cast(threshold, tl.int64) + 2147483648).to(tl.uint32)
    return _mix32(row_key + column_key) >= limit


@triton.jit
def _code_window(codes, radius):
    # The codes within `radius` of each code, as int32: the other side's codes are clamped into
    # this window, which is the clamp of the difference, without a difference that could wrap.
    wide = codes.to(tl.int64)
    low = tl.maximum(wide - radius, -2147483648).to(tl.int32)
    high = tl.minimum(wide + radius, 2147483647).to(tl.int32)
    return low, high


@triton.jit
def _read_table(row, index, PTX: tl.constexpr):
    # row[index] for a tile of indices, each inside the table. Written as an instruction where
    # there is PTX because Triton would pipeline tl.load through shared memory: a copy of 4 bytes
    # per element, with bank conflicts, then a read in another layout. So the value comes from the
    # first-level cache straight into the register of the similarity that it is added to.
    if not PTX:
        return tl.load(row + index)
    return tl.inline_asm_elementwise(
        "ld.global.nc.f32 $0, [$1];", "=f,l", [(row + index).to(tl.int64)],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _read_offset(row, first, code, last, PTX: tl.constexpr):
    # row[clamp(first - code, 0, last)] for every pair of a (BM, 1) and a (1, BN) tile. The
    # difference may wrap, so what is read always lies in the row, and is the right entry where the
    # true difference fits into int32. One piece of assembly, or ptxas takes the difference apart
    # from its clamp: on sm_90 it is three instructions, VIADDMNMX, IMAD.WIDE, LDG.
    if not PTX:
        return tl.load(row + tl.maximum(tl.minimum(first - code, last), 0))
    return tl.inline_asm_elementwise(
        "{ .reg .s32 i; .reg .u64 a;"
        " sub.s32 i, $2, $3; min.s32 i, i, $4; max.s32 i, i, 0;"
        " mul.wide.u32 a, i, 4; add.u64 a, a, $1; ld.global.nc.f32 $0, [a]; }",
        "=f,l,r,r,r", [row.to(tl.int64), first, code, last],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _codes_span(q_codes, k_codes_row, end, BLOCK: tl.constexpr):
    # Largest code of the queries and of the keys before `end`, less the smallest, as int64.
    lanes = tl.arange(0, BLOCK)
    low = tl.full([BLOCK], 2147483647, dtype=tl.int32)
    high = tl.full([BLOCK], -2147483648, dtype=tl.int32)
    for start in range(0, end, BLOCK):
        ok = start + lanes < end
        codes = tl.load(k_codes_row + start + lanes, mask=ok, other=0)
        low = tl.minimum(low, codes)
        high = tl.maximum(high, codes)
    lowest = tl.minimum(tl.min(low, axis=0), tl.min(q_codes, axis=0)).to(tl.int64)
    return tl.maximum(tl.max(high, axis=0), tl.max(q_codes, axis=0)).to(tl.int64) - lowest


@triton.jit
def _normalize(x, scale):
    # x: (rows, D) float32, scale: (D,) float32
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    return x / tl.maximum(norm, NORM_EPS)[:, None] * scale[None, :]


@triton.jit
def _normalize_gradient(x, scale, grad):
    # Gradients of _normalize: of x, (rows, D), and the rows' sum for scale, (D,).
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    reciprocal = 1.0 / tl.maximum(norm, NORM_EPS)
    unit = x * reciprocal[:, None]
    grad_scale = tl.sum(grad * unit, axis=0)
    grad = grad * scale[None, :]
    along = tl.where(norm > NORM_EPS, tl.sum(grad * unit, axis=1), 0.0)
    return (grad - unit * along[:, None]) * reciprocal[:, None], grad_scale


@triton.jit
def normalize_kernel(
    x, scale, y, stride_xb, stride_xh, stride_xn, heads, length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Y = l2norm(x) * scale; x (B, H, N, D) strided, y (B, H, N, D) contiguous, x's dtype."""
    blocks = tl.cdiv(length, BLOCK)
    pid = tl.program_id(0)
    bh = (pid // blocks).to(tl.int64)
    rows = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    base = x + (bh // heads) * stride_xb + (bh % heads) * stride_xh
    tile = tl.load(
        base + rows.to(tl.int64)[:, None] * stride_xn + dims[None, :], mask=mask, other=0.0
    )
    weight = tl.load(scale + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
    result = _normalize(tile.to(tl.float32), weight)
    where = y + bh * length * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :]
    tl.store(where, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _forward_tiles(
    acc, row_max, row_sum, q_tile, begin, end, key_end, last_key,
    k_base, v_base, stride_kn, stride_vn, table_row, first_entry, codes, radius,
    k_codes_row, mask_row, row_key, threshold, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    BOUNDED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    # One online-softmax sweep over the keys [begin, end). BOUNDED tiles may reach past key_end or
    # the causal diagonal, and may hold any codes; the others pay for none of it.
    lanes = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    k_offsets = dims[:, None] + lanes[None, :] * stride_kn  # (D, BN)
    v_offsets = lanes[:, None] * stride_vn + dims[None, :]  # (BN, D)
    dims_ok = dims < HEAD_DIM
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        columns = start + lanes
        columns_ok = columns < key_end
        start64 = tl.cast(start, tl.int64)
        k_ptrs = k_base + start64 * stride_kn + k_offsets
        v_ptrs = v_base + start64 * stride_vn + v_offsets
        if BOUNDED:
            k_tile = tl.load(k_ptrs, mask=columns_ok[None, :] & dims_ok[:, None], other=0.0)
        elif BLOCK_D != HEAD_DIM:
            k_tile = tl.load(k_ptrs, mask=dims_ok[:, None], other=0.0)
        else:
            k_tile = tl.load(k_ptrs)
        # The product starts from the bias: no addition, and no register for it.
        if table_row is None:
            s = tl.zeros([row_max.shape[0], BLOCK_N], dtype=tl.float32)  # (BM, BN)
        elif BOUNDED:
            k_codes = tl.load(k_codes_row + columns, mask=columns_ok, other=0)
            low, high = _code_window(codes, radius)
            clamped = tl.minimum(tl.maximum(k_codes[None, :], low[:, None]), high[:, None])
            s = _read_table(table_row, first_entry[:, None] - clamped, PTX)
        else:
            k_codes = tl.load(k_codes_row + columns)
            s = _read_offset(table_row, first_entry[:, None], k_codes[None, :], 2 * radius, PTX)
        s = tl.dot(q_tile, k_tile, s, input_precision=PRECISION)
        if mask_row is not None:
            if BOUNDED:
                visible = tl.load(mask_row + columns, mask=columns_ok, other=0) != 0
            else:
                visible = tl.load(mask_row + columns) != 0
            s = tl.where(visible[None, :], s, float("-inf"))
        if BOUNDED:
            s = tl.where(columns[None, :] <= last_key[:, None], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, axis=1) * scale_log2)
        # A row that has seen no key yet has the maximum -inf: subtract 0 there, not -inf.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s * scale_log2 - safe_max[:, None])
        correction = tl.exp2(row_max - safe_max)
        row_sum = row_sum * correction + tl.sum(p, axis=1)
        row_max = new_max
        if DROPOUT:
            kept = _kept(row_key[:, None], _column_key(columns)[None, :], threshold)
            p = tl.where(kept, p, 0.0)
        if BOUNDED:
            v_tile = tl.load(v_ptrs, mask=columns_ok[:, None] & dims_ok[None, :], other=0.0)
        elif BLOCK_D != HEAD_DIM:
            v_tile = tl.load(v_ptrs, mask=dims_ok[None, :], other=0.0)
        else:
            v_tile = tl.load(v_ptrs)
        acc = tl.dot(
            p.to(v_tile.dtype), v_tile, acc * correction[:, None], input_precision=PRECISION
        )
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["threshold"])
def forward_kernel(
    q, k, v, out, logsumexp2, table, q_codes, k_codes, key_mask, key_lengths, q_scale, seed,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    stride_tableh, stride_qcb, stride_kcb, stride_maskb,
    heads, queries, keys, radius, scale_log2, threshold, keep_factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Out (B, H, M, D) and lse2 (B, H, M) for one block of queries of one head.

    k is already normalised where ``q_scale`` is given; q is normalised here, in registers.
    ``table`` (H, 2R + 1) is float32 and holds the bias divided by the scale, which is positive.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // blocks).to(tl.int64)
    b = bh // heads
    h = bh % heads
    first_row = (pid % blocks) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    rows_ok = rows < queries
    dims = tl.arange(0, BLOCK_D)
    tile_ok = rows_ok[:, None] & (dims < HEAD_DIM)[None, :]

    q_base = q + b * stride_qb + h * stride_qh + first_row.to(tl.int64) * stride_qm
    lanes = tl.arange(0, BLOCK_M)
    q_tile = tl.load(q_base + lanes[:, None] * stride_qm + dims[None, :], mask=tile_ok, other=0.0)
    if q_scale is not None:
        weight = tl.load(q_scale + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        q_tile = _normalize(q_tile.to(tl.float32), weight).to(q_tile.dtype)

    # Names below must exist on every path; None vanishes at compile time.
    table_row = None
    codes = None
    first_entry = None
    k_codes_row = None
    if table is not None:
        table_row = table + h * stride_tableh
        k_codes_row = k_codes + b * stride_kcb
        codes_at = q_codes + b * stride_qcb + tl.minimum(rows, queries - 1)
        codes = tl.load(codes_at)
        first_entry = codes + radius  # may wrap; the difference with a key's code unwraps
    mask_row = None
    if key_mask is not None:
        mask_row = key_mask + b * stride_maskb
    row_key = None
    if seed is not None:
        row_key = _row_key(seed, bh * queries + rows)

    key_end = keys
    if key_lengths is not None:
        key_end = tl.minimum(tl.maximum(tl.load(key_lengths + b), 0), keys).to(tl.int32)
    end = key_end
    inside = key_end
    last_key = tl.zeros([BLOCK_M], dtype=tl.int32) + (key_end - 1)
    if CAUSAL:
        shift = keys - queries
        end = tl.minimum(key_end, first_row + BLOCK_M + shift)
        inside = tl.minimum(key_end, first_row + 1 + shift)
        last_key = tl.minimum(last_key, rows + shift)
    inside = tl.maximum(inside, 0) // BLOCK_N * BLOCK_N
    if table is not None:
        span = _codes_span(codes, k_codes_row, end, 1024)
        inside = tl.where(span + radius < 2147483648, inside, 0)

    k_base = k + b * stride_kb + (h // GROUP) * stride_kh
    v_base = v + b * stride_vb + (h // GROUP) * stride_vh
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # The last keys first: what only their tiles need then takes no registers in the other loop.
    acc, row_max, row_sum = _forward_tiles(
        acc, row_max, row_sum, q_tile, inside, end, key_end, last_key,
        k_base, v_base, stride_kn, stride_vn, table_row, first_entry, codes, radius,
        k_codes_row, mask_row, row_key, threshold, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N // 2, 1, True, seed is not None, PRECISION, PTX,
    )  # fmt: skip
    acc, row_max, row_sum = _forward_tiles(
        acc, row_max, row_sum, q_tile, 0, inside, key_end, last_key,
        k_base, v_base, stride_kn, stride_vn, table_row, first_entry, codes, radius,
        k_codes_row, mask_row, row_key, threshold, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, None, False, seed is not None, PRECISION, PTX,
    )  # fmt: skip

    seen = row_sum > 0.0
    factor = tl.where(seen, keep_factor / tl.where(seen, row_sum, 1.0), 0.0)
    out_base = out + b * stride_ob + h * stride_oh + first_row.to(tl.int64) * stride_om
    tl.store(
        out_base + lanes[:, None] * stride_om + dims[None, :],
        (acc * factor[:, None]).to(out.dtype.element_ty),
        mask=tile_ok,
    )
    lse2 = tl.where(seen, row_max + tl.log2(tl.where(seen, row_sum, 1.0)), float("-inf"))
    tl.store(logsumexp2 + bh * queries + rows, lse2, mask=rows_ok)


@triton.jit
def delta_kernel(
    grad_out, out, delta, stride_gb, stride_gh, stride_gm, stride_ob, stride_oh, stride_om,
    heads, queries, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Delta (B, H, M) = sum over D of grad_out * out."""
    blocks = tl.cdiv(queries, BLOCK)
    pid = tl.program_id(0)
    bh = (pid // blocks).to(tl.int64)
    b = bh // heads
    h = bh % heads
    rows = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    rows64 = rows.to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < queries)[:, None] & (dims < HEAD_DIM)[None, :]
    grad_at = grad_out + b * stride_gb + h * stride_gh + rows64 * stride_gm + dims[None, :]
    out_at = out + b * stride_ob + h * stride_oh + rows64 * stride_om + dims[None, :]
    product = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
    product *= tl.load(out_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta + bh * queries + rows, tl.sum(product, axis=1), mask=rows < queries)


@triton.jit(do_not_specialize=["threshold", "sample0", "kv_head0", "row_end"])
def backward_kv_kernel(
    grad_out, q, k, v, raw_k, k_scale, logsumexp2, delta, table2, q_codes, k_codes, key_mask,
    key_lengths, seed, ds, carry, grad_k, grad_v, grad_k_scale,
    stride_gb, stride_gh, stride_gm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_rb, stride_rh, stride_rn, stride_dkb, stride_dkh, stride_dkn,
    stride_tableh, stride_qcb, stride_kcb, stride_maskb,
    heads, kv_heads, queries, keys, radius, scale, scale_log2, threshold, keep_factor,
    sample0, kv_head0, band_kv_heads, row_begin, row_end, ds_rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_KEYS: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of k, v and k_scale, and dS, for one block of keys and a band of queries.

    Tiles are (BN, BM), keys first, so that neither product with a (BM, D) tile needs a transposed
    accumulator. A band is some samples x some key heads x the queries [row_begin, row_end). dS
    goes, keys first, to ``ds`` (band samples, band heads, N padded, ds_rows). Where the queries
    are cut into several bands, ``carry`` (2, band samples * band key heads, N padded, BLOCK_D)
    holds the unfinished sums in float32; it is None where one band has them all.
    """
    blocks = tl.cdiv(keys, BLOCK_N)
    pid = tl.program_id(0)
    block = pid % blocks
    unit = pid // blocks  # which (sample, key head) of the band
    b = (sample0 + unit // band_kv_heads).to(tl.int64)
    hk = (kv_head0 + unit % band_kv_heads).to(tl.int64)
    unit64 = unit.to(tl.int64)
    lanes = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    columns = block * BLOCK_N + lanes
    in_range = columns < keys
    tile_ok = in_range[:, None] & (dims < HEAD_DIM)[None, :]
    columns64 = columns.to(tl.int64)[:, None]
    k_tile = tl.load(
        k + b * stride_kb + hk * stride_kh + columns64 * stride_kn + dims[None, :],
        mask=tile_ok, other=0.0,
    )  # fmt: skip
    v_tile = tl.load(
        v + b * stride_vb + hk * stride_vh + columns64 * stride_vn + dims[None, :],
        mask=tile_ok, other=0.0,
    )  # fmt: skip

    key_end = keys
    if key_lengths is not None:
        key_end = tl.minimum(tl.maximum(tl.load(key_lengths + b), 0), keys).to(tl.int32)
    keys_ok = columns < key_end
    if key_mask is not None:
        keys_ok &= tl.load(key_mask + b * stride_maskb + columns, mask=in_range, other=0) != 0

    window_low = None
    window_high = None
    code_minus_radius = None
    if table2 is not None:
        codes = tl.load(k_codes + b * stride_kcb + columns, mask=in_range, other=0)
        window_low, window_high = _code_window(codes, radius)
        code_minus_radius = codes - radius  # may wrap; the difference unwraps
    column_key = None
    if seed is not None:
        column_key = _column_key(columns)

    causal_shift = keys - queries
    begin = row_begin
    if CAUSAL:  # from the first query that sees any of these keys
        first = tl.maximum(block * BLOCK_N - causal_shift, row_begin)
        begin = row_begin + (first - row_begin) // BLOCK_M * BLOCK_M
    end = tl.where(block * BLOCK_N < key_end, row_end, row_begin)  # beyond its length: no rows

    padded_keys = blocks.to(tl.int64) * BLOCK_N
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    if carry is not None:
        units = (tl.num_programs(0) // blocks).to(tl.int64)
        carry_at = carry + unit64 * padded_keys * BLOCK_D + columns64 * BLOCK_D + dims[None, :]
        carry_v_at = carry_at + units * padded_keys * BLOCK_D
        if row_begin > 0:
            dk = tl.load(carry_at)
            dv = tl.load(carry_v_at)

    lanes_m = tl.arange(0, BLOCK_M)
    q_offsets = lanes_m[:, None] * stride_qm + dims[None, :]
    g_offsets = lanes_m[:, None] * stride_gm + dims[None, :]
    ds_offsets = columns64 * ds_rows + lanes_m[None, :]
    # One loop over all heads' queries: a loop over heads around one over queries would keep the
    # addresses of both in registers, more than there are.
    span = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M) * BLOCK_M
    for at in range(begin, begin + GROUP * span, BLOCK_M):
        start = at
        h = hk * GROUP
        local = unit64 * GROUP
        if GROUP > 1:
            g = (at - begin) // tl.maximum(span, 1)
            start = at - g * span
            h += g
            local += g
        rows = start + lanes_m
        rows_ok = rows < row_end
        row_mask = rows_ok[:, None] & (dims < HEAD_DIM)[None, :]
        start64 = tl.cast(start, tl.int64)
        bh = b * heads + h
        q_at = q + b * stride_qb + h * stride_qh + start64 * stride_qm
        q_tile = tl.load(q_at + q_offsets, mask=row_mask, other=0.0)
        s2 = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_log2
        if table2 is not None:
            row_codes = tl.load(q_codes + b * stride_qcb + rows, mask=rows_ok, other=0)
            clamped = tl.minimum(
                tl.maximum(row_codes[None, :], window_low[:, None]), window_high[:, None]
            )
            table_row = table2 + h * stride_tableh
            s2 += _read_table(table_row, clamped - code_minus_radius[:, None], PTX)
        # Rows past the end, and rows that see no key, get +inf: p = 0.
        lse2 = tl.load(logsumexp2 + bh * queries + rows, mask=rows_ok, other=float("inf"))
        lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
        p = tl.exp2(s2 - lse2[None, :])
        if MASK_KEYS:
            p = tl.where(keys_ok[:, None], p, 0.0)
        if CAUSAL:  # in every tile: a second loop for those on the diagonal costs more registers
            p = tl.where(columns[:, None] <= rows[None, :] + causal_shift, p, 0.0)
        g_at = grad_out + b * stride_gb + h * stride_gh + start64 * stride_gm
        g_tile = tl.load(g_at + g_offsets, mask=row_mask, other=0.0)
        grad_p = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
        if seed is not None:
            row_key = _row_key(seed, bh * queries + rows)
            kept = _kept(row_key[None, :], column_key[:, None], threshold)
            dropped = tl.where(kept, p * keep_factor, 0.0)
            grad_p = tl.where(kept, grad_p * keep_factor, 0.0)
        else:
            dropped = p
        dv = tl.dot(dropped.to(g_tile.dtype), g_tile, dv, input_precision=PRECISION)
        row_delta = tl.load(delta + bh * queries + rows, mask=rows_ok, other=0.0)
        ds_tile = (p * (grad_p - row_delta[None, :])).to(q_tile.dtype)  # (BN, BM)
        # The workspace is padded to whole tiles: no mask. The hint makes the stores wide.
        ds_start = tl.multiple_of(start - row_begin, BLOCK_M)
        tl.store(ds + local * padded_keys * ds_rows + ds_start + ds_offsets, ds_tile)
        dk = tl.dot(ds_tile, q_tile, dk, input_precision=PRECISION)

    if row_end < queries:
        if carry is not None:
            tl.store(carry_at, dk)
            tl.store(carry_v_at, dv)
    else:
        dk *= scale
        if k_scale is not None:
            raw = tl.load(
                raw_k + b * stride_rb + hk * stride_rh + columns64 * stride_rn + dims[None, :],
                mask=tile_ok, other=0.0,
            ).to(tl.float32)  # fmt: skip
            weight = tl.load(k_scale + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
            dk, d_weight = _normalize_gradient(raw, weight, dk)
            partial = ((b * kv_heads + hk) * blocks + block) * HEAD_DIM
            tl.store(grad_k_scale + partial + dims, d_weight, mask=dims < HEAD_DIM)
        grad_at = b * stride_dkb + hk * stride_dkh + columns64 * stride_dkn + dims[None, :]
        tl.store(grad_k + grad_at, dk.to(grad_k.dtype.element_ty), mask=tile_ok)
        tl.store(grad_v + grad_at, dv.to(grad_v.dtype.element_ty), mask=tile_ok)


@triton.jit
def _backward_q_tiles(
    acc, begin, end, key_end, ds_base, ds_offsets, ds_rows, k_base, k_offsets, stride_kn,
    rows, causal_shift,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # acc += dS^T k over the keys [begin, end). dS lies keys first: a load's mask that varied along
    # the queries would cut it into single elements. So what lies above the diagonal is read and
    # then dropped, and rows past the end reach no sum but their own.
    lanes = tl.arange(0, BLOCK_N)
    dims_ok = tl.arange(0, BLOCK_D) < HEAD_DIM
    for start in range(begin, end, BLOCK_N):
        start64 = tl.cast(start, tl.int64)
        columns = start + lanes
        columns_ok = columns < key_end
        ds_at = ds_base + start64 * ds_rows + ds_offsets
        k_at = k_base + start64 * stride_kn + k_offsets
        if BOUNDED:
            ds_tile = tl.load(ds_at, mask=columns_ok[:, None], other=0.0)
        else:
            ds_tile = tl.load(ds_at)
        if BOUNDED and CAUSAL:
            seen = columns[:, None] <= rows[None, :] + causal_shift
            ds_tile = tl.where(seen, ds_tile, 0.0)
        if BOUNDED:
            k_tile = tl.load(k_at, mask=columns_ok[:, None] & dims_ok[None, :], other=0.0)
        elif BLOCK_D != HEAD_DIM:
            k_tile = tl.load(k_at, mask=dims_ok[None, :], other=0.0)
        else:
            k_tile = tl.load(k_at)
        acc = tl.dot(tl.trans(ds_tile), k_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["sample0", "kv_head0", "row_end"])
def backward_q_kernel(
    ds, k, raw_q, q_scale, key_lengths, grad_q, grad_q_scale,
    stride_kb, stride_kh, stride_kn, stride_rb, stride_rh, stride_rm,
    stride_dqb, stride_dqh, stride_dqm,
    heads, queries, keys, scale, sample0, kv_head0, band_kv_heads, row_begin, row_end,
    ds_rows, ds_keys, query_blocks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of q and q_scale from a band of dS: dq = scale * dS k, one block of queries.

    Only those elements of dS are read that backward_kv_kernel has written.
    """
    blocks = tl.cdiv(row_end - row_begin, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % blocks
    local = pid // blocks  # which (sample, head) of the band
    band_heads = band_kv_heads * GROUP
    b = (sample0 + local // band_heads).to(tl.int64)
    h = (kv_head0 * GROUP + local % band_heads).to(tl.int64)
    lanes_m = tl.arange(0, BLOCK_M)
    lanes_n = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_ok = dims < HEAD_DIM
    first_row = row_begin + block * BLOCK_M
    rows = first_row + lanes_m
    rows_ok = rows < row_end

    key_end = keys
    if key_lengths is not None:
        key_end = tl.minimum(tl.maximum(tl.load(key_lengths + b), 0), keys).to(tl.int32)
    causal_shift = keys - queries
    end = key_end
    inside = key_end
    if CAUSAL:
        end = tl.minimum(key_end, first_row + BLOCK_M + causal_shift)
        inside = tl.minimum(key_end, first_row + 1 + causal_shift)
    inside = tl.maximum(inside, 0) // BLOCK_N * BLOCK_N
    ds_base = ds + local.to(tl.int64) * ds_keys * ds_rows + block * BLOCK_M
    k_base = k + b * stride_kb + (h // GROUP) * stride_kh
    k_offsets = lanes_n[:, None] * stride_kn + dims[None, :]
    ds_offsets = lanes_n[:, None] * ds_rows + lanes_m[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    acc = _backward_q_tiles(
        acc, 0, inside, key_end, ds_base, ds_offsets, ds_rows, k_base, k_offsets, stride_kn,
        rows, causal_shift, HEAD_DIM, BLOCK_D, BLOCK_N, False, CAUSAL, PRECISION,
    )  # fmt: skip
    acc = _backward_q_tiles(
        acc, inside, end, key_end, ds_base, ds_offsets, ds_rows, k_base, k_offsets, stride_kn,
        rows, causal_shift, HEAD_DIM, BLOCK_D, BLOCK_N, True, CAUSAL, PRECISION,
    )  # fmt: skip
    # The workspace beyond the last row holds anything.
    acc = tl.where(rows_ok[:, None], acc, 0.0)

    dq = acc * scale
    tile_ok = rows_ok[:, None] & dims_ok[None, :]
    rows64 = rows.to(tl.int64)[:, None]
    if q_scale is not None:
        raw = tl.load(
            raw_q + b * stride_rb + h * stride_rh + rows64 * stride_rm + dims[None, :],
            mask=tile_ok, other=0.0,
        ).to(tl.float32)  # fmt: skip
        weight = tl.load(q_scale + dims, mask=dims_ok, other=0.0).to(tl.float32)
        dq, d_weight = _normalize_gradient(raw, weight, dq)
        partial = ((b * heads + h) * query_blocks + first_row // BLOCK_M) * HEAD_DIM
        tl.store(grad_q_scale + partial + dims, d_weight, mask=dims_ok)
    tl.store(
        grad_q + b * stride_dqb + h * stride_dqh + rows64 * stride_dqm + dims[None, :],
        dq.to(grad_q.dtype.element_ty),
        mask=tile_ok,
    )


@triton.jit
def _next_in_slot(codes_row, length, slots, after, slot_mask, BLOCK: tl.constexpr):
    # For each of `slots`, the first position beyond `after` whose code falls into it, or -1.
    best = tl.full(slots.shape, 2147483647, dtype=tl.int32)
    for start in range(0, length, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        ok = positions < length
        found = tl.load(codes_row + positions, mask=ok, other=0) & slot_mask
        hit = (found[None, :] == slots[:, None]) & ok[None, :]
        hit &= positions[None, :] > after[:, None]
        best = tl.minimum(best, tl.min(tl.where(hit, positions[None, :], 2147483647), axis=1))
    return tl.where(best == 2147483647, -1, best)


@triton.jit
def index_kernel(
    q_codes, first, following, stride_qcb, queries, slots,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each code is: the queries as chains, one per slot (code modulo ``slots``).

    ``first`` (B or 1, slots) int32 is the first query of a slot's chain, ``following`` (B or 1, M)
    int32 the next one in the same chain; -1 ends it. Distinct codes within ``slots`` of each other
    make chains of one. Brute force, (slots + M) * M comparisons, without atomics or a sort.
    """
    slot_blocks = tl.cdiv(slots, BLOCK)
    blocks = slot_blocks + tl.cdiv(queries, BLOCK)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    block = pid % blocks
    lanes = tl.arange(0, BLOCK)
    codes_row = q_codes + b * stride_qcb
    slot_mask = slots - 1
    if block < slot_blocks:
        wanted = block * BLOCK + lanes
        after = tl.full([BLOCK], -1, dtype=tl.int32)
        result = _next_in_slot(codes_row, queries, wanted, after, slot_mask, BLOCK)
        tl.store(first + b * slots + wanted, result, mask=wanted < slots)
    else:
        position = (block - slot_blocks) * BLOCK + lanes
        ok = position < queries
        wanted = tl.load(codes_row + position, mask=ok, other=0) & slot_mask
        result = _next_in_slot(codes_row, queries, wanted, position, slot_mask, BLOCK)
        tl.store(following + b * queries + position, result, mask=ok)


@triton.jit(do_not_specialize=["sample0", "head0", "row_end"])
def table_gradient_kernel(
    ds, q_codes, k_codes, key_mask, key_lengths, first, following, partial,
    stride_qcb, stride_kcb, stride_maskb, stride_firstb, stride_followingb,
    heads, queries, keys, radius, slots, sample0, head0, band_heads, pairs,
    pairs_per_part, row_begin, row_end, ds_rows, ds_keys,
    CAUSAL: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds a band of dS to ``partial`` (parts, H, 2R + 1), all offsets but the two clamped ones.

    For a key with code c, entry r of the table belongs to the query with code c + r - R, so lanes
    run over r and look their query up: a gather, hence no two lanes ever add to one place. One
    program owns a slice of r and some heads, and walks over its share of the band's (sample, key)
    ``pairs`` in order.
    """
    entries = 2 * radius + 1
    r_blocks = tl.cdiv(entries, BLOCK_R)
    h_blocks = tl.cdiv(band_heads, BLOCK_H)
    pid = tl.program_id(0)
    r_block = pid % r_blocks
    h_block = pid // r_blocks % h_blocks
    part = (pid // (r_blocks * h_blocks)).to(tl.int64)
    lanes = tl.arange(0, BLOCK_J * BLOCK_R)  # BLOCK_J keys x BLOCK_R entries
    entry = r_block * BLOCK_R + lanes % BLOCK_R
    inner = (entry > 0) & (entry < 2 * radius)
    local_heads = h_block * BLOCK_H + tl.arange(0, BLOCK_H)
    heads_ok = local_heads < band_heads
    plane = tl.cast(ds_keys, tl.int64) * ds_rows
    causal_shift = keys - queries

    acc = tl.zeros([BLOCK_H, BLOCK_J * BLOCK_R], dtype=tl.float32)
    pair_begin = tl.cast(part, tl.int32) * pairs_per_part
    pair_end = tl.minimum(pair_begin + pairs_per_part, pairs)
    for start in range(pair_begin, pair_end, BLOCK_J):
        pair = start + lanes // BLOCK_R
        ok = (pair < pair_end) & inner
        sample = pair // keys
        key = pair % keys
        b = (sample0 + sample).to(tl.int64)
        if key_lengths is not None:
            ok &= key < tl.load(key_lengths + b, mask=ok, other=0)
        if key_mask is not None:
            ok &= tl.load(key_mask + b * stride_maskb + key, mask=ok, other=0) != 0
        code = tl.load(k_codes + b * stride_kcb + key, mask=ok, other=0)
        wanted = code.to(tl.int64) + entry - radius
        slot = (wanted & (slots - 1)).to(tl.int32)
        query = tl.load(first + b * stride_firstb + slot, mask=ok, other=-1)
        ds_key = ds + sample.to(tl.int64) * band_heads * plane + key.to(tl.int64) * ds_rows
        while tl.max(query, axis=0) >= 0:
            some = query >= 0
            found = tl.load(q_codes + b * stride_qcb + query, mask=some, other=0)
            hit = some & (found.to(tl.int64) == wanted) & (query >= row_begin) & (query < row_end)
            if CAUSAL:
                hit &= key <= query + causal_shift
            at = ds_key + (query - row_begin)
            values = tl.load(
                at[None, :] + local_heads[:, None] * plane,
                mask=hit[None, :] & heads_ok[:, None], other=0.0,
            )  # fmt: skip
            acc += values.to(tl.float32)
            query = tl.load(following + b * stride_followingb + query, mask=some, other=-1)

    total = tl.sum(tl.reshape(acc, [BLOCK_H, BLOCK_J, BLOCK_R]), axis=1)
    entry = r_block * BLOCK_R + tl.arange(0, BLOCK_R)
    at = partial + (part * heads + head0 + local_heads[:, None]) * entries + entry[None, :]
    mask = heads_ok[:, None] & ((entry > 0) & (entry < 2 * radius))[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


@triton.jit(do_not_specialize=["sample0", "head0", "row_end"])
def table_edges_kernel(
    ds, q_codes, k_codes, key_mask, key_lengths, partial, stride_qcb, stride_kcb, stride_maskb,
    heads, queries, keys, radius, sample0, head0, band_heads, row_begin, row_end, ds_rows, ds_keys,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds a band of dS at clamped offsets to ``partial`` (B, H, key blocks, 2): low, high.

    Tiles whose codes are all within R of each other are not read.
    """
    blocks = tl.cdiv(keys, BLOCK_N)
    pid = tl.program_id(0)
    block = pid % blocks
    local = pid // blocks
    b = (sample0 + local // band_heads).to(tl.int64)
    h = head0 + local % band_heads
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_ok = columns < keys
    if key_lengths is not None:
        columns_ok &= columns < tl.load(key_lengths + b)
    if key_mask is not None:
        columns_ok &= tl.load(key_mask + b * stride_maskb + columns, mask=columns_ok, other=0) != 0
    key_codes = tl.load(k_codes + b * stride_kcb + columns, mask=columns < keys, other=0)
    key_low = tl.min(tl.where(columns_ok, key_codes, 2147483647), axis=0).to(tl.int64)
    key_high = tl.max(tl.where(columns_ok, key_codes, -2147483648), axis=0).to(tl.int64)
    causal_shift = keys - queries
    lanes = tl.arange(0, BLOCK_M)
    ds_base = ds + local.to(tl.int64) * ds_keys * ds_rows + columns.to(tl.int64)[:, None] * ds_rows
    low = tl.zeros([BLOCK_N], dtype=tl.float32)
    high = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(row_begin, row_end, BLOCK_M):
        rows = start + lanes
        rows_ok = rows < row_end
        codes = tl.load(q_codes + b * stride_qcb + rows, mask=rows_ok, other=0)
        code_low = tl.min(tl.where(rows_ok, codes, 2147483647), axis=0).to(tl.int64)
        code_high = tl.max(tl.where(rows_ok, codes, -2147483648), axis=0).to(tl.int64)
        if (code_high - key_low >= radius) | (code_low - key_high <= -radius):
            ok = columns_ok[:, None] & rows_ok[None, :]
            if CAUSAL:
                ok &= columns[:, None] <= rows[None, :] + causal_shift
            tile = tl.load(ds_base + (rows - row_begin)[None, :], mask=ok, other=0.0)
            tile = tile.to(tl.float32)
            offset = codes.to(tl.int64)[None, :] - key_codes.to(tl.int64)[:, None]
            below = offset <= -radius  # with R = 0 every offset is clamped once, to the one entry
            low += tl.sum(tl.where(below, tile, 0.0), axis=1)
            high += tl.sum(tl.where((offset >= radius) & (below == 0), tile, 0.0), axis=1)
    at = partial + (((b * heads + h) * blocks) + block) * 2
    tl.store(at, tl.load(at) + tl.sum(low, axis=0))
    tl.store(at + 1, tl.load(at + 1) + tl.sum(high, axis=0))
