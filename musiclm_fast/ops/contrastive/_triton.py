"""The contrastive losses' Triton backend: choice of tiles, launches, registration.

The kernels lie in ``_triton_kernels.py`` and are imported by the first call, so importing this
file needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from musiclm_fast._oracle import first_difference, gradients, to_float64
from musiclm_fast._self_check import in_default_modes
from musiclm_fast.ops import _triton_target
from musiclm_fast.ops._triton_target import Config
from musiclm_fast.ops.contrastive import _autograd
from musiclm_fast.ops.contrastive._parity import (
    contrastive_inputs,
    contrastive_labels,
    contrastive_rounding,
)
from musiclm_fast.ops.contrastive.reference import contrastive_loss_reference

MAX_DEPTH = 1024
# Latents up to these widths stay in shared memory as a whole, with their gradient in registers.
# Deeper ones are multiplied in pieces, and ds is written to memory, a stripe of rows at a time. So
# are those in float32: outside the tensor cores whole rows would spill, and the library's products
# with ds are faster.
SHALLOW = {torch.float32: 32, torch.bfloat16: 256, torch.float16: 256}
# Their pieces.
PIECE = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
# Programs that a launch should have: two for each of an H100's multiprocessors.
PROGRAMS = 264
# Bytes of partial gradients where few rows make a launch cut its columns into splits.
PARTIAL_BYTES = 32 << 20
# Of the columns' sums over blocks of rows, and of ds for latents that are deeper than SHALLOW.
SUMS_BYTES = 64 << 20
DS_BYTES = 256 << 20
# Rows of a part of logsumexp_kernel's block.
PART = 64
# Where similarities lie within +-BOUNDED exp needs no shift: see csrc/contrastive/contrastive.h.
BOUNDED = 40.0
# Of products of float32 latents. The backward recomputes the forward's similarities in tiles of
# other shapes and with the sides swapped, and takes e^(s - lse): they must be the same bits. Full
# float32 products commute and add in order of k; so do 16-bit ones. "tf32x3" would add its two
# small terms, high x low and low x high, in the other order when the sides are swapped.
PRECISION = "ieee"


# (logsumexp, gradient, sigmoid) by the largest padded depth; tests/ops/test_triton_resources.py
# compiles each and holds it to no spills and to the shared memory of its device.
Table = dict[int, tuple[Config, Config, Config]]
_HALF: Table = {
    128: (Config(128, 64, 4, 2), Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
    256: (Config(128, 32, 4, 2, 255), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
    MAX_DEPTH: (Config(128, 64, 8, 3),) * 3,
}
# Products before Hopper keep both operands in registers, so tiles of 128 columns would spill.
_HALF_AMPERE: Table = {
    128: (Config(64, 64, 4, 2), Config(128, 64, 8, 3), Config(64, 64, 8, 3)),
    256: (Config(64, 32, 4, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    MAX_DEPTH: (Config(64, 64, 4, 3, 255),) * 3,
}
_HALF_BLACKWELL: Table = {
    **_HALF,
    128: (Config(128, 64, 4, 2), Config(128, 64, 8, 3), Config(128, 32, 8, 3)),
    MAX_DEPTH: (Config(64, 64, 8, 3), Config(64, 64, 4, 3, 255), Config(64, 64, 4, 3, 255)),
}
_FLOAT32: Table = {
    32: (Config(32, 64, 8, 2, 128), Config(64, 64, 8, 2, 255), Config(32, 64, 8, 2, 128)),
    MAX_DEPTH: (Config(32, 64, 8, 2, 128), Config(64, 64, 8, 2, 255), Config(64, 64, 8, 2, 255)),
}
# 64 KB of shared memory; 256 registers a thread with 8 warps of 64, 512 with 4.
_HALF_AMD: Table = {
    128: (Config(64, 64, 8, 2), Config(64, 32, 4, 2), Config(64, 32, 8, 2)),
    256: (Config(64, 64, 8, 2), Config(32, 32, 4, 2), Config(64, 32, 4, 2)),
    MAX_DEPTH: (Config(64, 64, 4, 2),) * 3,
}
_FLOAT32_AMD: Table = {
    32: (Config(64, 32, 8, 2),) * 3,
    MAX_DEPTH: (Config(64, 64, 8, 2),) * 3,
}
_TABLES = {  # 16-bit and float32
    "ampere": (_HALF_AMPERE, _FLOAT32),
    "hopper": (_HALF, _FLOAT32),
    "blackwell": (_HALF_BLACKWELL, _FLOAT32),
    "amd": (_HALF_AMD, _FLOAT32_AMD),
}


def configs(target: str, block_d: int, dtype: torch.dtype) -> tuple[Config, Config, Config]:
    """The tiles of the three kernels that the table gives."""
    table = _TABLES[_triton_target.family(target)][dtype == torch.float32]
    return next(chosen for limit, chosen in table.items() if block_d <= limit)


@functools.cache
def _kernel(name: str) -> Any:
    from musiclm_fast.ops.contrastive import _triton_kernels

    return getattr(_triton_kernels, name)


def padded(depth: int) -> int:
    """Width of the tiles that hold latents of that width: a power of two that products take."""
    return max(16, 1 << (depth - 1).bit_length())


Labels = tuple[Tensor | None, Tensor | None]  # of a launch's rows and columns


class _Side:
    """One launch's rows ``x`` against columns ``y``."""

    def __init__(
        self, x: Tensor, y: Tensor, temperature: Tensor, offset: int, labels: Labels, part: int
    ) -> None:
        self.labels = labels
        self.x, self.y, self.temperature, self.offset = x, y, temperature, offset
        self.layers, self.rows, self.depth = x.shape
        self.columns = y.shape[1]
        self.deep = self.depth > SHALLOW[x.dtype]
        self.block_d = PIECE[x.dtype] if self.deep else padded(self.depth)
        self.target = _triton_target.target(x.device)
        self.config = configs(self.target, padded(self.depth), x.dtype)[part]
        if labels[0] is not None and self.config.max_registers is not None:
            # A masked sigmoid tile in float32 spills 8 bytes at 128 (sm_100, Triton 3.6).
            limit = max(self.config.max_registers, 160)
            self.config = replace(self.config, max_registers=limit)
        self.blocks = self.layers * -(-self.rows // self.config.block_m)

    def splits(self, row_bytes: int) -> int:
        """Pieces to cut the columns into, so that a launch with few rows has enough programs."""
        tiles = -(-self.columns // self.config.block_n)
        memory = max(PARTIAL_BYTES // max(self.layers * self.rows * row_bytes, 1), 1)
        wanted = min(max(PROGRAMS // max(self.blocks, 1), 1), -(-tiles // 4), memory)
        return -(-tiles // -(-tiles // wanted)) if tiles else 1  # none of them without columns

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def launch(self, name: str, splits: int, **arguments: Any) -> None:
        """Run a kernel over all rows and splits."""
        arguments = dict(
            x=self.x, y=self.y, x_labels=self.labels[0], y_labels=self.labels[1],
            temperature=self.temperature, **arguments,
            stride_xl=self.x.stride(0), stride_xm=self.x.stride(1),
            stride_yl=self.y.stride(0), stride_yn=self.y.stride(1),
            rows=self.rows, columns=self.columns, offset=self.offset,
            D=self.depth, BLOCK_D=self.block_d, SPLITS=splits, PRECISION=PRECISION,
            BLOCK_M=self.config.block_m, BLOCK_N=self.config.block_n,
        )  # fmt: skip
        _triton_target.launch(_kernel(name), self.blocks * splits, arguments, self.config.options)


def _labels_of_stripe(labels: Labels, first: int, rows: int) -> Labels:
    mine, others = labels
    return None if mine is None else mine[first : first + rows], others


def logsumexp(
    audio: Tensor, text: Tensor, temperature: Tensor, offset: int,
    audio_labels: Tensor | None = None, text_labels: Tensor | None = None, inclusive: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``musiclm_fast::contrastive_logsumexp_triton``; see ``block_logsumexp``."""
    flags = _bounded(audio, text, temperature).to(torch.int32)
    rows, columns, positives = [], [], []
    labels = audio_labels, text_labels
    whole = _Side(audio, text, temperature, offset, labels, 0)
    block = whole.config.block_m
    step = block * max(SUMS_BYTES // max(4 * whole.layers * whole.columns, 1), 1)
    with _triton_target.device_guard(audio.device):
        for first in range(0, max(whole.rows, 1), step):
            side = _Side(
                audio[:, first : first + step], text, temperature, offset + first,
                _labels_of_stripe(labels, first, step), 0,
            )  # fmt: skip
            splits = side.splits(8)
            lse, positive = (side.empty(splits, side.layers, side.rows) for _ in range(2))
            sums = side.empty(-(-side.rows // block), side.layers, side.columns)
            side.launch(
                "logsumexp_kernel", splits, bounded=flags, lse=lse,
                positive=positive, sums=sums, INCLUSIVE=inclusive,
                PART=block if side.deep else min(block, PART),
            )  # fmt: skip
            rows.append(_merged(lse))
            positives.append(positive.sum(dim=0))
            column = side.empty(side.layers, side.columns)
            _triton_target.launch(
                _kernel("merge_kernel"), side.layers * -(-side.columns // 256),
                dict(
                    sums=sums, bounded=flags, lse=column, blocks=len(sums), columns=side.columns,
                    layers=side.layers, BLOCK=256,
                ),
                dict(num_warps=4, num_stages=3),
            )  # fmt: skip
            columns.append(column)
    return torch.cat(rows, dim=1), _merged(torch.stack(columns)), torch.cat(positives, dim=1)


def _merged(parts: Tensor) -> Tensor:
    """Log-sum-exp over the first dim."""
    return parts[0] if len(parts) == 1 else torch.logsumexp(parts, dim=0)


def logsumexp_backward(
    grad_row: Tensor, grad_column: Tensor, grad_positive: Tensor, audio: Tensor, text: Tensor,
    temperature: Tensor, row_lse: Tensor, column_lse: Tensor, offset: int,
    audio_labels: Tensor | None = None, text_labels: Tensor | None = None, inclusive: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``musiclm_fast::contrastive_logsumexp_backward_triton``; see ``block_logsumexp_backward``."""
    bounded = _bounded(audio, text, temperature)
    # ds goes into the product in the latents' dtype: scaled to about 1 so that 1 / B does not
    # underflow in float16.
    weights = [grad_row, grad_column, grad_positive]
    scale = torch.stack([w.abs().amax() if w.numel() else w.new_zeros(()) for w in weights]).amax()
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    weights = [w / scale for w in weights]
    shifts = []
    for number, lse in enumerate((row_lse, column_lse)):
        empty = lse == -torch.inf  # a row without negatives: the weight is never used
        lse = lse.masked_fill(empty, 0.0)
        folded = torch.where(bounded[:, None], torch.exp(-lse), 1.0)
        weights[number] = (weights[number] * folded).masked_fill(empty, 0.0)
        shifts.append(lse * math.log2(math.e))
    # The positive's gradient by column: 0 where the column has none, and then never read. With
    # labels a column has several: a launch with the sides swapped takes it from its columns.
    of_column = None
    if audio_labels is None:
        of_column = torch.zeros_like(weights[1])
        begin, end = max(0, -offset), max(min(audio.shape[1], text.shape[1] - offset), 0)
        if begin < end:
            of_column[:, begin + offset : end + offset] = weights[2][:, begin:end]
    rows = weights[0], shifts[0], weights[2]
    columns = weights[1], shifts[1], of_column

    def launch(
        side: _Side, splits: int, mine: Sequence[Tensor | None], other: Sequence[Tensor | None],
        out: Tensor,
    ) -> None:  # fmt: skip
        side.launch(
            "gradient_kernel", splits, bounded=bounded.to(torch.int32), x_weight=mine[0],
            x_shift=mine[1], x_positive=mine[2], y_weight=other[0], y_shift=other[1],
            y_positive=other[2] if mine[2] is None else None, out=out, INCLUSIVE=inclusive,
        )  # fmt: skip

    def of_rows(
        x: Tensor, y: Tensor, offset: int, labels: Labels, mine: Sequence[Tensor | None],
        other: Sequence[Tensor | None],
    ) -> Tensor:  # fmt: skip
        side = _Side(x, y, temperature, offset, labels, 1)
        splits = side.splits(4 * side.depth)
        dx = side.empty(splits, *x.shape)
        launch(side, splits, mine, other, dx)
        return dx[0] if splits == 1 else dx.sum(dim=0)

    def of_stripe(x: Tensor, first: int, ds: Tensor) -> None:
        labels = _labels_of_stripe((audio_labels, text_labels), first, x.shape[1])
        side = _Side(x, text, temperature, offset + first, labels, 1)
        mine = [t[:, first : first + side.rows].contiguous() for t in rows]
        launch(side, side.splits(4), mine, columns, ds)

    with _triton_target.device_guard(audio.device):
        if audio.shape[2] > SHALLOW[audio.dtype]:
            d_audio, d_text = _deep_gradients(audio, text, of_stripe)
        else:
            labels = audio_labels, text_labels
            d_audio = of_rows(audio, text, offset, labels, rows, columns)
            d_text = of_rows(text, audio, -offset, labels[::-1], columns, rows)
    return _finish(d_audio, d_text, audio, temperature, scale)


def sigmoid(
    audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None, offset: int,
    gradients: bool, audio_labels: Tensor | None = None, text_labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``musiclm_fast::contrastive_sigmoid_triton``; see ``block_sigmoid``."""
    losses, ds_sums = [], []

    def launch(side: _Side, splits: int, loss: bool, out: Tensor | None) -> None:
        sums = [side.empty(splits, side.layers, side.rows) for _ in range(2)]
        side.launch(
            "sigmoid_kernel", splits, bias=bias, loss=sums[0], ds_sum=sums[1], out=out,
            LOSS=loss, GRADIENT=gradients,
            FAST=not _triton_target.INTERPRET and not side.target.startswith("gfx"),
        )  # fmt: skip
        if loss:
            losses.append(sums[0].sum())
            ds_sums.append(sums[1].sum(dim=(0, 2)))

    def of_rows(x: Tensor, y: Tensor, offset: int, labels: Labels, loss: bool) -> Tensor:
        side = _Side(x, y, temperature, offset, labels, 2)
        splits = side.splits(4 * side.depth)
        dx = side.empty(splits, *x.shape)
        launch(side, splits, loss, dx)
        return dx[0] if splits == 1 else dx.sum(dim=0)

    def of_stripe(x: Tensor, first: int, ds: Tensor | None) -> None:
        labels = _labels_of_stripe((audio_labels, text_labels), first, x.shape[1])
        side = _Side(x, text, temperature, offset + first, labels, 2)
        launch(side, side.splits(4), True, ds)

    with _triton_target.device_guard(audio.device):
        if not gradients:
            of_stripe(audio, 0, None)
            none = [losses[0].new_empty(0) for _ in range(4)]
            return losses[0], none[0], none[1], none[2], none[3]
        if audio.shape[2] > SHALLOW[audio.dtype]:
            d_audio, d_text = _deep_gradients(audio, text, of_stripe)
        else:
            d_audio = of_rows(audio, text, offset, (audio_labels, text_labels), True)
            d_text = of_rows(text, audio, -offset, (text_labels, audio_labels), False)
    total, d_bias = torch.stack(losses).sum(), torch.stack(ds_sums).sum(dim=0)
    return total, *_finish(d_audio, d_text, audio, temperature), d_bias


def _deep_gradients(
    audio: Tensor, text: Tensor, launch: Callable[[Tensor, int, Tensor], object]
) -> tuple[Tensor, Tensor]:
    """``ds @ text`` and ``ds^T @ audio`` in float32 for rows that are deeper than ``SHALLOW``.

    Accumulators of such rows do not fit a program's registers. ``launch(rows, first, ds)`` writes
    ds (L, m, N) of a stripe of rows, and two products of the library follow.
    """
    layers, rows, _ = audio.shape
    d_audio = torch.zeros(audio.shape, dtype=torch.float32, device=audio.device)
    d_text = torch.zeros(text.shape, dtype=torch.float32, device=text.device)
    step = max(DS_BYTES // max(layers * text.shape[1] * audio.element_size(), 1) // 128, 1) * 128
    for first in range(0, max(rows, 1), step):  # an empty block launches nothing, and adds zeros
        part = audio[:, first : first + step]
        ds = audio.new_empty(layers, part.shape[1], text.shape[1])
        launch(part, first, ds)
        d_audio[:, first : first + step] = _wide_product(ds, text)
        d_text += _wide_product(ds.transpose(1, 2), part)
    return d_audio, d_text


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with float32 sums: from bfloat16 by tensor cores. float16 would overflow."""
    if a.dtype == torch.bfloat16 or a.is_meta:
        return torch.bmm(a, b)
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a.float(), b.float())


def _finish(
    d_audio: Tensor, d_text: Tensor, audio: Tensor, temperature: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    # Kernels leave the temperature out: d temperature = sum_i <audio_i, (ds @ text)_i>.
    d_temperature = (audio.float() * d_audio).sum(dim=-1).sum(dim=-1)
    factor = temperature
    if scale is not None:
        factor, d_temperature = factor * scale, d_temperature * scale
    return d_audio.mul_(factor[:, None, None]), d_text.mul_(factor[:, None, None]), d_temperature


def _bounded(audio: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
    """By layer, whether all similarities lie within +-BOUNDED, by the product of norms (L,)."""
    return _largest_norm(audio) * _largest_norm(text) * temperature <= BOUNDED


def _largest_norm(latents: Tensor) -> Tensor:
    if latents.shape[1] == 0:
        return latents.new_zeros(latents.shape[0], dtype=torch.float32)
    return torch.linalg.vector_norm(latents, dim=-1, dtype=torch.float32).amax(dim=-1)


def supports(*, audio: Tensor, **_: Any) -> tuple[bool, str]:
    """Whether the kernels take this call, from device, dtype and width alone."""
    return _triton_target.supports(audio, MAX_DEPTH)


def run(*, audio: Tensor, text: Tensor, **rest: Any) -> Tensor:
    """The loss by the kernels."""
    return _autograd.loss(kernels, prepare(audio), prepare(text), **rest)


def prepare(latents: Tensor) -> Tensor:
    """Latents as the kernels read them: rows contiguous."""
    return latents if latents.stride(-1) == 1 else latents.contiguous()


@in_default_modes
def self_check(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare each loss and all gradients with the float64 reference on small calls.

    Returns:
        None, or what went wrong first.
    """
    kinds = (("softmax", 100.0), ("decoupled", 10.0), ("sigmoid", 10.0))
    both = (None, contrastive_labels(300, device))
    for (kind, factor), labels in itertools.product(kinds, both):
        inputs = contrastive_inputs(300, 128, 2, temperature=factor, dtype=dtype, device=device)
        results = []
        for function, given in (
            (run, inputs),
            (contrastive_loss_reference, inputs),
            (contrastive_loss_reference, to_float64(inputs)),
        ):
            loss = function(**given, kind=kind, labels=labels)
            grads = gradients(loss, given, torch.ones((), device=device))
            if kind != "sigmoid":
                del grads["bias"]  # zero in exact arithmetic, and here
            results.append({"loss": loss, **grads})
        rounding = contrastive_rounding(inputs, kind, labels=labels)
        case = f"{kind}, {dtype}" + ("" if labels is None else ", labels")
        problem = first_difference(case, results, dtype=dtype, rounding=rounding)
        if problem is not None:
            return problem
    return None


_triton_target.define("contrastive_logsumexp_triton", _autograd.LOGSUMEXP_SCHEMA, logsumexp)
_triton_target.define(
    "contrastive_logsumexp_backward_triton", _autograd.LOGSUMEXP_BACKWARD_SCHEMA, logsumexp_backward
)
_triton_target.define("contrastive_sigmoid_triton", _autograd.SIGMOID_SCHEMA, sigmoid)
kernels = _autograd.register(
    "musiclm_fast::contrastive_logsumexp_triton",
    "musiclm_fast::contrastive_logsumexp_backward_triton",
    "musiclm_fast::contrastive_sigmoid_triton",
)
