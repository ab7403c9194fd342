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
def _entries(q_codes, k_codes, radius):
    # (M, N) int32: the table's entry of each pair.
    low, high = _code_window(q_codes, radius)
    clamped = tl.minimum(tl.maximum(k_codes[None, :], low[:, None]), high[:, None])
    return (q_codes + radius)[:, None] - clamped  # may wrap; the difference unwraps


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
def _same_in_warp(value, PTX: tl.constexpr):
    # An int32 that is the same in all threads, which ptxas sees only then, and keeps what depends
    # on it in uniform registers: a loop's bound, the addresses of its products' tiles.
    if not PTX:
        return value
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [value],
        dtype=tl.int32, is_pure=True, pack=1,
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
    stride_qcb, stride_kcb, stride_maskb,
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

    # Names below must exist on every path; None vanishes at compile time.
    table_row = None
    codes = None
    first_entry = None
    k_codes_row = None
    if table is not None:
        table_row = table + h * (2 * radius + 1)
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

    q_base = q + b * stride_qb + h * stride_qh + first_row.to(tl.int64) * stride_qm
    lanes = tl.arange(0, BLOCK_M)
    q_tile = tl.load(q_base + lanes[:, None] * stride_qm + dims[None, :], mask=tile_ok, other=0.0)
    if q_scale is not None:
        weight = tl.load(q_scale + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        q_tile = _normalize(q_tile.to(tl.float32), weight).to(q_tile.dtype)

    k_base = k + b * stride_kb + (h // GROUP) * stride_kh
    v_base = v + b * stride_vb + (h // GROUP) * stride_vh
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # The last keys first: what only their tiles need then takes no registers in the other loop.
    # Wide rows outside the tensor cores would spill with a second layout of q.
    WIDE: tl.constexpr = q.dtype.element_ty == tl.float32 and BLOCK_D > 64
    EDGE: tl.constexpr = BLOCK_N if WIDE else BLOCK_N // 2
    acc, row_max, row_sum = _forward_tiles(
        acc, row_max, row_sum, q_tile, inside, end, key_end, last_key,
        k_base, v_base, stride_kn, stride_vn, table_row, first_entry, codes, radius,
        k_codes_row, mask_row, row_key, threshold, scale_log2,
        HEAD_DIM, BLOCK_D, EDGE, 1, True, seed is not None, PRECISION, PTX,
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
def _prepare_rows(
    x, scale, y, grad_out, out, logsumexp2, delta, lse2, pid, stride_xb, stride_xh, stride_xn,
    stride_gb, stride_gh, stride_gm, stride_ob, stride_oh, stride_om, heads, length, padded,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # y = l2norm(x) * scale where there is a scale, delta and lse2 where there is an output.
    blocks = tl.cdiv(padded, BLOCK)
    bh = (pid // blocks).to(tl.int64)
    b = bh // heads
    h = bh % heads
    rows = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    rows64 = rows.to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    if scale is not None:
        at = x + b * stride_xb + h * stride_xh + rows64 * stride_xn + dims[None, :]
        weight = tl.load(scale + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        result = _normalize(tl.load(at, mask=mask, other=0.0).to(tl.float32), weight)
        where = y + bh * length * HEAD_DIM + rows[:, None] * HEAD_DIM + dims[None, :]
        tl.store(where, result.to(y.dtype.element_ty), mask=mask)
    if out is not None:
        grad_at = grad_out + b * stride_gb + h * stride_gh + rows64 * stride_gm + dims[None, :]
        out_at = out + b * stride_ob + h * stride_oh + rows64 * stride_om + dims[None, :]
        product = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
        product *= tl.load(out_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(delta + bh * padded + rows, tl.sum(product, axis=1))
        # Rows past the end, and rows that see no key, get +inf: p = 0.
        value = tl.load(logsumexp2 + bh * length + rows, mask=rows < length, other=float("inf"))
        value = tl.where(value == float("-inf"), float("inf"), value)
        tl.store(lse2 + bh * padded + rows, value)


@triton.jit
def _index_codes(
    codes, inverse, frame, used, clash, length, absent, slots, BLOCK: tl.constexpr
):  # fmt: skip
    # inverse[slot] = position of the sample's code in that slot, or `absent`. Codes of all samples
    # in one slot should be equal, and a sample should have each once: then inverse, frame and used
    # hold the same numbers whatever the order of the stores. If not, clash becomes 1.
    lanes = tl.arange(0, BLOCK)
    for start in range(0, slots, BLOCK):
        at = start + lanes
        tl.store(inverse + at, tl.zeros([BLOCK], dtype=tl.int32) + absent, mask=at < slots)
    tl.debug_barrier()
    for start in range(0, length, BLOCK):
        at = start + lanes
        ok = at < length
        code = tl.load(codes + at, mask=ok, other=0)
        slot = code & (slots - 1)
        tl.store(inverse + slot, at, mask=ok)
        tl.store(frame + slot, code, mask=ok)
        tl.store(used + slot, tl.full([BLOCK], 1, dtype=tl.int32), mask=ok)
    tl.debug_barrier()
    for start in range(0, length, BLOCK):
        at = start + lanes
        ok = at < length
        slot = tl.load(codes + at, mask=ok, other=0) & (slots - 1)
        found = tl.load(inverse + slot, mask=ok, other=0)
        if tl.max(tl.where(ok & (found != at), 1, 0), axis=0) > 0:
            tl.store(clash, 1)


@triton.jit
def _rank_codes(
    codes, ranks, padded_codes, first, length,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    # ranks = how many earlier positions of the same group of GROUP hold the same code.
    lanes = first + tl.arange(0, BLOCK)
    own = tl.load(codes + lanes, mask=lanes < length, other=0)
    tl.store(padded_codes + lanes, own)
    rank = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(first // GROUP * GROUP, tl.minimum(first + BLOCK, length), STEP):
        others = start + tl.arange(0, STEP)
        code = tl.load(codes + others, mask=others < length, other=0)
        same = (own[:, None] == code[None, :]) & (others[None, :] < lanes[:, None])
        rank += tl.sum(tl.where(same, 1, 0), axis=1)
    tl.store(ranks + lanes, rank, mask=lanes < length)


@triton.jit
def _check_frame(codes, ok, frame, clash, slots):
    # clash becomes 1 if another sample has another code in the slot of one of these.
    found = tl.load(frame + (codes & (slots - 1)), mask=ok, other=0)
    if tl.max(tl.where(ok & (found != codes), 1, 0), axis=0) > 0:
        tl.store(clash, 1)


@triton.jit
def prepare_kernel(
    q, k, grad_out, out, logsumexp2, q_scale, k_scale, table, q_codes, k_codes,
    q_normal, k_normal, delta, lse2, scaled_table, padded_codes, inverse, frame, used, clash, ranks,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_gb, stride_gh, stride_gm, stride_ob, stride_oh, stride_om, stride_qcb, stride_kcb,
    batch, heads, kv_heads, queries, keys, entries, slots, absent, rank_rows, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, RANK_GROUP: tl.constexpr,
):  # fmt: skip
    """What the other kernels of the backward read; each program does one of five things.

    Blocks of queries, padded to ``absent``: delta (B, H, absent) = sum over D of grad_out * out,
    lse2 (B, H, absent), infinite where p is 0, and normalised q. Blocks of keys, with QK norm:
    normalised k. Blocks of the table: scaled_table (H, 2R + 1), over the scale. Blocks of queries'
    codes: padded_codes (B or 1, absent), and ranks (B or 1, M), the number of earlier equal codes
    in a group. Samples, with codes of their own: inverse (2, B, slots) of queries and keys, frame
    (2, slots), the code in a slot, used (2, slots), whether any sample has one, and clash (1), see
    _index_codes. used and clash arrive as zeros.
    """
    pid = tl.program_id(0)
    row_programs = batch * heads * tl.cdiv(absent, BLOCK)
    key_programs = 0
    if k_scale is not None:
        key_programs = batch * kv_heads * tl.cdiv(keys, BLOCK)
    table_programs = 0
    rank_programs = 0
    if table is not None:
        table_programs = tl.cdiv(heads * entries, BLOCK * BLOCK_D)
        rank_programs = rank_rows * tl.cdiv(queries, 2 * BLOCK)
    if pid < row_programs:
        _prepare_rows(
            q, q_scale, q_normal, grad_out, out, logsumexp2, delta, lse2, pid,
            stride_qb, stride_qh, stride_qm, stride_gb, stride_gh, stride_gm,
            stride_ob, stride_oh, stride_om, heads, queries, absent, HEAD_DIM, BLOCK_D, BLOCK,
        )  # fmt: skip
    elif pid < row_programs + key_programs:
        if k_scale is not None:
            _prepare_rows(
                k, k_scale, k_normal, None, None, None, None, None, pid - row_programs,
                stride_kb, stride_kh, stride_kn, 0, 0, 0, 0, 0, 0, kv_heads, keys, keys,
                HEAD_DIM, BLOCK_D, BLOCK,
            )  # fmt: skip
    elif pid < row_programs + key_programs + table_programs:
        if table is not None:
            first = (pid - row_programs - key_programs).to(tl.int64) * (BLOCK * BLOCK_D)
            at = first + tl.arange(0, BLOCK * BLOCK_D)
            ok = at < heads * entries
            value = tl.load(table + at, mask=ok, other=0.0).to(tl.float32)
            tl.store(scaled_table + at, value / scale, mask=ok)
    elif pid < row_programs + key_programs + table_programs + rank_programs:
        if table is not None:
            blocks = tl.cdiv(queries, 2 * BLOCK)
            place = pid - row_programs - key_programs - table_programs
            b = (place // blocks).to(tl.int64)
            first = place % blocks * (2 * BLOCK)
            _rank_codes(
                q_codes + b * stride_qcb, ranks + b * queries, padded_codes + b * absent,
                first, queries, RANK_GROUP, 2 * BLOCK, 16,
            )  # fmt: skip
    else:
        if used is not None:
            b = pid - row_programs - key_programs - table_programs - rank_programs
            b = b.to(tl.int64)
            if b < batch:
                _index_codes(
                    q_codes + b * stride_qcb, inverse + b * slots, frame, used, clash,
                    queries, absent, slots, 16 * BLOCK,
                )  # fmt: skip
            else:
                _index_codes(
                    k_codes + (b - batch) * stride_kcb, inverse + b * slots, frame + slots,
                    used + slots, clash, keys, keys, slots, 16 * BLOCK,
                )  # fmt: skip


@triton.jit
def _backward_q_tiles(
    acc, residue, q_tile, g_tile, begin, end, key_end, k_base, v_base, stride_kn, stride_vn,
    table_row, window_low, window_high, code_plus_radius, k_codes_row, mask_row, row_key,
    threshold, keep_factor, scale_log2, lse2, delta, rows, causal_shift,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    # acc += dS k and residue += rows' sums of dS, over the keys [begin, end).
    lanes = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_ok = dims < HEAD_DIM
    k_offsets = lanes[:, None] * stride_kn + dims[None, :]
    v_offsets = lanes[:, None] * stride_vn + dims[None, :]
    for start in range(begin, end, BLOCK_N):
        columns = start + lanes
        columns_ok = columns < key_end
        start64 = tl.cast(start, tl.int64)
        k_ptrs = k_base + start64 * stride_kn + k_offsets
        v_ptrs = v_base + start64 * stride_vn + v_offsets
        if BOUNDED:
            k_tile = tl.load(k_ptrs, mask=columns_ok[:, None] & dims_ok[None, :], other=0.0)
            v_tile = tl.load(v_ptrs, mask=columns_ok[:, None] & dims_ok[None, :], other=0.0)
        elif BLOCK_D != HEAD_DIM:
            k_tile = tl.load(k_ptrs, mask=dims_ok[None, :], other=0.0)
            v_tile = tl.load(v_ptrs, mask=dims_ok[None, :], other=0.0)
        else:
            k_tile = tl.load(k_ptrs)
            v_tile = tl.load(v_ptrs)
        if table_row is not None:
            codes = tl.load(k_codes_row + columns, mask=columns_ok, other=0)
            clamped = tl.minimum(
                tl.maximum(codes[None, :], window_low[:, None]), window_high[:, None]
            )
            s = _read_table(table_row, code_plus_radius[:, None] - clamped, PTX)
        else:
            s = tl.zeros([acc.shape[0], BLOCK_N], dtype=tl.float32)
        s = tl.dot(q_tile, tl.trans(k_tile), s, input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse2[:, None])
        if mask_row is not None:
            visible = tl.load(mask_row + columns, mask=columns_ok, other=0) != 0
            p = tl.where(visible[None, :], p, 0.0)
        elif BOUNDED:
            p = tl.where(columns_ok[None, :], p, 0.0)
        if BOUNDED and CAUSAL:
            p = tl.where(columns[None, :] <= rows[:, None] + causal_shift, p, 0.0)
        grad_p = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        if row_key is not None:
            kept = _kept(row_key[:, None], _column_key(columns)[None, :], threshold)
            grad_p = tl.where(kept, grad_p * keep_factor, 0.0)
        ds = p * (grad_p - delta[:, None])
        residue += tl.sum(ds, axis=1)
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    return acc, residue


@triton.jit(do_not_specialize=["threshold"])
def backward_q_kernel(
    grad_out, q, k, v, raw_q, q_scale, lse2, delta, scaled_table, q_codes, k_codes, key_mask,
    key_lengths, seed, grad_q, grad_q_scale, frame, clash,
    stride_gb, stride_gh, stride_gm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_rb, stride_rh, stride_rm, stride_qcb, stride_kcb, stride_maskb,
    heads, queries, keys, radius, slots, scale, scale_log2, threshold, keep_factor, absent,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of q and q_scale for one block of queries, and an exact delta.

    A row of dS = P (dP - delta) sums to zero, but for what the rounding of the output has left in
    delta. That residue is added to delta, for the kernels that sum dS over many rows.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % blocks
    bh = (pid // blocks).to(tl.int64)
    b = bh // heads
    h = bh % heads
    lanes = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    first_row = block * BLOCK_M
    rows = first_row + lanes
    rows_ok = rows < queries
    rows64 = rows.to(tl.int64)[:, None]
    tile_ok = rows_ok[:, None] & (dims < HEAD_DIM)[None, :]
    q_at = q + b * stride_qb + h * stride_qh + rows64 * stride_qm + dims[None, :]
    g_at = grad_out + b * stride_gb + h * stride_gh + rows64 * stride_gm + dims[None, :]
    q_tile = tl.load(q_at, mask=tile_ok, other=0.0)
    g_tile = tl.load(g_at, mask=tile_ok, other=0.0)
    row_lse2 = tl.load(lse2 + bh * absent + rows)
    row_delta = tl.load(delta + bh * absent + rows)

    # Names below must exist on every path; None vanishes at compile time.
    table_row = None
    window_low = None
    window_high = None
    code_plus_radius = None
    k_codes_row = None
    if scaled_table is not None:
        table_row = scaled_table + h * (2 * radius + 1)
        k_codes_row = k_codes + b * stride_kcb
        codes = tl.load(q_codes + b * stride_qcb + rows, mask=rows_ok, other=0)
        if frame is not None:
            _check_frame(codes, rows_ok, frame, clash, slots)
        window_low, window_high = _code_window(codes, radius)
        code_plus_radius = codes + radius  # may wrap; the difference with a clamped code unwraps
    mask_row = None
    if key_mask is not None:
        mask_row = key_mask + b * stride_maskb
    row_key = None
    if seed is not None:
        row_key = _row_key(seed, bh * queries + rows)

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
    k_base = k + b * stride_kb + (h // GROUP) * stride_kh
    v_base = v + b * stride_vb + (h // GROUP) * stride_vh
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    residue = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc, residue = _backward_q_tiles(
        acc, residue, q_tile, g_tile, 0, inside, key_end, k_base, v_base, stride_kn, stride_vn,
        table_row, window_low, window_high, code_plus_radius, k_codes_row, mask_row, row_key,
        threshold, keep_factor, scale_log2, row_lse2, row_delta, rows, causal_shift,
        HEAD_DIM, BLOCK_D, BLOCK_N, False, CAUSAL, PRECISION, PTX,
    )  # fmt: skip
    acc, residue = _backward_q_tiles(
        acc, residue, q_tile, g_tile, inside, end, key_end, k_base, v_base, stride_kn, stride_vn,
        table_row, window_low, window_high, code_plus_radius, k_codes_row, mask_row, row_key,
        threshold, keep_factor, scale_log2, row_lse2, row_delta, rows, causal_shift,
        HEAD_DIM, BLOCK_D, BLOCK_N, True, CAUSAL, PRECISION, PTX,
    )  # fmt: skip
    tl.store(delta + bh * absent + rows, row_delta + residue)

    dq = acc * scale
    if q_scale is not None:
        raw = tl.load(
            raw_q + b * stride_rb + h * stride_rh + rows64 * stride_rm + dims[None, :],
            mask=tile_ok, other=0.0,
        ).to(tl.float32)  # fmt: skip
        weight = tl.load(q_scale + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        dq, d_weight = _normalize_gradient(raw, weight, dq)
        partial = (bh * blocks + block) * HEAD_DIM
        tl.store(grad_q_scale + partial + dims, d_weight, mask=dims < HEAD_DIM)
    at = ((b * queries + rows64) * heads + h) * HEAD_DIM + dims[None, :]
    tl.store(grad_q + at, dq.to(grad_q.dtype.element_ty), mask=tile_ok)


@triton.jit
def _stored_q_tiles(
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


@triton.jit
def stored_q_kernel(
    ds, k, raw_q, q_scale, key_lengths, grad_q, grad_q_scale, q_codes, frame, clash,
    stride_kb, stride_kh, stride_kn, stride_rb, stride_rh, stride_rm, stride_qcb,
    heads, queries, keys, slots, scale, ds_rows, ds_keys, absent,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of q and q_scale from dS: dq = scale * dS k, one block of queries.

    Only those elements of dS are read that backward_kv_kernel has written.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % blocks
    bh = (pid // blocks).to(tl.int64)
    b = bh // heads
    h = bh % heads
    lanes_m = tl.arange(0, BLOCK_M)
    lanes_n = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_ok = dims < HEAD_DIM
    first_row = block * BLOCK_M
    rows = first_row + lanes_m
    rows_ok = rows < queries
    if frame is not None:
        codes = tl.load(q_codes + b * stride_qcb + rows, mask=rows_ok, other=0)
        _check_frame(codes, rows_ok, frame, clash, slots)

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
    ds_base = ds + bh * ds_keys * ds_rows + first_row
    k_base = k + b * stride_kb + (h // GROUP) * stride_kh
    k_offsets = lanes_n[:, None] * stride_kn + dims[None, :]
    ds_offsets = lanes_n[:, None] * ds_rows + lanes_m[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    acc = _stored_q_tiles(
        acc, 0, inside, key_end, ds_base, ds_offsets, ds_rows, k_base, k_offsets, stride_kn,
        rows, causal_shift, HEAD_DIM, BLOCK_D, BLOCK_N, False, CAUSAL, PRECISION,
    )  # fmt: skip
    acc = _stored_q_tiles(
        acc, inside, end, key_end, ds_base, ds_offsets, ds_rows, k_base, k_offsets, stride_kn,
        rows, causal_shift, HEAD_DIM, BLOCK_D, BLOCK_N, True, CAUSAL, PRECISION,
    )  # fmt: skip
    if pid == 0:  # what a key without a place reads, a row after all
        for start in range(0, ds_rows, BLOCK_M):
            none = tl.zeros([BLOCK_M], dtype=ds.dtype.element_ty)
            at = ds + (tl.num_programs(0) // blocks).to(tl.int64) * ds_keys * ds_rows
            tl.store(at + start + lanes_m, none, mask=start + lanes_m < ds_rows)
    if block == blocks - 1:  # what a query without a place reads
        for start in range(0, ds_keys, BLOCK_M):
            columns = start + lanes_m
            none = tl.zeros([BLOCK_M], dtype=ds.dtype.element_ty)
            at = ds + (bh * ds_keys + columns) * ds_rows + absent
            tl.store(at, none, mask=columns < ds_keys)
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
        partial = (bh * blocks + block) * HEAD_DIM
        tl.store(grad_q_scale + partial + dims, d_weight, mask=dims_ok)
    at = ((b * queries + rows64) * heads + h) * HEAD_DIM + dims[None, :]
    tl.store(grad_q + at, dq.to(grad_q.dtype.element_ty), mask=tile_ok)


@triton.jit
def _backward_kv_tiles(
    dk, dv, end, begin, span, k_tile, v_tile, q_base, g_base, stride_qh, stride_qm,
    stride_gh, stride_gm, lse2, delta, scaled_table, q_codes_row, codes, code_minus_radius, radius,
    ds, ds_rows, ds_keys, absent, seed, column_key, threshold, keep_factor, scale_log2,
    b, hk, heads, queries, columns, keys_ok, causal_shift,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_KEYS: tl.constexpr, ANY_CODES: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    # Adds what comes of `end` queries, `span` from `begin` of each head of the group. The loop
    # counts from 0: Triton 3.9 does not vectorise loads of one that begins at a variable.
    lanes_m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    dims_ok = dims < HEAD_DIM
    ds_offsets = columns.to(tl.int64)[:, None] * ds_rows + lanes_m[None, :]
    for at in range(0, end, BLOCK_M):
        start = begin + at
        h = hk * GROUP
        if GROUP > 1:
            g = at // tl.maximum(span, 1)
            start -= g * span
            h += g
        bh = b * heads + h
        rows = start + lanes_m
        # Past the end the last row is read again. Its p is 0, as lse2 is infinite there.
        inner = tl.minimum(lanes_m, queries - 1 - start)[:, None]
        start64 = tl.cast(start, tl.int64)
        q_at = q_base + h * stride_qh + start64 * stride_qm + (inner * stride_qm + dims[None, :])
        g_at = g_base + h * stride_gh + start64 * stride_gm + (inner * stride_gm + dims[None, :])
        if BLOCK_D == HEAD_DIM:
            q_tile = tl.load(q_at)
        else:
            q_tile = tl.load(q_at, mask=dims_ok[None, :], other=0.0)
        # The product starts from the bias: no addition, and no register for it.
        if scaled_table is None:
            s = tl.zeros([columns.shape[0], BLOCK_M], dtype=tl.float32)
        else:
            row_codes = tl.load(q_codes_row + rows)
            table_row = scaled_table + h * (2 * radius + 1)
            if ANY_CODES:
                low, high = _code_window(codes, radius)
                entry = (
                    tl.minimum(tl.maximum(row_codes[None, :], low[:, None]), high[:, None])
                    - code_minus_radius[:, None]
                )
                s = _read_table(table_row, entry, PTX)
            else:
                s = _read_offset(
                    table_row, row_codes[None, :], code_minus_radius[:, None], 2 * radius, PTX
                )
        s = tl.dot(k_tile, tl.trans(q_tile), s, input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - tl.load(lse2 + bh * absent + rows)[None, :])
        if MASK_KEYS:
            p = tl.where(keys_ok[:, None], p, 0.0)
        if CAUSAL:  # in every tile: a loop for those on the diagonal costs more registers
            p = tl.where(columns[:, None] <= rows[None, :] + causal_shift, p, 0.0)
        if BLOCK_D == HEAD_DIM:
            g_tile = tl.load(g_at)
        else:
            g_tile = tl.load(g_at, mask=dims_ok[None, :], other=0.0)
        grad_p = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
        if seed is not None:
            row_key = _row_key(seed, bh * queries + rows)
            kept = _kept(row_key[None, :], column_key[:, None], threshold)
            dropped = tl.where(kept, p * keep_factor, 0.0)
            grad_p = tl.where(kept, grad_p * keep_factor, 0.0)
        else:
            dropped = p
        dv = tl.dot(dropped.to(g_tile.dtype), g_tile, dv, input_precision=PRECISION)
        row_delta = tl.load(delta + bh * absent + rows)
        ds_tile = (p * (grad_p - row_delta[None, :])).to(q_tile.dtype)  # (BN, BM)
        if ds is not None:
            # The workspace is padded to whole tiles: no mask. The hint makes the stores wide.
            ds_start = tl.multiple_of(start, BLOCK_M)
            tl.store(ds + bh * ds_keys * ds_rows + ds_start + ds_offsets, ds_tile)
        dk = tl.dot(ds_tile, q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["threshold"])
def backward_kv_kernel(
    grad_out, q, k, v, raw_k, k_scale, lse2, delta, scaled_table, q_codes, k_codes, key_mask,
    key_lengths, seed, ds, grad_k, grad_v, grad_k_scale, frame, clash,
    stride_gb, stride_gh, stride_gm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_rb, stride_rh, stride_rn, stride_qcb, stride_kcb, stride_maskb,
    heads, queries, keys, radius, slots, scale, scale_log2, threshold, keep_factor,
    ds_rows, absent,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_KEYS: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of k, v and k_scale, and dS, for one block of keys.

    Tiles are (BN, BM), keys first, so that neither product with a (BM, D) tile needs a transposed
    accumulator. dS goes, keys first, to ``ds`` (B, H, N padded, ds_rows), unless that is None.
    """
    blocks = tl.cdiv(keys, BLOCK_N)
    pid = tl.program_id(0)
    block = pid % blocks
    bhk = (pid // blocks).to(tl.int64)
    kv_heads = heads // GROUP
    b = bhk // kv_heads
    hk = bhk % kv_heads
    lanes = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    columns = block * BLOCK_N + lanes
    in_range = columns < keys
    dims_ok = dims < HEAD_DIM
    tile_ok = in_range[:, None] & dims_ok[None, :]
    columns64 = columns.to(tl.int64)[:, None]
    k_at = k + b * stride_kb + hk * stride_kh + columns64 * stride_kn + dims[None, :]
    v_at = v + b * stride_vb + hk * stride_vh + columns64 * stride_vn + dims[None, :]
    k_tile = tl.load(k_at, mask=tile_ok, other=0.0)
    v_tile = tl.load(v_at, mask=tile_ok, other=0.0)

    padded_keys = blocks.to(tl.int64) * BLOCK_N

    key_end = keys
    if key_lengths is not None:
        key_end = tl.minimum(tl.maximum(tl.load(key_lengths + b), 0), keys).to(tl.int32)
    keys_ok = columns < key_end
    if key_mask is not None:
        keys_ok &= tl.load(key_mask + b * stride_maskb + columns, mask=in_range, other=0) != 0

    # Names below must exist on every path; None vanishes at compile time.
    codes = None
    code_minus_radius = None
    q_codes_row = None
    if scaled_table is not None:
        codes = tl.load(k_codes + b * stride_kcb + tl.minimum(columns, keys - 1))
        if frame is not None:
            _check_frame(codes, in_range, frame + slots, clash, slots)
        code_minus_radius = codes - radius  # may wrap; the difference unwraps
        q_codes_row = q_codes + b * stride_qcb
    column_key = None
    if seed is not None:
        column_key = _column_key(columns)

    causal_shift = keys - queries
    begin = 0
    if CAUSAL:  # from the first query that sees any of these keys
        begin = tl.maximum(block * BLOCK_N - causal_shift, 0) // BLOCK_M * BLOCK_M
    end = tl.where(block * BLOCK_N < key_end, queries, 0)  # beyond its length: no rows

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    # One loop over all heads' queries: a loop over heads around one over queries would keep the
    # addresses of both in registers, more than there are.
    span = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M) * BLOCK_M
    count = GROUP * span
    q_base = q + b * stride_qb
    g_base = grad_out + b * stride_gb
    # In float32 the products take the time, and one loop for any codes takes fewer registers.
    TWO_LOOPS: tl.constexpr = scaled_table is not None and q.dtype.element_ty != tl.float32
    if TWO_LOOPS:
        wide = _codes_span(codes, q_codes_row, queries, 1024) + radius >= 2147483648
        wide_count = count * _same_in_warp(wide.to(tl.int32), PTX)
        count -= wide_count
        # Codes whose differences may wrap: in small tiles, which need fewer registers.
        dk, dv = _backward_kv_tiles(
            dk, dv, wide_count, begin, span, k_tile, v_tile, q_base, g_base, stride_qh, stride_qm,
            stride_gh, stride_gm, lse2, delta, scaled_table, q_codes_row, codes, code_minus_radius,
            radius, ds, ds_rows, padded_keys, absent, seed, column_key, threshold, keep_factor,
            scale_log2, b, hk, heads, queries, columns, keys_ok, causal_shift,
            HEAD_DIM, BLOCK_D, GROUP, CAUSAL, MASK_KEYS, True, PRECISION, PTX, BLOCK_M // 2,
        )  # fmt: skip
    dk, dv = _backward_kv_tiles(
        dk, dv, count, begin, span, k_tile, v_tile, q_base, g_base, stride_qh, stride_qm,
        stride_gh, stride_gm, lse2, delta, scaled_table, q_codes_row, codes, code_minus_radius,
        radius, ds, ds_rows, padded_keys, absent, seed, column_key, threshold, keep_factor,
        scale_log2, b, hk, heads, queries, columns, keys_ok, causal_shift,
        HEAD_DIM, BLOCK_D, GROUP, CAUSAL, MASK_KEYS, not TWO_LOOPS, PRECISION, PTX, BLOCK_M,
    )  # fmt: skip

    dk *= scale
    if k_scale is not None:
        raw = tl.load(
            raw_k + b * stride_rb + hk * stride_rh + columns64 * stride_rn + dims[None, :],
            mask=tile_ok, other=0.0,
        ).to(tl.float32)  # fmt: skip
        weight = tl.load(k_scale + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
        dk, d_weight = _normalize_gradient(raw, weight, dk)
        partial = (bhk * blocks + block) * HEAD_DIM
        tl.store(grad_k_scale + partial + dims, d_weight, mask=dims < HEAD_DIM)
    at = ((b * keys + columns64) * kv_heads + hk) * HEAD_DIM + dims[None, :]
    tl.store(grad_k + at, dk.to(grad_k.dtype.element_ty), mask=tile_ok)
    tl.store(grad_v + at, dv.to(grad_v.dtype.element_ty), mask=tile_ok)


@triton.jit
def _compact(used, listed, slots, BLOCK: tl.constexpr):
    # The used slots in order, and their number. Every program writes the same list.
    count = 0
    for start in range(0, slots, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = tl.load(used + at, mask=at < slots, other=0)
        tl.store(listed + count + tl.cumsum(there, axis=0) - there, at, mask=there != 0)
        count += tl.sum(there, axis=0)
    return count


@triton.jit
def _frame_codes(own, frame, slots, listed, used, alone):
    # Codes of a tile's lanes: of the frame, or a sample's or the whole batch's own.
    code = tl.load(own + slots, mask=listed & ((used is None) | (alone != 0)), other=0)
    if used is not None:
        if alone == 0:
            code = tl.load(frame + slots, mask=listed, other=0)
    return code


@triton.jit(do_not_specialize=["threshold"])
def backward_table_kernel(
    grad_out, q, k, v, lse2, delta, scaled_table, q_codes, k_codes, key_mask, key_lengths, seed,
    ds, inverse, frame, used, listed, clash, ranks, scratch, partial,
    stride_gb, stride_gh, stride_gm, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_qcb, stride_kcb, stride_maskb, stride_ranksb,
    batch, heads, queries, keys, radius, slots, chunks, scale_log2, threshold, keep_factor,
    ds_rows, ds_keys, absent,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    MASK_ROWS: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Adds dS over all pairs of equal offset to ``partial`` (parts, H, 2R + 1), which holds zeros.

    A tile is (BM, BN) pairs of codes, not of positions: dS of a pair of codes is first summed over
    the samples that have both, in registers, and then over the pairs of equal offset. The codes of
    a tile come from the frame: codes shared by the batch are their own; of codes per sample, the
    frame is the list of all that occur, and ``inverse`` gives a sample's positions. If codes clash,
    a tile is a sample's own and no sum is shared.

    ``scratch`` (programs, BN, WINDOW) is a program's own: the sums of one key's row go to their
    offsets, which are distinct, and the rows are added up.
    """
    pid = tl.program_id(0)
    parts = tl.num_programs(0) // heads
    part = pid // heads
    h = (pid % heads).to(tl.int64)
    lanes_m = tl.arange(0, BLOCK_M)
    lanes_n = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_ok = dims < HEAD_DIM
    table_row = scaled_table + h * (2 * radius + 1)
    sums = partial + (part * heads + h) * (2 * radius + 1)
    own = scratch + pid.to(tl.int64) * (BLOCK_N * WINDOW)
    own_pieces = own + lanes_n[:, None] * WINDOW + tl.arange(0, PIECE)[None, :]
    causal_shift = keys - queries

    q_count = tl.cast(queries, tl.int32)
    k_count = tl.cast(keys, tl.int32)
    k_frame = None
    alone = 0  # whether each sample has its own frame
    if used is not None:
        k_frame = frame + slots
        alone = tl.load(clash)
        if alone == 0:
            q_count = _compact(used, listed, slots, 1024)
            k_count = _compact(used + slots, listed + slots, slots, 1024)
            tl.debug_barrier()
    groups = tl.cast(chunks, tl.int32)
    group_size = tl.cdiv(batch, chunks)
    if alone != 0:
        groups = tl.cast(batch, tl.int32)
        group_size = 1
    q_tiles = tl.cdiv(q_count, BLOCK_M)
    k_tiles = tl.cdiv(k_count, BLOCK_N)

    low = 0.0
    high = 0.0
    for task in range(part, q_tiles * k_tiles * groups, parts):
        group = task % groups
        number = task // groups
        first_sample = group * group_size
        last_sample = tl.minimum(first_sample + group_size, batch)
        q_place = number // k_tiles * BLOCK_M + lanes_m
        k_place = number % k_tiles * BLOCK_N + lanes_n
        q_listed = q_place < q_count
        k_listed = k_place < k_count
        q_slot = q_place
        k_slot = k_place
        if used is not None:
            if alone == 0:
                q_slot = tl.load(listed + q_place, mask=q_listed, other=0)
                k_slot = tl.load(listed + slots + k_place, mask=k_listed, other=0)
        own_q_codes = q_codes + tl.cast(first_sample, tl.int64) * stride_qcb
        own_k_codes = k_codes + tl.cast(first_sample, tl.int64) * stride_kcb
        if ds is None:
            q_code = _frame_codes(own_q_codes, frame, q_slot, q_listed, used, alone)
            k_code = _frame_codes(own_k_codes, k_frame, k_slot, k_listed, used, alone)
            bias = _read_table(table_row, _entries(q_code, k_code, radius), PTX)

        if ds is None:
            acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        else:  # keys first, as dS
            acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for sample in range(first_sample, last_sample):
            b = tl.cast(sample, tl.int64)
            rows = tl.where(q_listed, q_place, absent)
            columns = k_place
            if used is None:
                rows = q_place
            if used is not None:
                if alone == 0:
                    row = inverse + b * slots
                    rows = tl.load(row + q_slot, mask=q_listed, other=absent)
                    columns = tl.load(row + batch * slots + k_slot, mask=k_listed, other=keys)
            rows_ok = rows < queries
            columns_ok = columns < keys
            if key_lengths is not None:
                columns_ok &= columns < tl.load(key_lengths + b)
            if key_mask is not None:
                mask_row = key_mask + b * stride_maskb
                columns_ok &= tl.load(mask_row + columns, mask=columns_ok, other=0) != 0
            bh = b * heads + h
            columns64 = columns.to(tl.int64)
            if ds is not None:
                row = (bh * ds_keys + columns) * ds_rows
                if used is None:
                    # A mask that varied along the queries would cut the load.
                    at = ds + (row[:, None] + rows[None, :])
                    tile = tl.load(at, mask=columns_ok[:, None], other=0.0).to(tl.float32)
                    if MASK_ROWS:
                        tile = tl.where(rows_ok[None, :], tile, 0.0)
                else:
                    # A mask would cost an instruction an element: what is absent reads zeros.
                    row = tl.where(
                        columns_ok, row, tl.cast(batch, tl.int64) * heads * ds_keys * ds_rows
                    )
                    tile = tl.load(ds + (row[:, None] + rows[None, :])).to(tl.float32)
                if CAUSAL:
                    seen = columns[:, None] <= rows[None, :] + causal_shift
                    tile = tl.where(seen & rows_ok[None, :], tile, 0.0)
                acc += tile
            else:
                kv_head = h // GROUP
                rows64 = rows.to(tl.int64)[:, None]
                q_mask = rows_ok[:, None] & dims_ok[None, :]
                k_mask = columns_ok[:, None] & dims_ok[None, :]
                q_at = q + b * stride_qb + h * stride_qh + rows64 * stride_qm
                k_at = k + b * stride_kb + kv_head * stride_kh + columns64[:, None] * stride_kn
                v_at = v + b * stride_vb + kv_head * stride_vh + columns64[:, None] * stride_vn
                g_at = grad_out + b * stride_gb + h * stride_gh + rows64 * stride_gm
                q_tile = tl.load(q_at + dims[None, :], mask=q_mask, other=0.0)
                k_tile = tl.load(k_at + dims[None, :], mask=k_mask, other=0.0)
                row_at = bh * absent + rows
                row_lse2 = tl.load(lse2 + row_at, mask=rows_ok, other=float("inf"))
                row_delta = tl.load(delta + row_at, mask=rows_ok, other=0.0)
                s = tl.dot(q_tile, tl.trans(k_tile), bias, input_precision=PRECISION)
                p = tl.exp2(s * scale_log2 - row_lse2[:, None])
                p = tl.where(columns_ok[None, :], p, 0.0)
                if CAUSAL:
                    p = tl.where(columns[None, :] <= rows[:, None] + causal_shift, p, 0.0)
                v_tile = tl.load(v_at + dims[None, :], mask=k_mask, other=0.0)
                g_tile = tl.load(g_at + dims[None, :], mask=q_mask, other=0.0)
                grad_p = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
                if seed is not None:
                    row_key = _row_key(seed, bh * queries + rows)
                    kept = _kept(row_key[:, None], _column_key(columns)[None, :], threshold)
                    grad_p = tl.where(kept, grad_p * keep_factor, 0.0)
                acc += p * (grad_p - row_delta[:, None])

        # The codes are read again, or the loop would keep the entries in registers.
        tl.debug_barrier()
        q_code = _frame_codes(own_q_codes, frame, q_slot, q_listed, used, alone)
        k_code = _frame_codes(own_k_codes, k_frame, k_slot, k_listed, used, alone)
        entry = tl.trans(_entries(q_code, k_code, radius))
        if ds is None:
            acc = tl.trans(acc)
        # With R = 0 every offset is clamped once, to the one entry.
        low += tl.sum(tl.sum(tl.where(entry == 0, acc, 0.0), axis=1), axis=0)
        at_end = (entry == 2 * radius) & (entry > 0)
        high += tl.sum(tl.sum(tl.where(at_end, acc, 0.0), axis=1), axis=0)
        inner = (entry < 2 * radius) & q_listed[None, :] & k_listed[:, None]
        entry = tl.where(inner, entry, 0)
        last = tl.max(tl.max(entry, axis=1), axis=0)
        first = tl.min(tl.min(tl.where(entry > 0, entry, last), axis=1), axis=0)
        # A frame of positions may hold a code several times: a layer has each once.
        layer_of = tl.zeros([BLOCK_M], dtype=tl.int32)
        if used is None or alone != 0:
            rank_row = ranks + tl.cast(first_sample, tl.int64) * stride_ranksb
            layer_of = tl.load(rank_row + q_place, mask=q_listed, other=0)
        for layer in range(tl.max(layer_of, axis=0) + 1):
            start = tl.maximum(first, 1)
            while start <= last:
                columns_end = tl.minimum(last + 1 - start, WINDOW)
                for column in range(0, columns_end, PIECE):
                    tl.store(own_pieces + column, tl.zeros([BLOCK_N, PIECE], tl.float32))
                tl.debug_barrier()
                offset = tl.where((layer_of == layer)[None, :], entry - start, -1)
                inside = (offset >= 0) & (offset < WINDOW)
                tl.store(own + (lanes_n[:, None] * WINDOW + offset), acc, mask=inside)
                tl.debug_barrier()
                for column in range(0, columns_end, PIECE):
                    added = tl.sum(tl.load(own_pieces + column), axis=0)
                    at = sums + start + column + tl.arange(0, PIECE)
                    there = start + column + tl.arange(0, PIECE) < 2 * radius
                    tl.store(at, tl.load(at, mask=there, other=0.0) + added, mask=there)
                tl.debug_barrier()
                start += WINDOW
    tl.debug_barrier()
    tl.store(sums, tl.load(sums) + low)
    if radius > 0:
        tl.store(sums + 2 * radius, tl.load(sums + 2 * radius) + high)


@triton.jit
def _sum_rows(source, result, count, width, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # result[c] = sum over rows of source (count, width), for COLUMNS columns from `column`.
    at = column + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < count)[:, None] & (at < width)[None, :]
        acc += tl.load(
            source + rows.to(tl.int64)[:, None] * width + at[None, :], mask=mask, other=0.0
        )
    total = tl.sum(acc, axis=0)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=at < width)


@triton.jit
def sums_kernel(
    partial, grad_table, q_parts, grad_q_scale, k_parts, grad_k_scale,
    parts, table_size, q_rows, k_rows,
    HEAD_DIM: tl.constexpr, SCALE_COLUMNS: tl.constexpr, TABLE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over rows: (parts, table_size), (q_rows, D) and (k_rows, D) to the gradients."""
    pid = tl.program_id(0)
    scale_programs = tl.cdiv(HEAD_DIM, SCALE_COLUMNS)
    if q_parts is not None:
        first = pid * SCALE_COLUMNS
        if pid < scale_programs:
            _sum_rows(q_parts, grad_q_scale, q_rows, HEAD_DIM, first, 256, SCALE_COLUMNS)
        elif pid < 2 * scale_programs:
            first -= scale_programs * SCALE_COLUMNS
            _sum_rows(k_parts, grad_k_scale, k_rows, HEAD_DIM, first, 256, SCALE_COLUMNS)
        pid -= 2 * scale_programs
    if partial is not None:
        if pid >= 0:
            first = pid * TABLE_COLUMNS
            _sum_rows(partial, grad_table, parts, table_size, first, 8, TABLE_COLUMNS)
