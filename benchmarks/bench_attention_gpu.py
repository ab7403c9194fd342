"""Attention with a learned offset table on a GPU, against other attention with and without a bias.

For each length, forward and backward of

ours, shared       one set of codes for the batch; the backward includes the table's gradient
ours, per sample   one set of codes per sample, as with patch dropout
ours, QK norm      the same with the l2-norm of queries and keys and its learned scales
ceilings           attention without a bias: torch's flash attention, cuDNN, FlashAttention-2, -3
                   and -4
peers              attention with the bias and its gradient: torch's backends, cuDNN, xformers,
                   cuEquivariance; FlexAttention, compiled, reads the table by its score function

benchmarks/attention_peers.py has all but ours. What cannot run is listed with the reason. Output
and gradients are compared with the float64 reference first. No row is reported unless they agree.
Operations are the matrix products of plain attention, 4 B H N^2 D forward and 10 B H N^2 D
backward, for every contender. Runs without a network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import harness
from benchmarks.attention_peers import PEERS, Inputs, Peer
from benchmarks.harness import Result, Settings
from musiclm_fast import testing
from musiclm_fast.ops import attention, grid_codes
from musiclm_fast.ops.attention.reference import attention_reference

HEADS, HEAD_DIM, HEIGHT = 8, 64, 16
TOKENS = 32_768  # samples times length
LENGTHS = (512, 1024, 2048)


def make_inputs(
    batch: int, length: int, heads: int, device: str, dtype: torch.dtype, per_sample: bool,
    qk_norm: bool,
) -> Inputs:  # fmt: skip
    """Arguments of the op for patches of a grid; a quarter of them is dropped if per sample."""
    width = -(-(length * 4 // 3 if per_sample else length) // HEIGHT)
    radius = (HEIGHT - 1) * (2 * width - 1) + width
    inputs = testing.attention_inputs(
        batch, heads, length, head_dim=HEAD_DIM, radius=radius, qk_norm=qk_norm, dtype=dtype,
        device=device,
    )  # fmt: skip
    codes = grid_codes(HEIGHT, width)
    if per_sample:
        generator = torch.Generator().manual_seed(1)
        kept = [torch.randperm(len(codes), generator=generator)[:length] for _ in range(batch)]
        codes = torch.stack([codes[k.sort().values] for k in kept])
    else:
        codes = codes[:length]
    return inputs | dict(q_codes=codes.to(device), k_codes=codes.to(device))


def ours(inputs: Inputs) -> torch.Tensor:
    return attention(**inputs, backend="triton")


def check_parity(length: int, device: str, dtype: torch.dtype) -> None:
    """Raise AssertionError if ours is less accurate than the same-dtype torch path."""
    for per_sample in (False, True):
        inputs = make_inputs(2, length, 2, device, dtype, per_sample, qk_norm=per_sample)
        wide = testing.to_float64(inputs)
        grad = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(2))
        grad = grad.to(device=device, dtype=dtype)
        found = []
        for function, given in (
            (ours, inputs),
            (lambda a: attention_reference(**a, upcast=False), inputs),
            (lambda a: attention_reference(**a), wide),
        ):
            out = function(given)
            found.append({"out": out, **testing.gradients(out, given, grad)})
        for name in found[0]:
            testing.assert_close_to_oracle(name, *(f[name] for f in found), dtype=dtype)


def contenders(batch: int, length: int, heads: int, device: str, dtype: torch.dtype) -> Mapping[
    str, tuple[Peer | None, Inputs]
]:  # fmt: skip
    """Name -> peer, None for ours, and its inputs."""
    shared, own, norm = (
        make_inputs(batch, length, heads, device, dtype, *options)
        for options in ((False, False), (True, False), (True, True))
    )
    mine = {"ours, shared": shared, "ours, per sample": own, "ours, QK norm": norm}
    return {name: (None, inputs) for name, inputs in mine.items()} | {
        name: (peer, shared) for name, peer in PEERS.items()
    }


def measure(
    length: int, tokens: int = TOKENS, heads: int = HEADS, device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16, rounds: int = 7, repeats: int = 10,
) -> list[Result]:  # fmt: skip
    """Both directions of one length; memory is that of both together.

    Raises:
        AssertionError: values disagree.
    """
    check_parity(length, device, dtype)
    batch = max(tokens // length, 1)
    forward: dict[str, Callable[[], Any]] = {}
    backward: dict[str, Callable[[], Any]] = {}
    memory: dict[str, int | None] = {}
    absent: dict[str, str] = {}
    small = make_inputs(2, length, 2, device, dtype, False, False)
    for name, (peer, inputs) in contenders(batch, length, heads, device, dtype).items():
        function = ours if peer is None else peer.run
        grad = torch.randn_like(inputs["q"])
        names = [n for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad]
        plain = peer is not None and not peer.biased
        leaves = [inputs[n] for n in names if not plain or n in "qkv"]
        try:
            if peer is not None:
                peer.check(small)
            memory[name] = _peak(functools.partial(_both, function, inputs, leaves, grad), device)
            out = function(inputs)
        except Exception as error:  # a peer that is not installed or refuses; out of memory
            if peer is None and not isinstance(error, torch.OutOfMemoryError):
                raise
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        forward[name] = functools.partial(
            _repeat, repeats, functools.partial(_quiet, function, inputs)
        )
        backward[name] = functools.partial(
            _repeat,
            repeats,
            functools.partial(
                torch.autograd.grad, out, leaves, grad, retain_graph=True, allow_unused=True
            ),
        )
    flops = 4.0 * batch * heads * length**2 * HEAD_DIM
    found = []
    for direction, runs, factor in (("forward", forward, 1.0), ("backward", backward, 2.5)):
        for name, timing in harness.interleave(runs, rounds=rounds, warmup=2).items():
            role = role_of(name)
            found.append(Result(
                f"attention, {direction}", f"B = {batch}, N = {length:,}", name, role,
                [seconds / repeats for seconds in timing.seconds],
                operations=factor * flops, memory=memory[name], axes={"tokens": length},
                headline=f"attention with a learned bias, {direction}, N = {length:,}"
                if name == "ours, shared" else "",
            ))  # fmt: skip
    for name, reason in absent.items():
        case = f"B = {batch}, N = {length:,}"
        found.append(Result("attention, forward", case, name, role_of(name), reason=reason))
    return found


def role_of(name: str) -> str:
    """A contender's role; a ceiling is a bound."""
    return "ours" if name not in PEERS else "peer" if PEERS[name].biased else "bound"


