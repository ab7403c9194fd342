"""The audio tower's draws as an argument."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musiclm_fast import AudioSpectrogramTransformer, MuLaN, TextTransformer
from musiclm_fast.models.draws import AudioDraws, draw_kept, own_patches, own_patches_kept
from musiclm_fast.models.front_end import PRESETS

SMALL = dict(dim=32, depth=2, heads=2, dim_head=16)
STRETCHED = dataclasses.replace(PRESETS["mulan"], time_stretch=0.1)
LENGTHS = [8000, 16_000, 9000, 3100, 15_900]  # three groups of similar lengths
CPU = torch.device("cpu")


def make_tower(**arguments: Any) -> AudioSpectrogramTransformer:
    torch.manual_seed(0)
    return AudioSpectrogramTransformer(**{**SMALL, **arguments}).train()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


CLIPS: dict[str, tuple[dict[str, Any], Any, list[int] | None]] = {
    "masks of the batch": ({}, noise(5, 3000), None),
    "masks of each clip": (dict(front_end=STRETCHED), noise(5, 9000), None),
    "one clip": (dict(front_end=STRETCHED), noise(1, 9000), None),
    "a list": (dict(front_end=STRETCHED), [noise(n) for n in LENGTHS], None),
    "lengths": (dict(front_end=STRETCHED), noise(5, 16_000), LENGTHS),
    "similar lengths": (dict(front_end=STRETCHED), noise(3, 20_000), [15_000, 16_000, 14_000]),
    "all patches": (dict(front_end=STRETCHED, patch_dropout_prob=0.0), noise(5, 16_000), LENGTHS),
    "most patches dropped": (dict(patch_dropout_prob=0.9), noise(5, 16_000), LENGTHS),
    "spectrograms": (dict(accept_spec=True), noise(3, 90, 40), [90, 50, 86]),
    "frequency first": (
        dict(accept_spec=True, accept_spec_time_first=False), noise(3, 40, 90), None
    ),
}  # fmt: skip


@pytest.fixture(params=CLIPS)
def case(request: pytest.FixtureRequest) -> tuple[AudioSpectrogramTransformer, Any, Any]:
    arguments, clips, lengths = CLIPS[request.param]
    lengths = None if lengths is None else torch.tensor(lengths)
    return make_tower(**arguments), clips, lengths


def test_replayed_draws_give_equal_outputs(case: Any) -> None:
    """And draw makes those that forward makes: from the same generator, to the same end."""
    tower, clips, lengths = case
    torch.manual_seed(5)
    expected = tower(clips, lengths=lengths, return_all_layers=True)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    draws = tower.draw(clips, lengths=lengths)
    assert torch.equal(torch.get_rng_state(), after)
    for _ in range(2):
        found = tower(clips, lengths=lengths, return_all_layers=True, draws=draws)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(tower(clips, lengths=lengths), expected[0])


def test_rows_of_the_draws_are_those_of_the_clips(case: Any) -> None:
    """A clip sees its own draws, whatever it runs beside: on another grid, in another group."""
    tower, clips, lengths = case
    if not tower.accept_spec:
        clips, lengths = tower.as_batch(clips, lengths)
    draws = tower.draw(clips, lengths=lengths)
    expected = tower(clips, lengths=lengths, draws=draws)
    for rows in (slice(0, 2), slice(-3, None), torch.tensor([0])):
        some = None if lengths is None else lengths[rows]
        found = tower(clips[rows], lengths=some, draws=draws.rows(rows))
        torch.testing.assert_close(found, expected[rows])


def test_dropout_is_no_part_of_the_draws() -> None:
    tower, clips = make_tower(ff_dropout=0.5), noise(3, 3000)
    draws = tower.draw(clips)
    torch.manual_seed(1)
    first = tower(clips, draws=draws)
    assert not torch.equal(first, tower(clips, draws=draws))
    torch.manual_seed(1)
    assert torch.equal(first, tower(clips, draws=draws))


def test_what_is_drawn() -> None:
    tower, clips = make_tower(front_end=STRETCHED), noise(5, 16_000)  # 4 x 6 patches
    draws = tower.draw(clips)
    assert draws.grid == (4, 6)
    assert draws.stretch is not None and draws.stretch.shape == (5,)
    assert draws.freq_mask is not None and draws.freq_mask.shape == (5, 1, 2)
    assert draws.time_mask is not None and draws.time_mask.shape == (5, 1, 2)
    assert draws.kept is not None and draws.kept.shape == (5, 18)
    every = tower.draw(clips, force_no_patch_dropout=True)
    assert every.kept is None and every.freq_mask is not None
    assert tower.eval().draw(clips) == AudioDraws((4, 6))
    assert torch.equal(tower(clips, draws=AudioDraws((4, 6))), tower(clips))
    assert not torch.equal(tower(clips, draws=draws), tower(clips))  # in any mode


def test_patch_dropout_keeps_a_sorted_random_part() -> None:
    kept = draw_kept(4, (4, 5), 0.5, CPU)
    assert kept.shape == (4, 10)
    assert (kept.diff(dim=1) > 0).all()
    assert not torch.equal(kept[0], kept[1])
    columns = torch.tensor([5, 2, 1, 4])
    for groups in ((), (torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([2]))):
        kept = draw_kept(4, (4, 5), 0.5, CPU, columns, groups)
        counts = own_patches_kept(columns, (4, 5), 0.5)
        assert counts.tolist() == [10, 4, 2, 8]
        for row, count, width in zip(kept, counts, columns, strict=True):
            assert (row[:count].diff() > 0).all()
            assert (row[:count] % 5 < width).all()
    whole = own_patches(columns, (4, 5))
    assert whole[1].tolist() == [0, 1, 5, 6, 10, 11, 15, 16] + [19] * 12


def test_no_more_patches_count_than_are_kept() -> None:
    # 20 * 0.1 is 2 in float32 and less in float64
    assert draw_kept(1, (4, 5), 1 - 0.9, CPU).shape == (1, 1)
    assert own_patches_kept(torch.tensor([5]), (4, 5), 1 - 0.9).tolist() == [1]


def test_mulan_passes_draws_on() -> None:
    mulan = MuLaN(make_tower(), TextTransformer(**SMALL), dim_latent=8).train()
    wavs, texts = noise(3, 3000), torch.randint(1, 100, (3, 5))
    torch.manual_seed(2)
    loss, state = mulan(wavs, texts), torch.get_rng_state()
    torch.manual_seed(2)
    draws = mulan.audio.draw(wavs)
    assert torch.equal(mulan(wavs, texts, audio_draws=draws), loss)
    latents = mulan.get_audio_latents(wavs, audio_draws=draws)
    audio, _ = mulan(wavs, texts, return_latents=True, audio_draws=draws)
    assert torch.equal(audio, latents)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_and_a_tower_that_takes_none() -> None:
    class Plain(nn.Module):
        dim, depth, arguments, front_end = 32, 1, {}, PRESETS["mulan"]

        def forward(self, x: Tensor, return_all_layers: bool = False, **_: Any) -> Tensor:
            return x[:, :32]

    mulan: Any = MuLaN(Plain(), TextTransformer(**SMALL), dim_latent=8)
    assert mulan.get_audio_latents(noise(2, 50)).shape == (2, 8)
    with pytest.raises(ValueError, match="audio_draws: got draws, expected None: Plain takes none"):
        mulan.get_audio_latents(noise(2, 50), audio_draws=AudioDraws((1, 1)))


@pytest.mark.parametrize(
    "change",
    [
        dict(grid=(4, 7)),
        dict(stretch=torch.ones(2)),
        dict(freq_mask=torch.zeros(2, 1, 2, dtype=torch.int64)),
        dict(time_mask=torch.zeros(3, 2, dtype=torch.int64)),
        dict(kept=torch.zeros(3, 17, dtype=torch.int64)),
        dict(kept=torch.zeros(1, 18, dtype=torch.int64)),
        dict(kept=torch.zeros(3, 18, dtype=torch.int64, device="meta")),
    ],
    ids=lambda change: "-".join(change),
)
def test_draws_of_other_clips(change: dict[str, Any]) -> None:
    tower, clips = make_tower(front_end=STRETCHED), noise(3, 16_000)
    draws = dataclasses.replace(tower.draw(clips), **change)
    wanted = r"draws: got .*, expected those of 3 clips on cpu, a grid of \(4, 6\)"
    with pytest.raises(ValueError, match=wanted):
        tower(clips, draws=draws)


def test_draws_of_another_batch() -> None:
    tower = make_tower(front_end=STRETCHED)
    draws = tower.draw(noise(3, 16_000))
    for other in (noise(2, 16_000), noise(3, 13_000)):
        with pytest.raises(ValueError, match=r"draws: got .*those of"):
            tower(other, draws=draws)


def test_compiles_with_draws() -> None:
    tower, clips = make_tower(front_end=STRETCHED), noise(3, 9000)
    draws = tower.draw(clips)
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(clips, draws=draws), tower(clips, draws=draws))
