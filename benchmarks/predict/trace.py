"""Finds the kernels that a call launches on a CUDA GPU, without one.

The call runs on fake tensors: torch's dispatcher sees every operator with its shapes, and the
Triton backends record their launches instead of running them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.predict.launches import TARGET, Launch
from musiclm_fast.ops import _triton_target, use_backend

# Operators with more than one kernel on CUDA, from ATen's sources. A view has none, every other
# operator has one.
SEVERAL = {
    "embedding_dense_backward": 6,  # sort of the indices, their counts, sums of segments
    "index_put": 6, "index_put_": 6, "_index_put_impl_": 6,  # accumulating: the same
    "native_layer_norm_backward": 2, "native_group_norm": 2,
    "masked_fill": 2, "logsumexp": 6, "topk": 4, "sort": 3, "randperm": 4, "cumsum": 2,
    "_fft_r2c": 2, "_fft_c2r": 2, "multinomial": 5, "scatter": 2,
}  # fmt: skip
# Of the multi-tensor kernels: blocks and tensors a launch, elements a block, by list length
# (ATen/native/cuda/MultiTensorApply.cuh).
BLOCKS_A_LAUNCH, TENSORS_A_LAUNCH, CHUNK = 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 65_536
NONE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach",
        "lift_fresh", "_unsafe_view", "resize_", "set_", "_local_scalar_dense",
        "transpose_", "t_", "squeeze_", "unsqueeze_", "as_strided_", "detach_"}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """What one operator launches.

    Args:
        name: of the operator or the Triton kernel.
        launches: kernels.
        traffic: bytes of its tensors, each once.
        operations: of matrix products.
        precision: of those, ``"bf16"`` or ``"float32"``.
        launch: of a Triton kernel.
    """

    name: str
    launches: int = 1
    traffic: float = 0.0
    operations: float = 0.0
    precision: str = "bf16"
    launch: Launch | None = None


def trace(run: Callable[[], Any]) -> list[Kernel]:
    """The kernels of a call, in order; for use inside :func:`gpu`."""
    with _Counter() as counter:
        run()
    return counter.found


@contextlib.contextmanager
def gpu(truth: bool = True) -> Iterator[None]:
    """Fake tensors that take the path of a GPU's: through the Triton kernels, cast as on CUDA.

    Their device is the CPU, since a torch without CUDA has no other autograd.

    Args:
        truth: the result of reading a truth value from the device: whether a check holds, or
            whether all is done. Other numbers are 1.
    """
    nothing = contextlib.nullcontext()
    with (
        mock.patch("torch.nn.Module.to", lambda module, *_, **__: module),
        # CPU only: transposed products of few rows, checks of values.
        mock.patch("musiclm_fast.ops.decode.reference._transposed", return_value=False),
        mock.patch("musiclm_fast._checks.check_finite_clips"),
        mock.patch("musiclm_fast.ops.contrastive.op.check_finite"),
        mock.patch.object(_triton_target, "refusal", return_value=""),
        mock.patch.object(_triton_target, "device_guard", return_value=nothing),
        FakeTensorMode(allow_non_fake_inputs=True),
        _Scalars(truth),
        _Casts(),
        use_backend("torch"),
        use_backend(attention="triton", contrastive="triton"),
    ):
        yield


class _Scalars(TorchDispatchMode):
    def __init__(self, truth: bool) -> None:
        super().__init__()
        self.truth = truth

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.truth if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.equal.default:
            return self.truth
        if func is torch.ops.aten.masked_select.default:  # upstream's diagonal of a square
            return args[0].new_empty(args[0].numel() // args[0].shape[-1])
        return func(*args, **(kwargs or {}))


class _Casts(TorchFunctionMode):
    # Autocast on CUDA runs these in float32; on a CPU it leaves them in the dtype that they get.
    # docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32".
    NAMES = frozenset([
        "exp", "log", "norm", "normalize", "pow", "softmax", "log_softmax", "sum", "layer_norm",
        "cumsum", "prod", "rsqrt", "softplus",
    ])  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in self.NAMES:
            args = tuple(
                a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a
                for a in args
            )
        return func(*args, **(kwargs or {}))


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Kernel] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inside = _inside(func)
        if inside is not None:
            with self, _triton_target.recorded_launches(self._record, TARGET):
                return inside(*args, **kwargs)
        if (
            torch.is_inference_mode_enabled() and func.namespace == "aten"
        ):  # operators arrive whole there
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self._add(func, [args, kwargs], out)
        return out

    def _record(self, *recorded: Any) -> None:
        launch = Launch(*recorded)
        if launch.programs:
            self.found.append(of_launch(launch))

    def _add(self, func: Any, given: Any, out: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        inputs = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if (
            name in NONE
            or name.startswith("prim::")
            or getattr(func, "is_view", False)
            or not any(t.numel() for t in outputs or inputs)
        ):
            return
        launches = SEVERAL.get(name, 1)
        if name.startswith(("index_put", "_index_put")) and True not in given[0][3:4]:
            launches = 1
        lists = [a for a in given[0] if isinstance(a, (list, tuple)) and a
                 and isinstance(a[0], Tensor)]  # fmt: skip
        if name.startswith(("_foreach", "_fused", "_amp_foreach")) and lists:
            launches = _multi_tensor(lists)
        operations, precision = _products(name, inputs)
        overwritten = name in ("fill_", "zero_", "copy_")
        moved = sum(_bytes(t) for t in (inputs[1:] if overwritten else inputs))
        moved += sum(_bytes(t) for t in outputs)
        if name.startswith(("_foreach", "_fused")) and name.endswith("_"):
            moved += sum(_bytes(t) for t in lists[0])
        self.found.append(Kernel(name, launches, float(moved), operations, precision))


def _inside(func: Any) -> Callable[..., Any] | None:
    # The code inside an operator of the Triton backends.
    from musiclm_fast.ops.attention import _triton as attention
    from musiclm_fast.ops.contrastive import _triton as contrastive
    from musiclm_fast.ops.geglu_norm import _triton as geglu_norm
    from musiclm_fast.ops.hyper_connection import _triton as hyper_connection

    return {
        "musiclm_fast::attention_forward_triton": attention.forward,
        "musiclm_fast::attention_backward_triton": attention.backward,
        "musiclm_fast::contrastive_logsumexp_triton": contrastive.logsumexp,
        "musiclm_fast::contrastive_logsumexp_backward_triton": contrastive.logsumexp_backward,
        "musiclm_fast::contrastive_sigmoid_triton": contrastive.sigmoid,
        "musiclm_fast::geglu_norm_forward_triton": geglu_norm.forward,
        "musiclm_fast::geglu_norm_backward_triton": geglu_norm.backward,
        "musiclm_fast::hyper_connection_forward_triton": hyper_connection.forward,
        "musiclm_fast::hyper_connection_backward_triton": hyper_connection.backward,
    }.get(func._schema.name)


def of_launch(launch: Launch) -> Kernel:
    """A Triton kernel's launch with the bytes of its tensors."""
    tensors = [v for v in launch.arguments.values() if isinstance(v, Tensor)]
    return Kernel(launch.name, 1, float(sum(_bytes(t) for t in tensors)), launch=launch)


def _bytes(t: Tensor) -> int:
    # an expanded tensor counts once
    distinct = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        distinct *= size if stride else min(size, 1)
    return distinct * t.element_size()


def _multi_tensor(lists: Sequence[Sequence[Tensor]]) -> int:
    chunks = [-(-t.numel() // CHUNK) for t in lists[0]]
    most = TENSORS_A_LAUNCH.get(len(lists), 30)
    return max(-(-sum(chunks) // BLOCKS_A_LAUNCH), -(-len(chunks) // most))


def _products(name: str, inputs: Sequence[Tensor]) -> tuple[float, str]:
    pair = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}.get(name)
    if pair is None:
        return 0.0, "bf16"
    a, b = (inputs[i] for i in pair)
    precision = "float32" if a.dtype == torch.float32 else "bf16"
    return 2.0 * a.numel() * b.shape[-1], precision
