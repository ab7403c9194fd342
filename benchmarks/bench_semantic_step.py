"""A training step of the semantic stage: live audiolm-pytorch against ours.

1,024 tokens, batch 2 (8 on a GPU), dim 512, depth 6, conditioned on given embeddings, forward,
backward and Adam. Loss and gradients are compared first, in evaluation mode, since dropout draws
different numbers in each. Weights are equal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings

CODES = 500


@dataclasses.dataclass(frozen=True)
class Size:
    """Tokens, sequences of a batch, width and depth."""

    tokens: int = 1024
    batch: int = 2
    dim: int = 512
    depth: int = 6


def build(kind: str, size: Size, device: str) -> torch.nn.Module:
    """The semantic transformer of either package, with equal weights."""
    torch.manual_seed(0)
    if kind == "ours":
        from musiclm_fast.audiolm import SemanticTransformer
    else:
        from tests.upstream import live

        SemanticTransformer = live.load().audiolm.SemanticTransformer
    model = SemanticTransformer(
        dim=size.dim, depth=size.depth, num_semantic_tokens=CODES, audio_text_condition=True
    )
    return model.to(device).train()


def gradients(model: torch.nn.Module, size: Size, device: str) -> Callable[[], Any]:
    """Forward and backward of the next-token loss."""
    generator = torch.Generator().manual_seed(1)
    shape = (size.batch, size.tokens - 1)
    ids = torch.randint(0, CODES, shape, generator=generator).to(device)
    embeds = torch.randn(size.batch, 8, size.dim, generator=generator).to(device)

    def run() -> torch.Tensor:
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        logits = model(ids=ids, text_embeds=embeds)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids.flatten())
        loss.backward()
        return loss.detach()

    return run


def step(kind: str, size: Size, device: str) -> Callable[[], Any]:
    """A whole step."""
    model = build(kind, size, device)
    run = gradients(model, size, device)
    update = torch.optim.Adam(model.parameters(), lr=3e-4, fused=kind == "ours" or None)

    def both() -> None:
        run()
        update.step()

    return both


def memory(kind: str, size: Size, device: str) -> int:
    """Peak memory of forward and backward in bytes."""
    if device == "cuda":
        model = build(kind, size, device)
        return harness.gpu_memory(
            lambda: gradients(model, size, device),
            between=lambda: model.zero_grad(set_to_none=True),
        )
    return int(harness.in_fresh_process(peak, kind, size))


def peak(kind: str, size: Size) -> int:
    """The same on the CPU; call in a fresh process."""

    def prepare() -> Callable[[], Any]:
        model = build(kind, size, "cpu")
        gradients(model, dataclasses.replace(size, tokens=8), "cpu")()  # warms up
        model.zero_grad(set_to_none=True)
        return gradients(model, size, "cpu")

    return harness.extra_memory(prepare)


def check(size: Size, device: str) -> None:
    """Loss and gradients agree.

    Raises:
        AssertionError: they do not.
    """
    few = dataclasses.replace(size, tokens=min(size.tokens, 64))
    ours = build("ours", few, device).eval()
    theirs, backend = harness.oracle(
        lambda: build("theirs", few, device), lambda: build("ours", few, device)
    )
    theirs.eval()
    ours.load_state_dict(theirs.state_dict())
    loss = gradients(ours, few, device)()
    with backend:
        expected = gradients(theirs, few, device)()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name.endswith("rel_pos_bias.net.3.bias"):
            continue  # exactly zero in theory: softmax is invariant
        if a.grad is None or b.grad is None:
            assert a.grad is b.grad, f"one of both has no gradient of {name}"
        elif b.grad.any() or a.grad.any():
            error = (a.grad - b.grad).norm() / b.grad.norm()
            assert error < 2e-3, f"gradient of {name} is off by {error:.1e}"


def results(settings: Settings) -> list[Result]:
    """The one case of the mode."""
    size = settings.pick(Size(), gpu=Size(batch=8), tiny=Size(16, 1, 64, 1))
    device = settings.device
    contenders = {
        name: Contender(
            functools.partial(step, kind, size, device),
            memory=functools.partial(memory, kind, size, device),
            role="ours" if kind == "ours" else "peer",
        )
        for name, kind in (("ours", "ours"), ("audiolm-pytorch", "theirs"))
    }
    return harness.measure(
        "semantic training step", f"{size.tokens:,} tokens x {size.batch}", contenders, settings,
        check=functools.partial(check, size, device), rounds=3,
        headline=f"semantic training step, {size.tokens:,} tokens, batch {size.batch}",
    )  # fmt: skip
