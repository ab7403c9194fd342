"""Other attention kernels behind one interface: from the op's arguments to its output.

torch's backends, each forced; FlashAttention-2, -3 and -4, xformers and cuEquivariance, cuDNN by
its own frontend. They are packages for CUDA GPUs: requirements/peers.txt names them. Those without
a bias are ceilings: they do less than the op. Those with one read it from a (1, H, N, N) tensor,
gathered from the table in every call, except FlexAttention, whose score function reads the table.
None of them reads codes per sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast.ops.attention.reference import offset_bias

Inputs = dict[str, Any]


def bias_of(inputs: Inputs) -> Tensor:
    """The (1, H, N, N) bias in the dtype of q."""
    bias = offset_bias(inputs["bias_table"], inputs["q_codes"], inputs["k_codes"])
    return bias.to(inputs["q"].dtype)


def torch_backend(name: str, biased: bool = False) -> Callable[[Inputs], Tensor]:
    """torch's attention by one of ``SDPBackend``'s members; its flash attention runs on a CPU too.

    Raises:
        RuntimeError: when called, it refuses.
    """

    def run(inputs: Inputs) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (inputs[n] for n in "qkv")
        if not q.is_cuda and name != "FLASH_ATTENTION":
            raise RuntimeError(f"{name} needs a CUDA device")
        bias = bias_of(inputs) if biased else None
        with sdpa_kernel(getattr(SDPBackend, name)):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return run


flash = torch_backend("FLASH_ATTENTION")


def sdpa_with_bias(inputs: Inputs) -> Tensor:
    """torch's attention by the backend that it chooses."""
    q, k, v = (inputs[n] for n in "qkv")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_of(inputs))


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # one compilation per length


def flex(inputs: Inputs) -> Tensor:
    """FlexAttention, compiled."""
    table, q_codes, k_codes = (inputs[name] for name in ("bias_table", "q_codes", "k_codes"))
    radius = table.shape[1] // 2

    def score(s: Tensor, b: Any, h: Any, i: Any, j: Any) -> Tensor:
        offset = (q_codes[i] - k_codes[j]).clamp(-radius, radius)
        return s + table[h, offset + radius]

    out: Tensor = _compiled_flex()(*(inputs[name] for name in "qkv"), score_mod=score)
    return out


def _rows(function: Callable[..., Any], inputs: Inputs, **options: Any) -> Tensor:
    # Functions of (B, N, H, D) tensors. Some return further results after the output.
    found = function(*(inputs[name].transpose(1, 2) for name in "qkv"), **options)
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out.transpose(1, 2)


def flash_attention_2(inputs: Inputs) -> Tensor:
    from flash_attn import flash_attn_func

    return _rows(flash_attn_func, inputs)


def flash_attention_3(inputs: Inputs) -> Tensor:
    from flash_attn_interface import flash_attn_func

    return _rows(flash_attn_func, inputs)


def flash_attention_4(inputs: Inputs) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return _rows(flash_attn_func, inputs)


def xformers(inputs: Inputs) -> Tensor:
    """Its CUTLASS kernels, the ones that give the bias a gradient."""
    from xformers.ops import fmha

    bias = bias_of(inputs).expand(len(inputs["q"]), -1, -1, -1)
    kernels = fmha.MemoryEfficientAttentionCutlassOp
    return _rows(fmha.memory_efficient_attention, inputs, attn_bias=bias, op=kernels)


def cuequivariance(inputs: Inputs) -> Tensor:
    """Its attention over the rows of a pair representation: ours with samples as rows."""
    # Without its kernels it computes by torch and says nothing.
    import cuequivariance_ops_torch  # noqa: F401
    from cuequivariance_torch import triangle_attention

    q, k, v = (inputs[name][None] for name in "qkv")  # (1, B, H, N, D)
    out: Tensor = triangle_attention(q, k, v, bias_of(inputs)[None])[0]
    return out


class CudnnAttention(torch.autograd.Function):
    """cuDNN's attention with a bias (1, H, N, N) and the bias's gradient, which torch's binding
    lacks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        given = {"q": q, "k": k, "v": v, "bias": bias}
        made = {"o": torch.empty_like(q), "stats": q.new_empty(*q.shape[:3], 1).float()}
        cudnn_graph("forward", q.dtype, _layouts(given | made)).run(given | made)
        ctx.save_for_backward(*given.values(), *made.values())
        return made["o"]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(("q", "k", "v", "bias", "o", "stats"), ctx.saved_tensors, strict=True))
        made = {f"d{name}": torch.empty_like(given[name]) for name in ("q", "k", "v", "bias")}
        every = given | {"do": grad} | made
        cudnn_graph("backward", grad.dtype, _layouts(every)).run(every)
        return tuple(made.values())


Layouts = tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # name, shape, strides


def _layouts(tensors: dict[str, Tensor]) -> Layouts:
    return tuple((name, tuple(t.shape), t.stride()) for name, t in tensors.items())


@dataclass(frozen=True)
class CudnnGraph:
    """A graph of cuDNN's frontend whose tensors have the places of their names as ids."""

    graph: Any
    names: tuple[str, ...]

    def build(self) -> None:
        """Choose its kernels; needs a device."""
        import cudnn

        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()

    def run(self, tensors: dict[str, Tensor]) -> None:
        """Compute the tensors that are its outputs."""
        import cudnn

        device = tensors["q"].device
        handle = _cudnn_handle(device)
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        workspace = torch.empty(self.graph.get_workspace_size(), dtype=torch.uint8, device=device)
        pointers = {place: tensors[name].detach() for place, name in enumerate(self.names, 1)}
        self.graph.execute(pointers, workspace, handle=handle)


