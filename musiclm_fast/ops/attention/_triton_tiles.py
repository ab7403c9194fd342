"""Block shapes and launch options of the attention kernels: by table, or timed on request."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from musiclm_fast._checks import check_choice
from musiclm_fast.ops import _triton_target
from musiclm_fast.ops._triton_target import Config
from musiclm_fast.ops.attention._triton_call import Call

_AUTOTUNE = os.environ.get("MUSICLM_FAST_AUTOTUNE") or "0"
check_choice("MUSICLM_FAST_AUTOTUNE", _AUTOTUNE, ("0", "1"))
MAX_HEAD_DIM = 128


@dataclass(frozen=True)
class Configs:
    """The three kernels that hold matrix products."""

    forward: Config
    backward_kv: Config
    backward_q: Config


# By longest head dim, for many queries. The counts behind the choices are in README.md.
Table = dict[int, Configs]
_HALF: Table = {
    32: Configs(Config(128, 64, 8, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
    64: Configs(Config(128, 64, 8, 2, 128), Config(64, 64, 4, 2), Config(128, 64, 8, 3)),
    128: Configs(Config(128, 64, 8, 2), Config(32, 64, 8, 2), Config(64, 64, 4, 2)),
}
_HALF_AMPERE: Table = {
    32: Configs(Config(128, 64, 8, 3, 255), Config(64, 64, 4, 2), Config(64, 64, 4, 3)),
    64: Configs(Config(128, 64, 8, 3), Config(32, 64, 4, 2), Config(128, 64, 8, 3, 255)),
    128: Configs(Config(128, 32, 8, 2), Config(32, 64, 8, 2), Config(128, 64, 8, 2)),
}
_HALF_BLACKWELL: Table = {
    32: replace(_HALF[32], backward_kv=Config(32, 64, 4, 3, 255)),
    64: replace(_HALF[64], forward=Config(128, 32, 8, 3), backward_kv=Config(64, 64, 4, 2, 255)),
    128: replace(
        _HALF[128], backward_kv=Config(32, 64, 8, 2, 255), backward_q=Config(128, 64, 8, 2)
    ),
}
# 64 KB of shared memory; 256 registers a thread with 8 warps of 64, 512 with 4.
_HALF_AMD: Table = {
    32: Configs(Config(128, 32, 8, 2), Config(32, 64, 4, 2), Config(64, 64, 4, 2)),
    64: Configs(Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(128, 64, 8, 2)),
    128: Configs(Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(128, 64, 8, 2)),
}
_FLOAT32: Table = {
    32: Configs(Config(64, 32, 4, 2, 255), Config(32, 32, 4, 2), Config(64, 32, 4, 2)),
    64: Configs(Config(64, 32, 8, 2, 255), Config(32, 32, 8, 2), Config(64, 32, 8, 2)),
    128: Configs(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
}
_FLOAT32_AMD: Table = {
    limit: replace(chosen, forward=replace(chosen.forward, max_registers=None))
    for limit, chosen in _FLOAT32.items()
}
_TABLES = {  # 16-bit and float32
    "ampere": (_HALF_AMPERE, _FLOAT32),
    "hopper": (_HALF, _FLOAT32),
    "blackwell": (_HALF_BLACKWELL, _FLOAT32),
    "amd": (_HALF_AMD, _FLOAT32_AMD),
}


def configs(
    target: str, head_dim: int, queries: int, dtype: torch.dtype, causal: bool, masked: bool
) -> Configs:
    """The tiles that the table gives for a call.

    Args:
        target: the device's architecture, such as ``sm_90``.
        head_dim: D.
        queries: M; few queries (cached decoding) take narrow tiles.
        dtype: q's dtype.
        causal: the backward masks, which takes registers.
        masked: dropout or a mask of keys; the forward masks all tiles, which takes registers.
    """
    family = _triton_target.family(target)
    table = _TABLES[family][dtype == torch.float32]
    limit = next(limit for limit in table if head_dim <= limit)
    chosen = table[limit]
    forward, backward_kv = chosen.forward, chosen.backward_kv
    if limit == 64 and dtype != torch.float32:
        if causal or masked or head_dim & (head_dim - 1):  # 64 would spill
            backward_kv = replace(backward_kv, block_m=32, max_registers=None)
        if (masked or causal) and family in ("hopper", "blackwell"):
            # two programs a multiprocessor, without spills
            forward = replace(forward, block_n=32, num_stages=3, max_registers=128)
    narrow_keys = masked or (causal and family == "ampere")  # wider ones would spill
    if limit == 32 and narrow_keys and dtype != torch.float32:
        backward_kv = replace(backward_kv, block_m=32)
    if queries <= 64 and limit == 128 and family == "hopper" and dtype != torch.float32:
        backward_kv = replace(backward_kv, block_m=32, block_n=32)  # wider ones would spill
    if queries <= 64:
        # With narrower tiles and a bias Triton 3.6 emits a cast that AMD's LLVM cannot translate.
        narrow = queries <= 16 and family != "amd"
        rows = 16 if narrow else min(forward.block_m, 64)
        forward = replace(forward, block_m=rows, num_warps=4)
    return replace(chosen, forward=forward, backward_kv=backward_kv)


def table_config(stored: bool, target: str, head_dim: int, dtype: torch.dtype) -> Config:
    """The tile of the table's gradient: from a kept dS, or from products."""
    family = _triton_target.family(target)
    if stored:
        return Config(512, 8, 4, 1, None if family == "amd" else 255)
    if family == "amd":
        return Config(32, 32, 4, 1)
    if head_dim > 64 and dtype != torch.float32:
        return Config(64, 16, 8, 1)
    return Config(64, 32, 8, 1) if family == "hopper" else Config(32, 32, 8, 1)


