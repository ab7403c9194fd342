"""TextTransformer against upstream: token ids, raw texts and padding."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.upstream import live
from tests.upstream.comparing import compare

SMALL = dict(dim=32, depth=2, heads=2, dim_head=16, num_tokens=50, max_seq_len=24)

CONFIGS: dict[str, dict[str, Any]] = {
    "small": {},
    "dim 64, depth 3, 8 heads of 64": dict(dim=64, depth=3, heads=8, dim_head=64),
    "one head": dict(heads=1, dim_head=32),
    "3 heads of 5": dict(heads=3, dim_head=5),
    "dim 35": dict(dim=35),
    "ff_mult 3": dict(ff_mult=3),
    "padded with 7": dict(pad_id=7),
}

TEXTS = [
    "the sound of a brass band, playing slowly",
    "Überraschung! 🎺 &amp; déjà vu",
    "",
    "a",
]


def tokens(batch: int = 4, length: int = 11, pad_id: int = 0) -> Tensor:
    """Ids of several lengths: full, padded, padding inside, and padding alone."""
    ids = torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(2))
    if batch > 1:
        ids[1, length // 2 :] = pad_id
    if batch > 2:
        ids[2, length // 3] = pad_id
    if batch > 3:
        ids[3] = pad_id
    return ids


def build(package: ModuleType, **config: Any) -> nn.Module:
    return package.TextTransformer(**{**SMALL, **config})


def outputs(model: nn.Module, *args: Any, **inputs: Any) -> dict[str, Tensor]:
    cls, layers = model(*args, return_all_layers=True, **inputs)
    return {"output": cls, "text layers": layers}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_token_ids(config: dict[str, Any], train: bool):
    pair = live.pair(lambda package: build(package, **config))
    compare(pair, outputs, dict(x=tokens(pad_id=config.get("pad_id", 0))), train=train)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 1), (1, 24), (3, 24)])
def test_shapes(batch: int, length: int):
    pair = live.pair(build)
    compare(pair, outputs, dict(x=tokens(batch, length)))


def test_a_mask_of_ones_own():
    pair = live.pair(build)
    mask = torch.rand(4, 11, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[0] = False
    mask[1] = True
    compare(pair, outputs, dict(x=tokens(), mask=mask))


def test_output_alone():
    pair = live.pair(build)
    compare(pair, lambda model, x: {"output": model(x)}, dict(x=tokens()))


def test_raw_texts():
    pair = live.pair(lambda package: build(package, num_tokens=49_408, max_seq_len=64))
    compare(pair, outputs, dict(raw_texts=TEXTS))


def test_default_vocabulary_and_length(upstream: live.Upstream):
    pair = live.pair(lambda package: package.TextTransformer(dim=32, depth=2, heads=1))
    assert pair.ours.token_emb.weight.shape == (49_408, 32)
    assert pair.ours.pos_emb.weight.shape == (256, 32)
    compare(pair, outputs, dict(x=upstream.tokenizer.tokenize(TEXTS)))