@functools.cache
def _cudnn_handle(device: torch.device) -> Any:
    import cudnn

    return cudnn.create_handle()


@functools.cache
def cudnn_graph(direction: str, dtype: torch.dtype, layouts: Layouts) -> CudnnGraph:
    """A built graph."""
    handle = _cudnn_handle(torch.device("cuda", torch.cuda.current_device()))
    made = describe(direction, dtype, layouts, handle=handle)
    made.build()
    return made


def describe(direction: str, dtype: torch.dtype, layouts: Layouts, **options: Any) -> CudnnGraph:
    """A graph, described and not yet built."""
    import cudnn

    kinds = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
    if dtype not in kinds:
        raise RuntimeError(f"cuDNN's attention takes bfloat16 and float16, not {dtype}")
    wide = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=kinds[dtype], intermediate_data_type=wide, compute_data_type=wide, **options
    )
    outputs = {"forward": ("o", "stats"), "backward": ("dq", "dk", "dv")}[direction]
    t = {
        name: graph.tensor(
            name=name, dim=shape, stride=stride, uid=place,
            data_type=wide if name == "stats" else kinds[dtype],
        )
        for place, (name, shape, stride) in enumerate(layouts, 1)
        if name not in outputs
    }  # fmt: skip
    names = [name for name, _, _ in layouts]
    scale = layouts[names.index("q")][1][-1] ** -0.5
    if direction == "forward":
        found = graph.sdpa(
            name="sdpa", q=t["q"], k=t["k"], v=t["v"], bias=t["bias"], attn_scale=scale,
            generate_stats=True,
        )  # fmt: skip
    else:
        found = graph.sdpa_backward(
            name="sdpa_backward", q=t["q"], k=t["k"], v=t["v"], o=t["o"], dO=t["do"],
            stats=t["stats"], bias=t["bias"], dBias=t["dbias"], attn_scale=scale,
        )  # fmt: skip
    for name, tensor in zip(outputs, found, strict=True):
        _, shape, stride = layouts[names.index(name)]
        tensor.set_output(True).set_uid(names.index(name) + 1).set_dim(shape).set_stride(stride)
        tensor.set_data_type(wide if name == "stats" else kinds[dtype])
    return CudnnGraph(graph, tuple(names))


def cudnn_with_bias(inputs: Inputs) -> Tensor:
    import cudnn  # noqa: F401

    if not inputs["q"].is_cuda:
        raise RuntimeError("needs a CUDA device")
    out: Tensor = CudnnAttention.apply(*(inputs[name] for name in "qkv"), bias_of(inputs))
    return out


@dataclass(frozen=True)
class Peer:
    """Another attention kernel.

    Args:
        run: from the op's arguments to its output.
        biased: whether it adds the bias; a ceiling does not.
    """

    run: Callable[[Inputs], Tensor]
    biased: bool

    def check(self, inputs: Inputs) -> None:
        """Compare output and gradients with plain attention in float64, to 3%: the effect of
        16-bit products.

        Raises:
            AssertionError: naming what differs.
            RuntimeError: it cannot run.
        """
        if self.run is flex and not inputs["q"].is_cuda:
            raise RuntimeError("its backward needs a CUDA device")
        wide = {
            name: x.detach().double().requires_grad_(x.requires_grad)
            if isinstance(x, Tensor) and x.is_floating_point()
            else x
            for name, x in inputs.items()
        }
        names = ["q", "k", "v", *(["bias_table"] if self.biased else [])]
        found = []
        grad = torch.sin(torch.arange(inputs["q"].numel(), device=inputs["q"].device))
        for given, function in (
            (inputs, self.run),
            (wide, sdpa_with_bias if self.biased else _plain),
        ):
            out = function(given)
            ones = grad.view(out.shape).to(out.dtype)
            grads = torch.autograd.grad(out, [given[name] for name in names], ones)
            found.append({"output": out, **dict(zip(names, grads, strict=True))})
        for name, value in found[0].items():
            want = found[1][name]
            off = (value.double() - want).norm() / want.norm().clamp_min(1e-30)
            if not off <= 0.03:
                raise AssertionError(f"{name} is off by {off.item():.1%}")


def _plain(inputs: Inputs) -> Tensor:
    return F.scaled_dot_product_attention(*(inputs[name] for name in "qkv"))


FLASH = "flash"  # the ceiling that goals are stated against
PEERS = {
    FLASH: Peer(flash, False),
    "cuDNN": Peer(torch_backend("CUDNN_ATTENTION"), False),
    "memory-efficient": Peer(torch_backend("EFFICIENT_ATTENTION"), False),
    "FlashAttention-2": Peer(flash_attention_2, False),
    "FlashAttention-3": Peer(flash_attention_3, False),
    "FlashAttention-4": Peer(flash_attention_4, False),
    "SDPA + bias": Peer(sdpa_with_bias, True),
    "memory-efficient + bias": Peer(torch_backend("EFFICIENT_ATTENTION", True), True),
    "cuDNN + bias, by torch": Peer(torch_backend("CUDNN_ATTENTION", True), True),
    "cuDNN + bias": Peer(cudnn_with_bias, True),
    "xformers + bias": Peer(xformers, True),
    "cuEquivariance": Peer(cuequivariance, True),
    "FlexAttention": Peer(flex, True),
}
