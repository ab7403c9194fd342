"""The attention op's Triton backend: registration, what it refuses, its self-check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast._oracle import first_difference, gradients, to_float64
from musiclm_fast._self_check import in_default_modes
from musiclm_fast.ops import _triton_target
from musiclm_fast.ops.attention import _autograd
from musiclm_fast.ops.attention._parity import attention_inputs
from musiclm_fast.ops.attention._triton_backward import backward
from musiclm_fast.ops.attention._triton_forward import forward
from musiclm_fast.ops.attention._triton_tiles import MAX_HEAD_DIM
from musiclm_fast.ops.attention.reference import attention_reference


def supports(q: Tensor, **_: Any) -> tuple[bool, str]:
    """Whether the kernels take this call, from device, dtype and head dim alone."""
    return _triton_target.supports(q, MAX_HEAD_DIM)


def run(**arguments: Any) -> Tensor:
    """Run the op on arguments that :func:`supports` accepts."""
    return _autograd.run(torch.ops.musiclm_fast.attention_forward_triton, arguments)


@in_default_modes
def self_check(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare output and all gradients with the float64 reference on two small calls.

    The first keeps dS, and its codes per sample are distinct; the second computes dS again.

    Returns:
        None, or what went wrong first.
    """
    cases: tuple[dict[str, Any], ...] = (
        dict(queries=130, head_dim=64, heads=1, radius=200, codes_per_sample=True, key_mask=True),
        dict(queries=40, keys=70, head_dim=48, heads=4, kv_heads=2, lengths=True),
    )
    for number, case in enumerate(cases):
        inputs = attention_inputs(**case, dtype=dtype, device=device)
        if number == 0:
            for name in ("q_codes", "k_codes"):
                drawn = torch.rand(inputs[name].shape[0], 200).argsort(-1)[:, :130]
                inputs[name] = drawn.sort(-1).values.int().to(device)
        grad = torch.linspace(-1.0, 1.0, inputs["q"].numel(), device=device)
        grad = grad.view(inputs["q"].shape).to(dtype)
        rest: dict[str, Any] = dict(causal=number == 1)
        if number == 0:
            rest.update(dropout_p=0.1, dropout_seed=torch.tensor([7], device=device))
        results = []
        for function, given in (
            (lambda **a: run(**_complete(a)), inputs),
            (lambda **a: attention_reference(**a, upcast=False), inputs),
            (attention_reference, to_float64(inputs)),
        ):
            out = function(**given, **rest)
            results.append({"out": out, **gradients(out, given, grad)})
        problem = first_difference(f"{dtype}, case {number}", results, dtype=dtype)
        if problem is not None:
            return problem
    return None


def _complete(arguments: dict[str, Any]) -> dict[str, Any]:
    defaults = dict.fromkeys(_autograd.ARGUMENTS) | dict(
        scale=arguments["q"].shape[-1] ** -0.5, causal=False, dropout_p=0.0
    )
    return defaults | arguments


_triton_target.define("attention_forward_triton", _autograd.FORWARD_SCHEMA, forward)
_triton_target.define("attention_backward_triton", _autograd.BACKWARD_SCHEMA, backward)
_autograd.register(
    "musiclm_fast::attention_forward_triton", "musiclm_fast::attention_backward_triton"
)