def _repeat(times: int, run: Callable[[], Any]) -> None:
    for _ in range(times):
        run()


def _both(
    function: Callable[[Inputs], torch.Tensor], inputs: Inputs, leaves: list[torch.Tensor],
    grad: torch.Tensor,
) -> None:  # fmt: skip
    torch.autograd.grad(function(inputs), leaves, grad, allow_unused=True)


def _quiet(function: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> None:
    with torch.no_grad():
        function(inputs)


def _peak(run: Callable[[], Any], device: str) -> int | None:
    run()
    return None if device == "cpu" else harness.gpu_memory(lambda: run)


def results(settings: Settings) -> list[Result]:
    """Each direction of each length on a GPU; on a CPU a small one in Triton's interpreter, as a
    test of this code."""
    if settings.mode != "gpu":
        return []
    sizes: dict[str, Any] = dict(tokens=TOKENS, heads=HEADS, dtype=torch.bfloat16)
    if settings.device == "cpu":
        sizes = dict(tokens=64, heads=1, dtype=torch.float32, rounds=1, repeats=1)
    found = []
    for length in settings.pick(LENGTHS, tiny=(32,)):
        try:
            found += measure(length, device=settings.device, **sizes)
        except AssertionError as error:
            reason = f"{harness.PARITY_FAILED}: {str(error).splitlines()[0]}"
            found.append(Result("attention", f"N = {length:,}", "ours", "ours", reason=reason))
    return [r for r in found if r.ours or not settings.only_ours]