def recomputed_q_config(configs: Configs, target: str, head_dim: int, dtype: torch.dtype) -> Config:
    """The tile of q's gradient without a kept dS, which holds more than one with it."""
    if dtype == torch.float32:
        return configs.backward_q
    family = _triton_target.family(target)
    if family == "amd":
        return Config(64, 32, 4, 1) if head_dim <= 64 else Config(32, 32, 8, 1)
    if head_dim > 64 or family == "ampere":
        return Config(64, 32, 8, 1)
    return Config(128, 64, 8, 2)


_tuning_results: dict[tuple[Any, ...], Configs] = {}


def choose(
    call: Call, kind: str, prepared: Callable[[Configs], Callable[[], None]]
) -> tuple[Configs, bool]:
    """The tiles of :func:`configs` or, on request, the fastest of a few; whether that is final.

    The fastest are found once per kind of call. Tuning synchronises, so it does not happen while a
    CUDA graph is captured.

    Args:
        call: what is run.
        kind: ``"forward"`` or ``"backward"``.
        prepared: returns what launches the kernels.
    """
    target = _triton_target.target(call.device)
    heuristic = configs(target, call.head_dim, call.queries, call.dtype, call.causal, call.masked)
    if _AUTOTUNE == "0" or call.device.type != "cuda":
        return heuristic, True
    key = (
        kind, target, call.head_dim, call.dtype, call.causal, call.group,
        call.table is None, call.masked, call.keys.bit_length(), call.queries.bit_length(),
    )  # fmt: skip
    if key not in _tuning_results and not torch.cuda.is_current_stream_capturing():
        _tuning_results[key] = _fastest(heuristic, prepared)
    return _tuning_results.get(key, heuristic), key in _tuning_results


def _fastest(heuristic: Configs, prepared: Callable[[Configs], Callable[[], None]]) -> Configs:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    timed: list[tuple[float, int, Configs]] = []
    for number, candidate in enumerate(_candidates(heuristic)):
        try:
            ms = do_bench(prepared(candidate), warmup=5, rep=20)
            timed.append((ms, number, candidate))
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
