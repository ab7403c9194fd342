"""Evaluation against definitions written out, and its report."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import musiclm_fast
from musiclm_fast.datasets.opening import open_dataset
from musiclm_fast.evaluation.evaluate import evaluate, label_scores, write_report
from musiclm_fast.evaluation.figures import project
from musiclm_fast.evaluation.labels import Labels
from musiclm_fast.evaluation.metrics import retrieval, roc_auc, spread
from musiclm_fast.inference.embedder import Embedder

soundfile = pytest.importorskip("soundfile", reason="needs the train extra")


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def by_hand(queries, candidates, pairs, k):
    """Ranks, recall@k and AP@10 as their definitions say, one query at a time."""
    ranks, precisions = [], []
    for q in range(len(queries)):
        own = {c for p, c in pairs.tolist() if p == q}
        near = (candidates @ queries[q]).tolist()
        order = sorted(range(len(near)), key=lambda c: (-near[c], c in own))  # ties: others first
        hits = [place for place, c in enumerate(order, 1) if c in own]
        ranks.append(hits[0])
        top = [(i + 1) / place for i, place in enumerate(hits) if place <= 10]
        precisions.append(sum(top) / min(10, len(own)))
    return ranks, np.mean(np.array(ranks) <= k), np.mean(precisions)


@pytest.mark.parametrize("block_bytes", [1, 500, 2**26])
@pytest.mark.parametrize("ties", [False, True])
def test_retrieval_is_its_definition(block_bytes, ties):
    generator = torch.Generator().manual_seed(1)
    queries, candidates = unit(23, 6), unit(41, 6, seed=1)
    if ties:
        candidates[5:30] = candidates[torch.arange(5, 30) % 3]
    owns = torch.rand(23, 41, generator=generator) < 0.15
    owns[torch.arange(23), torch.arange(23)] = True
    owns[4] = True  # more than ten
    pairs = owns.nonzero()[torch.randperm(int(owns.sum()), generator=generator)]
    got = retrieval(queries, candidates, pairs, (1, 5), block_bytes=block_bytes)
    ranks, recall, precision = by_hand(queries, candidates, pairs, 5)
    assert got.ranks.tolist() == ranks
    assert got.recall[5] == pytest.approx(recall)
    assert got.mean_average_precision == pytest.approx(precision)
    assert got.median_rank == np.median(ranks)
    assert got.candidates == 41


def test_a_perfect_and_a_collapsed_model():
    x, pairs = unit(12, 16), torch.arange(12)[:, None].expand(-1, 2)
    good = retrieval(x, x, pairs)
    assert (good.recall[1], good.median_rank, good.mean_average_precision) == (1.0, 1.0, 1.0)
    for same in (x[:1].expand(12, -1), torch.full((12, 16), torch.nan)):
        bad = retrieval(same, same, pairs)
        assert (bad.recall[10], bad.median_rank, bad.mean_average_precision) == (0.0, 12.0, 0.0)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pairs=torch.tensor([[0, 0]])), "a query without a candidate"),
        (dict(pairs=torch.tensor([[0, 0], [1, 0], [2, 0]])), "a query without a candidate"),
        (dict(queries=torch.zeros(0, 4)), "0 and 3"),
        (dict(candidates=torch.zeros(3, 5)), "candidates"),
        (dict(ks=(0,)), "ks: got 0"),
    ],
)
def test_retrieval_of_bad_input(change, message):
    pairs = torch.tensor([[0, 0], [1, 2]])
    arguments = dict(queries=unit(2, 4), candidates=unit(3, 4), pairs=pairs)
    with pytest.raises(ValueError, match=message):
        retrieval(**{**arguments, **change})


def test_roc_auc_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    scores = unit(60, 5).mul(4).round() / 4  # with ties
    relevant = torch.rand(60, 5, generator=torch.Generator().manual_seed(2)) < 0.3
    relevant[:, 3], relevant[:, 4] = True, False
    got = roc_auc(scores, relevant)
    for label in range(3):
        expected = metrics.roc_auc_score(relevant[:, label], scores[:, label])
        assert got[label].item() == pytest.approx(expected)
    assert got[3:].isnan().all()
    scores[7, 0] = torch.nan
    assert roc_auc(scores, relevant)[0].isnan()


def test_labels_several_to_a_sound():
    audio, vectors = unit(30, 8), unit(7, 8, seed=3)
    near = audio @ vectors.t()
    table = near > near.quantile(0.7)
    table[0] = False
    scores = label_scores(audio, vectors, table, [*"abcdefg"])
    labelled = table.any(dim=1)
    best = near.argmax(dim=1)
    expected = table[torch.arange(30), best][labelled].double().mean().item()
    assert scores.accuracy[1] == pytest.approx(expected)
    assert scores.sounds == int(labelled.sum()) < 30
    known = [area for area in scores.roc_auc.values() if area is not None]
    assert scores.macro_roc_auc == pytest.approx(np.mean(known))
    with pytest.raises(ValueError, match="no sound with a label"):
        label_scores(audio, vectors, torch.zeros(30, 7, dtype=torch.bool), [*"abcdefg"])


def test_spread_is_its_definition():
    x = unit(40, 6).double()
    got = spread(x)
    near = x @ x.t()
    other = ~torch.eye(40, dtype=torch.bool)
    assert got.mean_cosine == pytest.approx(near[other].mean().item())
    distance = torch.cdist(x, x).square()[other]
    assert got.uniformity == pytest.approx(distance.mul(-2).exp().mean().log().item())
    s = torch.linalg.svdvals(x - x.mean(0))
    s = s / s.sum()
    assert got.effective_rank == pytest.approx((-(s * s.log()).sum()).exp().item())


@pytest.mark.parametrize(
    "latents, verdict",
    [
        (unit(500, 32), "healthy"),
        (F.normalize(unit(1, 32) + 1e-3 * unit(500, 32), dim=-1), "collapsed: all vectors"),
        (unit(1, 32).expand(50, 32), "collapsed: all vectors"),
        (unit(500, 1, seed=4) * unit(1, 32), "collapsed: the vectors lie on a line"),
        (F.pad(unit(500, 3), (0, 61)), "narrow"),
        (F.normalize(3 * unit(1, 32) + unit(500, 32), dim=-1), "narrow"),
        (torch.full((5, 3), torch.nan), "broken"),
    ],
)
def test_verdicts(latents, verdict):
    assert spread(latents).verdict.startswith(verdict)


@pytest.fixture(scope="module")
def embedder():
    torch.manual_seed(0)
    sizes = dict(dim=16, depth=1, heads=2, dim_head=8)
    audio = musiclm_fast.AudioSpectrogramTransformer(**sizes, front_end="mulan")
    mulan = musiclm_fast.MuLaN(audio, musiclm_fast.TextTransformer(**sizes), dim_latent=8)
    return Embedder(mulan, window_seconds=0.5, batch_size=3)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Seven sounds of 0.3 to 2.1 s; two share a caption, one has two, two cannot be read."""
    folder = tmp_path_factory.mktemp("collection")
    generator = np.random.default_rng(0)
    rows = []
    for place in range(5):
        wav = generator.normal(0, 0.1, 4800 + 7200 * place).astype(np.float32)
        soundfile.write(folder / f"{place}.wav", wav, 16000, subtype="FLOAT")
        rows.append({"path": f"{place}.wav", "caption": f"noise {max(place, 1)}"})
    rows[3]["caption"] = ["noise 3", "three"]
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    (folder / "broken.wav").write_bytes(b"RIFFnothing")
    rows += [{"path": f"{name}.wav", "caption": "x"} for name in ("silent", "broken")]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def opened(embedder, folder):
    return open_dataset(folder, sample_hz=embedder.sample_hz, clip_seconds=None)


