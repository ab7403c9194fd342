"""Captioned sounds: every kind of source, draws that depend on index and seed alone, bad files."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from musiclm_fast import cli
from musiclm_fast.datasets import captioned_sounds as data
from musiclm_fast.datasets.captioned_sounds import Skipped
from musiclm_fast.datasets.collation import collate
from musiclm_fast.datasets.opening import open_dataset
from musiclm_fast.datasets.shards import shard_paths
from musiclm_fast.datasets.splitting import split
from musiclm_fast.datasets.titles import title_of

soundfile = pytest.importorskip("soundfile", reason="needs the train extra")
soxr = pytest.importorskip("soxr", reason="needs the train extra")
RATE = 16_000


def noise(seconds, rate=RATE, seed=0, channels=1):
    """Smooth noise, (frames, channels) float32: no two places alike, nothing near Nyquist."""
    generator = np.random.default_rng(seed)
    raw = generator.normal(size=(round(seconds * rate), channels))
    smooth = np.apply_along_axis(np.convolve, 0, raw, np.hanning(31), "same")
    return (0.3 * smooth / np.abs(smooth).max()).astype(np.float32)


def write(path, wav, rate=RATE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".wav":
        options.setdefault("subtype", "FLOAT")
    soundfile.write(path, wav, rate, **options)


def write_csv(path, header, *rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def opened(source, *, sample_hz=RATE, clip_seconds=0.5, **options):
    return open_dataset(source, sample_hz=sample_hz, clip_seconds=clip_seconds, **options)


@pytest.fixture
def folder(tmp_path):
    """Six wav files of one second, the first with two captions."""
    rows = []
    for i in range(6):
        write(tmp_path / "sounds" / f"{i}.wav", noise(1.0, seed=i))
        rows.append([f"sounds/{i}.wav", f"sound {i}"])
    rows[0][1] = json.dumps(["a piano", "slow keys"])
    write_csv(tmp_path / "manifest.csv", ["path", "caption"], *rows)
    return tmp_path


def test_draw_depends_on_index_and_seed_alone(folder):
    sounds = opened(folder)
    file = noise(1.0, seed=1)[:, 0]
    starts = set()
    for seed in range(20):
        row = sounds.draw(1, seed)
        wav, text = row
        assert (text, row.name, row.position, row.skipped) == ("sound 1", "sounds/1.wav", 1, ())
        first = round(row.start * RATE)
        np.testing.assert_array_equal(wav.numpy(), file[first : first + RATE // 2])
        torch.manual_seed(seed)  # no other generator takes part
        again = pickle.loads(pickle.dumps(sounds)).draw(1, seed)
        assert torch.equal(again.wav, wav)
        starts.add(first)
    assert len(starts) > 15
    assert max(starts) > RATE // 3
    assert sounds.draw(-1, 3).name == "sounds/5.wav"
    for index in (6, -7):
        with pytest.raises(IndexError, match=f"got {index}, expected one of 6 sounds"):
            sounds.draw(index, 0)
        with pytest.raises(IndexError, match="expected one of 6 sounds"):
            sounds[index]


def test_one_of_several_captions_is_drawn(folder):
    sounds = opened(folder / "manifest.csv")
    assert sounds.captions(0) == ["a piano", "slow keys"]
    drawn = {sounds.draw(0, seed).text for seed in range(20)}
    assert drawn == {"a piano", "slow keys"}
    assert sounds.whole(0).text == "a piano"


def test_extra_words_are_drawn_around_the_caption(folder):
    plain, sounds = opened(folder), opened(folder, extra_words=3)
    texts = [sounds.draw(2, seed).text for seed in range(30)]
    caption = plain.captions(2)[0]
    assert all(caption in text for text in texts)
    assert len(set(texts)) > 20
    assert texts == [sounds.draw(2, seed).text for seed in range(30)]
    np.testing.assert_array_equal(sounds.draw(2, 5).wav, plain.draw(2, 5).wav)
    assert sounds.whole(2).text == caption  # evaluation has none
    for bad in (-1, 1.5):
        with pytest.raises(ValueError, match="extra_words: got"):
            opened(folder, extra_words=bad)


def test_whole_is_the_middle(folder):
    row = opened(folder).whole(2)
    np.testing.assert_array_equal(row.wav, noise(1.0, seed=2)[RATE // 4 : 3 * RATE // 4, 0])
    whole = opened(folder, clip_seconds=None).whole(2)
    np.testing.assert_array_equal(whole.wav, noise(1.0, seed=2)[:, 0])


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [44_100, 22_050, 16_000, 8_000])
def test_a_crop_equals_the_part_of_the_whole_file(tmp_path, suffix, rate):
    """Seeking, decoding and resampling only what a crop needs gives what the whole file has."""
    write(tmp_path / f"a.{suffix}", noise(3.0, rate, channels=2), rate)
    sounds = opened(tmp_path, captions="names")
    decoded, _ = soundfile.read(tmp_path / f"a.{suffix}", dtype="float32")
    expected = soxr.resample(decoded.mean(axis=1), rate, RATE, quality="VHQ")
    for seed in range(5):
        wav, _ = row = sounds.draw(0, seed)
        assert len(wav) == RATE // 2
        # the crop starts between two samples of the expected wave: the nearest whole frame that
        # lies on one is compared
        position = row.start * RATE
        if abs(position - round(position)) > 1e-6:
            shift = position - np.floor(position)
            spectrum = np.fft.rfft(np.pad(expected, (0, len(expected))))
            turn = np.exp(2j * np.pi * np.fft.rfftfreq(2 * len(expected)) * shift)
            shifted = np.fft.irfft(spectrum * turn)
        else:
            shifted = expected
        first = int(np.floor(position + 1e-6))
        inside = slice(200, RATE // 2 - 200)
        got, want = wav.numpy()[inside], shifted[first : first + RATE // 2][inside]
        assert np.abs(got - want).max() < 2e-3 * np.abs(expected).max()


def test_lengths_say_what_is_padding(tmp_path):
    for i, seconds in enumerate((0.3, 1.0, 0.25)):
        write(tmp_path / f"{i}.wav", noise(seconds, seed=i))
    sounds = opened(tmp_path, captions="names")
    batch = collate([sounds.draw(i, 0) for i in range(3)])
    assert batch["lengths"].tolist() == [4800, 8000, 4000]
    assert batch["wavs"].shape == (3, 8000)
    assert not batch["wavs"][2, 4000:].any()
    assert batch["raw_texts"] == ["0", "1", "2"]
    assert set(collate([sounds.draw(1, 0), sounds.draw(1, 1)])) == {"wavs", "raw_texts"}


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_draw_what_one_process_draws(folder, context):
    sounds = opened(folder)
    keys = [(index, 7 * index) for index in range(6)]
    alone = [sounds.draw(*key) for key in keys]
    # spawn takes seconds to import torch: one worker shows that the dataset travels
    workers = 2 if context == "fork" else 1
    loader = DataLoader(
        sounds, batch_size=2, sampler=keys, num_workers=workers,
        multiprocessing_context=context, collate_fn=collate,
    )  # fmt: skip
    batches = list(loader)
    wavs = torch.cat([batch["wavs"] for batch in batches])
    assert torch.equal(wavs, torch.stack([row.wav for row in alone]))
    texts = [text for batch in batches for text in batch["raw_texts"]]
    assert texts == [row.text for row in alone]


def test_any_loader_takes_it(folder):
    torch.manual_seed(3)
    wavs, texts = next(iter(DataLoader(opened(folder), batch_size=6, shuffle=True)))
    assert wavs.shape == (6, RATE // 2)
    assert len(set(texts)) == 6
    torch.manual_seed(3)
    again, _ = next(iter(DataLoader(opened(folder), batch_size=6, shuffle=True)))
    assert torch.equal(wavs, again)


def spoil(folder):
    """One file of each kind that cannot be used, in place of sounds 0 to 3; reasons by name."""
    sounds = folder / "sounds"
    (sounds / "0.wav").write_bytes(b"no sound at all" * 100)
    (sounds / "1.wav").write_bytes(b"")
    write(sounds / "2.wav", np.full(RATE, np.nan, np.float32))
    write(sounds / "3.wav", noise(0.1))
    return {
        "sounds/0.wav": "Format not recognised",
        "sounds/1.wav": "cannot be read as sound",
        "sounds/2.wav": "NaN or infinity",
        "sounds/3.wav": "shorter than 0.2 s",
    }


def test_a_bad_file_is_replaced_and_named(folder):
    reasons = spoil(folder)
    sounds = opened(folder)
    for index, (name, reason) in enumerate(reasons.items()):
        row = sounds.draw(index, 5)
        assert row.name in ("sounds/4.wav", "sounds/5.wav")
        assert row.text == f"sound {row.position}"
        assert row.skipped[0].name == name
        assert reason in row.skipped[0].reason
        assert {skip.name for skip in row.skipped} <= set(reasons)
        assert sounds.draw(index, 5).skipped == row.skipped
        with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
            sounds.whole(index)
    batch = collate([sounds.draw(4, 0), sounds.draw(0, 0)])
    assert batch["skipped"][0].name == "sounds/0.wav"
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"skipped sounds/0.wav: cannot be read as sound"):
        sounds[0]


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_damaged_bytes_are_skipped_or_heard(tmp_path, suffix, capfd):
    """Whatever bytes a file holds, a draw gives a clip of it or replaces it."""
    path = tmp_path / f"a.{suffix}"
    write(path, noise(1.0, 44_100, channels=2), 44_100)
    content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    write(tmp_path / "z.wav", noise(1.0))
    sounds = opened(tmp_path, captions="names")
    generator = np.random.default_rng(0)
    skipped = 0
    for trial in range(20):
        damaged = content.copy()
        where = generator.integers(len(content) if trial % 2 else 100, size=3)
        damaged[where] = generator.integers(256, size=3)
        cut = generator.integers(len(content)) if trial % 3 == 0 else len(content)
        path.write_bytes(damaged[:cut].tobytes())
        row = sounds.draw(0, trial)
        assert torch.isfinite(row.wav).all()
        assert RATE // 5 <= len(row.wav) <= RATE // 2
        assert row.position == len(row.skipped)
        skipped += len(row.skipped)
    assert 0 < skipped < 20
    capfd.readouterr()  # mpg123 prints what it thinks of such files


def test_a_file_that_vanishes_later_is_replaced(folder):
    sounds = opened(folder)
    (folder / "sounds" / "0.wav").unlink()
    assert Skipped("sounds/0.wav", "no such file") in sounds.draw(0, 0).skipped


def test_a_file_cut_short_is_named_where_it_matters(tmp_path):
    path = tmp_path / "a.flac"
    write(path, noise(8.0, channels=2))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    write(tmp_path / "b.flac", noise(1.0))
    sounds = opened(tmp_path, captions="names")
    rows = [sounds.draw(0, seed) for seed in range(10)]
    assert all(row.start < 4 for row in rows if not row.skipped)
    reasons = [row.skipped[0].reason for row in rows if row.skipped]
    assert 0 < len(reasons) < 10
    assert all("cut short" in reason for reason in reasons)


def test_all_files_bad_is_an_error(folder):
    for path in (folder / "sounds").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="none of 6 sounds can be read, the first is sounds/2"):
        opened(folder).draw(2, 0)


def test_rows_that_cannot_be_drawn_are_left_out_and_counted(folder):
    write_csv(
        folder / "manifest.csv",
        ["path", "caption", "start", "end"],
        ["sounds/0.wav", "good", "", ""],
        ["sounds/gone.wav", "gone", "", ""],
        ["sounds/1.wav", "  ", "", ""],
        ["sounds/2.wav", "over two\nlines", "0.25", "0.75"],
        ["sounds/2.wav", "x", "0.5", "0.5"],
        ["sounds/2.wav", "x", "soon", ""],
        ["", "x", "", ""],
    )
    with pytest.warns(UserWarning, match=r"1 x no such file \(sounds/gone.wav \(line 3\)\)"):
        sounds = opened(folder)
    assert [sounds.name(i) for i in range(len(sounds))] == [
        "sounds/0.wav", "sounds/2.wav [0.25-0.75 s]",
    ]  # fmt: skip
    assert sounds.left_out == (
        Skipped("sounds/gone.wav", "no such file", 3),
        Skipped("sounds/1.wav", "empty caption", 4),
        Skipped("sounds/2.wav", "end is not after start", 7),
        Skipped("sounds/2.wav", "start or end is no number of seconds", 8),
        Skipped("line 9", "no path", 9),
    )
    part = noise(1.0, seed=2)[RATE // 4 : 3 * RATE // 4, 0]
    np.testing.assert_array_equal(sounds.draw(1, 9).wav, part)


def test_jsonl_manifest(folder):
    lines = [
        {"path": "sounds/0.wav", "caption": ["one", "two"], "start": 0.5},
        {"path": str(folder / "sounds" / "1.wav"), "caption": "an absolute path"},
        {"path": "sounds/2.wav", "caption": 5},
        {"caption": "nowhere"},
    ]
    path = folder / "music.jsonl"
    path.write_text("\n".join([*map(json.dumps, lines), "{oops", "[]"]))
    with pytest.warns(UserWarning, match="left out"):
        sounds = opened(path)
    assert [sounds.captions(i) for i in range(len(sounds))] == [
        ["one", "two"], ["an absolute path"],
    ]  # fmt: skip
    assert [(skip.line, skip.reason[:7]) for skip in sounds.left_out] == [
        (3, "caption"), (4, "no path"), (5, "no JSON"), (6, "no JSON"),
    ]  # fmt: skip


def test_wrong_columns_are_named(folder):
    path = write_csv(folder / "other.csv", ["file", "caption"], ["a.wav", "x"])
    with pytest.raises(ValueError, match=r"other.csv.*columns file, caption.*lacking: path"):
        opened(path)
    path = write_csv(folder / "other.csv", ["path", "caption"], ["sounds/0.wav"])
    with pytest.raises(ValueError, match=r"1 x 1 cell under 2 columns \(sounds/0.wav \(line 2"):
        opened(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"path,caption\n\xff\xfe,x\n", "not UTF-8"),
        ("a.csv", b'path,caption\n"a"b.wav,x\n', "line 2"),
        ("a.csv", b"", "columns none"),
        ("a.csv", b"path,caption\n", "nothing to draw"),
        ("a.txt", b"x", r"\.csv, \.tsv, \.jsonl or \.tar"),
        ("a.tar", b"no tar" * 200, "no plain tar file"),
    ],
)
def test_bad_sources(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / name, cache_folder=tmp_path)


def test_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="source: nothing at"):
        opened(tmp_path / "gone")
    (tmp_path / "a.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"no shard .*b\.tar"):
        opened(str(tmp_path / "{a,b}.tar"))
    write(tmp_path / "a.wav", noise(1.0))
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ValueError, match=r"1 sound file, no manifest and no \.tar, expected"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="kind: got 'zip', expected one of 'auto'"):
        opened(tmp_path, kind="zip")
    with pytest.raises(ValueError, match="min_seconds: got -1"):
        opened(tmp_path, captions="names", min_seconds=-1)
    with pytest.raises(ValueError, match="clip_seconds: got 0"):
        opened(tmp_path, captions="names", clip_seconds=0)
    with pytest.raises(ValueError, match="download it first"):
        opened("https://example.com/a.tar")


def test_a_source_with_nothing_to_draw_says_why(folder):
    write_csv(folder / "manifest.csv", ["path", "caption"], ["no.wav", "x"], ["nor.wav", "y"])
    with pytest.raises(ValueError, match=r"2 x no such file \(no.wav \(line 2\), nor.wav"):
        opened(folder)


def test_musiccaps(tmp_path):
    header = ["ytid", "start_s", "end_s", "audioset_positive_labels", "aspect_list", "caption"]
    ids = ["-0Gj8-vB1q4", "0PvhUKZ3b_A", "_abcdefghij", "gone0000000", "whole000000"]
    rows = [[ytid, "2", "4", "/m/0", "['slow', 'sad']", f"caption {ytid}"] for ytid in ids]
    table = write_csv(tmp_path / "musiccaps-public.csv", header, *rows)
    write(tmp_path / "wav" / f"{ids[0]}.wav", noise(2.0, seed=0))  # already cut
    write(tmp_path / "wav" / f"[{ids[1]}]-[2-4].wav", noise(2.0, seed=1))
    write(tmp_path / "wav" / f"{ids[2]}_2_4.wav", noise(2.0, seed=2))
    write(tmp_path / "wav" / f"{ids[4]}.wav", noise(6.0, seed=4))
    with pytest.warns(UserWarning, match=r"1 x no sound file of that ytid in .* \(gone0000000"):
        sounds = opened(table, clip_seconds=None)
    assert [sounds.file(i) for i in range(4)] == [ids[0], ids[1], ids[2], ids[4]]
    assert sounds.captions(0) == [f"caption {ids[0]}"]
    for index, (seed, part) in enumerate([(0, slice(None)), (1, slice(None)), (2, slice(None))]):
        np.testing.assert_array_equal(sounds.draw(index, 0).wav, noise(2.0, seed=seed)[part, 0])
    row = sounds.draw(3, 0)
    np.testing.assert_array_equal(row.wav, noise(6.0, seed=4)[2 * RATE : 4 * RATE, 0])
    with pytest.warns(UserWarning, match="left out"):
        assert len(opened(table, audio=tmp_path / "wav")) == 4


def test_folder_captions(tmp_path):
    write(tmp_path / "sad" / "03-northern_mountains.wav", noise(1.0))
    path = tmp_path / "x.ogg"
    with soundfile.SoundFile(path, "w", 44_100, 1) as file:
        file.title, file.genre = "Slow Rain", "Ambient"
        file.write(noise(1.0, 44_100))
    sounds = opened(tmp_path, captions="names")
    assert [sounds.captions(i) for i in range(2)] == [["northern mountains"], ["x"]]
    sounds = opened(tmp_path, captions="tags")
    assert sounds.captions(1) == ["Slow Rain", "Slow Rain, Ambient"]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("a/b/battle-epic.ogg", "battle epic"),
        ("01 The Deep_Path.mp3", "The Deep Path"),
        ("loyalistsTheme.ogg", "loyalists Theme"),
        ("1984.wav", "1984"),
        ("99-100.wav", "99 100"),
    ],
)
def test_titles(name, title):
    assert title_of(name) == title


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def sound_bytes(wav, kind="WAV", rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, wav, rate, format=kind)
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Two shards with four good sounds, and four keys that cannot be used."""
    with tarfile.open(tmp_path / "music-000.tar", "w") as tar:
        add(tar, "00.flac", sound_bytes(noise(1.0, seed=0), "FLAC"))
        add(tar, "00.txt", b"a flute\n")
        add(tar, "00.cls", b"7")
        add(tar, "sub/01.json", json.dumps({"caption": ["a drum", "beats"]}).encode())
        add(tar, "sub/01.ogg", sound_bytes(noise(1.0, seed=1), "OGG"))
    with tarfile.open(tmp_path / "music-001.tar", "w") as tar:
        add(tar, "02.mp3", sound_bytes(noise(1.0, seed=2), "MP3"))
        add(tar, "02.txt", b"a harp")
        add(tar, "03.wav", sound_bytes(noise(1.0, seed=3)))
        add(tar, "03.txt", b"a bell")
        add(tar, "04.wav", sound_bytes(noise(1.0, seed=4)))
        add(tar, "05.txt", b"no sound")
        add(tar, "06.wav", sound_bytes(noise(1.0, seed=6)))
        add(tar, "06.txt", b" ")
        add(tar, "07.wav", sound_bytes(noise(1.0, seed=7)))
        add(tar, "07.json", b'{"title": "x"}')
    return tmp_path


