"""The attention op's Triton backend: choice of tiles, bands of workspace, launches, registration.

The kernels lie in ``_triton_kernels.py`` and are imported by the first call, so importing this
file needs neither Triton nor a GPU. README.md beside this file derives the backward pass.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from musiclm_fast._checks import check_choice
from musiclm_fast._dispatch import Backend
from musiclm_fast.ops import _triton_target
from musiclm_fast.ops._triton_target import Config
from musiclm_fast.ops.attention import _autograd

MAX_HEAD_DIM = 128
# Bytes of dS that exist at a time, of the table gradient's partial sums and of the index of codes.
# With the carried sums of k and v (at most 16 MB up to 16,384 keys) that is less than 64 MB.
DS_BYTES = 40 << 20
PARTIAL_BYTES = 4 << 20
INDEX_BYTES = 2 << 20
# Programs that a band of the backward should have: two for each of an H100's multiprocessors.
BAND_PROGRAMS = 256
# Rows of dS are padded to whole tiles of every kernel that touches it.
DS_ROWS = 128
_SMALL = dict(num_warps=4, num_stages=1)  # of kernels without products
_LOG2E = math.log2(math.e)
_AUTOTUNE = os.environ.get("MUSICLM_FAST_AUTOTUNE") or "0"
check_choice("MUSICLM_FAST_AUTOTUNE", _AUTOTUNE, ("0", "1"))


@dataclass(frozen=True)
class Configs:
    """The three kernels that hold matrix products."""

    forward: Config
    backward_kv: Config
    backward_q: Config


@dataclass(frozen=True)
class Band:
    """What one round of the backward's kernels works on."""

    sample: int
    samples: int
    kv_head: int
    kv_heads: int
    row_begin: int
    row_end: int


