"""The towers' blocks: what is left out or padded changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from musiclm_fast import testing
from musiclm_fast.models.text_tower import TextTransformer
from musiclm_fast.nn.transformer import FeedForward, Transformer


def plain_feed_forward(layer: nn.Sequential, x: Tensor) -> Tensor:
    """Layer by layer, on the width that the parameters have."""
    for part in layer:
        x = part(x)
    return x


@pytest.mark.parametrize("dim, rows", [(20, 600), (20, 5), (24, 600)], ids=["odd", "few", "even"])
def test_padded_feed_forward_equals_its_layers(dim: int, rows: int) -> None:
    torch.manual_seed(0)
    layer = FeedForward(dim).double()
    x = torch.randn(2, rows, dim, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    out, expected = layer(x), plain_feed_forward(layer, x)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(found, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_many_rows_are_padded_and_a_hook_prevents_it() -> None:
    layer = FeedForward(20)
    widths: list[int] = []
    layer[2].register_forward_hook(lambda _, args, out: widths.append(out.shape[-1]))
    x = torch.randn(1, 600, 20)
    layer(x)
    layer(x[:, :5])
    heard: list[int] = []
    layer[4].register_forward_hook(lambda *_: heard.append(1))
    layer(x)
    assert widths == [64, 53, 53]
    assert heard == [1]


def test_an_adapter_in_place_of_a_linear_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    layer = FeedForward(20)
    x = torch.randn(1, 600, 20)
    before = layer(x)
    adapter = Doubled(*reversed(layer[4].weight.shape), bias=False)
    adapter.load_state_dict(layer[4].state_dict())
    layer[4] = adapter
    torch.testing.assert_close(layer(x), 2 * before)


@pytest.mark.parametrize("depth", [1, 3])
def test_first_token_alone_equals_the_first_of_all(depth: int) -> None:
    torch.manual_seed(0)
    model = Transformer(dim=32, depth=depth, dim_head=16, heads=2).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    leaves = [x, *model.parameters()]
    grad = torch.randn(2, 32, dtype=torch.float64)
    found = []
    for queries in (1, None):
        out, layers = model(x, mask=mask, return_all_layers=True, last_queries=queries)
        assert out.shape[1] == (7 if queries is None else 1)
        assert layers is not None
        assert layers.shape == (depth - 1, 2, 7, 32)
        found.append((out[:, 0], layers, *torch.autograd.grad(out[:, 0], leaves, grad)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_last_text_block_computes_one_token_in_the_feed_forward() -> None:
    model = TextTransformer(dim=32, depth=2, dim_head=16, heads=2, num_tokens=50)
    rows: list[int] = []
    for block in model.transformer.layers:
        block[1].register_forward_hook(lambda _, args, out: rows.append(out.shape[1]))
    model(torch.randint(1, 50, (2, 9)))
    assert rows == [10, 1]


def test_autocast_of_the_padded_width_is_as_exact_as_without() -> None:
    torch.manual_seed(0)
    layer = FeedForward(64)  # 170 wide, padded to 176
    x = torch.randn(1, 600, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = layer(x), plain_feed_forward(layer, x)
    exact = plain_feed_forward(layer.double(), x.double())
    testing.assert_close_to_oracle("out", found, plain, exact, dtype=torch.bfloat16)