def test_windows(embedder, collection):
    sounds = opened(embedder, collection)
    found = dict(embedder.sounds(sounds))
    assert found[0].starts.tolist() == [0.0]  # 0.3 s, whole
    assert found[1].starts.tolist() == [0.0, 0.25]  # 0.75 s: the last window ends at the end
    assert found[4].starts.tolist() == [0.0, 0.5, 1.0, 1.5, 1.6]
    assert found[5].reason == "nothing but silence" and "cannot be read" in found[6].reason
    for index in range(5):
        wav = torch.from_numpy(soundfile.read(collection / f"{index}.wav", dtype="float32")[0])
        starts = [round(start * 16000) for start in found[index].starts]
        with torch.no_grad():
            clips = [wav[start : start + 8000] for start in starts]
            expected = torch.cat([embedder.mulan.get_audio_latents(c[None]) for c in clips])
        torch.testing.assert_close(torch.from_numpy(found[index].latents), expected)
        mean = F.normalize(expected.mean(dim=0), dim=0)
        torch.testing.assert_close(torch.from_numpy(found[index].mean()), mean)


def test_a_long_sound_is_read_in_blocks(tmp_path, embedder, monkeypatch):
    wav = np.random.default_rng(1).normal(0, 0.1, 44100 * 7).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", wav, 44100, subtype="FLOAT")
    sounds = open_dataset(tmp_path, sample_hz=16000, clip_seconds=None, captions="names")
    whole = dict(embedder.sounds(sounds))[0]
    monkeypatch.setattr("musiclm_fast.inference.embedder._BLOCK", 4)
    blocks = dict(embedder.sounds(sounds))[0]
    assert len(whole.starts) == 14
    assert np.array_equal(whole.starts, blocks.starts)
    np.testing.assert_allclose(blocks.latents, whole.latents, atol=1e-5)


def test_fingerprint(embedder):
    first = embedder.fingerprint()
    assert embedder.fingerprint() == first
    other = Embedder(embedder.mulan, window_seconds=0.5, stride_seconds=0.25)
    assert other.fingerprint() != first
    with torch.no_grad():
        embedder.mulan.text_to_latents.bias += 1
        assert embedder.fingerprint() == first
        embedder.mulan.text_to_latents.bias -= 1
        embedder.mulan.audio_to_latents.bias += 1
        assert embedder.fingerprint() != first
        embedder.mulan.audio_to_latents.bias -= 1