# By longest head dim, for many queries. The counts behind the choices are in README.md.
Table = dict[int, Configs]
_HALF: Table = {
    32: Configs(Config(128, 64, 8, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
    64: Configs(Config(128, 32, 8, 3), Config(64, 64, 4, 2), Config(128, 64, 8, 3)),
    128: Configs(Config(128, 64, 8, 2), Config(32, 64, 8, 2), Config(64, 64, 4, 2)),
}
_HALF_AMPERE: Table = {
    32: Configs(Config(128, 64, 8, 3, 255), Config(64, 64, 4, 2), Config(64, 64, 4, 3)),
    64: Configs(Config(128, 64, 8, 3), Config(32, 64, 4, 2), Config(128, 64, 8, 3, 255)),
    128: Configs(Config(128, 32, 8, 2), Config(32, 64, 8, 2), Config(128, 64, 8, 2)),
}
_HALF_BLACKWELL: Table = {
    32: replace(_HALF[32], backward_kv=Config(32, 64, 4, 3)),
    64: replace(_HALF[64], backward_kv=Config(64, 64, 4, 2, 255)),
    128: replace(_HALF[128], backward_q=Config(128, 64, 8, 2)),
}
# 64 KB of shared memory; 256 registers a thread with 8 warps of 64, 512 with 4.
_HALF_AMD: Table = {
    32: Configs(Config(128, 32, 8, 2), Config(32, 64, 4, 2), Config(64, 64, 4, 2)),
    64: Configs(Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(128, 64, 8, 2)),
    128: Configs(Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(128, 64, 8, 2)),
}
_FLOAT32: Table = {
    32: Configs(Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(64, 32, 4, 2)),
    64: Configs(Config(64, 32, 8, 2), Config(32, 32, 8, 2), Config(64, 32, 8, 2)),
    128: Configs(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
}
_TABLES = {  # 16-bit and float32
    "ampere": (_HALF_AMPERE, _FLOAT32),
    "hopper": (_HALF, _FLOAT32),
    "blackwell": (_HALF_BLACKWELL, _FLOAT32),
    "amd": (_HALF_AMD, _FLOAT32),
}


def configs(
    target: str, head_dim: int, queries: int, dtype: torch.dtype, causal: bool, dropout: bool
) -> Configs:
    """The heuristic choice of tiles: nothing is measured at run time unless it is asked for.

    Args:
        target: the device's architecture, such as ``sm_90``.
        head_dim: D.
        queries: M; few queries (cached decoding) take narrow tiles.
        dtype: q's dtype.
        causal: the backward then also masks.
        dropout: the forward then also hashes.
    """
    family = _triton_target.family(target)
    table = _TABLES[family][dtype == torch.float32]
    limit = next(limit for limit in table if head_dim <= limit)
    chosen = table[limit]
    forward, backward_kv = chosen.forward, chosen.backward_kv
    if limit == 64 and dtype != torch.float32:
        if causal:
            backward_kv = replace(backward_kv, block_m=32, max_registers=None)  # 64 would spill
        if dropout and family in ("hopper", "blackwell"):
            forward = replace(forward, max_registers=128)  # two programs a multiprocessor
    if queries <= 64:
        # Of narrower tiles with a bias, Triton 3.6 leaves a cast that AMD's LLVM cannot translate.
        narrow = queries <= 16 and family != "amd"
        rows = 16 if narrow else min(forward.block_m, 64)
        forward = replace(forward, block_m=rows, num_warps=4)
    return replace(chosen, forward=forward, backward_kv=backward_kv)


def plan_bands(
    batch: int, kv_heads: int, group: int, queries: int, keys: int, block_n: int, itemsize: int
) -> list[Band]:
    """Cut the backward into bands whose dS fits into ``DS_BYTES``, in a fixed order.

    Whole (sample, key head) pairs where they leave enough programs for a device; else fewer rows
    of more pairs, and the sums over the rows are carried from band to band.
    """
    blocks = -(-keys // block_n)
    row_bytes = group * blocks * block_n * itemsize  # of one query row of one pair
    padded = _round_up(queries, DS_ROWS)
    pairs = batch * kv_heads
    units = DS_BYTES // (row_bytes * padded)
    rows = queries
    if units < pairs and units * blocks < BAND_PROGRAMS:
        units = min(pairs, BAND_PROGRAMS // blocks, DS_BYTES // (row_bytes * DS_ROWS))
        units = max(units, 1)
        rows = max(DS_BYTES // (row_bytes * units) // DS_ROWS * DS_ROWS, DS_ROWS)
        rows = _round_up(_even(queries, rows), DS_ROWS)
    units = min(units, pairs)
    samples = _even(batch, max(units // kv_heads, 1))
    heads = _even(kv_heads, min(units, kv_heads))
    return [
        Band(b, min(samples, batch - b), h, min(heads, kv_heads - h), i, min(i + rows, queries))
        for b in range(0, batch, samples)
        for h in range(0, kv_heads, heads)
        for i in range(0, queries, rows)
    ]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _even(total: int, largest: int) -> int:
    # Size of the pieces when total is cut into as few pieces of at most `largest` as possible.
    return -(-total // -(-total // min(largest, total)))


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None, q_codes: Tensor | None,
    k_codes: Tensor | None, key_padding_mask: Tensor | None, key_lengths: Tensor | None,
    q_scale: Tensor | None, k_scale: Tensor | None, dropout_seed: Tensor | None,
    scale: float, causal: bool, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``musiclm_fast::attention_forward_triton``: the output and its rows' base-2 log-sum-exp."""
    batch, heads, queries, head_dim = q.shape
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    lse2 = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse2
    if k.shape[2] == 0:
        return out.zero_(), lse2.fill_(-math.inf)
    call = _Call(
        q, k, v, bias_table, q_codes, k_codes, key_padding_mask, key_lengths, q_scale, k_scale,
        dropout_seed, scale, causal, dropout_p,
    )  # fmt: skip
    with _triton_target.device_guard(call.device):
        _tuned(call, "forward", lambda chosen: _run_forward(call, out, lse2, chosen.forward))
    return out, lse2


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    bias_table: Tensor | None, q_codes: Tensor | None, k_codes: Tensor | None,
    key_padding_mask: Tensor | None, key_lengths: Tensor | None, q_scale: Tensor | None,
    k_scale: Tensor | None, dropout_seed: Tensor | None, scale: float, causal: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``musiclm_fast::attention_backward_triton``: gradients of q, k, v, table and scales."""
    like_heads = [
        t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2)
        for t in (q, k, v)
    ]
    small = [
        q.new_empty(0) if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format)
        for t in (bias_table, q_scale, k_scale)
    ]
    if q.numel() == 0 or k.numel() == 0:
        return (*(t.zero_() for t in like_heads), *small)  # type: ignore[return-value]
    call = _Call(
        q, k, v, bias_table, q_codes, k_codes, key_padding_mask, key_lengths, q_scale, k_scale,
        dropout_seed, scale, causal, dropout_p,
    )  # fmt: skip
    with _triton_target.device_guard(call.device):
        _tuned(
            call,
            "backward",
            lambda chosen: _run_backward(
                call, _rows(grad_out), _rows(out), logsumexp, like_heads, small, chosen
            ),
        )
    return (*like_heads, *small)  # type: ignore[return-value]


class _Call:
    """One call's tensors in the form that the kernels read."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None, q_codes: Tensor | None,
        k_codes: Tensor | None, key_padding_mask: Tensor | None, key_lengths: Tensor | None,
        q_scale: Tensor | None, k_scale: Tensor | None, dropout_seed: Tensor | None,
        scale: float, causal: bool, dropout_p: float,
    ) -> None:  # fmt: skip
        self.batch, self.heads, self.queries, self.head_dim = q.shape
        self.kv_heads, self.keys = k.shape[1:3]
        self.q, self.k, self.v = _rows(q), _rows(k), _rows(v)
        self.device, self.dtype = q.device, q.dtype
        self.group = self.heads // self.kv_heads
        self.block_d = max(16, 1 << (self.head_dim - 1).bit_length())
        self.table2 = None if bias_table is None else bias_table.float().contiguous() * _LOG2E
        self.radius = 0 if bias_table is None else bias_table.shape[1] // 2
        self.q_codes, self.k_codes = _unit_stride(q_codes), _unit_stride(k_codes)
        self.key_mask = _unit_stride(key_padding_mask)
        if self.key_mask is not None:
            self.key_mask = self.key_mask.view(torch.uint8)
        self.key_lengths = _unit_stride(key_lengths)
        self.q_scale, self.k_scale = _unit_stride(q_scale), _unit_stride(k_scale)
        self.seed, self.dropout_p = dropout_seed, dropout_p
        self.scale, self.causal = scale, causal

    def bias(self) -> dict[str, Any]:
        """Arguments that the kernels of the forward and of the backward share."""
        return dict(
            table2=self.table2, q_codes=self.q_codes, k_codes=self.k_codes,
            key_mask=self.key_mask, key_lengths=self.key_lengths, seed=self.seed,
            stride_tableh=2 * self.radius + 1, **self.code_strides(),
            queries=self.queries, keys=self.keys, radius=self.radius,
            scale_log2=self.scale * _LOG2E,
            threshold=int(self.dropout_p * 2**32) - 2**31,
            keep_factor=1.0 / (1.0 - self.dropout_p),
        )  # fmt: skip

    def code_strides(self) -> dict[str, int]:
        return dict(
            stride_qcb=_batch_stride(self.q_codes), stride_kcb=_batch_stride(self.k_codes),
            stride_maskb=_batch_stride(self.key_mask),
        )  # fmt: skip

    def normalized(self, x: Tensor, weight: Tensor) -> Tensor:
        """l2norm(x) * weight, rounded to x's dtype: what the products read."""
        batch, heads, length, head_dim = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        block = 64
        _launch(
            "normalize_kernel", batch * heads * -(-length // block), _SMALL,
            x=x, scale=weight, y=y, **_strides("x", x, "bhn"), heads=heads, length=length,
            HEAD_DIM=head_dim, BLOCK_D=self.block_d, BLOCK=block,
        )  # fmt: skip
        return y

    @property
    def ptx(self) -> bool:
        """Whether the kernels may hold NVIDIA's instructions."""
        on_amd = _triton_target.family(_triton_target.target(self.device)) == "amd"
        return not (on_amd or _triton_target.INTERPRET)

    @property
    def precision(self) -> str:
        # Float32 products are exact to float32: no TF32, whatever torch's own setting.
        return "ieee"


def _run_forward(call: _Call, out: Tensor, lse2: Tensor, config: Config) -> None:
    k = call.k if call.k_scale is None else call.normalized(call.k, call.k_scale)
    _launch(
        "forward_kernel",
        call.batch * call.heads * -(-call.queries // config.block_m),
        config.options,
        q=call.q, k=k, v=call.v, out=out, logsumexp2=lse2, q_scale=call.q_scale, **call.bias(),
        **_strides("q", call.q, "bhm"), **_strides("k", k, "bhn"), **_strides("v", call.v, "bhn"),
        **_strides("o", out, "bhm"), heads=call.heads,
        HEAD_DIM=call.head_dim, BLOCK_D=call.block_d, GROUP=call.group, CAUSAL=call.causal,
        PRECISION=call.precision, PTX=call.ptx, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
    )  # fmt: skip


def _run_backward(
    call: _Call, grad_out: Tensor, out: Tensor, lse2: Tensor, grads: list[Tensor],
    small: list[Tensor], chosen: Configs,
) -> None:  # fmt: skip
    grad_q, grad_k, grad_v = grads
    grad_table, grad_q_scale, grad_k_scale = small
    batch, heads, kv_heads = call.batch, call.heads, call.kv_heads
    queries, keys, head_dim = call.queries, call.keys, call.head_dim
    kv, dq = chosen.backward_kv, chosen.backward_q
    key_blocks = -(-keys // kv.block_n)
    query_blocks = -(-queries // dq.block_m)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=call.device)

    delta = empty(batch, heads, queries)
    block = 64
    _launch(
        "delta_kernel", batch * heads * -(-queries // block), _SMALL,
        grad_out=grad_out, out=out, delta=delta, **_strides("g", grad_out, "bhm"),
        **_strides("o", out, "bhm"), heads=heads, queries=queries,
        HEAD_DIM=head_dim, BLOCK_D=call.block_d, BLOCK=block,
    )  # fmt: skip
    q, k = call.q, call.k
    q_scale_parts = k_scale_parts = None
    if call.q_scale is not None and call.k_scale is not None:
        q, k = call.normalized(q, call.q_scale), call.normalized(k, call.k_scale)
        q_scale_parts = empty(batch * heads * query_blocks, head_dim)
        k_scale_parts = empty(batch * kv_heads * key_blocks, head_dim)
    table = _TableGradient(call) if call.table2 is not None else None

    bands = plan_bands(batch, kv_heads, call.group, queries, keys, kv.block_n, call.dtype.itemsize)
    largest = bands[0]  # the first band is never smaller than another
    ds_rows = _round_up(largest.row_end - largest.row_begin, DS_ROWS)
    ds_keys = key_blocks * kv.block_n
    pairs = largest.samples * largest.kv_heads
    ds = empty(pairs * call.group, ds_keys, ds_rows, dtype=call.dtype)
    carry = None
    if largest.row_end < queries:
        carry = empty(2, pairs, ds_keys, call.block_d)
    for band in bands:
        units = band.samples * band.kv_heads
        where = dict(sample0=band.sample, row_begin=band.row_begin, row_end=band.row_end)
        _launch(
            "backward_kv_kernel", units * key_blocks, kv.options,
            grad_out=grad_out, q=q, k=k, v=call.v, raw_k=call.k, k_scale=call.k_scale,
            logsumexp2=lse2, delta=delta, ds=ds, carry=carry, grad_k=grad_k, grad_v=grad_v,
            grad_k_scale=k_scale_parts, **call.bias(), **_strides("g", grad_out, "bhm"),
            **_strides("q", q, "bhm"), **_strides("k", k, "bhn"), **_strides("v", call.v, "bhn"),
            **_strides("r", call.k, "bhn"), **_strides("dk", grad_k, "bhn"),
            heads=heads, kv_heads=kv_heads, scale=call.scale, **where, kv_head0=band.kv_head,
            band_kv_heads=band.kv_heads, ds_rows=ds_rows,
            HEAD_DIM=head_dim, BLOCK_D=call.block_d, GROUP=call.group, CAUSAL=call.causal,
            MASK_KEYS=(
                call.key_mask is not None or call.key_lengths is not None
                or keys % kv.block_n != 0
            ),
            PRECISION=call.precision, PTX=call.ptx, BLOCK_M=kv.block_m, BLOCK_N=kv.block_n,
        )  # fmt: skip
        band_blocks = -(-(band.row_end - band.row_begin) // dq.block_m)
        _launch(
            "backward_q_kernel", units * call.group * band_blocks, dq.options,
            ds=ds, k=k, raw_q=call.q, q_scale=call.q_scale, key_lengths=call.key_lengths,
            grad_q=grad_q, grad_q_scale=q_scale_parts, **_strides("k", k, "bhn"),
            **_strides("r", call.q, "bhm"), **_strides("dq", grad_q, "bhm"),
            heads=heads, queries=queries, keys=keys, scale=call.scale, **where,
            kv_head0=band.kv_head, band_kv_heads=band.kv_heads, ds_rows=ds_rows, ds_keys=ds_keys,
            query_blocks=query_blocks,
            HEAD_DIM=head_dim, BLOCK_D=call.block_d, GROUP=call.group, CAUSAL=call.causal,
            PRECISION=call.precision, BLOCK_M=dq.block_m, BLOCK_N=dq.block_n,
        )  # fmt: skip
        if table is not None:
            table.add(band, ds, ds_rows, ds_keys)
    if table is not None:
        grad_table.copy_(table.result())
    if q_scale_parts is not None and k_scale_parts is not None:
        grad_q_scale.copy_(q_scale_parts.sum(0))
        grad_k_scale.copy_(k_scale_parts.sum(0))


class _TableGradient:
    """Sums of dS over equal offsets, band by band, in a fixed order and without atomics."""

    block_h, block_j, edge_keys = 8, 4, 32

    def __init__(self, call: _Call) -> None:
        assert call.q_codes is not None and call.k_codes is not None
        self.call = call
        self.key_blocks = -(-call.keys // self.edge_keys)
        entries = 2 * call.radius + 1
        per_sample = call.q_codes.ndim == 2
        tables = call.batch if per_sample else 1
        largest = max(INDEX_BYTES // (4 * tables), 128)
        self.slots = max(128, min(1 << (2 * call.radius).bit_length(), 1 << 14))
        self.slots = min(self.slots, 1 << (largest.bit_length() - 1))
        self.block_r = min(256, max(64, 1 << (entries - 1).bit_length()))
        self.r_blocks = -(-entries // self.block_r)
        h_blocks = -(-call.heads // self.block_h)
        wanted = min(64, -(-1024 // (self.r_blocks * h_blocks)), -(-call.batch * call.keys // 32))
        self.parts = max(1, min(wanted, PARTIAL_BYTES // (4 * call.heads * entries)))

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=call.device)

        self.first, self.following = empty(tables, self.slots), empty(tables, call.queries)
        block = 64
        _launch(
            "index_kernel", tables * (-(-self.slots // block) + -(-call.queries // block)), _SMALL,
            q_codes=call.q_codes, first=self.first, following=self.following,
            stride_qcb=_batch_stride(call.q_codes), queries=call.queries, slots=self.slots,
            BLOCK=block,
        )  # fmt: skip
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=call.device)
        self.inner = zeros(self.parts, call.heads, entries)
        self.edges = zeros(call.batch, call.heads, self.key_blocks, 2)

    def add(self, band: Band, ds: Tensor, ds_rows: int, ds_keys: int) -> None:
        call = self.call
        band_heads = band.kv_heads * call.group
        common: dict[str, Any] = dict(
            ds=ds, q_codes=call.q_codes, k_codes=call.k_codes, key_mask=call.key_mask,
            key_lengths=call.key_lengths, **call.code_strides(), heads=call.heads,
            queries=call.queries, keys=call.keys, radius=call.radius, sample0=band.sample,
            head0=band.kv_head * call.group, band_heads=band_heads, row_begin=band.row_begin,
            row_end=band.row_end, ds_rows=ds_rows, ds_keys=ds_keys, CAUSAL=call.causal,
        )  # fmt: skip
        per_sample = call.q_codes is not None and call.q_codes.ndim == 2
        pairs = band.samples * call.keys
        if call.radius > 0:
            h_blocks = -(-band_heads // self.block_h)
            _launch(
                "table_gradient_kernel", self.r_blocks * h_blocks * self.parts, _SMALL,
                **common, first=self.first, following=self.following, partial=self.inner,
                stride_firstb=self.slots if per_sample else 0,
                stride_followingb=call.queries if per_sample else 0, slots=self.slots,
                pairs=pairs, pairs_per_part=-(-pairs // self.parts),
                BLOCK_H=self.block_h, BLOCK_J=self.block_j, BLOCK_R=self.block_r,
            )  # fmt: skip
        _launch(
            "table_edges_kernel", band.samples * band_heads * self.key_blocks, _SMALL,
            **common, partial=self.edges, BLOCK_M=64, BLOCK_N=self.edge_keys,
        )  # fmt: skip

    def result(self) -> Tensor:
        """``(H, 2R + 1)`` float32."""
        table = self.inner.sum(0)
        low, high = self.edges.sum((0, 2)).unbind(-1)
        table[:, 0] += low
        table[:, -1] += high
        return table


def _rows(x: Tensor) -> Tensor:
    # Rows must be contiguous, and a tile of 128 of them must fit into 32-bit offsets.
    if x.stride(-1) == 1 and abs(x.stride(2)) < 2**23:
        return x
    return x.contiguous()


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _batch_stride(x: Tensor | None) -> int:
    return x.stride(0) if x is not None and x.ndim == 2 else 0


def _strides(name: str, x: Tensor, axes: str) -> dict[str, int]:
    return {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate(axes)}


def _launch(name: str, programs: int, options: dict[str, int], **arguments: Any) -> None:
    from musiclm_fast.ops.attention import _triton_kernels

    _triton_target.launch(getattr(_triton_kernels, name), programs, arguments, options)


_tuning_results: dict[tuple[Any, ...], Configs] = {}


def _tuned(call: _Call, kind: str, run: Callable[[Configs], None]) -> None:
    # Runs with the heuristic configs or, on request, with the fastest of a few, found once per
    # kind of call. Tuning synchronises, so it does not happen inside a CUDA graph's capture.
    target = _triton_target.target(call.device)
    heuristic = configs(
        target, call.head_dim, call.queries, call.dtype, call.causal, call.seed is not None
    )
    if _AUTOTUNE == "0" or call.device.type != "cuda":
        run(heuristic)
        return
    key = (
        kind, target, call.head_dim, call.dtype, call.causal, call.group,
        call.table2 is None, call.seed is None, call.keys.bit_length(), call.queries.bit_length(),
    )  # fmt: skip
    if key not in _tuning_results and not torch.cuda.is_current_stream_capturing():
        _tuning_results[key] = _fastest(heuristic, run)
    run(_tuning_results.get(key, heuristic))


def _fastest(heuristic: Configs, run: Callable[[Configs], None]) -> Configs:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    timed: list[tuple[float, int, Configs]] = []
    for number, candidate in enumerate(_candidates(heuristic)):
        try:
            timed.append(
                (do_bench(lambda c=candidate: run(c), warmup=5, rep=20), number, candidate)
            )
        except OutOfResources:
            continue
    return min(timed)[2]


def _candidates(heuristic: Configs) -> Iterator[Configs]:
    yield heuristic
    for change in ({"num_warps": 4}, {"num_warps": 8}, {"num_stages": 2}, {"num_stages": 3}):
        yield Configs(
            replace(heuristic.forward, **change),
            replace(heuristic.backward_kv, **change),
            replace(heuristic.backward_q, **change),
        )


def supports(q: Tensor, **_: Any) -> tuple[bool, str]:
    """Whether the kernels take this call, from device, dtype and head dim alone."""
    reason = _triton_target.refusal(q)
    if not reason and q.shape[-1] > MAX_HEAD_DIM:
        reason = f"head dim {q.shape[-1]} is above {MAX_HEAD_DIM}"
    return not reason, reason


def run(**arguments: Any) -> Tensor:
    """Run the op on arguments that :func:`supports` accepts."""
    return _autograd.run(torch.ops.musiclm_fast.attention_forward_triton, arguments)


def self_check(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare output and all gradients with the float64 reference on two small calls.

    16 kernels are compiled: what only the integers of a call specialise is alike in both.

    Returns:
        None, or what went wrong first.
    """
    from musiclm_fast import testing
    from musiclm_fast.ops.attention.reference import attention_reference

    cases: tuple[dict[str, Any], ...] = (
        dict(queries=130, head_dim=64, heads=1, radius=200, codes_per_sample=True, key_mask=True),
        dict(queries=40, keys=70, head_dim=48, heads=4, kv_heads=2, lengths=True),
    )
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        for number, case in enumerate(cases):
            inputs = testing.attention_inputs(**case, dtype=dtype, device=device)
            grad = torch.linspace(-1.0, 1.0, inputs["q"].numel(), device=device)
            grad = grad.view(inputs["q"].shape).to(dtype)
            rest: dict[str, Any] = dict(causal=number == 1)
            if number == 0:
                rest.update(dropout_p=0.1, dropout_seed=torch.tensor([7], device=device))
            wide = testing.to_float64(inputs)
            results = []
            for function, given in (
                (lambda **a: run(**_complete(a)), inputs),
                (lambda **a: attention_reference(**a, upcast=False), inputs),
                (attention_reference, wide),
            ):
                out = function(**given, **rest)
                results.append({"out": out, **testing.gradients(out, given, grad)})
            for name in results[0]:
                try:
                    testing.assert_close_to_oracle(
                        f"{name} ({dtype}, case {number})",
                        *(r[name] for r in results),
                        dtype=dtype,
                    )
                except AssertionError as error:
                    return str(error)
    return None


def _complete(arguments: dict[str, Any]) -> dict[str, Any]:
    defaults = dict.fromkeys(_autograd.ARGUMENTS) | dict(
        scale=arguments["q"].shape[-1] ** -0.5, causal=False, dropout_p=0.0
    )
    return defaults | arguments


_library = torch.library.Library("musiclm_fast", "FRAGMENT")
_library.define(
    f"attention_forward_triton{_autograd.FORWARD_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    f"attention_backward_triton{_autograd.BACKWARD_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,)
)
for _key in ("CUDA", "CPU") if _triton_target.INTERPRET else ("CUDA",):
    _library.impl("attention_forward_triton", forward, _key)
    _library.impl("attention_backward_triton", backward, _key)
_autograd.register(
    "musiclm_fast::attention_forward_triton", "musiclm_fast::attention_backward_triton"
)

BACKEND = Backend(
    "triton", supports, run, _triton_target.available, self_check, _triton_target.dtypes
)
