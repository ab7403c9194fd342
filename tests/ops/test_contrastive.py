"""The contrastive losses: every backend against the float64 definition, and the contract."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from musiclm_fast import _extension, testing
from musiclm_fast._dispatch import BackendError
from musiclm_fast.ops import _triton_target, contrastive_loss
from musiclm_fast.ops.contrastive import reference
from musiclm_fast.ops.contrastive.op import check_latents

KINDS = ("softmax", "decoupled", "sigmoid")
cpp = pytest.mark.skipif(not _extension.load(), reason=_extension.why_missing())
INTERPRETED = _triton_target.INTERPRET
# The Triton backend's tests are marked gpu: they run on a GPU, or in Triton's interpreter, with
# which test_contrastive_triton.py runs this file anew: TRITON_INTERPRET=1 is read at import. In the
# interpreter every program takes milliseconds, so it gets fewer and smaller cases.
TEMPERATURES = [39.0, math.exp(7)] if INTERPRETED else [1e-3, 39.0, 41.0, 100.0, math.exp(7)]
triton = pytest.param("triton", marks=pytest.mark.gpu)
KERNELS = [triton] if INTERPRETED else [pytest.param("cpp", marks=cpp), triton]
GRAD = 1.5  # of the loss


Labels = tuple[Tensor, Tensor] | None


def check_against_oracle(
    inputs: dict[str, Any], kind: str, backend: str, labels: Labels = None
) -> None:
    """Loss and every gradient, in poisoned memory, by the tolerance rule."""

    def run(arguments: dict[str, Any], name: str) -> tuple[Tensor, dict[str, Tensor]]:
        loss = contrastive_loss(**arguments, kind=kind, labels=labels, backend=name)
        return loss, testing.gradients(loss, arguments, torch.tensor(GRAD, device=loss.device))

    with testing.poisoned_memory():
        loss, grads = run(inputs, backend)
    same, same_grads = run(inputs, "torch")
    oracle, oracle_grads = run(testing.to_float64(inputs), "torch")
    # Triton's ds enters its product in the latents' dtype, the C++ kernels' in float32.
    dtype = inputs["audio"].dtype if backend == "triton" else torch.float32
    rounding = testing.contrastive_rounding(inputs, kind, dtype, labels)
    assert loss.dtype == torch.float32 and loss.shape == ()
    rule: dict[str, Any] = dict(dtype=dtype if backend == "triton" else None)
    testing.assert_close_to_oracle("loss", loss, same, oracle, rounding=rounding["loss"], **rule)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype, name
        if name == "bias" and kind != "sigmoid":
            assert torch.equal(grad, torch.zeros_like(grad))
            continue
        results = [g[name] for g in (grads, same_grads, oracle_grads)]
        testing.assert_close_to_oracle(name, *results, rounding=GRAD * rounding[name], **rule)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "depth", "layers"),
    [
        pytest.param(1, 128, None, id="one"),
        pytest.param(2, 3, 2, id="two-narrow"),
        pytest.param(17, 128, None, id="odd"),
        pytest.param(65, 100, 3, id="padded-layers"),
        pytest.param(100 if INTERPRETED else 256, 128, None, id="256"),
        pytest.param(150 if INTERPRETED else 600, 20, 2, id="many-tiles"),
        pytest.param(70, 200, None, id="wide"),
        pytest.param(40, 300, None, id="deep"),
    ],
)
def test_loss_and_gradients(
    batch: int, depth: int, layers: int | None, kind: str, backend: str, device: str
) -> None:
    if kind == "decoupled" and batch == 1:
        pytest.skip("an error, see test_bad_input")
    inputs = testing.contrastive_inputs(batch, depth, layers, device=device)
    check_against_oracle(inputs, kind, backend)


def plain_loss(s: list[list[float]], kind: str, audio: list[int], text: list[int]) -> float:
    """A layer's loss from its similarities, pair by pair."""
    size = range(len(s))
    if kind == "sigmoid":
        signs = [[1 if audio[i] == text[j] else -1 for j in size] for i in size]
        terms = [math.log1p(math.exp(-signs[i][j] * s[i][j])) for i in size for j in size]
        return sum(terms) / len(s)
    total = 0.0
    for i in size:
        for mine, others, scores in (
            (audio[i], text, s[i]),
            (text[i], audio, [row[i] for row in s]),
        ):
            positives = [x for x, label in zip(scores, others, strict=True) if label == mine]
            every = [
                x
                for x, label in zip(scores, others, strict=True)
                if kind == "softmax" or label != mine
            ]
            total -= sum(positives) / len(positives)
            total += math.log(sum(math.exp(x) for x in every))
    return total / (2 * len(s))


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("audio", "text"),
    [
        pytest.param([7, 7, -1, 3, -1, 7], None, id="one-tensor"),
        pytest.param([1 << 40, 2, 3, 2, 3, 1], [2, 2, 3, 1, 1 << 40, 3], id="tuple"),
    ],
)
def test_labels_by_plain_loops(
    audio: list[int], text: list[int] | None, kind: str, backend: str, device: str
) -> None:
    inputs = testing.contrastive_inputs(6, 8, 2, device=device)
    sims = inputs["audio"] @ inputs["text"].transpose(1, 2) * inputs["temperature"][:, None, None]
    if kind == "sigmoid":
        sims = sims + inputs["bias"][:, None, None]
    expected = sum(plain_loss(s, kind, audio, text or audio) for s in sims.tolist())
    labels = tuple(torch.tensor(x, device=device) for x in (audio, text) if x is not None)
    given: Any = labels if len(labels) == 2 else labels[0]
    loss = contrastive_loss(**inputs, kind=kind, labels=given, backend=backend)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert abs(contrastive_loss(**inputs, kind=kind, backend=backend).item() - expected) > 0.1


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "depth", "layers", "temperature"),
    [
        pytest.param(2, 3, 2, 10.0, id="two-narrow"),
        pytest.param(65, 100, 3, 10.0, id="padded-layers"),
        pytest.param(150 if INTERPRETED else 600, 20, 2, 10.0, id="many-tiles"),
        pytest.param(70, 200, None, 100.0, id="wide-hot"),
        pytest.param(40, 300, None, 10.0, id="deep"),
    ],
)
def test_labels(
    batch: int, depth: int, layers: int | None, temperature: float, kind: str, backend: str,
    device: str,
) -> None:  # fmt: skip
    inputs = testing.contrastive_inputs(
        batch, depth, layers, temperature=temperature, device=device
    )
    check_against_oracle(inputs, kind, backend, testing.contrastive_labels(batch, device))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_labels_in_half_precision(dtype: torch.dtype, kind: str, backend: str, device: str) -> None:
    inputs = testing.contrastive_inputs(130, 48, 2, dtype=dtype, device=device)
    check_against_oracle(inputs, kind, backend, testing.contrastive_labels(130, device))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [20, 300])
