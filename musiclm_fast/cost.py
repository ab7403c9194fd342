"""Cost of a training step of MuLaN from its shapes: operations, traffic, memory, time.

Nothing is run and torch is not imported. Operations are floating-point additions and
multiplications; traffic is the bytes that an op must read and write if nothing stays in a cache
between ops. An op takes at least the longer of the two (the roofline, Williams et al. 2009,
https://doi.org/10.1145/1498765.1498785): :func:`seconds` is therefore a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

VOCABULARY = 49_408  # CLIP's byte-pair tokens


# As in models/layers.py: feed-forwards of so many rows run on a width of a multiple of 16.
_ALIGNED, _MANY_ROWS = 16, 512


@dataclass(frozen=True)
class Device:
    """Published peak rates of a device: dense, without sparsity.

    Args:
        name: of the device.
        products: operations per second of matrix products, by precision.
        arithmetic: operations per second of everything else, in float32.
        bandwidth: bytes per second of its memory.
        memory: bytes of its memory; 0 where it is the host's.
    """

    name: str
    products: dict[str, float]
    arithmetic: float
    bandwidth: float
    memory: int = 0


# NVIDIA's data sheets: H100 SXM5 80 GB, A100 SXM4 80 GB, GeForce RTX 4090 (bf16 with float32 sums).
DEVICES = {
    device.name.lower().replace(" ", ""): device
    for device in (
        Device("H100", {"bf16": 989e12, "float32": 67e12}, 67e12, 3.35e12, 80 * 10**9),
        Device("A100", {"bf16": 312e12, "float32": 19.5e12}, 19.5e12, 2.04e12, 80 * 10**9),
        Device("RTX 4090", {"bf16": 165e12, "float32": 82.6e12}, 82.6e12, 1.01e12, 24 * 10**9),
    )
}


VALUE_BYTES = {"float32": 4, "bf16": 2}


@dataclass(frozen=True)
class Tower:
    """Sizes of one tower's transformer.

    Args:
        dim, depth, heads, dim_head, ff_mult: of the transformer.
        reads: what its output is made of: ``"all"`` tokens, or the ``"first"`` alone, for which
            the last block computes keys and values of all tokens and the rest of one.
    """

    dim: int = 512
    depth: int = 6
    heads: int = 8
    dim_head: int = 64
    ff_mult: float = 4
    reads: str = "all"

    @property
    def inner(self) -> int:
        """Width of queries, of keys and of values."""
        return self.heads * self.dim_head

    @property
    def hidden(self) -> int:
        """Width of the feed-forward's hidden layer."""
        return int(self.dim * self.ff_mult * 2 / 3)

    @property
    def parameters(self) -> int:
        """Numbers in its blocks and last norm."""
        block = 2 * self.dim + 2 * self.dim_head
        block += 4 * self.dim * self.inner + 3 * self.dim * self.hidden
        return self.depth * block + self.dim


@dataclass(frozen=True)
class Step:
    """Shapes of a training step.

    Args:
        audio, text: the towers.
        batch: pairs.
        audio_tokens: patches of a clip that take part.
        text_tokens: tokens of a text, its class token included.
        bias_rows: distinct offsets of two patches, rows of the position table.
        samples: of a clip.
        bands, frames: of its spectrogram.
        patch_values: values of a patch.
        max_seq_len: positions that the text tower knows.
        dim_latent: width of the joint space.
        precision: ``"float32"``, or ``"bf16"`` for autocast with float32 weights.
    """

    audio: Tower
    text: Tower
    batch: int
    audio_tokens: int
    text_tokens: int
    bias_rows: int
    samples: int
    bands: int
    frames: int
    patch_values: int = 256
    max_seq_len: int = 256
    dim_latent: int = 128
    precision: str = "float32"

    @property
    def parameters(self) -> int:
        """Numbers in the whole model."""
        audio, text = self.audio, self.text
        hidden = audio.dim // 4
        front = 2 * self.patch_values + (self.patch_values + 1) * audio.dim + 2 * audio.dim
        bias = 3 * hidden + (hidden + 1) * hidden + (hidden + 1) * audio.heads
        words = (VOCABULARY + self.max_seq_len + 1) * text.dim
        heads = (audio.dim + text.dim + 2) * self.dim_latent + 1
        return audio.parameters + text.parameters + front + bias + words + heads

    def with_batch(self, batch: int) -> Step:
        """The same step on another number of pairs."""
        return replace(self, batch=batch)


