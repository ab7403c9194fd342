"""Runs both packages' models on the same input and seed and compares all that comes out.

Every output, the gradient of every parameter and of every floating input is held against the
reference's own model in float64: our float32 error is at most twice the reference's float32
error plus the floor of ``musiclm_fast.testing``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from musiclm_fast.testing import assert_close_to_oracle
from tests.reference.live import Pair

AUDIO_LAYERS = "audio layers"  # outputs of this name are (layers, batch, patches, dim)

Call = Callable[..., dict[str, Tensor]]


def compare(
    pair: Pair, call: Call, inputs: dict[str, Any], *, train: bool = False, seed: int = 1
) -> None:
    """Compare outputs, gradients and the random numbers drawn.

    Args:
        pair: the models.
        call: ``call(model, **inputs)`` gives named outputs. The gradients are those of their sum,
            each weighted by fixed random numbers (a scalar by one).
        inputs: floating tensors are converted to the model's dtype and require a gradient.
        train: training mode; dropped patches are then compared in sorted order.
        seed: of the random numbers the forward pass draws.
    """
    theirs = _record(pair.reference, call, inputs, train, seed, torch.float32, sort=True)
    exact = _record(pair.oracle(), call, inputs, train, seed, torch.float64, sort=True)
    ours = _record(pair.ours, call, inputs, train, seed, torch.float32, sort=False)

    assert ours.keys() == theirs.keys()
    wrong = []
    for name, value in ours.items():
        try:
            if value.is_floating_point():
                assert_close_to_oracle(name, value, theirs[name], exact[name])
            else:
                assert torch.equal(value, theirs[name]), f"{name}: differs"
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


def _record(
    model: nn.Module,
    call: Call,
    inputs: dict[str, Any],
    train: bool,
    seed: int,
    dtype: torch.dtype,
    sort: bool,
) -> dict[str, Tensor]:
    """Outputs, gradients and the generator's state after a forward and backward pass."""
    kept = _KeptPatches(model) if sort else None
    model.train(train)
    model.zero_grad()
    own = {
        name: value.detach().to(dtype).requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    torch.manual_seed(seed)
    outputs = call(model, **own)
    drawn = torch.get_rng_state()
    if kept is not None:
        kept.sort_(outputs)

    generator = torch.Generator().manual_seed(seed)
    weighted = torch.zeros((), dtype=dtype)
    for output in outputs.values():
        weights = torch.randn(output.shape, generator=generator) if output.ndim else torch.ones(())
        weighted = weighted + (output * weights).sum()
    weighted.backward()

    record = {name: output.detach() for name, output in outputs.items()}
    record["state of the random generator"] = drawn
    leaves = dict(model.named_parameters())
    leaves |= {name: value for name, value in own.items() if isinstance(value, Tensor)}
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            record[f"gradient of {name}"] = grad.detach()
    return record


class _KeptPatches:
    """The order that sorts the patches the reference's model kept, seen from the outside.

    We keep the patches of the same random draw but in the order of the grid, which neither the
    attention nor the mean over patches can tell; only the layers' outputs are permuted. The
    reference hands all pairs' (row, column) offsets to its position bias; those to the first
    patch are the patches' places up to a shift.
    """

    def __init__(self, model: nn.Module) -> None:
        self.order: Tensor | None = None  # (b, n)
        self.hooks = [
            module.dynamic_pos_bias_mlp.register_forward_pre_hook(self._see)
            for module in model.modules()
            if hasattr(module, "dynamic_pos_bias_mlp")
        ]

    def _see(self, _: nn.Module, args: tuple[Tensor]) -> None:
        (offsets,) = args  # (n, n, 2), with a batch dimension in front if patches were dropped
        self.order = None
        if offsets.ndim == 4:
            row, column = offsets[:, :, 0].unbind(-1)
            self.order = (row * 4096 + column).argsort(dim=-1)

    def sort_(self, outputs: dict[str, Tensor]) -> None:
        """Sort the audio layers among ``outputs``, and stop looking."""
        for hook in self.hooks:
            hook.remove()
        if self.order is not None and AUDIO_LAYERS in outputs:
            index = self.order[None, :, :, None]
            outputs[AUDIO_LAYERS] = outputs[AUDIO_LAYERS].take_along_dim(index, dim=2)