def test_labels_of_stripes(
    depth: int, kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large batches run in stripes of rows: here of a block each."""
    from musiclm_fast.ops.contrastive import _triton

    monkeypatch.setattr(_triton, "SUMS_BYTES", 1)
    monkeypatch.setattr(_triton, "DS_BYTES", 1)
    inputs = testing.contrastive_inputs(150, depth, device=device)
    check_against_oracle(inputs, kind, "triton", testing.contrastive_labels(150, device))
    check_against_oracle(inputs, kind, "triton")


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
@pytest.mark.parametrize("kind", KINDS)
def test_a_label_for_each_pair_changes_nothing(kind: str, backend: str, device: str) -> None:
    inputs = testing.contrastive_inputs(70, 24, 2, device=device)
    rounding = testing.contrastive_rounding(inputs, kind)
    results = []
    for labels in (None, torch.arange(70, device=device).flip(0) * 1000):
        loss = contrastive_loss(**inputs, kind=kind, labels=labels, backend=backend)
        results.append({"loss": loss, **testing.gradients(loss, inputs, torch.ones_like(loss))})
    for name, plain in results[0].items():
        # both are rounded; the softmax loss adds its positive in another place
        torch.testing.assert_close(
            results[1][name], plain, rtol=1e-5, atol=4 * rounding[name], msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
@pytest.mark.parametrize("kind", KINDS)
def test_unread_labels_without_a_positive(kind: str, backend: str, device: str) -> None:
    """Such a row's positive term is 0, and all others are as they were."""
    inputs = testing.contrastive_inputs(6, 8, device=device)
    audio = torch.tensor([0, 0, 1, 1, 5, 2], device=device)
    text = torch.tensor([1, 0, 0, 1, 2, 6], device=device)
    options: dict[str, Any] = dict(kind=kind, labels=(audio, text), check_values=False)
    loss = contrastive_loss(**inputs, **options, backend=backend)
    grads = testing.gradients(loss, inputs, torch.ones_like(loss))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads.values())
    sims = inputs["temperature"] * inputs["audio"] @ inputs["text"].t()
    if kind == "sigmoid":
        sims = sims + inputs["bias"]
        sign = torch.where(audio[:, None] == text, 1.0, -1.0)
        expected = F.softplus(-sign * sims).sum() / 6
    else:
        same = audio[:, None] == text
        shown = sims if kind == "softmax" else sims.masked_fill(same, -torch.inf)
        total = (shown.logsumexp(0) + shown.logsumexp(1)).sum()
        for side in (0, 1):
            means = (sims * same).sum(side)[same.any(side)] / same.sum(side)[same.any(side)]
            total = total - means.sum()
        expected = total / 12
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        ([0, 1, 2, 3], TypeError, r"labels: .*\(list\).*a tuple of two"),
        (torch.zeros(4, 1, dtype=torch.long), ValueError, r"labels: .*\(4, 1\).*\(B,\) = \(4,\)"),
        (torch.zeros(4), TypeError, "labels: .*float32.*int64"),
        (torch.zeros(4, dtype=torch.bool), TypeError, "labels: .*bool.*int64"),
        (torch.zeros(4, dtype=torch.long, device="meta"), ValueError, "labels: .*device cpu"),
        ((torch.arange(4),), ValueError, "labels: got a tuple of 1"),
        ((torch.arange(4), None), TypeError, r"labels\[1\]: got None"),
        ((torch.arange(4), torch.arange(5)), ValueError, r"labels\[1\]: .*\(5,\)"),
        (
            (torch.tensor([0, 9, 8, 9]), torch.tensor([0, 0, 0, 0])),
            ValueError,
            r"labels: got 2 audio labels without text \(8, 9\)",
        ),
        (
            (torch.zeros(4, dtype=torch.long), torch.arange(-3, 1)),
            ValueError,
            r"labels: got 3 text labels without audio \(-3, -2, -1\)",
        ),
    ],
    ids=lambda value: "" if not isinstance(value, type) else value.__name__,
)
def test_bad_labels(labels: Any, error: type[Exception], words: str) -> None:
    latents = torch.zeros(4, 8)
    for kind in KINDS:
        with pytest.raises(error, match=words):
            contrastive_loss(latents, latents, torch.ones(1), kind=kind, labels=labels)