def test_shards(shards):
    for source in (shards, shards / "music-*.tar", shards / "music-{000..001}.tar"):
        with pytest.warns(UserWarning, match="left out 1 x "):
            sounds = opened(source, cache_folder=shards / "cache")
        assert [sounds.name(i) for i in range(len(sounds))] == [
            "music-000.tar/00", "music-000.tar/sub/01", "music-001.tar/02", "music-001.tar/03",
        ]  # fmt: skip
        assert [sounds.captions(i) for i in range(4)] == [
            ["a flute"], ["a drum", "beats"], ["a harp"], ["a bell"],
        ]  # fmt: skip
        assert {(skip.name[-2:], skip.reason) for skip in sounds.left_out} == {
            ("04", "no .txt or .json of that key"),
            ("05", "no sound of that key"),
            ("06", "empty caption"),
            ("07", ".json has none of caption, captions, text"),
        }
    for index in range(4):
        row = sounds.draw(index, 4)
        first = round(row.start * RATE)
        expected = noise(1.0, seed=index)[first : first + RATE // 2, 0]
        correlation = np.corrcoef(row.wav, expected)[0, 1]
        assert correlation > (0.9999 if index in (0, 3) else 0.98)  # ogg and mp3 lose a little


def test_no_file_stays_open(shards):
    """Not even one of a bad member: its exception keeps frames alive."""
    with tarfile.open(shards / "music-002.tar", "w") as tar:
        add(tar, "08.wav", b"no sound at all")
        add(tar, "08.txt", b"bad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sounds = opened(shards, cache_folder=shards / "cache")
    handles = Path("/proc/self/fd")
    if not handles.is_dir():
        pytest.skip("needs /proc")

    def open_shards():
        links = [handle.resolve() for handle in handles.iterdir()]
        return [link for link in links if link.suffix == ".tar"]

    errors = []
    for index in range(len(sounds)):
        try:
            sounds.whole(index)
        except ValueError as error:
            errors.append(error)
        assert not open_shards()
    assert len(errors) == 1


def test_the_index_of_shards_is_kept(shards, monkeypatch):
    cache = shards / "cache"
    read = []
    original = data_shards()._read_index
    monkeypatch.setattr(
        data_shards(), "_read_index", lambda path: read.append(path) or original(path)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = opened(shards, cache_folder=cache)
        assert len(read) == 2
        second = opened(shards, cache_folder=cache)
        assert len(read) == 2
        assert torch.equal(first.draw(1, 1).wav, second.draw(1, 1).wav)
        with tarfile.open(shards / "music-002.tar", "w") as tar:
            add(tar, "08.wav", sound_bytes(noise(1.0)))
            add(tar, "08.txt", b"new")
        assert len(opened(shards, cache_folder=cache)) == 5
        assert [Path(path).name for path in read[2:]] == ["music-002.tar"]
        with tarfile.open(shards / "music-002.tar", "a") as tar:
            add(tar, "09.wav", sound_bytes(noise(1.0)))
            add(tar, "09.txt", b"newer")
        assert len(opened(shards, cache_folder=cache)) == 6
        for path in cache.iterdir():
            path.write_text("damaged")
        assert len(opened(shards, cache_folder=cache)) == 6


def data_shards():
    from musiclm_fast.datasets import shards

    return shards


def test_a_shard_cut_short_keeps_what_is_whole(shards):
    path = shards / "music-000.tar"
    path.write_bytes(path.read_bytes()[: 12 * 1024])
    with pytest.warns(UserWarning, match="damaged or cut short|the shard is cut short"):
        sounds = opened(shards, cache_folder=shards / "cache")
    assert all(sounds.draw(i, 0).skipped == () for i in range(len(sounds)))
    with tarfile.open(shards / "z.tar.gz", "w:gz") as tar:
        add(tar, "00.txt", b"x")
    (shards / "z.tar.gz").rename(shards / "z.tar")
    with pytest.raises(ValueError, match=r"z.tar.*expected an uncompressed .tar"):
        opened(shards / "z.tar", cache_folder=shards / "cache")


def test_a_table_of_something_else_beside_shards(shards):
    write_csv(shards / "sizes.csv", ["shard", "count"], ["music-000", 2])
    with pytest.warns(UserWarning, match="left out"):
        assert len(opened(shards, cache_folder=shards / "cache")) == 4


def test_shard_patterns(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-09.tar", "c.txt"):
        (tmp_path / name).touch()
    found = [Path(path).name for path in shard_paths(str(tmp_path / "a-{08..10}.tar"))]
    assert found == ["a-08.tar", "a-09.tar", "a-10.tar"]
    found = [Path(path).name for path in shard_paths(str(tmp_path / "{a,b}-09.tar"))]
    assert found == ["a-09.tar", "b-09.tar"]
    assert len(shard_paths(str(tmp_path))) == 4


def test_split_moves_nothing_when_files_are_added(tmp_path):
    rows = [[f"{i}.wav", f"caption {i}", start, start + 1] for i in range(400) for start in (0, 1)]
    for i in range(400):
        (tmp_path / f"{i}.wav").touch()
    header = ["path", "caption", "start", "end"]
    table = write_csv(tmp_path / "manifest.csv", header, *rows[:400])
    train, valid = split(opened(table), 0.25, seed=1)
    names = [{part.name(i) for i in range(len(part))} for part in (train, valid)]
    assert len(names[0]) + len(names[1]) == 400
    assert not names[0] & names[1]
    assert 60 < len(names[1]) < 140
    # both parts of a file stay together
    assert not {name.split()[0] for name in names[0]} & {name.split()[0] for name in names[1]}

    larger = split(opened(write_csv(table, header, *rows)), 0.25, seed=1)
    for before, part in zip(names, larger, strict=True):
        assert before <= {part.name(i) for i in range(len(part))}
    _, other = split(opened(table), 0.25, seed=2)
    assert {other.name(i) for i in range(len(other))} != names[1]
    assert [len(part) for part in split(opened(table), 0.0)] == [800, 0]


def test_a_part_replaces_bad_files_from_itself(folder):
    """A training part never draws what is kept for validation."""
    spoil(folder)
    part = opened(folder).select([0, 1, 5])
    assert len(part) == 3
    assert {part.draw(0, seed).name for seed in range(20)} == {"sounds/5.wav"}
    assert part.draw(0, 0).position == 2


def test_collate_serves_upstreams_rows():
    rows = [(torch.zeros(5), "a"), (torch.zeros(3), "b")]
    batch = collate(rows)
    assert batch["wavs"].shape == (2, 3)
    assert batch["raw_texts"] == ["a", "b"]
    assert set(batch) == {"wavs", "raw_texts"}
    ids = collate([(torch.zeros(5), torch.tensor([1, 2])), (torch.zeros(5), torch.tensor([3]))])
    assert ids["texts"].tolist() == [[1, 2], [3, 0]]
    with pytest.raises(ValueError, match="two elements per row that are wavs"):
        collate([(torch.zeros(5), torch.zeros(5))])
    with pytest.raises(TypeError, match="clips"):
        collate([(torch.zeros(5), 3.0)])


def test_a_model_takes_the_batch(tmp_path):
    """Clips of different lengths through a MuLaN: the loss of the padded batch is its clips'."""
    import musiclm_fast

    for i, seconds in enumerate((0.3, 0.5, 0.4)):
        write(tmp_path / f"tune {i}.wav", noise(seconds, seed=i))
    torch.manual_seed(0)
    sizes = dict(dim=16, depth=1, heads=2, dim_head=8)
    audio = musiclm_fast.AudioSpectrogramTransformer(**sizes, front_end="mulan")
    mulan = musiclm_fast.MuLaN(audio, musiclm_fast.TextTransformer(**sizes), dim_latent=8).eval()
    sounds = opened(tmp_path, captions="names")
    rows = [sounds.draw(i, 0) for i in range(3)]
    batch = collate(rows)
    texts = batch.pop("raw_texts")
    with torch.no_grad():
        together = mulan.get_audio_latents(**batch)
        alone = torch.cat([mulan.get_audio_latents(row.wav[None]) for row in rows])
        assert torch.isfinite(mulan(**batch, raw_texts=texts))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_many_strings_travel_as_one_array():
    strings = ["", "a", "ünïcode", "\udcff", "long " * 100]
    table = pickle.loads(pickle.dumps(data._Strings(strings)))
    assert list(table) == strings


def test_a_header_may_overstate_the_length_a_little(tmp_path):
    """As some ogg files do: the clips then end a little before that."""
    path = tmp_path / "a.ogg"
    write(path, noise(4.0))
    content = bytearray(path.read_bytes())
    last = content.rindex(b"OggS")
    # the last page's granule position: frames from the start, and the page's checksum
    content[last + 6 : last + 14] = int(4.15 * RATE).to_bytes(8, "little")
    content[last + 22 : last + 26] = bytes(4)
    content[last + 22 : last + 26] = ogg_checksum(bytes(content[last:])).to_bytes(4, "little")
    path.write_bytes(content)
    with soundfile.SoundFile(path) as file:
        assert file.frames == int(4.15 * RATE)
        assert len(file.read()) < 4.1 * RATE
    sounds = opened(tmp_path, captions="names")
    rows = [sounds.draw(0, seed) for seed in range(100)]
    assert all(len(row.wav) == RATE // 2 and not row.skipped for row in rows)
    ends = [row.start + 0.5 for row in rows]
    decoded = soundfile.read(path, dtype="float32")[0]
    assert max(ends) <= len(decoded) / RATE
    last = rows[int(np.argmax(ends))]
    first = round(last.start * RATE)
    np.testing.assert_allclose(last.wav, decoded[first : first + RATE // 2], atol=1e-6)


def ogg_checksum(page):
    """Ogg's CRC: polynomial 0x04c11db7, not reflected, no inversions."""
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return crc


def check(*argv):
    return cli.main(["data", "check", *map(str, argv)])


def test_check_says_what_is_wrong(folder, capsys):
    reasons = spoil(folder)
    sounds = folder / "sounds"
    write(sounds / "silent.wav", np.zeros(RATE, np.float32))
    write(sounds / "loud.wav", np.clip(30 * noise(1.0, 44_100, channels=2), -1, 1), 44_100)
    write(sounds / "copy.wav", noise(1.0, seed=5))
    rows = [[f"sounds/{name}.wav", f"sound {name}"] for name in range(6)]
    rows += [["sounds/silent.wav", "nothing"], ["sounds/loud.wav", "sound 5"]]
    rows += [["sounds/copy.wav", "long " * 257], ["sounds/gone.wav", "x"], ["sounds/4.wav", " "]]
    write_csv(folder / "manifest.csv", ["path", "caption"], *rows)

    assert check(folder, "--json", "--workers", 2) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["sounds"], report["usable"], report["captions"]) == (11, 5, 9)
    assert report["rates"] == {"16000": 5, "44100": 1}  # the short one was read
    assert report["channels"] == {"1": 5, "2": 1}
    assert report["seconds"] == pytest.approx(5.1)
    failing = {skip["name"]: (skip["reason"], skip["line"]) for skip in report["failing"]}
    assert failing.pop("sounds/gone.wav") == ("no such file", 11)
    assert failing.pop("sounds/4.wav") == ("empty caption", 12)
    assert set(failing) == set(reasons)
    assert all(reasons[name] in failing[name][0] for name in reasons)
    notes = {(skip["name"], skip["reason"]) for skip in report["notes"]}
    assert notes == {
        ("sounds/silent.wav", "silent: peak below -60 dB"),
        ("sounds/loud.wav", "clipped: over 0.1% of the samples at full scale"),
        ("sounds/loud.wav", "the same caption as sounds/5.wav"),
        ("sounds/copy.wav", "the same sound as sounds/5.wav"),
        ("sounds/copy.wav", "caption cut to 256 tokens"),
    }

    assert check(folder, "--workers", 0) == 1
    text = capsys.readouterr().out
    assert "11 sounds, 5 of them usable; 9 captions, 0:00:05 of sound" in text
    assert "training would leave out: 6" in text
    assert "      sounds/gone.wav (line 11)\n" in text
    assert "      sounds/copy.wav = sounds/5.wav\n" in text


def test_check_of_a_good_collection(folder, capsys):
    assert check(folder, "--batch-size", 6) == 0
    assert "6 sounds, 6 of them usable; 7 captions" in capsys.readouterr().out
    assert check(folder, "--batch-size", 7) == 1
    assert "fewer than a batch of 7" in capsys.readouterr().out
    assert check(folder, "--batch-size", 0) == 2
    assert "batch_size: got 0" in capsys.readouterr().err


def test_check_agrees_with_draws(folder, capsys):
    """What the check calls failing is what draws skip, and nothing else."""
    spoil(folder)
    check(folder, "--json")
    failing = {skip["name"] for skip in json.loads(capsys.readouterr().out)["failing"]}
    sounds = opened(folder)
    assert failing == {sounds.name(i) for i in range(6) if sounds.draw(i, 0).skipped}


def test_check_of_shards(shards, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards / "cache"))
    assert check(shards / "music-*.tar", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["sounds"], report["usable"], len(report["failing"])) == (8, 4, 4)


def test_check_of_a_wrong_source(folder, capsys):
    write_csv(folder / "manifest.csv", ["file", "caption"], ["a.wav", "x"])
    assert check(folder) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "lacking: path" in error


def test_titles_make_a_manifest(folder, capsys):
    sounds = folder / "sounds"
    (folder / "manifest.csv").unlink()
    assert cli.main(["data", "titles", str(sounds), "--captions", "names"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[:2] == ["path,caption", "0.wav,0"]
    (sounds / "manifest.csv").write_text(printed)
    assert opened(sounds).name(5) == "5.wav"
    (sounds / "manifest.csv").unlink()
    for output in (folder / "all.csv", folder / "deep" / "er" / "all.csv"):
        assert cli.main(["data", "titles", str(sounds), "--output", str(output)]) == 0
        assert opened(output).whole(5).text == "5"
    assert opened(folder / "all.csv").name(5) == "sounds/5.wav"
    capsys.readouterr()
    assert cli.main(["data", "titles", str(folder / "deep")]) == 2
    assert "without sound files" in capsys.readouterr().err
    assert cli.main(["data", "titles", str(sounds), "--output", "a.txt"]) == 2


def test_long_captions_are_cut_and_said_once():
    import musiclm_fast

    sizes = dict(dim=16, depth=1, heads=2, dim_head=8, max_seq_len=4)
    tower = musiclm_fast.TextTransformer(**sizes).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        four = tower(raw_texts=["one two three four", "a"])
        with pytest.warns(UserWarning, match="more than max_seq_len = 4 tokens are cut"):
            cut = tower(raw_texts=["one two three four five", "a"])
        again = tower(raw_texts=["one two three four six seven", "a"])
    torch.testing.assert_close(cut, four, atol=0, rtol=0)
    torch.testing.assert_close(again, four, atol=0, rtol=0)


def test_convert(folder, capsys):
    write(folder / "sounds" / "0.wav", noise(1.0, 44_100, channels=2), 44_100)
    write(folder / "sounds" / "1.ogg", noise(1.0, seed=1))
    (folder / "sounds" / "2.wav").write_bytes(b"no sound")
    write_csv(
        folder / "manifest.csv",
        ["path", "caption", "start", "end"],
        ["sounds/0.wav", '["a piano", "slow keys"]', "", ""],
        ["sounds/1.ogg", "a harp, plucked", "", ""],
        ["sounds/2.wav", "damaged", "", ""],
        ["sounds/3.wav", "[a part]", "0.25", "0.75"],
        ["sounds/3.wav", "another part", "0.5", ""],
    )
    out = folder / "converted"
    argv = ["data", "convert", str(folder), str(out), "--workers", "2"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "4 sounds at 16,000 Hz" in printed
    assert "1 x cannot be read as sound: Format not recognised (sounds/2.wav)" in printed

    before, after = opened(folder, clip_seconds=None), opened(out, clip_seconds=None)
    kept = [0, 1, 3, 4]
    assert [after.captions(i) for i in range(4)] == [before.captions(i) for i in kept]
    for i, index in enumerate(kept):
        wav = after.whole(i).wav
        np.testing.assert_allclose(wav, before.whole(index).wav, atol=1 / 32767)
    assert soundfile.info(out / after.file(0)).samplerate == RATE

    # again: what is there stays, what is damaged or at another rate is made anew
    paths = [out / after.file(i) for i in range(4)]
    paths[1].write_bytes(b"")
    times = [path.stat().st_mtime_ns for path in paths]
    assert cli.main(argv) == 0
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)] == [
        True, False, True, True,
    ]  # fmt: skip
    assert cli.main([*argv, "--sample-hz", "8000"]) == 0
    assert {soundfile.info(path).samplerate for path in paths} == {8000}


def test_convert_of_nothing_readable(folder, capsys):
    for path in (folder / "sounds").iterdir():
        path.write_bytes(b"nothing")
    assert cli.main(["data", "convert", str(folder), str(folder / "out"), "--workers", "0"]) == 2
    assert "none of 6 that can be read" in capsys.readouterr().err
    assert not (folder / "out" / "manifest.csv").exists()
