"""The cases of the stages, and the work of each.

:mod:`benchmarks.harvest.kernels` and :mod:`benchmarks.harvest.models` run them,
:mod:`benchmarks.predict` predicts them. The names of a case and a contender identify a figure.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import (
    attention_peers,
    bench_attention_gpu,
    bench_contrastive,
    bench_spectrogram,
    bench_spectrogram_gpu,
    bench_training_step,
    contrastive_peers,
)
from musiclm_fast import cost

OURS = "ours"
SHARED, PER_SAMPLE, QK_NORM = "ours, shared", "ours, per sample", "ours, QK norm"
OPTIONS = {SHARED: (False, False), PER_SAMPLE: (True, False), QK_NORM: (True, True)}
FLASH, CUDNN, SDPA_BIAS, FLEX = "flash", "cuDNN", "SDPA + bias", "FlexAttention"


@dataclass(frozen=True)
class Case:
    """A job that contenders are timed at.

    Args:
        stage: of the harvest.
        name: the case in words, with its sizes.
        contenders: names of those that run it.
        operations: floating-point operations that it needs; 0 if they do not bound it.
        traffic: bytes that it must move; 0 if they do not bound it.
        shape: its sizes and options, by name.
        budget: seconds for which a contender's calls are repeated.
    """

    stage: str
    name: str
    contenders: tuple[str, ...]
    operations: float = 0.0
    traffic: float = 0.0
    shape: dict[str, Any] = field(default_factory=dict)
    budget: float = 0.2


def card(tiny: bool) -> list[Case]:
    """The card's ceilings: a copy, a product, a launch."""
    copied, side = (2**16, 256) if tiny else (2**30, 8192)
    torch_alone = ("torch",)
    return [
        Case("card", f"copy of {copied / 2**20:g} MiB", torch_alone, traffic=2.0 * copied,
             shape=dict(bytes=copied)),
        Case("card", f"{side}^3 bf16 product", torch_alone, operations=2.0 * side**3,
             shape=dict(side=side)),
        Case("card", "a small launch", torch_alone),
    ]  # fmt: skip


def attention(tiny: bool, stage: str = "attention") -> list[Case]:
    """Both directions of each length; ``stage="flex"`` has FlexAttention alone, compiled."""
    lengths, heads, tokens = (
        bench_attention_gpu.LENGTHS,
        bench_attention_gpu.HEADS,
        bench_attention_gpu.TOKENS,
    )
    contenders: tuple[str, ...] = (SHARED, PER_SAMPLE, QK_NORM, FLASH, CUDNN, SDPA_BIAS)
    dtype = torch.float32 if tiny else torch.bfloat16
    if stage == "flex":
        lengths, contenders = (1024, 2048), (FLEX,)
    if tiny:
        lengths, heads, tokens = (32,), 1, 64
    depth = bench_attention_gpu.HEAD_DIM
    found = []
    for length in lengths:
        batch = tokens // length
        work = 4.0 * batch * heads * length**2 * depth
        for direction, factor in (("forward", 1.0), ("backward", 2.5)):
            name = f"attention {direction}, B = {batch}, H = {heads}, N = {length:,}, D = {depth}"
            shape = dict(batch=batch, heads=heads, length=length, direction=direction, dtype=dtype)
            found.append(Case(stage, name, contenders, factor * work, shape=shape))
    return found


def contrastive(tiny: bool) -> list[Case]:
    """Loss and gradients of a large batch."""
    half, full = torch.bfloat16, torch.float32
    cases = [(kind, 128, half) for kind in bench_contrastive.KINDS]
    cases += [(kind, 768, half) for kind in ("sigmoid", "softmax")]
    cases += [(kind, 128, full) for kind in ("sigmoid", "softmax")]
    batch = bench_contrastive.SIZES["cuda"]
    if tiny:
        cases, batch = [("softmax", 16, full), ("sigmoid", 16, full)], 40
    found = []
    for kind, depth, dtype in cases:
        peers = [n for n, (theirs, _) in contrastive_peers.PEERS.items() if theirs == kind]
        name = f"contrastive {kind}, B = {batch:,}, d = {depth}, {dtype_name(dtype)}"
        found.append(Case(
            "contrastive", name, (OURS, *(peers if dtype == half else ())),
            operations=8.0 * batch**2 * depth,
            shape=dict(kind=kind, batch=batch, depth=depth, dtype=dtype), budget=0.3,
        ))  # fmt: skip
    return found