def mulan_step(
    samples: int,
    batch: int,
    *,
    text_tokens: int = 256,
    audio: Tower | None = None,
    text: Tower | None = None,
    n_fft: int = 512,
    hop_length: int = 160,
    bands: int | None = None,
    patch_size: tuple[int, int] = (16, 16),
    patch_dropout_prob: float = 0.25,
    precision: str = "float32",
) -> Step:
    """The step on clips of ``samples``, with a centred spectrogram of ``bands`` (None: of
    ``n_fft``) cut into patches, and texts of ``text_tokens`` without the class token.

    Raises:
        ValueError: the clips are shorter than a patch.
    """
    bands = n_fft // 2 + 1 if bands is None else bands
    frames = samples // hop_length + 1
    rows, columns = bands // patch_size[0], frames // patch_size[1]
    if not rows * columns:
        shortest = (patch_size[1] - 1) * hop_length
        raise ValueError(f"samples: got {samples}, expected at least {shortest}, one patch")
    return Step(
        audio=audio or Tower(),
        text=replace(text or Tower(), reads="first"),
        batch=batch,
        audio_tokens=max(1, int(rows * columns * (1 - patch_dropout_prob))),
        text_tokens=text_tokens + 1,
        bias_rows=(2 * rows - 1) * (2 * columns - 1),
        samples=samples,
        bands=bands,
        frames=frames,
        patch_values=patch_size[0] * patch_size[1],
        precision=precision,
    )


@dataclass(frozen=True)
class Op:
    """Operations and traffic of one op, forward and backward, over the whole step.

    Args:
        name: of the op.
        operations: floating-point operations.
        traffic: bytes read and written.
        matrix: whether the operations are matrix products.
    """

    name: str
    operations: float
    traffic: float
    matrix: bool = False


@dataclass(frozen=True)
class Product:
    """In each of ``count`` blocks, ``(rows, inner)`` by ``(inner, columns)`` with both gradients;
    or, where ``keys`` is not 0, attention of ``rows`` queries of width ``inner`` to ``keys`` keys
    in each of ``together`` heads of all clips."""

    name: str
    rows: int
    inner: int
    columns: int = 0
    keys: int = 0
    together: int = 1
    count: int = 1

    @property
    def operations(self) -> float:
        """Of one forward and two gradients; attention's backward has five products, one of which
        computes the scores again."""
        if self.keys:
            return 7 * 2.0 * self.count * self.together * self.rows * self.keys * self.inner
        return 3 * 2.0 * self.count * self.rows * self.inner * self.columns


def products(tower: Tower, batch: int, tokens: int) -> list[Product]:
    """Matrix products of a tower's blocks."""
    found = []
    rest = tower.depth if tower.reads == "all" else tower.depth - 1
    for count, queries in ((rest, tokens), (tower.depth - rest, 1)):
        if count:
            rows = batch * queries
            found += [
                Product("queries", rows, tower.dim, tower.inner, count=count),
                Product("keys and values", batch * tokens, tower.dim, 2 * tower.inner, count=count),
                Product("attention", queries, tower.dim_head, keys=tokens,
                        together=batch * tower.heads, count=count),
                Product("out", rows, tower.inner, tower.dim, count=count),
                Product("up", rows, tower.dim, 2 * tower.hidden, count=count),
                Product("down", rows, tower.hidden, tower.dim, count=count),
            ]  # fmt: skip
    return found


def _tower_ops(name: str, tower: Tower, batch: int, tokens: int, width: int) -> list[Op]:
    ops = []
    for product in products(tower, batch, tokens):
        if product.keys:
            # q, k, v, out read or written forward; the same, their gradients and out's backward
            rows = product.count * product.together * (product.rows + product.keys)
            traffic = width * 6.0 * rows * product.inner
        else:
            # three products that each read two matrices and write the third
            matrices = (
                product.rows * product.inner
                + product.inner * product.columns
                + product.rows * product.columns
            )
            traffic = width * 3.0 * product.count * matrices
        ops.append(Op(f"{name}: {product.name}", product.operations, traffic, matrix=True))
    rest = tower.depth if tower.reads == "all" else tower.depth - 1
    rows = batch * (rest * tokens + (tower.depth - rest))
    dim, hidden = tower.dim, tower.hidden
    # Forward a norm reads and writes dim values a token; backward it reads two and writes one. The
    # residual sum reads two and writes one; backward one gradient is added to another.
    ops.append(Op(f"{name}: norms", 2 * 20.0 * rows * dim, width * 2 * 5.0 * rows * dim))
    ops.append(Op(f"{name}: residuals", 4.0 * rows * dim, width * 2 * 6.0 * rows * dim))
    # GEGLU reads two values and writes one; backward it reads three and writes two.
    ops.append(Op(f"{name}: GEGLU", 60.0 * rows * hidden, width * 8.0 * rows * hidden))
    return ops


def step_ops(step: Step) -> list[Op]:
    """Every op of a step, forward, backward and optimizer."""
    width = VALUE_BYTES[step.precision]
    audio, text, batch = step.audio, step.text, step.batch
    patches = batch * step.audio_tokens
    hidden = audio.dim // 4
    bias_operations = 3 * 2.0 * step.bias_rows * (2 * hidden + hidden**2 + hidden * audio.heads)
    embed = step.patch_values * audio.dim
    spectrum = batch * step.bands * step.frames
    words = batch * step.text_tokens * text.dim
    return [
        Op("spectrogram", 2.5 * 9 * 2 * spectrum, 4.0 * (batch * step.samples + spectrum)),
        Op("patch embedding", 3 * 2.0 * patches * embed,
           width * 3.0 * (patches * (step.patch_values + audio.dim) + embed), matrix=True),
        Op("position table", bias_operations,
           4.0 * 10 * step.bias_rows * (3 * hidden + audio.heads), matrix=True),
        *_tower_ops("audio", audio, batch, step.audio_tokens, width),
        # rows of the embedding are read and written; its gradient is dense
        Op("token embedding", 2.0 * words, 4.0 * (4 * words + 2 * VOCABULARY * text.dim)),
        *_tower_ops("text", text, batch, step.text_tokens, width),
        Op("loss", 4 * 2.0 * batch**2 * step.dim_latent, 4.0 * 8 * batch * step.dim_latent,
           matrix=True),
        # Adam reads weight, gradient and two moments, and writes all but the gradient
        Op("optimizer", 16.0 * step.parameters, 4.0 * 7 * step.parameters),
    ]  # fmt: skip


