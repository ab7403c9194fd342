"""A rule per stage of the harvest, from a case and a contender to the prediction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks import (
    bench_attention_gpu,
    bench_generation,
    bench_spectrogram,
    bench_training_step,
    contrastive_peers,
)
from benchmarks.harvest import cases
from benchmarks.harvest import kernels as harvest_kernels
from benchmarks.harvest.cases import Case
from benchmarks.predict import trace
from benchmarks.predict.calls import call, host_ms, main_bound, none, parts, simple, total
from benchmarks.predict.kernels import costs
from benchmarks.predict.model import ATOMICS, MODEL, PUBLISHED, SIGLIP_768_MS, SPECTROGRAM, Card
from benchmarks.predict.stored import Prediction
from benchmarks.predict.trace import Kernel
from musiclm_fast import cost
from musiclm_fast.ops.contrastive import _triton as contrastive


def of_card(case: Case, contender: str, card: Card) -> Prediction:
    if case.traffic:
        how = f"{case.traffic / 1e9:.3g} GB at {card.bandwidth / 1e12:.3g} TB/s"
        return simple(case, contender, case.traffic / card.bandwidth, 1, "bandwidth", how)
    if case.operations:
        how = f"{case.operations / 1e12:.3g} TFLOP at {card.tensor / 1e12:.0f} TFLOP/s"
        return simple(case, contender, case.operations / card.tensor, 1, "tensor", how)
    return simple(case, contender, MODEL.kernel_us / 1e6, 1, "launch", "an empty kernel")


def of_attention(case: Case, contender: str, card: Card) -> Prediction:
    shape = case.shape
    forward = shape["direction"] == "forward"
    if contender in PUBLISHED:
        return _published_attention(case, contender, card)
    with trace.gpu():
        inputs = bench_attention_gpu.make_inputs(
            shape["batch"], shape["length"], shape["heads"], "cpu", shape["dtype"],
            *cases.OPTIONS[contender],
        )  # fmt: skip
        if forward:
            with torch.no_grad():
                return call(
                    case.name,
                    contender,
                    trace.trace(lambda: bench_attention_gpu.ours(inputs)),
                    card,
                )
        leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        out = None

        def attend() -> None:
            nonlocal out
            out = bench_attention_gpu.ours(inputs)

        trace.trace(attend)
        grad = torch.empty_like(inputs["q"])
        kernels = trace.trace(lambda: torch.autograd.grad(out, leaves, grad))
    return call(case.name, contender, kernels, card)


def _published_attention(case: Case, contender: str, card: Card) -> Prediction:
    shape = case.shape
    length, heads, batch = (shape[n] for n in ("length", "heads", "batch"))
    forward = shape["direction"] == "forward"
    rate = PUBLISHED[contender][length][0 if forward else 1]
    pairs = float(heads * length**2)
    half = 2.0
    seconds, launches = 0.0, {"flash": 3}.get(contender, 2)
    if contender == "FlexAttention" and not forward:
        # one addition a pair for the table
        seconds = batch * pairs / ATOMICS
        extra = f" + {batch * pairs / 1e6:.0f} M atomic additions, {1e3 * seconds:.3g} ms"
    elif contender == "SDPA + bias":
        # Forward: gather the bias in float32 and round it. Backward: write its gradient of each
        # sample, sum, and scatter into the table.
        if forward:
            nbytes = pairs * (4 + 4 + half + half) + length**2 * 8 * 4
            launches = 8
        else:
            nbytes = pairs * (2 * half * batch + half + 4 + 4)
            seconds = pairs / ATOMICS
            launches = 12
        seconds += nbytes / card.bandwidth
        extra = f" + {nbytes / 1e6:.0f} MB of the bias, together {1e3 * seconds:.3g} ms"
    else:
        extra = ""
    if forward:
        launches = {"flash": 1, "cuDNN": 1, "FlexAttention": 1}.get(contender, launches)
    seconds += case.operations / (rate * 1e12)
    how = f"{case.operations / 1e9:.3g} GFLOP at {rate:.0f} TFLOP/s{extra}"
    return simple(case, contender, seconds, launches, "tensor", how)


def of_contrastive(case: Case, contender: str, card: Card) -> Prediction:
    shape = case.shape
    depth = shape["depth"]
    if contender in contrastive_peers.PEERS:
        if contender == "siglip-kernel" and depth == 768:
            how = "its authors' figure for Hopper"
            return simple(case, contender, SIGLIP_768_MS / 1e3, 4, "tensor", how)
        return none(case, contender, "its instructions are not counted and nothing is published "
                    "for this width")  # fmt: skip
    if depth > contrastive.MAX_DEPTH:
        reason = f"refused: latents of width {depth}, not 1 to {contrastive.MAX_DEPTH}"
        return none(case, contender, reason)
    with trace.gpu():
        found = trace.trace(harvest_kernels.loss(shape, "cpu"))
    return call(case.name, contender, found, card)


def of_spectrogram(case: Case, contender: str, card: Card) -> Prediction:
    shape = case.shape
    gradient = "gradient" in shape["variant"]
    if contender == "copy":
        how = f"{case.traffic / 1e6:.0f} MB at {card.bandwidth / 1e12:.3g} TB/s"
        return simple(case, contender, case.traffic / card.bandwidth, 1, "bandwidth", how)
    if contender == "ours":
        counted = SPECTROGRAM[shape["n_fft"]]
        each = counted["log-mel" if shape["variant"] == "log-mel" else "values"]
        each += counted["gradient"] if gradient else 0
        hop = bench_spectrogram.FRONT_ENDS[shape["n_fft"]]["hop_length"]
        frames = shape["clips"] * (shape["samples"] // hop + 1)
        issued = MODEL.issue * MODEL.schedulers * card.sms * card.clock * 32
        limits = {"issue": frames * each / issued, "bandwidth": case.traffic / card.bandwidth}
        bound = max(limits, key=lambda name: limits[name])
        times = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in limits.items())
        how = f"{frames:,} frames of {each:,.0f} instructions a thread: {times}"
        return simple(case, contender, limits[bound], 3 if gradient else 1, bound, how, 4)
    with trace.gpu():
        found = trace.trace(harvest_kernels.transform(shape, "cpu", "torch", contender))
    return call(case.name, contender, found, card)


def of_peer(case: Case, contender: str, card: Card) -> Prediction:
    return none(case, contender, "its instructions are not counted and nothing is published for "
                "this shape")  # fmt: skip


@functools.cache
def _step_kernels(who: str, mode: str, sizes: Any) -> list[Kernel]:
    # Upstream's masks read a truth value that must not hold.
    # On a GPU its Adam uses torch's default, which updates all tensors at once.
    ours = who == bench_training_step.OURS
    foreach = mock.patch.dict(bench_training_step.ADAM, {} if ours else {"foreach": True})
    with trace.gpu(truth=ours), foreach:
        run = bench_training_step.step(who, sizes, "cpu", mode)
        trace.trace(run)  # allocates the optimizer's moments
        return trace.trace(run)


def of_step(case: Case, contender: str, card: Card) -> Prediction:
    shape = case.shape
    mode = shape["mode"]
    compiled = "torch.compile" in mode
    eager = " (bf16)" if "bf16" in mode else ""
    kernels = _step_kernels(shape["who"], eager, shape["sizes"])
    if compiled:
        return _compiled_step(case, contender, kernels, card)
    found = call(case.name, contender, kernels, card)
    if contender.endswith("captured"):
        device = found.kernels_ms + found.launches * MODEL.gap_us / 1e3
        how = f"the eager step's kernels with gaps, without the CPU; {found.how}"
        return replace(found, ms=device, bound=main_bound(costs(kernels, card)), how=how)
    return found


def _compiled_step(case: Case, contender: str, kernels: Sequence[Kernel], card: Card) -> Prediction:
    # Products and Triton kernels of the eager step; for the rest, the bytes of the roofline's ops.
    kept = [k for k in kernels if k.launch is not None or k.operations]
    found = costs(kept, card)
    step = case.shape["sizes"].counted()
    ops = [op for op in cost.step_ops(step) if not op.matrix]
    rest = 0.5 * sum(op.traffic for op in ops) / card.bandwidth  # bf16, the counts are float32
    fused = (len(kernels) - len(kept)) // 3  # assumed: one kernel remains of three
    busy = sum(c.ms * c.launches for c in found) + 1e3 * rest
    launches = sum(c.launches for c in found) + fused
    host = host_ms(kept)
    how = f"{parts(found)}; the rest fused, {1e3 * rest:.3g} ms in {fused} kernels"
    return total(case.name, contender, busy, launches, host, how, main_bound(found))


def of_generation(case: Case, contender: str, card: Card) -> Prediction:
    ours = contender == "ours"
    few, more, tokens = 2, 6, case.shape["tokens"]
    # Ours reads whether all rows run on: true. Upstream reads checks of its masks: false.
    with trace.gpu(truth=ours):
        theirs, mine = bench_generation.pair()
        generate = bench_generation.ours_generate if ours else bench_generation.theirs_generate
        model = mine if ours else theirs
        first, later = (
            trace.trace(functools.partial(generate, model, n)) for n in (few, more)
        )  # fmt: skip
    sizes = [
        (sum(c.ms * c.launches for c in found), sum(c.launches for c in found), host_ms(kernels))
        for kernels in (first, later)
        for found in [costs(kernels, card)]
    ]
    token = [(b - a) / (more - few) for a, b in zip(*sizes, strict=True)]
    busy, launches, host = (
        a + each * (tokens - few) for a, each in zip(sizes[0], token, strict=True)
    )
    how = (
        f"a token: {token[1]:.0f} kernels, {token[0]:.3g} ms of them, CPU {token[2]:.3g} ms; "
        f"{tokens / max(busy, host) * 1e3:.0f} tokens/s"
    )
    return total(case.name, contender, busy, round(launches), host, how, "launch")


RULES: dict[str, Callable[[Case, str, Card], Prediction]] = {
    "card": of_card, "attention": of_attention, "flex": of_attention,
    "contrastive": of_contrastive, "spectrogram": of_spectrogram, "step": of_step,
    "step_upstream": of_step, "step_compiled": of_step, "step_captured": of_step,
    "generation": of_generation, "peers": of_peer,
}  # fmt: skip
