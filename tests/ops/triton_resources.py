"""Compiles the attention op's Triton kernels ahead of time and tabulates what they need.

Neither a GPU nor a driver takes part: the launches that a call would make are recorded on meta
tensors and compiled for sm_80, sm_90 and sm_100 with the assembler that Triton ships.

    python -m tests.ops.triton_resources            head dim 64, bfloat16
    python -m tests.ops.triton_resources --all      head dims, dtypes and options
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Shared memory that one program may use, in bytes (CUDA C++ Programming Guide, table of
# technical specifications per compute capability).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

PRODUCTS = {"forward_kernel", "backward_kv_kernel", "backward_q_kernel"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs per program and thread."""

    kernel: str
    arch: int
    registers: int
    spilled_bytes: int  # stack and local memory; the kernels have no arrays of their own
    shared_bytes: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Variant:
    """The options of a call that change which kernels it launches."""

    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    queries: int = 1024
    kv_heads: int = 8
    bias: bool = True
    per_sample: bool = True
    qk_norm: bool = True
    key_mask: bool = False
    lengths: bool = False
    causal: bool = False
    dropout_p: float = 0.0

    def __str__(self) -> str:
        on = [n for n in ("bias", "qk_norm", "key_mask", "lengths", "causal") if getattr(self, n)]
        on += ["dropout"] if self.dropout_p else []
        on += [f"kv_heads={self.kv_heads}"] if self.kv_heads != 8 else []
        dtype = str(self.dtype).removeprefix("torch.")
        return f"D={self.head_dim} {dtype} M={self.queries} {'+'.join(on) or 'plain'}"


def launches(variant: Variant, arch: int) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """The distinct kernel launches of a forward and a backward call, on meta tensors."""
    from musiclm_fast.ops.attention import _triton

    batch, heads, keys, radius = 4, 8, 1024, 2000

    def meta(*shape: int, dtype: torch.dtype = variant.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = meta(batch, variant.queries, heads, variant.head_dim).transpose(1, 2)
    k = meta(batch, keys, variant.kv_heads, variant.head_dim).transpose(1, 2)
    lead = (batch,) if variant.per_sample else ()
    options = (
        meta(heads, 2 * radius + 1, dtype=torch.float32) if variant.bias else None,
        meta(*lead, variant.queries, dtype=torch.int32) if variant.bias else None,
        meta(*lead, keys, dtype=torch.int32) if variant.bias else None,
        meta(batch, keys, dtype=torch.bool) if variant.key_mask else None,
        meta(batch, dtype=torch.int64) if variant.lengths else None,
        meta(variant.head_dim, dtype=torch.float32) if variant.qk_norm else None,
        meta(variant.head_dim, dtype=torch.float32) if variant.qk_norm else None,
        meta(1, dtype=torch.int64) if variant.dropout_p else None,
        variant.head_dim**-0.5, variant.causal, variant.dropout_p,
    )  # fmt: skip
    found: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {}

    def record(kernel: Any, arguments: dict[str, Any], **chosen: int) -> None:
        found.setdefault(kernel.__name__, (kernel, arguments, chosen))

    capability = divmod(arch, 10)
    with _triton.recorded_launches(record, capability):
        out, lse = _triton.forward(q, k, k, *options)
        _triton.backward(out, q, k, k, out, lse, *options)
    return list(found.values())


def compile_launch(
    kernel: Any, arguments: dict[str, Any], options: dict[str, int], arch: int
) -> Resources:
    """Compile one launch for an architecture, specialised as Triton's launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = _type_name(value)
        if isinstance(value, torch.Tensor) or (free and type(value) is int and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={**options, "enable_fp_fusion": True}
    )
    registers, spilled = _resource_usage(compiled.asm["cubin"])
    return Resources(kernel.__name__, arch, registers, spilled, compiled.metadata.shared, **options)


def _type_name(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        names = {
            torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
            torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
        }  # fmt: skip
        return "*" + names[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resource_usage(binary: bytes) -> tuple[int, int]:
    # Registers a thread, and bytes of stack and local memory: where spilled registers go.
    from triton.backends.nvidia import compiler as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def table(variants: Iterable[Variant], archs: Iterable[int]) -> Iterator[tuple[Variant, Resources]]:
    """Every kernel of the first variant, those with matrix products of all, on every arch."""
    archs = tuple(archs)
    for number, variant in enumerate(variants):
        for arch in archs:
            for kernel, arguments, options in launches(variant, arch):
                if number == 0 or kernel.__name__ in PRODUCTS:
                    yield variant, compile_launch(kernel, arguments, options, arch)


def every_variant() -> list[Variant]:
    """Head dims, dtypes and options, one change at a time."""
    half, full = torch.float16, torch.float32
    return [
        *(Variant(head_dim=d) for d in (64, 16, 32, 48, 80, 128)),
        *(Variant(head_dim=d, dtype=full) for d in (32, 64, 128)),
        Variant(dtype=half),
        Variant(dropout_p=0.1, key_mask=True),
        Variant(causal=True, lengths=True, kv_heads=1),
        Variant(bias=False, qk_norm=False),
        Variant(queries=1, causal=True, kv_heads=1, per_sample=False),
    ]


HEADER = f"{'kernel':24}{'arch':>8}{'regs':>6}{'spill':>7}{'shared':>9}{'warps':>7}{'stages':>8}"


def line(r: Resources) -> str:
    """One row under ``HEADER``."""
    return (
        f"{r.kernel:24}{'sm_' + str(r.arch):>8}{r.registers:6}{r.spilled_bytes:7}"
        f"{r.shared_bytes:9}{r.num_warps:7}{r.num_stages:8}"
    )


def main() -> None:
    """Print the table; exit with 1 if a kernel does not fit or spills at head dim 64."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="head dims, dtypes and options")
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT))
    options = parser.parse_args()
    print(f"triton {triton.__version__}, torch {torch.__version__}\n{HEADER}")
    before, failures = None, []
    for variant, found in table(every_variant() if options.all else [Variant()], options.arch):
        if variant != before:
            print(f"-- {variant}")
            before = variant
        print(line(found), flush=True)
        failures += [f"{variant}: {p}" for p in problems(variant, found)]
    if failures:
        raise SystemExit("\n".join(failures))


def problems(variant: Variant, found: Resources) -> list[str]:
    """What breaks the gates: shared memory always, spills at 16-bit head dims up to 64."""
    broken = []
    if found.shared_bytes > SHARED_LIMIT[found.arch]:
        broken.append(f"{found.kernel} on sm_{found.arch}: {found.shared_bytes} B shared memory")
    if found.spilled_bytes and variant.head_dim <= 64 and variant.dtype != torch.float32:
        broken.append(f"{found.kernel} on sm_{found.arch}: {found.spilled_bytes} B spilled")
    return broken


if __name__ == "__main__":
    main()