def seconds(ops: Sequence[Op], device: Device, precision: str = "float32") -> float:
    """Time that ops need at least, one after the other, on a device at its peak rates."""
    total = 0.0
    for op in ops:
        rate = device.products[precision] if op.matrix else device.arithmetic
        total += max(op.operations / rate, op.traffic / device.bandwidth)
    return total


@dataclass(frozen=True)
class Memory:
    """Bytes that a step holds at its peak."""

    weights: float
    optimizer: float
    forward_backward: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.optimizer + self.forward_backward


@dataclass(frozen=True)
class _Piece:
    # A part of the model in the order in which the forward pass runs it: bytes that it saves for
    # the backward pass, bytes of its parameters' gradients, and the most that its own backward
    # holds on top while it runs.
    saved: float
    gradients: float
    passing: float


def _tower_pieces(tower: Tower, batch: int, tokens: int, precision: str) -> list[_Piece]:
    mixed = precision == "bf16"
    width = VALUE_BYTES[precision]
    padded = tower.hidden + (-tower.hidden % _ALIGNED if batch * tokens >= _MANY_ROWS else 0)
    block = (tower.parameters - tower.dim) // tower.depth
    pieces = []
    for index in range(tower.depth):
        alone = tower.reads == "first" and index == tower.depth - 1
        every, rows = batch * tokens, batch * (1 if alone else tokens)
        # Per token: the residual before each norm, in float32; the normed input of the products;
        # keys and values (of every token), queries and attention's output; both halves before
        # GEGLU, the gate's gelu and the product of both.
        attended = 4 * tower.dim + width * tower.dim + width * 2 * tower.inner
        rest = 4 * tower.dim + width * tower.dim + width * 2 * tower.inner + width * 4 * padded
        saved = every * attended + rows * rest
        # Weights of another dtype or width are copies, kept for the backward pass.
        copies = float(width * block) if mixed else 0.0
        if padded != tower.hidden and not alone:
            copies += width * 3 * tower.dim * padded
        # Backward through GEGLU: gradients of the product, of both halves and of their join.
        passing = rows * width * 5 * padded + 4 * tower.dim * rows
        pieces.append(_Piece(saved + copies, 4 * block, passing))
    return pieces


def memory(step: Step, optimizer_values: int = 2) -> Memory:
    """Peak memory of a step, following autograd's order.

    The backward pass frees what a part saved once it is through it, and makes the gradients of its
    parameters; the peak is the largest sum on the way. The text tower runs last forward, so first
    backward.

    Args:
        optimizer_values: numbers that the optimizer keeps per parameter: 2 of Adam, 1 of Lion.
    """
    audio, text, batch = step.audio, step.text, step.batch
    width = VALUE_BYTES[step.precision]
    patches, words = batch * step.audio_tokens, batch * step.text_tokens
    hidden = audio.dim // 4
    # Patches, normed patches, their embedding and its norm; the position table's layers and codes.
    front = 1.0 * patches * (2 * 4 * step.patch_values + (4 + width) * audio.dim)
    front += 4.0 * step.bias_rows * (2 + 4 * hidden + 2 * audio.heads)
    front += 4.0 * batch * (step.samples + step.bands * step.frames)
    towers = audio.parameters + text.parameters
    vocabulary = VOCABULARY * text.dim
    pieces = [
        _Piece(front, 4 * (step.parameters - towers - vocabulary), front / 2),
        *_tower_pieces(audio, batch, step.audio_tokens, step.precision),
        _Piece(4 * 2 * words * text.dim, 4 * vocabulary, 4 * words * text.dim),
        *_tower_pieces(text, batch, step.text_tokens, step.precision),
    ]
    held = sum(piece.saved for piece in pieces)
    peak = float(held)
    for piece in reversed(pieces):
        peak = max(peak, held + piece.passing + piece.gradients)
        held += piece.gradients - piece.saved
    numbers = 4 * step.parameters
    return Memory(numbers, optimizer_values * numbers, peak)


def largest_batch(step: Step, memory_bytes: float, optimizer_values: int = 2) -> int:
    """The largest batch whose step fits in ``memory_bytes``; 0 if not even one pair does."""

    def fits(batch: int) -> bool:
        return memory(step.with_batch(batch), optimizer_values).total <= memory_bytes

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