def test_decoupled_needs_a_negative() -> None:
    latents = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"audio label 5 for every text.*no negatives"):
        contrastive_loss(
            latents, latents, torch.ones(1), kind="decoupled", labels=torch.full((3,), 5)
        )
    loss = contrastive_loss(latents, latents, torch.ones(1), labels=torch.full((3,), 5))
    assert loss.item() == pytest.approx(math.log(3))


@cpp
@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_4096(kind: str) -> None:
    check_against_oracle(testing.contrastive_inputs(4096, 32), kind, "cpp")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [10.0, math.exp(7)])
@pytest.mark.parametrize("dtype", _triton_target.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "depth"),
    [(2, 3), (17, 128), (150 if INTERPRETED else 600, 20), (70, 200), (4096, 128)],
    ids=str,
)
def test_triton_in_every_dtype(
    batch: int, depth: int, dtype: torch.dtype, temperature: float, kind: str, device: str
) -> None:
    if INTERPRETED and batch == 4096:
        pytest.skip("needs a CUDA device: too slow for the interpreter")
    inputs = testing.contrastive_inputs(
        batch, depth, temperature=temperature, dtype=dtype, device=device
    )
    check_against_oracle(inputs, kind, "triton")


# Every table of tiles has a row for each of these widths, or one for several.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", _triton_target.DTYPES, ids=str)
@pytest.mark.parametrize("depth", [16, 64, 100, 128, 200, 256])
def test_triton_products_commute(depth: int, dtype: torch.dtype, device: str) -> None:
    """dot(x, y^T) = dot(y, x^T)^T bit by bit, whatever the kernel's tile.

    The backward takes e^(s - lse) with lse from another kernel's s. float32 latents are multiplied
    in full float32 ("ieee": multiply-adds in order of k), 16-bit ones by tensor cores with float32
    sums. "tf32x3", which the kernels do not use, would fail: its two small terms change places.
    """
    from musiclm_fast.ops.contrastive import _triton
    from tests.ops.contrastive_product import product

    sizes = (130, 70) if INTERPRETED else (700, 450)
    x, y = (testing.contrastive_inputs(n, depth, dtype=dtype)["audio"].detach() for n in sizes)
    x, y = x.to(device), (y * 3).to(device)
    target = _triton_target.target(x.device)
    chosen = _triton.configs(target, _triton.padded(depth), dtype)
    found = [
        made for config in chosen for made in (product(x, y, config), product(y, x, config).t())
    ]
    wide = x.double(), y.double()
    # Tensor cores cut off what they add, up to a unit in the last place of the sum so far.
    rounding = depth * torch.finfo(torch.float32).eps * (wide[0].abs() @ wide[1].abs().t()).max()
    testing.assert_close_to_oracle(
        "product", found[0], x.float() @ y.float().t(), wide[0] @ wide[1].t(),
        rounding=rounding.item(),
    )  # fmt: skip
    for other in found[1:]:
        assert torch.equal(other, found[0]), (other - found[0]).abs().max()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "depth", "layers", "temperature"),
    [
        pytest.param(70 if INTERPRETED else 130, 48, 2, 10.0, id="narrow"),
        pytest.param(70, 100, None, math.exp(7), id="hot"),
        pytest.param(40, 300, None, 10.0, id="deep"),
    ],
)
def test_half_precision(
    batch: int, depth: int, layers: int | None, temperature: float, dtype: torch.dtype, kind: str,
    backend: str, device: str,
) -> None:  # fmt: skip
    inputs = testing.contrastive_inputs(
        batch, depth, layers, temperature=temperature, dtype=dtype, device=device
    )
    check_against_oracle(inputs, kind, backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("latents", ["random", "identical", "same side", "opposite", "zero"])
def test_extremes(latents: str, temperature: float, kind: str, backend: str, device: str) -> None:
    """Finite and right, with gradients, where exp without a shift or a clamp would fail."""
    inputs = testing.contrastive_inputs(40, 32, temperature=temperature, device=device)
    audio, text = inputs["audio"].detach(), inputs["text"].detach()
    if latents == "identical":  # all of both sides
        audio = text = audio[:1].expand(40, -1)
    elif latents == "same side":  # every pair's two sides are equal
        text = audio
    elif latents == "opposite":
        text = -audio
    elif latents == "zero":
        audio, text = torch.zeros_like(audio), torch.zeros_like(text)
    inputs["audio"] = audio.clone().requires_grad_()
    inputs["text"] = text.clone().requires_grad_()
    loss = contrastive_loss(**inputs, kind=kind, backend=backend)
    grads = testing.gradients(loss, inputs, torch.ones_like(loss))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads.values())
    if latents == "opposite" and temperature >= 39:
        assert grads["audio"].abs().sum() > 0  # upstream's clamp would leave none
    check_against_oracle(inputs, kind, backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_won_positive_keeps_its_digits(backend: str, device: str) -> None:
    """Softmax with orthogonal negatives at temperature 60: ln(1 + 7 e^-60), not a rounded zero."""
    latents = torch.eye(8, device=device)
    audio = latents.clone().requires_grad_()
    loss = contrastive_loss(audio, latents, torch.tensor([60.0], device=device), backend=backend)
    loss.backward()
    expected = 7 * math.exp(-60)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert audio.grad is not None
    assert audio.grad[0, 0].item() == pytest.approx(-60 * expected / 8, rel=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_large_unnormalised_latents(kind: str, backend: str, device: str) -> None:
    inputs = testing.contrastive_inputs(33, 16, device=device)
    for name in ("audio", "text"):
        inputs[name] = (inputs[name].detach() * 50).requires_grad_()
    check_against_oracle(inputs, kind, backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_strided_and_mixed_inputs(kind: str, backend: str, device: str) -> None:
    inputs = testing.contrastive_inputs(30, 24, 2, device=device)
    plain = contrastive_loss(**inputs, kind=kind, backend=backend)
    strided = dict(inputs)
    strided["audio"] = inputs["audio"].detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided["text"] = torch.cat((inputs["text"].detach(), torch.ones(2, 30, 8, device=device)), -1)[
        ..., :24
    ]
    assert strided["audio"].stride(-1) != 1 and not strided["text"].is_contiguous()
    assert torch.equal(contrastive_loss(**strided, kind=kind, backend=backend), plain)
    mixed = dict(inputs, text=inputs["text"].detach().bfloat16())
    grad = torch.autograd.grad(
        contrastive_loss(**mixed, kind=kind, backend=backend), inputs["audio"]
    )[0]
    assert grad.dtype == torch.float32 and grad.isfinite().all()


@cpp
@pytest.mark.parametrize("kind", KINDS)
def test_latents_wider_than_a_slice(kind: str) -> None:
    check_against_oracle(testing.contrastive_inputs(70, 700), kind, "cpp")


@cpp
@pytest.mark.parametrize("kind", KINDS)
def test_every_simd_level(kind: str, simd_level: str) -> None:
    check_against_oracle(testing.contrastive_inputs(131, 40, 2), kind, "cpp")
    check_against_oracle(testing.contrastive_inputs(67, 21, temperature=300.0), kind, "cpp")
    labels = testing.contrastive_labels(131)
    check_against_oracle(testing.contrastive_inputs(131, 40, 2), kind, "cpp", labels)


@cpp
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labels"])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads(kind: str, labelled: bool) -> None:
    labels = testing.contrastive_labels(700) if labelled else None
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        inputs = testing.contrastive_inputs(700, 32, 2)
        loss = contrastive_loss(**inputs, kind=kind, labels=labels, backend="cpp")
        results.append([loss, *testing.gradients(loss, inputs, torch.tensor(1.0)).values()])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Blocks: m rows by n columns, row i's positive at column i + offset.
BLOCKS = [(5, 5, 0), (3, 70, 66), (70, 3, -20), (1, 1, 0), (9, 4, 4), (130, 200, 60), (6, 8, -6)]


def block_inputs(
    m: int, n: int, temperature: float, depth: int = 36, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m * n)
    audio = F.normalize(torch.randn(2, m, depth, generator=generator), dim=-1)
    text = F.normalize(torch.randn(2, n, depth, generator=generator), dim=-1)
    factor = torch.tensor([temperature, temperature / 2])
    return audio.to(device), text.to(device), factor.to(device)


BLOCK_LABELS = ("none", "inclusive", "left out")


def block_labels(case: str, m: int, n: int, device: str = "cpu") -> tuple[Any, ...]:
    """A block op's last arguments: labels of a few rows and columns, and ``inclusive``."""
    if case == "none":
        return ()
    generator = torch.Generator().manual_seed(m + n)
    clips = max(m, n) // 3 + 2
    audio, text = (
        torch.randint(clips, (size,), generator=generator, dtype=torch.int32) for size in (m, n)
    )
    return audio.to(device), text.to(device), case == "inclusive"


def compare(names: str, ours: Any, same: Any, oracle: Any) -> None:
    for name, a, b, c in zip(names.split(), ours, same, oracle, strict=True):
        infinite = c.isinf()  # a row or column without negatives
        assert torch.equal(a.isinf(), infinite), name
        a, b, c = (t.masked_fill(infinite, 0.0) for t in (a, b, c))
        testing.assert_close_to_oracle(name, a, b, c)


def kernels_of(backend: str) -> Any:
    from musiclm_fast.ops.contrastive.op import block_kernels

    return block_kernels(backend)


# At temperature 200 an error of the similarities shows 200 times: only a large block has enough of
# them for the torch path's largest error to be a measure.
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", BLOCK_LABELS)
@pytest.mark.parametrize(
    ("m", "n", "offset", "temperature"),
    [(*block, 10.0) for block in BLOCKS] + [(130, 200, 60, 200.0), (140, 90, -10, 200.0)],
)
def test_rectangular_blocks(
    m: int, n: int, offset: int, temperature: float, case: str, backend: str, device: str
) -> None:
    given = block_labels(case, m, n, device)
    kernels = kernels_of(backend)
    audio, text, factor = block_inputs(m, n, temperature, device=device)
    wide = (audio.double(), text.double(), factor.double())
    with testing.poisoned_memory():
        stats = kernels.logsumexp(audio, text, factor, offset, *given)
    oracle = reference.block_logsumexp(*wide, offset, *given)
    same = reference.block_logsumexp(audio, text, factor, offset, *given)
    compare("row column positive", stats, same, oracle)

    weights = [torch.rand_like(s) for s in same]
    shifts = [s.masked_fill(s.isinf(), 0.0) for s in same[:2]]
    shifts[0] = shifts[0] + 1.0  # as if the rows had more columns elsewhere
    grads = (*weights, audio, text, factor, *shifts, offset, *given)
    with testing.poisoned_memory():
        ours = kernels.logsumexp_backward(*grads)
    oracle = reference.block_logsumexp_backward(
        *(t.double() for t in weights), *wide, *(t.double() for t in shifts), offset, *given
    )
    compare("audio text temperature", ours, reference.block_logsumexp_backward(*grads), oracle)

    bias = torch.tensor([-4.0, 1.0], device=device)
    with testing.poisoned_memory():
        ours = kernels.sigmoid(audio, text, factor, bias, offset, True, *given[:2])
    oracle = reference.block_sigmoid(*wide, bias.double(), offset, True, *given[:2])
    same = reference.block_sigmoid(audio, text, factor, bias, offset, True, *given[:2])
    compare("loss audio text temperature bias", ours, same, oracle)


def kernel_call(
    kind: str, dtype: torch.dtype, device: str, size: int
) -> Callable[[], tuple[Tensor, ...]]:
    """A kernel's op on a fixed block with more columns than rows, so that it is split."""
    kernels = kernels_of("triton")
    audio, text, factor = block_inputs(size, 3 * size, 100.0, depth=128, device=device)
    audio, text = audio.to(dtype), text.to(dtype)
    if kind.startswith("sigmoid"):
        return lambda: kernels.sigmoid(audio, text, factor, -factor / 10, 7, kind == "sigmoid")
    if kind == "logsumexp":
        return lambda: kernels.logsumexp(audio, text, factor, 7)
    stats = reference.block_logsumexp(audio, text, factor, 7)
    given = (*(torch.full_like(s, 1.0 / size) for s in stats), audio, text, factor, *stats[:2], 7)
    return lambda: kernels.logsumexp_backward(*given)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", _triton_target.DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["logsumexp", "logsumexp backward", "sigmoid", "sigmoid, loss alone"]
)
def test_bits_of_200_triton_runs(kind: str, dtype: torch.dtype, device: str) -> None:
    """Nothing is added atomically, and no load overtakes the product that reads it."""
    sizes, runs = ((70,), 2) if INTERPRETED else ((70, 1000), 200)
    for size in sizes:
        call = kernel_call(kind, dtype, device, size)
        first = call()
        assert all(t.isfinite().all() for t in first)
        for run in range(runs):
            assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True)), run


