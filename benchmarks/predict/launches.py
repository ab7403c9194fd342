"""A launch of a Triton kernel, compiled without a GPU."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from musiclm_fast.ops import _triton_target

TARGET = "sm_90"


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments and options of one launch, and its number of programs."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """The kernel's name, with the requested outputs of kernels that have several."""
        ends = {
            "logsumexp_kernel": ["INCLUSIVE"],
            "gradient_kernel": ["INCLUSIVE", "y_positive"],
            "sigmoid_kernel": ["LOSS", "GRADIENT"],
        }
        name = self.kernel.__name__
        asked = [
            end
            for end in ends.get(name, [])
            if self.arguments[end] is not None and self.arguments[end] is not False
        ]
        return "+".join([name, *asked]).lower()


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel for an architecture, specialised like its launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    amd = _triton_target.family(target) == "amd"
    signature, constants, attributes = specialised(launch, amd)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    if amd:
        gpu = GPUTarget("hip", target, 64)
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = {**launch.options, "enable_fp_fusion": True}
    unknown = set(options) - set(vars(make_backend(gpu).parse_options(options)))
    if unknown:  # as with unknown arguments
        raise ValueError(f"{launch.name} has no options {', '.join(sorted(unknown))} on {target}")
    return triton.compile(source, target=gpu, options=options)


def specialised(
    launch: Launch, amd: bool = False
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Types, constants and attributes of a launch's arguments: what its code depends on."""
    unknown = set(launch.arguments) - {parameter.name for parameter in launch.kernel.params}
    if unknown:  # Triton's launcher refuses them, its compiler and interpreter do not
        raise ValueError(f"{launch.name} has no arguments {', '.join(sorted(unknown))}")
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = _type_name(value)
        tensor = isinstance(value, torch.Tensor)
        if tensor or (free and type(value) is int and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
        if tensor and amd and value.untyped_storage().nbytes() < 2**31:
            attributes[(index,)].append(["tt.pointer_range", 32])
    return signature, constants, attributes


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


def cuobjdump(binary: bytes, *options: str) -> str:
    """What Triton's cuobjdump says about a cubin or an object file."""
    from triton.backends.nvidia import compiler as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run(
            [tool, *options, file.name], capture_output=True, text=True, check=True
        ).stdout


def cuda_usage(binary: bytes) -> dict[str, dict[str, int]]:
    """By kernel of a cubin or an object file: registers, stack, local memory (spills)."""
    report = cuobjdump(binary, "--dump-resource-usage")
    functions = re.findall(r"Function (\S+):\n(.+)", report)
    return {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
        for name, line in functions
    }


def tile(launch: Launch) -> int:
    """Elements that one turn of a launch's innermost loop works on: BLOCK_M x BLOCK_N, or the
    product of the block sizes of a kernel without these; 0 for one with less than two."""
    sizes = {
        name: value
        for name, value in launch.arguments.items()
        if name.startswith("BLOCK") and isinstance(value, int)
    }
    if {"BLOCK_M", "BLOCK_N"} <= set(sizes):
        return sizes["BLOCK_M"] * sizes["BLOCK_N"]
    return math.prod(sizes.values()) if len(sizes) > 1 else 0