def spectrogram(tiny: bool) -> list[Case]:
    """Both front ends; values, their gradient, and log-mel."""
    clips, samples = (1, 8000) if tiny else (bench_spectrogram.CLIPS, bench_spectrogram.SAMPLES)
    return [
        Case(
            "spectrogram",
            f"spectrogram {variant}, window {sizes['win_length']} of {n_fft}, {clips} clips of "
            f"{samples / 16_000:g} s",
            ("ours", "copy", "torchaudio", "torch"),
            traffic=bench_spectrogram_gpu.traffic(clips, samples, n_fft, variant),
            shape=dict(n_fft=n_fft, variant=variant, clips=clips, samples=samples),
            budget=0.15,
        )
        for n_fft, sizes in bench_spectrogram.FRONT_ENDS.items()
        for variant in bench_spectrogram_gpu.VARIANTS
        if n_fft == 512 or variant != "log-mel"
    ]


def peers(tiny: bool) -> list[Case]:
    """Other packages, and torch's rarer backends: attention of one length, log-mel."""
    compared = (FLASH, CUDNN, SDPA_BIAS, FLEX)  # in stages of their own
    others = tuple(name for name in attention_peers.PEERS if name not in compared)
    found = [
        replace(case, stage="peers", contenders=others)
        for case in attention(tiny)
        if case.shape["length"] == (32 if tiny else 1024)
    ]
    return found + [
        replace(case, stage="peers", contenders=("nnAudio", "flashmel"))
        for case in spectrogram(tiny)
        if case.shape["variant"] == "log-mel"
    ]


BF16, COMPILED = " (bf16)", " (bf16, torch.compile)"
STEPS = {  # stage -> contender, and batch, width and mode of each case
    "step": (bench_training_step.OURS, [(64, 512, BF16), (64, 512, ""), (4, 512, BF16),
                                        (64, 768, BF16)]),
    "step_upstream": (bench_training_step.THEIRS, [(4, 512, BF16), (4, 512, ""), (16, 512, BF16),
                                                    (64, 512, BF16)]),
    "step_compiled": (bench_training_step.OURS, [(64, 512, COMPILED)]),
    "step_captured": (bench_training_step.OURS, [(64, 512, BF16)]),
}  # fmt: skip


def steps(tiny: bool, stage: str) -> list[Case]:
    """Whole training steps of MuLaN."""
    who, cases = STEPS[stage]
    if tiny:
        cases = [(2, 64, COMPILED if stage == "step_compiled" else "")]
    found = []
    for batch, dim, mode in cases:
        sizes = bench_training_step.Case(10 * bench_training_step.SAMPLE_HZ, batch, dim=dim)
        if tiny:
            sizes = bench_training_step.TINY["tiny"]
        name = (
            f"MuLaN step, {sizes.samples / bench_training_step.SAMPLE_HZ:g} s x {sizes.batch}, "
            f"dim {sizes.dim}, depth {sizes.depth}{mode or ' (float32)'}"
        )
        operations = sum(op.operations for op in cost.step_ops(sizes.counted()))
        contender = f"{who}, captured" if stage == "step_captured" else who
        shape = dict(sizes=sizes, mode=mode, who=who)
        found.append(Case(stage, name, (contender,), operations, shape=shape, budget=1.0))
    return found


def generation(tiny: bool) -> list[Case]:
    """Tokens of the semantic stage."""
    tokens = 4 if tiny else 128
    return [
        Case("generation", f"semantic generation, dim 512, depth 6, guidance 3, {tokens} tokens",
             (OURS, "audiolm-pytorch"), shape=dict(tokens=tokens))
    ]  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def all_cases(tiny: bool = False) -> list[Case]:
    """Every case of every stage, in the stages' order."""
    return [
        *card(tiny), *attention(tiny), *contrastive(tiny), *spectrogram(tiny),
        *steps(tiny, "step"), *steps(tiny, "step_upstream"), *generation(tiny),
        *attention(tiny, "flex"), *steps(tiny, "step_captured"), *steps(tiny, "step_compiled"),
        *peers(tiny),
    ]  # fmt: skip