@pytest.mark.parametrize("case", BLOCK_LABELS)
def test_block_definitions_have_the_gradients_of_autograd(case: str) -> None:
    audio, text, factor = (t.double().requires_grad_() for t in block_inputs(7, 9, 3.0))
    bias = torch.tensor([-1.0, 0.5], dtype=torch.float64, requires_grad=True)
    given = block_labels(case, 7, 9)
    stats = reference.block_logsumexp(audio, text, factor, 1, *given)
    weights = [torch.rand_like(s) for s in stats]
    expected = torch.autograd.grad(stats, (audio, text, factor), weights)
    found = reference.block_logsumexp_backward(
        *weights, audio, text, factor, stats[0], stats[1], 1, *given
    )
    torch.testing.assert_close(found, expected)
    loss, *found = reference.block_sigmoid(audio, text, factor, bias, 1, True, *given[:2])
    expected = torch.autograd.grad(loss, (audio, text, factor, bias))
    torch.testing.assert_close(tuple(found), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_definition(kind: str) -> None:
    inputs = testing.to_float64(testing.contrastive_inputs(5, 4, 2, temperature=2.0))
    assert torch.autograd.gradcheck(
        lambda *a: contrastive_loss(*a, kind=kind, backend="torch"), tuple(inputs.values())
    )
    labels = testing.contrastive_labels(5)
    assert torch.autograd.gradcheck(
        lambda *a: contrastive_loss(*a, kind=kind, labels=labels, backend="torch"),
        tuple(inputs.values()),
    )


@cpp
def test_opcheck() -> None:
    audio, text, factor = block_inputs(6, 9, 10.0)
    stats = torch.ops.musiclm_fast.contrastive_logsumexp(audio, text, factor, 2)
    needed = [t.clone().requires_grad_() for t in (audio, text, factor)]
    bias = torch.zeros(2, requires_grad=True)
    ops = torch.ops.musiclm_fast
    torch.library.opcheck(ops.contrastive_logsumexp, (*needed, 2))
    torch.library.opcheck(
        ops.contrastive_logsumexp_backward, (*stats, audio, text, factor, *stats[:2], 2)
    )
    torch.library.opcheck(ops.contrastive_sigmoid, (*needed, bias, 2, True))
    torch.library.opcheck(ops.contrastive_sigmoid, (audio, text, factor, None, 2, False))
    for case in BLOCK_LABELS[1:]:
        given = block_labels(case, 6, 9)
        torch.library.opcheck(ops.contrastive_logsumexp, (*needed, 2, *given))
        torch.library.opcheck(
            ops.contrastive_logsumexp_backward,
            (*stats, audio, text, factor, *stats[:2], 2, *given),
        )
    torch.library.opcheck(ops.contrastive_sigmoid, (*needed, bias, 2, True, *given[:2]))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labels"])
@pytest.mark.skipif(INTERPRETED, reason="nothing here depends on the kernels' inside")
def test_compiles_without_graph_breaks(
    labelled: bool, kind: str, backend: str, device: str
) -> None:
    inputs = testing.contrastive_inputs(20, 16, 2, device=device)
    labels = testing.contrastive_labels(20, device) if labelled else None

    def run(audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
        return contrastive_loss(
            audio, text, temperature, bias, kind=kind, labels=labels, backend=backend
        )

    eager = run(*inputs.values())
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs.values())
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(
        testing.gradients(compiled, inputs, torch.ones_like(eager)).values(),
        testing.gradients(eager, inputs, torch.ones_like(eager)).values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labels"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, labelled: bool, backend: str, device: str) -> None:
    """On CUDA it is the loss of rounded latents, to the last bit; on the CPU it changes nothing."""
    inputs = testing.contrastive_inputs(50, 32, device=device)
    outside = dict(inputs)
    if device == "cuda":
        outside.update({n: inputs[n].bfloat16() for n in ("audio", "text")})
    options: dict[str, Any] = dict(kind=kind, backend=backend)
    if labelled:
        options["labels"] = testing.contrastive_labels(50, device)
    expected = contrastive_loss(**outside, **options)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = contrastive_loss(**inputs, **options)
    assert torch.equal(inside, expected)
    grads = testing.gradients(inside, inputs, torch.ones_like(inside))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())


@pytest.fixture
def cuda_autocast() -> Iterator[None]:
    """``torch.autocast("cuda", torch.float16)``, which a torch without CUDA would refuse."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.float16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


def test_cuda_autocast_rounds_float32_latents(cuda_autocast: None) -> None:
    with FakeTensorMode():
        latents = torch.empty(4, 8, device="cuda")
        for audio, text, expected in (
            (latents, latents, torch.float16),
            (latents, latents.bfloat16(), torch.float16),  # float32, both, before autocast
            (latents.bfloat16(), latents.bfloat16(), torch.bfloat16),
            (latents.double(), latents.double(), torch.float64),
        ):
            assert [x.dtype for x in check_latents(audio, text)] == [expected] * 2
    assert check_latents(torch.zeros(4, 8), torch.zeros(4, 8))[0].dtype == torch.float32


@pytest.mark.parametrize("backend", KERNELS)
def test_only_what_needs_a_gradient_gets_one(backend: str, device: str) -> None:
    inputs = testing.contrastive_inputs(12, 8, device=device)
    for name in ("audio", "temperature"):
        inputs[name].requires_grad_(False)
    for kind in KINDS:
        inputs["text"].grad = None
        contrastive_loss(**inputs, kind=kind, backend=backend).backward()
        assert inputs["text"].grad is not None and inputs["audio"].grad is None
    with torch.no_grad():
        assert not contrastive_loss(**inputs, kind="sigmoid", backend=backend).requires_grad


@cpp
@pytest.mark.parametrize("kind", ["decoupled", "sigmoid"])
def test_memory_is_linear_in_the_batch(kind: str) -> None:
    """B = 8,192: one float32 matrix of B x B alone would be 256 MiB."""
    script = f"""
import resource, torch
from musiclm_fast.ops import contrastive_loss
torch.set_num_threads(1)
def step(batch):
    audio, text = torch.randn(2, batch, 16).requires_grad_().unbind()
    factor = torch.tensor([1.0], requires_grad=True)
    contrastive_loss(audio, text, factor, kind={kind!r}, backend="cpp").backward()
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8192)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 * 1024  # KiB


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(audio=None), TypeError, "audio"),
        (dict(audio=torch.zeros(4)), ValueError, "audio"),
        (dict(text=torch.zeros(5, 8)), ValueError, r"text: .*\(5, 8\).*audio = \(4, 8\)"),
        (dict(text=torch.zeros(4, 9)), ValueError, r"text: .*\(4, 9\).*audio = \(4, 8\)"),
        (dict(text=torch.zeros(4, 8, dtype=torch.long)), TypeError, "text"),
        (dict(temperature=torch.tensor(1.0)), ValueError, "temperature"),
        (dict(temperature=torch.tensor([0.0])), ValueError, "temperature"),
        (dict(temperature=torch.tensor([-1.0])), ValueError, "temperature"),
        (dict(temperature=torch.tensor([math.nan])), ValueError, "temperature"),
        (dict(bias=torch.zeros(2)), ValueError, "bias"),
        (dict(kind="siglip"), ValueError, "kind"),
        (dict(audio=torch.zeros(0, 8), text=torch.zeros(0, 8)), ValueError, "empty batch"),
        (
            dict(audio=torch.zeros(1, 8), text=torch.zeros(1, 8), kind="decoupled"),
            ValueError,
            "at least two",
        ),
        (dict(audio=torch.full((4, 8), math.nan)), ValueError, r"audio: .*non-finite.*4 of 4"),
        (
            dict(text=torch.eye(4, 8).masked_fill(torch.eye(4, 8)[[0, 2, 1, 3]] > 2, 0) / 0.0),
            ValueError,
            "text: .*non-finite",
        ),
        (dict(backend="mkl"), ValueError, "backend"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], words: str) -> None:
    good: dict[str, Any] = dict(
        audio=torch.zeros(4, 8), text=torch.zeros(4, 8), temperature=torch.ones(1)
    )
    with pytest.raises(error, match=words):
        contrastive_loss(**{**good, **change})


def test_values_are_not_read_when_told_so() -> None:
    latents = torch.full((4, 8), math.inf)
    loss = contrastive_loss(latents, latents, torch.ones(1), check_values=False)
    assert not loss.isfinite()


@cpp
def test_a_backend_asked_for_says_why_it_cannot() -> None:
    latents = torch.zeros(4, 8, dtype=torch.float64)
    with pytest.raises(BackendError, match="float64"):
        contrastive_loss(latents, latents, torch.ones(1), backend="cpp")
    assert contrastive_loss(latents, latents, torch.ones(1)).dtype == torch.float64
