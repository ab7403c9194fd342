"""Compiles the ops' Triton kernels ahead of time and tabulates what they need.

Neither a GPU nor a driver takes part: the launches that a call would make are recorded on meta
tensors and compiled with the assemblers that Triton ships, for NVIDIA and for AMD.

    python -m tests.ops.triton_resources                    the usual call of each op
    python -m tests.ops.triton_resources --all              widths, dtypes and options
    python -m tests.ops.triton_resources --target gfx942    one architecture
    python -m tests.ops.triton_resources --markdown .venvs/triton-3.6.0
                                            the tables in the ops' READMEs, by the environment's
                                            Triton and by those in the folders given
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import tables
from benchmarks.predict.launches import Launch, compile_launch, cuda_usage
from musiclm_fast.ops import _triton_target

# Shared memory that one program may use, in bytes: CUDA C++ Programming Guide, table of technical
# specifications per compute capability; AMD CDNA 2 and 3 ISA, local data share.
SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024,
    "gfx90a": 64 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip
# Bytes that may be spilled, by version of Triton, kernel and target. The wide tile of the attention
# forward takes 13.8 instructions an element with these; the narrow one, without, takes 17.4.
SPILLS = {("3.8.0", "forward_kernel", "sm_90"): 88}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs per program and thread."""

    kernel: str
    target: str
    registers: int
    spilled_bytes: int  # stack and local memory; the kernels have no arrays of their own
    shared_bytes: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Attention:
    """The options of a call that change which kernels it launches."""

    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    batch: int = 32
    queries: int = 1024
    keys: int = 1024
    kv_heads: int = 8
    bias: bool = True
    per_sample: bool = True
    qk_norm: bool = True
    key_mask: bool = False
    lengths: bool = False
    causal: bool = False
    dropout_p: float = 0.0
    radius: int = 2000
    stored: bool = True  # False: the backward does not keep dS, although it is small enough

    def __str__(self) -> str:
        on = [n for n in ("bias", "qk_norm", "key_mask", "lengths", "causal") if getattr(self, n)]
        on += ["dropout"] if self.dropout_p else []
        on += [] if self.stored else ["recomputed"]
        on += [f"kv_heads={self.kv_heads}"] if self.kv_heads != 8 else []
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B={self.batch} H=8 M={self.queries:,} N={self.keys:,} D={self.head_dim}"
        return f"attention {sizes} {dtype} {'+'.join(on) or 'plain'}"

    def call(self) -> None:
        """A forward and a backward on meta tensors."""
        from musiclm_fast.ops.attention import _triton, _triton_backward, _triton_plan

        batch, heads, keys = self.batch, 8, self.keys

        def meta(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        q = meta(batch, self.queries, heads, self.head_dim).transpose(1, 2)
        k = meta(batch, keys, self.kv_heads, self.head_dim).transpose(1, 2)
        lead = (batch,) if self.per_sample else ()
        options = (
            meta(heads, 2 * self.radius + 1, dtype=torch.float32) if self.bias else None,
            meta(*lead, self.queries, dtype=torch.int32) if self.bias else None,
            meta(*lead, keys, dtype=torch.int32) if self.bias else None,
            meta(batch, keys, dtype=torch.bool) if self.key_mask else None,
            meta(batch, dtype=torch.int64) if self.lengths else None,
            meta(self.head_dim, dtype=torch.float32) if self.qk_norm else None,
            meta(self.head_dim, dtype=torch.float32) if self.qk_norm else None,
            meta(1, dtype=torch.int64) if self.dropout_p else None,
            self.head_dim**-0.5, self.causal, self.dropout_p,
        )  # fmt: skip
        out, lse = _triton.forward(q, k, k, *options)
        with contextlib.ExitStack() as stack:
            if not self.stored:
                patch = mock.patch.object(_triton_backward, "_stores_ds", return_value=False)
                stack.enter_context(patch)
                stack.enter_context(mock.patch.object(_triton_plan, "_plans", {}))
            _triton.backward(out, q, k, k, out, lse, *options)


@dataclass(frozen=True)
class Contrastive:
    """The latents of a call, and whether it has labels."""

    depth: int = 128
    dtype: torch.dtype = torch.bfloat16
    batch: int = 65536
    labels: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        labels = " labels" if self.labels else ""
        return f"contrastive B={self.batch:,} d={self.depth} {dtype}{labels}"

    def call(self) -> None:
        """Forward and backward of every loss on meta tensors."""
        from musiclm_fast.ops.contrastive import _triton

        latents = torch.empty((1, self.batch, self.depth), dtype=self.dtype, device="meta")
        factor = torch.empty(1, device="meta")
        labels: tuple[torch.Tensor, ...] = ()
        if self.labels:
            labels = (torch.empty(self.batch, dtype=torch.int32, device="meta"),) * 2
        for inclusive in ((True,), (False,)) if self.labels else ((),):  # softmax, decoupled
            stats = _triton.logsumexp(latents, latents, factor, 0, *labels, *inclusive)
            _triton.logsumexp_backward(
                *stats, latents, latents, factor, *stats[:2], 0, *labels, *inclusive
            )
        for gradients in (True, False):
            _triton.sigmoid(latents, latents, factor, factor, 0, gradients, *labels)


@dataclass(frozen=True)
class GegluNorm:
    """The sizes and dtype of a call."""

    hidden: int = 1365
    padded: int = 1376
    dtype: torch.dtype = torch.bfloat16
    rows: int = 64 * 744

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"geglu_norm h={self.hidden} of {self.padded} {dtype}"

    def call(self) -> None:
        """A forward and a backward on meta tensors, the parameters in float32."""
        from musiclm_fast.ops.geglu_norm import _triton

        x = torch.empty((self.rows, 2 * self.padded), dtype=self.dtype, device="meta")
        gamma = torch.empty(self.hidden, device="meta")
        out, *kept = _triton.forward(x, gamma, gamma)
        _triton.backward(out, x, gamma, gamma, *kept)


@dataclass(frozen=True)
class HyperConnection:
    """The sizes and dtype of a call."""

    streams: int = 4
    dim: int = 512
    dtype: torch.dtype = torch.bfloat16
    branch: bool = True
    tokens: int = 64 * 744

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        branch = "" if self.branch else " without a branch"
        return f"hyper_connection {self.streams} x {self.dim} {dtype}{branch}"

    def call(self) -> None:
        """A forward and a backward on meta tensors, the parameters in float32."""
        from musiclm_fast.ops.hyper_connection import _triton

        count, tokens = self.streams, self.tokens

        def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        arguments = (
            meta(tokens, count, self.dim, dtype=self.dtype),
            meta(tokens, count, dtype=self.dtype) if self.branch else None,
            meta(tokens, self.dim, dtype=self.dtype) if self.branch else None,
            meta(count + 2, self.dim), meta(count + 2), meta(count, count + 2),
        )  # fmt: skip
        outputs = _triton.forward(*arguments)
        _triton.backward(*outputs[:3], *arguments, *outputs[3:])


Variant = Attention | Contrastive | GegluNorm | HyperConnection

USUAL: dict[str, Variant] = {
    "attention": Attention(), "contrastive": Contrastive(), "geglu_norm": GegluNorm(),
    "hyper_connection": HyperConnection(),
}  # fmt: skip


def every_variant(op: str) -> list[Variant]:
    """Widths, dtypes and options, the usual call first."""
    half, full = torch.float16, torch.float32
    if op == "contrastive":
        return [
            *(Contrastive(depth) for depth in (128, 64, 256, 768)),
            Contrastive(dtype=half),
            *(Contrastive(depth, full) for depth in (64, 128, 256, 768)),
            *(
                Contrastive(depth, dtype, labels=True)
                for dtype, depths in ((torch.bfloat16, (128, 256, 768)), (full, (32,)))
                for depth in depths
            ),
        ]
    if op == "geglu_norm":
        return [
            GegluNorm(hidden, padded, dtype)
            for dtype in (torch.bfloat16, full)
            for hidden, padded in (
                (1365, 1376), (1365, 1365), (682, 688), (2048, 2048), (2730, 2736), (3072, 3072),
                (10, 16),
            )
        ]  # fmt: skip
    if op == "hyper_connection":
        return [
            HyperConnection(streams, dim, dtype, branch)
            for dtype in (torch.bfloat16, full)
            for streams, dim, branch in (
                (4, 512, True), (4, 512, False), (4, 768, True), (4, 1024, True), (4, 2048, True),
                (8, 512, True), (8, 1024, True), (5, 768, True), (1, 512, True), (3, 37, True),
            )
        ]  # fmt: skip
    few = dict(causal=True, kv_heads=1)
    return [
        *(Attention(head_dim=d) for d in (64, 16, 32, 48, 80, 128)),
        *(Attention(head_dim=d, dtype=full) for d in (32, 64, 128)),
        Attention(dtype=half),
        *(Attention(head_dim=d, dropout_p=0.1, key_mask=True) for d in (32, 64, 128)),
        *(Attention(head_dim=d, lengths=True, **few) for d in (32, 64, 128)),
        *(Attention(head_dim=d, queries=1, per_sample=False, **few) for d in (32, 48, 64, 128)),
        *(Attention(head_dim=d, stored=False) for d in (32, 64, 128)),
        Attention(stored=False, per_sample=False, lengths=True, dropout_p=0.1, **few),
        Attention(bias=False, qk_norm=False),
        Attention(dtype=full, dropout_p=0.1, lengths=True, **few),
    ]


def every_launch(variant: Variant, target: str) -> list[Launch]:
    """The kernel launches of a call, in order."""
    found: list[Launch] = []
    with _triton_target.recorded_launches(
        lambda *recorded: found.append(Launch(*recorded)), target
    ):
        variant.call()
    return found


def launches(variant: Variant, target: str) -> list[Launch]:
    """The first launch of each kernel of a call."""
    found: dict[str, Launch] = {}
    for launch in every_launch(variant, target):
        found.setdefault(launch.name, launch)
    return list(found.values())


def resources(launch: Launch, target: str) -> Resources:
    """What a launch needs on an architecture."""
    compiled = compile_launch(launch, target)
    if "amdgcn" in compiled.asm:
        usage = {
            name: int(value)
            for name, value in re.findall(r"^ +\.(\w+): +(\d+)$", compiled.asm["amdgcn"], re.M)
        }
        registers = usage["vgpr_count"]  # accumulation registers among them
        spilled = usage["private_segment_fixed_size"]
    else:
        usage = next(iter(cuda_usage(compiled.asm["cubin"]).values()))
        registers, spilled = usage["REG"], usage["STACK"] + usage["LOCAL"]
    warps, stages = launch.options["num_warps"], launch.options["num_stages"]
    shared = compiled.metadata.shared
    return Resources(launch.name, target, registers, spilled, shared, warps, stages)


def table(
    op: str, variants: Iterable[Variant], targets: Iterable[str]
) -> Iterator[tuple[Variant, Resources]]:
    """Every kernel of the usual call, those whose registers vary of all, on every target."""
    targets = tuple(targets)
    for variant in variants:
        for target in targets:
            for launch in launches(variant, target):
                small = "PRECISION" not in launch.arguments  # of attention: alike in all
                if variant == USUAL[op] or op != "attention" or not small:
                    yield variant, resources(launch, target)


def problems(variant: Variant, found: Resources) -> list[str]:
    """What breaks the gates: spills, and more shared memory than there is."""
    broken = []
    if found.shared_bytes > SHARED_LIMIT[found.target]:
        broken.append(f"{found.shared_bytes} B shared memory")
    # Products of float32 run outside the tensor cores: the attention backward's, with two
    # accumulators of long head dims, do not fit.
    full = isinstance(variant, Attention) and variant.dtype == torch.float32
    import triton

    allowed = SPILLS.get((triton.__version__, found.kernel, found.target), 0)
    if found.spilled_bytes > allowed and not (full and "backward" in found.kernel):
        broken.append(f"{found.spilled_bytes} B spilled")
    return [f"{variant}: {found.kernel} on {found.target}: {problem}" for problem in broken]


HEADER = f"{'kernel':37}{'target':>8}{'regs':>6}{'spill':>7}{'shared':>9}{'warps':>7}{'stages':>8}"


def line(r: Resources) -> str:
    """One row under ``HEADER``."""
    return (
        f"{r.kernel:37}{r.target:>8}{r.registers:6}{r.spilled_bytes:7}"
        f"{r.shared_bytes:9}{r.num_warps:7}{r.num_stages:8}"
    )


MARKDOWN_TARGETS = ("sm_90", "gfx942")
MARKER = "<!-- python -m tests.ops.triton_resources --markdown -->\n"
ROOT = Path(__file__).parents[2]


def rows(op: str) -> dict[str, Any]:
    """The usual call on ``MARKDOWN_TARGETS``, as plain values."""
    import triton

    found = [asdict(r) for _, r in table(op, [USUAL[op]], MARKDOWN_TARGETS)]
    return {"version": triton.__version__, "rows": found}


def write_markdown(folders: list[str]) -> None:
    """Replace each op's table in its README."""
    for op in USUAL:
        code = f"from tests.ops import triton_resources as t; print(t.json.dumps(t.rows({op!r})))"
        cells: dict[str, dict[str, str]] = {}
        for folder in [*folders, ""]:
            path = os.pathsep.join(
                filter(None, [folder and str(Path(folder).resolve()), str(ROOT)])
            )
            done = subprocess.run(
                [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found = json.loads(done.stdout)
            for row in found["rows"]:
                column = f"{found['version']}, {row['target']}"
                cells.setdefault(row["kernel"], {})[column] = (
                    f"{row['registers']} / {row['spilled_bytes']} / {row['shared_bytes']:,}"
                )
        columns = list(next(iter(cells.values())))
        lines = [f"| kernel | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [
            f"| {kernel} | {' | '.join(values[c] for c in columns)} |"
            for kernel, values in cells.items()
        ]
        tables.replace(ROOT / "musiclm_fast" / "ops" / op / "README.md", MARKER, "\n".join(lines))


def main() -> None:
    """Print the table; exit with 1 if a kernel does not fit or spills."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="widths, dtypes and options")
    parser.add_argument("--op", nargs="+", choices=list(USUAL), default=list(USUAL))
    parser.add_argument(
        "--target", nargs="+", choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT)
    )
    parser.add_argument("--markdown", nargs="*", metavar="FOLDER", help="into the READMEs")
    options = parser.parse_args()
    if options.markdown is not None:
        write_markdown(options.markdown)
        return
    print(f"triton {triton.__version__}, torch {torch.__version__}\n{HEADER}")
    before, failures = None, []
    for op in options.op:
        variants = every_variant(op) if options.all else [USUAL[op]]
        for variant, found in table(op, variants, options.target):
            if variant != before:
                print(f"-- {variant}")
                before = variant
            print(line(found), flush=True)
            failures += problems(variant, found)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
