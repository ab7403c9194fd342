"""What the backends of the compiled library share: availability, refusals, registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from musiclm_fast import _extension
from musiclm_fast._dispatch import Backend, Supports


def cpp_backend(supports: Supports, run: Callable[..., Any]) -> Backend:
    """The backend of an op's C++ kernels."""
    return Backend("cpp", supports, run, available)


def available() -> tuple[bool, str]:
    """Whether the compiled library is loaded, and why not."""
    status = _extension.extension_status()
    return status.loaded, status.reason


def supports(
    x: Tensor, device: str, dtypes: tuple[torch.dtype, ...], **others: Tensor | None
) -> tuple[bool, str]:
    """Whether a kernel takes tensors of these devices and dtypes, and why not.

    Args:
        x: the op's first tensor; the op has checked that the others lie on its device.
        device: ``"cpu"`` or ``"cuda"``.
        dtypes: those that the kernel takes.
        **others: further tensors that must have one of the dtypes, by argument.
    """
    if not (x.is_cpu if device == "cpu" else x.is_cuda):  # a tenth of device.type's time
        return False, f"it runs on {device.upper()} tensors, not {x.device.type}"
    if x.dtype not in dtypes:
        return False, f"it takes {_names(dtypes)}, not {_names((x.dtype,))}"
    for name, other in others.items():
        if other is not None and other.dtype not in dtypes:
            return False, f"it takes {_names(dtypes)}, and {name} is {_names((other.dtype,))}"
    return True, ""


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def register(
    op: str,
    fake_forward: Callable[..., Any],
    fake_backward: Callable[..., Any],
    results: int,
    backend: str = "",
) -> None:
    """Register fakes and autograd of ``musiclm_fast::<op>_forward`` and ``<op>_backward``, to which
    ``backend`` adds ``"_triton"``.

    The backward takes the gradients of the forward's first ``results`` outputs, its inputs, and
    its other outputs, which are kept for that. It returns a gradient per input.
    """
    forward, backward = (f"musiclm_fast::{op}_{way}{backend}" for way in ("forward", "backward"))
    torch.library.register_fake(forward)(fake_forward)
    torch.library.register_fake(backward)(fake_backward)
    backward_op = getattr(torch.ops.musiclm_fast, f"{op}_backward{backend}")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        ctx.save_for_backward(*inputs, *outputs[results:])

    def gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = backward_op(*(g.contiguous() for g in grads[:results]), *ctx.saved_tensors)
        return tuple(
            g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True)
        )

    torch.library.register_autograd(forward, gradients, setup_context=setup_context)
