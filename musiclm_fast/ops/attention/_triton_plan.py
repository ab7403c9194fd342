"""The launches of a call but for its tensors, kept for later calls of the same layout.

To work them out takes the CPU several times as long as to run them: sizes, strides, tiles, and
Triton's search for what it compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from musiclm_fast.ops import _triton_target
from musiclm_fast.ops.attention._triton_call import Call, Tensors, round_up
from musiclm_fast.ops.attention._triton_tiles import Configs, choose

# Elements to which pieces of a workspace are padded, to be aligned to 256 bytes as allocations are.
PIECE = 128
# How many plans are kept.
MOST = 1024
_plans: dict[tuple[Any, ...], Plan] = {}


class Plan:
    """Workspace and launches of a call.

    A kernel's arguments come by their names from the numbers given to :meth:`launch`, the others
    from the call's tensors and the workspace.

    Args:
        device: of the tensors.
        names: of the workspace that the kernels know; what is not asked for is None.
    """

    def __init__(self, device: torch.device, names: Iterable[str] = ()) -> None:
        self._device = device
        self._absent = dict.fromkeys(names)
        self._pieces: dict[torch.dtype, dict[str, int]] = {}
        self._zeros: dict[str, int] = {}
        self._zeros_dtypes: list[torch.dtype] = []
        self._launches: list[_Launch] = []

    def workspace(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """Ask for uninitialised memory."""
        self._pieces.setdefault(dtype, {})[name] = round_up(math.prod(shape), PIECE)

    def zeros(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """Ask for zeros of four bytes each. All of them are one tensor, set by one launch."""
        self._zeros[name] = round_up(math.prod(shape), PIECE)
        self._zeros_dtypes.append(dtype)

    def launch(
        self, name: str, programs: int, options: dict[str, int], numbers: dict[str, Any],
        **renamed: str,
    ) -> None:  # fmt: skip
        """Add a launch.

        Args:
            name: the kernel's. The first one imports them all.
            programs: how many.
            options: of the launch.
            numbers: arguments that are no tensors, and others that the kernel does not have.
            renamed: tensors that the kernel names differently, by its name.
        """
        from musiclm_fast.ops.attention import _triton_kernels

        kernel = getattr(_triton_kernels, name)
        self._launches.append(_Launch(kernel, programs, options, numbers, renamed))

    def run(self, tensors: Tensors) -> None:
        """Allocate the workspace and launch.

        Args:
            tensors: inputs and outputs by name. As ``raw_q`` and ``raw_k``, q and k are there
                beside normalised ones in the workspace.
        """
        aligned = not _triton_target.recording() and not any(
            x is not None and x.data_ptr() % 16 for x in tensors.values()
        )
        tensors = {**self._absent, **tensors, "raw_q": tensors["q"], "raw_k": tensors["k"]}
        for dtype, pieces in self._pieces.items():
            sizes = [*pieces.values()]
            whole = torch.empty(sum(sizes), dtype=dtype, device=self._device)
            tensors.update(zip(pieces, whole.split_with_sizes(sizes), strict=True))
        if self._zeros:
            sizes = [*self._zeros.values()]
            whole = torch.zeros(sum(sizes), dtype=torch.int32, device=self._device)
            views = map(Tensor.view, whole.split_with_sizes(sizes), self._zeros_dtypes)
            tensors.update(zip(self._zeros, views, strict=True))
        for launch in self._launches:
            launch(tensors, aligned)


class _Launch:
    """A kernel's launch that a call completes with its tensors."""

    def __init__(
        self, kernel: Any, programs: int, options: dict[str, int], numbers: dict[str, Any],
        renamed: dict[str, str],
    ) -> None:  # fmt: skip
        names = kernel.arg_names
        self.kernel, self.programs, self.options = kernel, programs, options
        self.values = [numbers.get(name) for name in names]
        self.tensors = [
            (i, renamed.get(name, name)) for i, name in enumerate(names) if name not in numbers
        ]
        self.again: Callable[..., None] | None = None  # for aligned tensors

    def __call__(self, tensors: Tensors, aligned: bool) -> None:
        values = self.values.copy()
        for i, name in self.tensors:
            values[i] = tensors[name]
        if aligned and self.again is not None:
            self.again(*values)
            return
        arguments = dict(zip(self.kernel.arg_names, values, strict=True))
        again = _triton_target.launch(self.kernel, self.programs, arguments, self.options)
        if aligned:
            self.again = again


def run(
    kind: str, build: Callable[[Call, Configs], Plan], inputs: Tensors, outputs: Tensors,
    scale: float, causal: bool, dropout_p: float,
) -> None:  # fmt: skip
    """Run a call's kernels: by the plan that is kept for its layout, or a new one.

    Args:
        kind: ``"forward"`` or ``"backward"``.
        build: makes a plan.
        inputs: of :func:`readable`, and more.
        outputs: by name; their layouts follow from the inputs'.
        scale, causal, dropout_p: as in :class:`Call`.
    """
    q = inputs["q"]
    assert q is not None
    key = (
        kind, q.device, _triton_target.target(q.device), scale, causal, dropout_p,
        *[None if x is None else (x.shape, x.stride(), x.dtype) for x in inputs.values()],
    )  # fmt: skip
    tensors = inputs | outputs
    with _triton_target.device_guard(q.device):
        plan = _plans.get(key)
        if plan is None:
            call = Call(inputs, scale, causal, dropout_p)
            chosen, final = choose(call, kind, lambda c: partial(build(call, c).run, tensors))
            plan = build(call, chosen)
            if len(_plans) >= MOST:
                _plans.clear()
            if final:
                _plans[key] = plan
        plan.run(tensors)
