"""Ranks, recall, zero-shot accuracy and the loss of a collapsed model by their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import musiclm_fast
from musiclm_fast.evaluation.metrics import (
    collapsed_loss,
    embed_clips,
    embed_texts,
    label_latents,
    ranks,
    recall_at_k,
    zero_shot_accuracy,
)


@pytest.fixture(scope="module")
def mulan():
    torch.manual_seed(0)
    audio = musiclm_fast.AudioSpectrogramTransformer(dim=16, depth=1, heads=2, dim_head=8)
    return musiclm_fast.MuLaN(
        audio, musiclm_fast.TextTransformer(dim=16, depth=1, heads=2, dim_head=8), dim_latent=8
    )


@pytest.mark.parametrize("decoupled", [True, False])
def test_collapsed_loss_is_the_loss_of_equal_latents(decoupled):
    latents = torch.ones(9, 4) / 2
    loss = musiclm_fast.SoftmaxContrastiveLearning(decoupled_contrastive_learning=decoupled)
    assert loss(latents, latents).item() == pytest.approx(collapsed_loss(9, decoupled), rel=1e-5)


def test_collapsed_loss_needs_negatives():
    with pytest.raises(ValueError, match="batch_size"):
        collapsed_loss(1)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9999))
def test_ranks_by_sorting(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    sims = torch.randn(rows, columns, generator=generator)
    targets = torch.randint(columns, (rows,), generator=generator)
    order = sims.argsort(dim=1, descending=True)
    expected = [order[i].tolist().index(t) + 1 for i, t in enumerate(targets.tolist())]
    assert ranks(sims, targets).tolist() == expected


def test_a_collapsed_or_broken_model_scores_nothing():
    targets = torch.arange(4)
    assert ranks(torch.zeros(4, 4), targets).tolist() == [4] * 4
    assert ranks(torch.full((4, 4), math.nan), targets).tolist() == [4] * 4
    assert recall_at_k(torch.zeros(4, 4), ks=(1, 3, 4)) == {1: 0.0, 3: 0.0, 4: 1.0}


def test_recall_of_a_known_matrix():
    sims = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    third = pytest.approx(1 / 3)
    assert recall_at_k(sims, ks=(1, 2, 3)) == {1: third, 2: pytest.approx(2 / 3), 3: 1.0}
    assert recall_at_k(sims, torch.tensor([0, 0, 0]), ks=(1,)) == {1: 1.0}


def test_zero_shot_accuracy_of_known_latents():
    labels = torch.eye(3)
    clips = torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.0, 0.1], [0.9, 0.0, 0.5]])
    accuracy = zero_shot_accuracy(clips, labels, torch.tensor([0, 1, 2]), ks=(1, 2))
    assert accuracy == {1: pytest.approx(2 / 3), 2: 1.0}


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ranks(torch.zeros(2, 3), torch.tensor([0, 3])), "targets"),
        (lambda: ranks(torch.zeros(2, 3), torch.tensor([0])), "targets"),
        (lambda: recall_at_k(torch.zeros(0, 3)), "similarities"),
        (lambda: recall_at_k(torch.zeros(3, 3), ks=(0,)), "ks"),
        (lambda: zero_shot_accuracy(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2)), "label"),
    ],
)
def test_refuses(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_embedding_in_batches_is_embedding_at_once(mulan):
    mulan.train()
    clips = torch.randn(5, 2048, generator=torch.Generator().manual_seed(1))
    latents = embed_clips(mulan, lambda part: clips[part], len(clips), batch_size=2)
    texts = embed_texts(mulan, ["a", "b", "c"], batch_size=2)
    assert mulan.training, "the mode is put back"
    mulan.eval()
    with torch.no_grad():
        torch.testing.assert_close(latents, mulan.get_audio_latents(clips))
        torch.testing.assert_close(texts, mulan.get_text_latents(raw_texts=["a", "b", "c"]))


def test_label_latents_average_their_prompts(mulan):
    latents = label_latents(mulan, [["a piano"], ["a flute", "the flute"]])
    one, two, three = embed_texts(mulan, ["a piano", "a flute", "the flute"])
    torch.testing.assert_close(latents[0], one)
    torch.testing.assert_close(latents[1], torch.nn.functional.normalize(two + three, dim=0))
    with pytest.raises(ValueError, match="prompts"):
        label_latents(mulan, [["a"], []])
