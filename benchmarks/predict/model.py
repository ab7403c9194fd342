"""Every constant of the cost model, with its source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU: nominal and sustained rates.

    Args:
        sms, clock: multiprocessors; Hz that a long product sustains.
        nominal_bandwidth, bandwidth: bytes per second: the data sheet's, and a large copy's.
        nominal_tensor, tensor: bf16 operations per second: the data sheet's, and a large product's.
        float32: operations per second of a large float32 product, without TF32.
    """

    name: str
    sms: int
    clock: float
    nominal_bandwidth: float
    bandwidth: float
    nominal_tensor: float
    tensor: float
    float32: float


# Nominal: NVIDIA's data sheets of the SXM cards. Achieved: assumed; the harvest's first stage
# measures a copy and a bf16 product.
CARDS = {
    "h100": Card("H100 SXM", 132, 1.7e9, 3.35e12, 3.0e12, 989e12, 700e12, 50e12),
    "h200": Card("H200", 132, 1.7e9, 4.8e12, 4.0e12, 989e12, 700e12, 50e12),
}


@dataclass(frozen=True)
class Model:
    """The constants that belong to no card; ``SOURCES`` says where each comes from."""

    schedulers: int = 4
    issue: float = 0.65
    pipe: float = 0.85
    warp_issue: float = 0.3
    kernel_us: float = 2.0
    gap_us: float = 1.0
    operator_us: float = 6.0
    launch_us: float = 10.0
    argument_us: float = 0.4
    call_us: float = 40.0
    event_us: float = 4.0


MODEL = Model()
SOURCES = {
    "schedulers": "schedulers of an SM, one instruction a cycle each (CUDA C++ Programming Guide)",
    "issue": "share of the cycles in which a scheduler with enough warps issues: assumed",
    "pipe": "share of a pipe's peak that is reached: assumed",
    "warp_issue": "instructions a cycle of one warp alone, which waits for itself: assumed",
    "kernel_us": "least duration of a kernel, us: assumed, as profilers show empty ones",
    "gap_us": "from one queued kernel to the next, us: assumed",
    "operator_us": "CPU time of an eager torch operator, us: assumed",
    "launch_us": "CPU time of a Triton launch beside its arguments, us: assumed",
    "argument_us": "of each of its arguments, us: measured on a shared EPYC, Triton 3.6 and 3.9, "
    "with the launch stubbed out: an attention forward and backward of 7 launches of 37 arguments "
    "(mean) takes 99 us; the launch itself is in launch_us",
    "call_us": "of a custom operator and its autograd, us: assumed",
    "event_us": "of a first kernel on an idle GPU, from the event before it, us: assumed",
}
# Cycles for which an instruction of a warp holds its scheduler's pipe: 32 threads over a quarter of
# the SM's lanes (CUDA C++ Programming Guide, arithmetic throughput, 9.0: 128 float32, 64 integer
# and conversion, 16 special functions, 32 memory). Memory counts once for each 128 bytes.
PIPES = {
    "float": ("float", 1), "imad": ("float", 2), "integer": ("integer", 2),
    "convert": ("integer", 2), "mufu": ("mufu", 8), "global": ("memory", 4),
    "shared": ("memory", 4), "generic": ("memory", 4), "local": ("memory", 4),
    "cp.async": ("memory", 4), "shuffle": ("memory", 4),
}  # fmt: skip
TENSOR_CYCLE = 1024  # bf16 operations a cycle of one scheduler's tensor core: 4,096 an SM
# Peers' TFLOP/s forward and backward at D = 64, by length. Forward, flash and cuDNN: the project's
# review read them off the FlashAttention-3 paper's curves for an H100, of FlashAttention-2 (282 to
# 318; 1,024 lies between) and of FlashAttention-3; cuDNN is assumed to equal it. Backward: the
# review's 0.6 ms for flash at 1,024, and the rest assumed around it. Nothing is published for a
# learned table in FlexAttention or for torch's attention with a bias on an H100: assumed.
PUBLISHED: dict[str, dict[int, tuple[float, float]]] = {
    "flash": {512: (282, 250), 1024: (304, 286), 2048: (318, 300)},
    "cuDNN": {512: (333, 300), 1024: (392, 343), 2048: (460, 360)},
    "FlexAttention": {1024: (140, 180), 2048: (145, 190)},
    "SDPA + bias": {512: (110, 75), 1024: (120, 80), 2048: (125, 85)},
}
# siglip-kernel 0.1.1's page: "Hopper (GH200/H100)", B = 65,536, bfloat16; its width, 768, as the
# review found it.
SIGLIP_768_MS = 48.8
ATOMICS = 96 * 1.7e9  # additions a second to distinct words in the L2: one a slice and cycle
# Instructions of a thread that the CUDA spectrogram needs for a frame, counted in its machine code
# (nvcc 13.0, sm_90) along the path of the benchmark's case, a fifth of the frames masked; the op's
# README has the parts. By n_fft: of the values, of the log-mel values, of the gradient.
SPECTROGRAM: dict[int, dict[str, float]] = {
    128: {"values": 2_040, "gradient": 4_700},
    512: {"values": 13_900, "log-mel": 20_100, "gradient": 68_800},
}
