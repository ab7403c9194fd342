"""Runs both packages' models on the same input and seed and compares all that comes out.

Every output, the gradient of every parameter and of every floating input is compared with
upstream's own model in float64 by the rule of ``musiclm_fast.testing``: our float32 error is at
most twice upstream's float32 error plus the effect of ``FLOOR_ULPS`` roundings.

That module takes for the effect of a rounding eps times the largest value, which is right for
results that do not cancel. Gradients do: that of the position bias's last bias is exactly zero,
because softmax does not see a constant, and in float32 it is nothing but rounding. For such a
result the effect is measured: the float64 model runs once more with a relative error of eps in
the result of every operation (Monte Carlo arithmetic, D. S. Parker, UCLA CSD-970002, 1997).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from musiclm_fast.testing import FLOOR_ULPS, assert_close_to_oracle
from tests.upstream.live import Pair

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
    settings = (call, inputs, train, seed)
    ours = _record(pair.ours, *settings, torch.float32, sort=False)
    theirs = _record(pair.upstream, *settings, torch.float32, sort=True)
    exact = _record(pair.oracle(), *settings, torch.float64, sort=True)
    assert ours.keys() == theirs.keys()

    @cache
    def rounded() -> list[dict[str, Tensor]]:
        runs = []
        for run in range(2):
            with _Rounding(seed=run):
                runs.append(_record(pair.oracle(), *settings, torch.float64, sort=True))
        return runs

    wrong = []
    for name, value in ours.items():
        if not value.is_floating_point():
            if not torch.equal(value, theirs[name]):
                wrong.append(f"{name}: differs")
            continue
        try:
            assert_close_to_oracle(name, value, theirs[name], exact[name])
        except AssertionError as error:
            if not _within_rounding(value, theirs[name], exact[name], rounded, name):
                wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


def _within_rounding(
    ours: Tensor,
    theirs: Tensor,
    exact: Tensor,
    rounded: Callable[[], list[dict[str, Tensor]]],
    name: str,
) -> bool:
    """The rule with the measured effect of a rounding in place of eps times the largest value."""
    if ours.shape != exact.shape:
        return False
    error, yardstick = ((t.double() - exact).abs().max() for t in (ours, theirs))
    rounding = max((run[name] - exact).abs().max() for run in rounded())
    return bool(error <= 2.0 * yardstick + FLOOR_ULPS * rounding)


class _Rounding(TorchDispatchMode):
    """Adds u times its size to every new float64 tensor, u uniform in [-eps, eps] of float32.

    A sum is as large as its terms together: its partial sums may be, in one order or another.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._softmax_backward_data.default:
            grad, weights, dim, _ = args
            with self:  # a product, a sum and a difference, in one operation
                terms = grad * weights
                return terms - weights * terms.sum(dim, keepdim=True)
        results = func(*args, **kwargs)
        if any(result.alias_info is not None for result in func._schema.returns):
            return results  # a view, or written in place
        sizes = None
        if func.overloadpacket is torch.ops.aten.sum:
            sizes = func(args[0].abs(), *args[1:], **kwargs)
        return tree_map_only(Tensor, partial(self._round, sizes=sizes), results)

    def _round(self, result: Tensor, sizes: Tensor | None) -> Tensor:
        if result.dtype != torch.float64:
            return result
        # its own generator: the model must draw what it draws without us
        uniform = torch.rand(result.shape, generator=self.generator, dtype=torch.float64)
        eps = torch.finfo(torch.float32).eps * (2 * uniform - 1)
        return result + eps * (result if sizes is None else sizes)


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
    """The order that sorts the patches upstream's model kept, seen from the outside.

    We keep the patches of the same random draw but in the order of the grid, which neither the
    attention nor the mean over patches can tell; only the layers' outputs are permuted. Upstream
    hands all pairs' (row, column) offsets to its position bias; those to the first patch are
    the patches' places up to a shift.
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
            self.order = (row * 4096 + column).round().argsort(dim=-1)

    def sort_(self, outputs: dict[str, Tensor]) -> None:
        """Sort the audio layers among ``outputs``, and stop looking."""
        for hook in self.hooks:
            hook.remove()
        if self.order is not None and AUDIO_LAYERS in outputs:
            index = self.order[None, :, :, None]
            outputs[AUDIO_LAYERS] = outputs[AUDIO_LAYERS].take_along_dim(index, dim=2)