def test_evaluate(embedder, collection, tmp_path):
    labels = Labels({"a": ["a", "an a"], "b": ["b"]}, {"0.wav": ["a"], "1.wav": ["a", "b"]})
    report = evaluate(embedder, opened(embedder, collection), labels)
    assert report.names == [f"{place}.wav" for place in range(5)]
    assert report.texts == ["noise 1", "noise 2", "noise 3", "three", "noise 4"]
    assert report.pairs.tolist() == [[0, 0], [1, 0], [2, 1], [3, 2], [3, 3], [4, 4]]
    near = report.audio @ report.text.t()
    others = near[3, [0, 1, 4]]
    assert report.audio_to_text.ranks[3] == 1 + int((others >= near[3, 2:4].max()).sum())
    assert set(report.left_out) == {"silent.wav", "broken.wav"}
    assert report.labels is not None and report.labels.sounds == 2
    again = evaluate(embedder, opened(embedder, collection), labels)
    assert again.to_dict() == report.to_dict()
    pytest.importorskip("matplotlib")
    written = write_report(report, tmp_path / "out", "pca")
    assert [path.name for path in written] == [
        "report.json", "similarity.png", "ranks.png", "map.png",
    ]  # fmt: skip
    assert json.loads(written[0].read_text()) == report.to_dict()
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    table = report.table()
    assert "5 sounds, 5 captions" in table and "left out 2 sounds" in table
    assert f"{report.text_to_audio.recall[1]:.1%}" in table


def test_evaluate_refuses(embedder, collection):
    sounds = opened(embedder, collection)
    labels = Labels({"a": ["a"], "b": ["b"]}, {"elsewhere.wav": ["a"]})
    with pytest.raises(ValueError, match=r"labels: got names such as \['elsewhere.wav'\]"):
        evaluate(embedder, sounds, labels)
    with pytest.raises(ValueError, match=r"sounds: got 0 that can be read; silent\.wav: nothing"):
        evaluate(embedder, sounds.select([5, 6]))
    cropped = open_dataset(collection, sample_hz=16000, clip_seconds=1.0)
    with pytest.raises(ValueError, match=r"clips of 1.0 s, expected 16000 Hz, whole"):
        evaluate(embedder, cropped)


def test_labels_of_files(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("path,labels\na.wav,piano; calm\nb.wav,drums\nb.wav,loud\nc.wav,\n")
    labels = Labels.read(table)
    assert labels.of == {"a.wav": ["piano", "calm"], "b.wav": ["drums", "loud"], "c.wav": []}
    assert labels.prompts == {n: [n] for n in ("calm", "drums", "loud", "piano")}
    assert labels.table(["b.wav", "z.wav"]).tolist() == [[False, True, True, False], [False] * 4]
    content = {"labels": {"a.wav": "x"}, "prompts": {"x": ["an x", "the x"], "y": "a y"}}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert Labels.read(tmp_path / "labels.json").prompts == {"x": ["an x", "the x"], "y": ["a y"]}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "path,mood\na,b\n", "columns path, mood, expected path and labels"),
        ("a.csv", "", "columns nothing"),
        ("a.csv", "path,label\na,b\n", "1 label, expected at least two"),
        ("a.json", "{", "a.json"),
        ("a.json", "[]", "no object with 'labels'"),
        ("a.json", '{"labels": {"a": 3}}', "labels of 'a': got 3"),
        ("a.json", '{"labels": {"a": ["z"]}, "prompts": {"x": "x", "y": "y"}}', "'z' of 'a'"),
        ("a.json", '{"labels": {"a": ["x"]}, "prompts": {"x": " ", "y": "y"}}', "none empty"),
    ],
)
def test_bad_label_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Labels.read(tmp_path / name)


def test_maps():
    x = unit(30, 8)
    places, how = project(x, "pca")
    assert how == "principal components" and places.shape == (30, 2)
    centred = (x - x.mean(0)).double()
    kept = np.square(places).sum() / centred.square().sum().item()
    s = torch.linalg.svdvals(centred).square()
    assert kept == pytest.approx((s[:2].sum() / s.sum()).item())
    assert np.isfinite(project(x[:2], "pca")[0]).all()
    pytest.importorskip("sklearn")
    first, how = project(x, "auto")
    assert how == "t-SNE" and np.array_equal(first, project(x, "tsne")[0])


def test_a_report_of_one_caption_has_no_nan_in_json(embedder, tmp_path):
    for place in range(2):
        wav = np.random.default_rng(place).normal(0, 0.1, 8000)
        soundfile.write(tmp_path / f"{place}.wav", wav, 16000)
    (tmp_path / "m.csv").write_text("path,caption\n0.wav,same\n1.wav,same\n")
    report = evaluate(embedder, opened(embedder, tmp_path))
    assert math.isnan(report.text_spread.mean_cosine)
    assert "NaN" not in json.dumps(report.to_dict())
    assert report.audio_to_text.recall[1] == 1.0
