"""The contrastive losses' Triton backend: choice of tiles, launches, registration.

The kernels lie in ``_triton_kernels.py`` and are imported by the first call, so importing this
file needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from musiclm_fast._oracle import first_difference, gradients, to_float64
from musiclm_fast._self_check import in_default_modes
from musiclm_fast.ops import _triton_target
from musiclm_fast.ops._triton_target import Config
from musiclm_fast.ops.contrastive import _autograd
from musiclm_fast.ops.contrastive._parity import contrastive_inputs, contrastive_rounding
from musiclm_fast.ops.contrastive.reference import contrastive_loss_reference

MAX_DEPTH = 256
# Programs that a launch should have: two for each of an H100's multiprocessors.
PROGRAMS = 264
# Bytes of partial gradients where few rows make a launch cut its columns into splits.
PARTIAL_BYTES = 32 << 20
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
    128: (Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    256: (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
}
# Products before Hopper keep both operands in registers, so tiles of 128 columns would spill.
_HALF_AMPERE: Table = {
    128: (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 64, 8, 3)),
    256: (Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
}
_HALF_BLACKWELL: Table = {
    **_HALF,
    128: (Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 3)),
}
_FLOAT32: Table = {
    64: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    128: (Config(32, 32, 8, 2), Config(32, 64, 8, 2, 128), Config(32, 32, 8, 2)),
    256: (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
}
_FLOAT32_AMPERE: Table = {
    **_FLOAT32,
    64: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
    128: (Config(32, 32, 8, 2), Config(32, 32, 8, 1), Config(32, 32, 8, 2)),
}
# 64 KB of shared memory; 256 registers a thread with 8 warps of 64, 512 with 4.
_HALF_AMD: Table = {
    128: (Config(128, 64, 8, 2), Config(64, 32, 4, 2), Config(128, 32, 8, 2)),
    256: (Config(64, 64, 8, 2), Config(32, 32, 4, 2), Config(64, 32, 4, 2)),
}
_FLOAT32_AMD: Table = {
    64: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    128: (Config(32, 32, 8, 2), Config(32, 16, 8, 2), Config(32, 16, 8, 2)),
    256: (Config(16, 32, 8, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
}
_TABLES = {  # 16-bit and float32
    "ampere": (_HALF_AMPERE, _FLOAT32_AMPERE),
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


class _Side:
    """One launch's rows ``x`` against columns ``y``."""

    def __init__(self, x: Tensor, y: Tensor, temperature: Tensor, offset: int, part: int) -> None:
        self.x, self.y, self.temperature, self.offset = x, y, temperature, offset
        self.layers, self.rows, self.depth = x.shape
        self.columns = y.shape[1]
        self.block_d = padded(self.depth)
        self.config = configs(_triton_target.target(x.device), self.block_d, x.dtype)[part]
        self.blocks = self.layers * -(-self.rows // self.config.block_m)

    def splits(self, row_bytes: int) -> int:
        """Pieces to cut the columns into, so that a launch with few rows has enough programs."""
        tiles = -(-self.columns // self.config.block_n)
        memory = max(PARTIAL_BYTES // max(self.layers * self.rows * row_bytes, 1), 1)
        wanted = min(-(-PROGRAMS // max(self.blocks, 1)), -(-tiles // 4), memory)
        return -(-tiles // -(-tiles // wanted)) if tiles else 1  # none of them without columns

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def launch(self, name: str, splits: int, **arguments: Any) -> None:
        """Run a kernel over all rows and splits."""
        arguments = dict(
            x=self.x, y=self.y, temperature=self.temperature, **arguments,
            stride_xl=self.x.stride(0), stride_xm=self.x.stride(1),
            stride_yl=self.y.stride(0), stride_yn=self.y.stride(1),
            rows=self.rows, columns=self.columns, offset=self.offset,
            D=self.depth, BLOCK_D=self.block_d, SPLITS=splits,
            EVEN=self.columns % self.config.block_n == 0, PRECISION=PRECISION,
            BLOCK_M=self.config.block_m, BLOCK_N=self.config.block_n,
        )  # fmt: skip
        _triton_target.launch(_kernel(name), self.blocks * splits, arguments, self.config.options)


def logsumexp(
    audio: Tensor, text: Tensor, temperature: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``musiclm_fast::contrastive_logsumexp_triton``; see ``block_logsumexp``."""

    def of_rows(x: Tensor, y: Tensor, offset: int, wanted: bool) -> tuple[Tensor, Tensor]:
        side = _Side(x, y, temperature, offset, 0)
        splits = side.splits(8)
        lse = side.empty(splits, side.layers, side.rows)
        positive = torch.empty_like(lse) if wanted else None
        side.launch("logsumexp_kernel", splits, lse=lse, positive=positive)
        merged = lse[0] if splits == 1 else torch.logsumexp(lse, dim=0)
        return merged, merged if positive is None else positive.sum(dim=0)

    with _triton_target.device_guard(audio.device):
        row, positive = of_rows(audio, text, offset, True)
        column, _ = of_rows(text, audio, -offset, False)
    return row, column, positive


def logsumexp_backward(
    grad_row: Tensor, grad_column: Tensor, grad_positive: Tensor, audio: Tensor, text: Tensor,
    temperature: Tensor, row_lse: Tensor, column_lse: Tensor, offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``musiclm_fast::contrastive_logsumexp_backward_triton``; see ``block_logsumexp_backward``."""
    bounded = _largest_norm(audio) * _largest_norm(text) * temperature <= BOUNDED  # (L,)
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
        shifts.append(lse)
    # The positive's gradient by column: 0 where the column has none, and then never read.
    of_column = torch.zeros_like(weights[1])
    begin, end = max(0, -offset), max(min(audio.shape[1], text.shape[1] - offset), 0)
    if begin < end:
        of_column[:, begin + offset : end + offset] = weights[2][:, begin:end]

    def of_rows(
        x: Tensor, y: Tensor, offset: int, mine: int, other: int, positive: Tensor
    ) -> Tensor:
        side = _Side(x, y, temperature, offset, 1)
        splits = side.splits(4 * side.depth)
        dx = side.empty(splits, *x.shape)
        side.launch(
            "gradient_kernel", splits, bounded=bounded.to(torch.int32), x_weight=weights[mine],
            x_shift=shifts[mine], y_weight=weights[other], y_shift=shifts[other],
            positive=positive, dx=dx,
        )  # fmt: skip
        return dx[0] if splits == 1 else dx.sum(dim=0)

    with _triton_target.device_guard(audio.device):
        d_audio = of_rows(audio, text, offset, 0, 1, weights[2])
        d_text = of_rows(text, audio, -offset, 1, 0, of_column)
    return _finish(d_audio, d_text, audio, temperature, scale)


def sigmoid(
    audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None, offset: int,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``musiclm_fast::contrastive_sigmoid_triton``; see ``block_sigmoid``."""

    def of_rows(x: Tensor, y: Tensor, offset: int, with_loss: bool) -> list[Tensor]:
        side = _Side(x, y, temperature, offset, 2)
        splits = side.splits(4 * side.depth if gradients else 4)
        loss, ds_sum = (side.empty(splits, side.layers, side.rows) for _ in range(2))
        dx = side.empty(splits, *x.shape) if gradients else None
        side.launch(
            "sigmoid_kernel", splits, bias=bias, loss=loss, ds_sum=ds_sum, dx=dx,
            LOSS=with_loss, GRADIENT=gradients,
        )  # fmt: skip
        total = [] if dx is None else [dx[0] if splits == 1 else dx.sum(dim=0)]
        return [loss, ds_sum, *total]

    with _triton_target.device_guard(audio.device):
        loss, ds_sum, *d_audio = of_rows(audio, text, offset, True)
        if not gradients:
            none = [loss.new_empty(0) for _ in range(4)]
            return loss.sum(), none[0], none[1], none[2], none[3]
        d_text = of_rows(text, audio, -offset, False)[2]
    return loss.sum(), *_finish(d_audio[0], d_text, audio, temperature), ds_sum.sum(dim=(0, 2))


def _finish(
    d_audio: Tensor, d_text: Tensor, audio: Tensor, temperature: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    # Kernels leave the temperature out: d temperature = sum_i <audio_i, (ds @ text)_i>.
    d_temperature = (audio.float() * d_audio).sum(dim=-1).sum(dim=-1)
    factor = temperature
    if scale is not None:
        factor, d_temperature = factor * scale, d_temperature * scale
    return d_audio.mul_(factor[:, None, None]), d_text.mul_(factor[:, None, None]), d_temperature


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
    for kind, factor in (("softmax", 100.0), ("decoupled", 10.0), ("sigmoid", 10.0)):
        inputs = contrastive_inputs(300, 128, 2, temperature=factor, dtype=dtype, device=device)
        results = []
        for function, given in (
            (run, inputs),
            (contrastive_loss_reference, inputs),
            (contrastive_loss_reference, to_float64(inputs)),
        ):
            loss = function(**given, kind=kind)
            grads = gradients(loss, given, torch.ones((), device=device))
            if kind != "sigmoid":
                del grads["bias"]  # zero in exact arithmetic, and here
            results.append({"loss": loss, **grads})
        rounding = contrastive_rounding(inputs, kind)
        problem = first_difference(f"{kind}, {dtype}", results, dtype=dtype, rounding=rounding)
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
