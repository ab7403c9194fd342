"""Quantizer, MusicLM and the stages' trainers: from clips to a text's music."""

import hashlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from musiclm_fast import MuLaNEmbedQuantizer, MusicLM
from musiclm_fast.audio.resampling import resample
from musiclm_fast.audiolm import (
    AudioLM,
    CoarseTransformer,
    CoarseTransformerTrainer,
    FineTransformer,
    FineTransformerTrainer,
    MelCodec,
    MelKmeans,
    SemanticTransformer,
    SemanticTransformerTrainer,
    SoundFolder,
)
from tests.audiolm.test_tokenizers import RATE, notes

DIM = 32
SIZES = dict(dim=DIM, depth=1, heads=2, dim_head=16, audio_text_condition=True)


class Joint(nn.Module):
    """A joint embedding that is not a MuLaN: random projections of spectra and of letters."""

    dim_latent = 16
    sample_hz = RATE

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("heard", torch.randn(129, 16, generator=generator))
        self.register_buffer("read", torch.randn(128, 16, generator=generator))

    def get_audio_latents(self, wavs):
        frames = wavs.unfold(1, 256, 256) * torch.hann_window(256)
        return F.normalize(torch.fft.rfft(frames).abs().mean(1).log1p() @ self.heard, dim=-1)

    def get_text_latents(self, texts=None, raw_texts=None):
        letters = [torch.bincount(torch.tensor(list(t.encode())), minlength=128) for t in raw_texts]
        return F.normalize(torch.stack(letters).float() @ self.read, dim=-1)


def make_quantizer(**options):
    torch.manual_seed(0)
    return MuLaNEmbedQuantizer(Joint(), (DIM,) * 3, rq_num_quantizers=3, codebook_size=8, **options)


@pytest.fixture(scope="module")
def clips():
    return notes(12, 0.5)


@pytest.fixture(scope="module")
def parts(clips):
    return (
        MelKmeans(codebook_size=12).fit(clips),
        MelCodec(num_quantizers=4, codebook_size=10).fit(clips),
    )


def stages():
    torch.manual_seed(0)
    return (
        SemanticTransformer(**SIZES, num_semantic_tokens=12, drop_text_embeds=True),
        CoarseTransformer(
            **SIZES, num_semantic_tokens=12, codebook_size=10, num_coarse_quantizers=2
        ),
        FineTransformer(
            **SIZES, codebook_size=10, num_coarse_quantizers=2, num_fine_quantizers=2,
            drop_text_embeds=True,
        ),
    )  # fmt: skip


# ---- quantizer


def test_fit_freezes_codes_that_tell_clips_apart(clips):
    quantizer = make_quantizer().fit(clips, progress=False)
    assert quantizer.fitted
    before = {k: v.clone() for k, v in quantizer.rq.state_dict().items()}
    quantizer.train()
    first = quantizer(wavs=torch.stack(clips))
    quantizer(wavs=torch.randn(30, 8000))
    for name, value in quantizer.rq.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(first, quantizer(wavs=torch.stack(clips)))
    assert len(first.flatten(1).unique(dim=0)) >= 8
    latents = quantizer.mulan.get_audio_latents(torch.stack(clips))
    rebuilt, _, _ = quantizer.rq(latents)
    assert (rebuilt - latents).square().mean() < 0.1 * latents.var()


def test_fit_of_latents_is_reproducible_and_moves_the_fingerprint():
    latents = F.normalize(torch.randn(200, 16), dim=-1)
    one, two = (make_quantizer().fit(latents, seed=1) for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    assert one.fingerprint() != make_quantizer().fit(latents, seed=2).fingerprint()
    other = make_quantizer()
    other.load_state_dict(one.state_dict())
    assert other.fitted
    assert other.fingerprint() == one.fingerprint()


def test_the_fingerprint_is_hashed_once_and_follows_the_weights(monkeypatch):
    quantizer = make_quantizer().fit(F.normalize(torch.randn(60, 16), dim=-1))
    quantizer.mulan.scale = nn.Parameter(torch.ones(3))  # no whole number of words
    digests = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda: digests.append(None) or sha256())
    seen = [quantizer.fingerprint()]
    for _ in range(3):
        assert quantizer.fingerprint() == seen[-1]
    assert len(digests) == 1

    heard, book = quantizer.mulan.heard, quantizer.rq.layers[1]._codebook.embed
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}

    def changed(change):
        with torch.no_grad():
            change()
        seen.append(quantizer.fingerprint())
        assert len(set(seen)) == len(seen) == len(digests)

    changed(lambda: heard[3, 2].add_(1e-3))
    changed(lambda: heard.copy_(heard.flip(0)))
    changed(lambda: heard.data[0, 0].mul_(-1))  # leaves the version counter as it is
    changed(lambda: book.data.copy_(2 * book))
    changed(lambda: quantizer.mulan.scale.data.neg_())
    changed(lambda: setattr(quantizer.mulan, "heard", heard.flip(1)))
    quantizer.load_state_dict(state)
    assert quantizer.fingerprint() == seen[0]
    quantizer.mulan.heard = quantizer.mulan.heard.t().contiguous().t()  # the same values
    before = len(digests)
    assert [quantizer.fingerprint() for _ in range(2)] == seen[:1] * 2
    assert len(digests) == before + 1
    with torch.inference_mode():  # such tensors have no version
        quantizer.mulan.heard = heard.clone()
        seen.append(quantizer.fingerprint())
        quantizer.mulan.heard.add_(1)
        assert quantizer.fingerprint() != seen[-1]


def test_errors_of_fit():
    with pytest.raises(ValueError, match="at least one clip"):
        make_quantizer().fit([], progress=False)
    with pytest.raises(ValueError, match="finite"):
        make_quantizer().fit(torch.full((4, 16), torch.nan))
    with pytest.raises(ValueError, match="dim_latent"):
        make_quantizer().fit(torch.randn(4, 15))
    with pytest.raises(ValueError, match="not fitted"):
        make_quantizer().freeze()


def test_windows_are_averaged():
    quantizer = make_quantizer(window_seconds=0.2, window_stride_seconds=0.1)
    quantizer.fit(notes(12, 0.5), progress=False)
    wave = torch.stack(notes(2, 0.5))
    windows = wave.unfold(1, 3200, 1600)
    assert windows.shape[1] == 4
    expected = [quantizer.mulan.get_audio_latents(w).mean(0) for w in windows]
    _, ids, _ = quantizer.rq(F.normalize(torch.stack(expected), dim=-1))
    table = quantizer.cond_embeddings["coarse"]
    torch.testing.assert_close(quantizer(wavs=wave, namespace="coarse")[:, 1], table[1][ids[:, 1]])


def test_the_papers_sizes():
    quantizer = MuLaNEmbedQuantizer.paper(Joint(), (DIM,) * 3)
    assert quantizer.cond_embeddings["fine"].shape == (12, 1024, DIM)
    assert quantizer.window_seconds == 10.0


# ---- trainers


def trainer(kind, parts, quantizer, clips, results, **options):
    semantic, coarse, fine = stages()
    tokenizer, codec = parts
    first = {
        SemanticTransformerTrainer: (tokenizer, semantic),
        CoarseTransformerTrainer: (coarse, codec, tokenizer),
        FineTransformerTrainer: (fine, codec),
    }[kind]
    defaults = dict(
        num_train_steps=4, batch_size=3, lr=1e-2, save_model_every=2, save_results_every=2,
        valid_frac=0.25, accelerate_kwargs={"cpu": True}, results_folder=results,
        audio_conditioner=quantizer, dataset=clips,
    )  # fmt: skip
    return kind(*first, **{**defaults, **options})


TRAINERS = (SemanticTransformerTrainer, CoarseTransformerTrainer, FineTransformerTrainer)


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_trains_its_conditioning_and_resumes(kind, parts, clips, tmp_path):
    quantizer = make_quantizer()
    before = {k: v.clone() for k, v in quantizer.cond_embeddings.items()}
    whole = trainer(kind, parts, quantizer, clips, tmp_path)
    assert quantizer.fitted
    logs = []
    torch.manual_seed(7)
    whole.train(logs.append)
    assert [("valid_loss" in log) for log in logs] == [False, True, False, True]
    assert whole.train_wrapper.training
    for name, table in quantizer.cond_embeddings.items():
        assert torch.equal(table, before[name]) == (name != whole.stage_name)

    resumed = trainer(kind, parts, make_quantizer(), clips, tmp_path)
    resumed.load(tmp_path / f"{whole.stage_name}.transformer.2.pt")
    assert int(resumed.steps) == 2
    resumed.train()
    for a, b in zip(whole.trained_parameters, resumed.trained_parameters, strict=True):
        torch.testing.assert_close(a, b)


def test_a_longer_training_learns(parts, clips, tmp_path):
    quantizer = make_quantizer()
    learner = trainer(
        SemanticTransformerTrainer, parts, quantizer, clips, tmp_path, num_train_steps=60,
        save_model_every=1000, valid_frac=0.0,
    )  # fmt: skip
    losses = []
    learner.train(lambda log: losses.append(log["loss"]))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_another_quantizer_is_refused(parts, clips, tmp_path):
    quantizer = make_quantizer().fit(clips, progress=False)
    learner = trainer(SemanticTransformerTrainer, parts, quantizer, clips, tmp_path)
    learner.train()
    path = tmp_path / "semantic.transformer.4.pt"
    semantic, *_ = stages()
    other = make_quantizer().fit(clips[:5], seed=5, progress=False)
    with pytest.raises(ValueError, match="audio_conditioner"):
        semantic.load(path, audio_conditioner=other)
    same = make_quantizer()
    same.load_state_dict(quantizer.state_dict())
    same.cond_embeddings["semantic"].data.zero_()
    semantic.load(path, audio_conditioner=same)
    assert torch.equal(same.cond_embeddings["semantic"], quantizer.cond_embeddings["semantic"])
    assert semantic.conditioner_fingerprint == quantizer.fingerprint()
    with pytest.raises(ValueError, match="another architecture"):
        stages()[2].load(path)
    with pytest.raises(FileNotFoundError):
        semantic.load(tmp_path / "absent.pt")


def test_a_folder_of_sounds_and_rows_with_embeddings(parts, clips, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    for index, clip in enumerate(notes(6, 0.5, rate=22_050)):
        soundfile.write(tmp_path / f"{index}.wav", clip.numpy(), 22_050)
    folder = SoundFolder(tmp_path, (RATE, 8000), max_length=6000, multiple_of=(640, 320))
    assert [wave.shape[0] for wave in folder[0]] == [5760, 2880]
    learner = trainer(
        CoarseTransformerTrainer, parts, make_quantizer(), None, tmp_path / "out",
        folder=tmp_path, data_max_length_seconds=0.4, num_train_steps=1, batch_size=2,
    )  # fmt: skip
    learner.train()
    rows = [(clip, torch.randn(3, DIM)) for clip in clips]
    learner = trainer(SemanticTransformerTrainer, parts, None, rows, tmp_path / "out")
    learner.train()
    with pytest.raises(ValueError, match="neither"):
        trainer(SemanticTransformerTrainer, parts, None, None, tmp_path / "out")
    with pytest.raises(ValueError, match="at least one batch"):
        trainer(SemanticTransformerTrainer, parts, None, rows[:2], tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        SoundFolder(tmp_path / "absent", RATE)


# ---- MusicLM


def make_musiclm(parts, quantizer):
    semantic, coarse, fine = stages()
    semantic.to_logits.bias.data[-1] = -1e9
    audio_lm = AudioLM(
        wav2vec=parts[0], codec=parts[1], semantic_transformer=semantic,
        coarse_transformer=coarse, fine_transformer=fine,
    )  # fmt: skip
    return MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=quantizer)


def test_each_stage_sees_its_own_namespace(parts, clips, monkeypatch):
    quantizer = make_quantizer().fit(clips, progress=False)
    musiclm = make_musiclm(parts, quantizer)
    seen = {}
    for name in ("semantic", "coarse", "fine"):
        wrapper = getattr(musiclm.audio_lm, name)
        original = wrapper.generate

        def watch(*args, name=name, original=original, **kwargs):
            seen[name] = kwargs["text_embeds"]
            return original(*args, **kwargs)

        monkeypatch.setattr(wrapper, "generate", watch)
    options = dict(seconds=0.2, seed=0, progress=False)
    samples = musiclm("a slow waltz", num_samples=3, return_all=True, **options)
    for name, embeds in seen.items():
        expected = quantizer(raw_texts=["a slow waltz"], namespace=name)
        assert torch.equal(embeds, expected.expand(3, -1, -1))
    scores = [sample.score for sample in samples]
    assert scores == sorted(scores, reverse=True)
    best = musiclm("a slow waltz", num_samples=3, **options)
    assert torch.equal(best, samples[0].wave)
    latent = quantizer.mulan.get_text_latents(raw_texts=["a slow waltz"])
    cosine = (quantizer.mulan.get_audio_latents(best) * latent).sum()
    assert samples[0].score == pytest.approx(float(cosine))
    musiclm("a slow waltz", single_namespace=True, **options)
    assert torch.equal(seen["fine"], quantizer(raw_texts=["a slow waltz"], namespace="semantic"))


class Counter:
    """Counts the calls of methods while it lets them through."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.calls = monkeypatch, {}

    def count(self, owner, method):
        original = getattr(owner, method)
        self.calls[method] = 0

        def counted(*args, **kwargs):
            self.calls[method] += 1
            return original(*args, **kwargs)

        self.monkeypatch.setattr(owner, method, counted)


def test_one_text_goes_through_the_tower_once(parts, clips, monkeypatch, tmp_path):
    pytest.importorskip("soundfile")
    musiclm = make_musiclm(parts, make_quantizer().fit(clips, progress=False))
    counter = Counter(monkeypatch)
    counter.count(Joint, "get_text_latents")
    options = dict(seed=0, progress=False)
    for call in (
        lambda: musiclm("waltz", 3, seconds=0.2, **options),
        lambda: musiclm("waltz", 2, seconds=0.2, single_namespace=True, **options),
        lambda: musiclm.stream_to_file(
            "waltz", tmp_path / "x.wav", seconds=0.6, window_seconds=0.2, **options
        ),
    ):
        counter.calls["get_text_latents"] = 0
        call()
        assert counter.calls["get_text_latents"] == 1


@pytest.mark.parametrize("conditioner", [None, "quantizer", "any"])
def test_a_prompt_is_tokenized_and_encoded_once(parts, clips, monkeypatch, conditioner):
    quantizer = make_quantizer().fit(clips, progress=False)

    class AnyConditioner(nn.Module):
        sample_hz = RATE

        def forward(self, wavs, namespace):
            return quantizer(wavs=wavs, namespace=namespace)

    names = ("semantic", "coarse", "fine")
    transformers = dict(zip((f"{name}_transformer" for name in names), stages(), strict=True))
    model = AudioLM(
        wav2vec=parts[0], codec=parts[1], **transformers,
        audio_conditioner={None: None, "quantizer": quantizer}.get(conditioner, AnyConditioner()),
    )  # fmt: skip
    prompt = torch.stack(notes(2, 0.4))
    counter = Counter(monkeypatch)
    for owner, method in (
        (parts[0], "forward"), (parts[1], "get_emb_from_indices"), (Joint, "get_audio_latents"),
    ):  # fmt: skip
        counter.count(owner, method)
    embeds = {} if conditioner else dict(text_embeds=torch.randn(2, 3, DIM))
    waves = model(
        seconds=0.2, prime_wave=prompt, prime_wave_input_sample_hz=RATE, seed=0, progress=False,
        return_coarse_generated_wave=True, **embeds,
    )  # fmt: skip
    decoded = len(waves) if isinstance(waves, list) else 1
    assert counter.calls["forward"] == 1
    assert counter.calls["get_emb_from_indices"] == 1 + decoded
    wanted = {None: 0, "quantizer": 1, "any": 3}[conditioner]
    assert counter.calls["get_audio_latents"] == wanted


def test_music_is_refused_before_any_sampling(parts, clips, monkeypatch):
    fitted = make_quantizer().fit(clips, progress=False)
    with pytest.raises(ValueError, match="not fitted"):
        make_musiclm(parts, make_quantizer())("waltz")
    musiclm = make_musiclm(parts, fitted)
    monkeypatch.setattr(
        type(musiclm.audio_lm.semantic), "generate", lambda *a, **k: pytest.fail("sampled")
    )
    for text, message in ((" ", "text"), ("", "text")):
        with pytest.raises(ValueError, match=message):
            musiclm(text)
    with pytest.raises(ValueError, match="num_samples"):
        musiclm("waltz", num_samples=0)
    with pytest.raises(ValueError, match="seconds"):
        musiclm("waltz", seconds=0.0)
    musiclm.audio_lm.coarse.transformer.conditioner_fingerprint = "0123456789abcdef"
    with pytest.raises(ValueError, match="a coarse stage trained with"):
        musiclm("waltz")
    narrow = MuLaNEmbedQuantizer(Joint(), (8, 8, 8), rq_num_quantizers=2, codebook_size=4)
    narrow.fit(clips, progress=False)
    with pytest.raises(ValueError, match="a condition of 32"):
        make_musiclm(parts, narrow)("waltz")


def test_parts_of_three_rates(clips, monkeypatch, tmp_path):
    """Tokenizer at 8 kHz, codec at 24 kHz, joint embedding at 16 kHz: each hears its own."""
    slow = [resample(clip, RATE, 8000) for clip in clips]
    tokenizer = MelKmeans(12, target_sample_hz=8000, downsample_factor=320).fit(slow)
    codec = MelCodec(4, 10, target_sample_hz=24_000, downsample_factor=480)
    codec.fit(clips, input_sample_hz=RATE)
    heard = []
    embed = Joint.get_audio_latents
    monkeypatch.setattr(
        Joint, "get_audio_latents", lambda self, w: heard.append(w.shape[1]) or embed(self, w)
    )
    for kind, wave in zip(TRAINERS, (slow[0], clips[0], slow[0]), strict=True):
        heard.clear()
        hz = {SemanticTransformerTrainer: None, CoarseTransformerTrainer: RATE}.get(kind, 8000)
        learner = trainer(
            kind, (tokenizer, codec), make_quantizer(), [wave] * 6, tmp_path, data_sample_hz=hz,
            num_train_steps=1,
        )  # fmt: skip
        learner.train_step()
        assert set(heard) == {8000}  # half a second at 16 kHz, for the fit and for the step
    musiclm = make_musiclm((tokenizer, codec), make_quantizer().fit(clips, progress=False))
    heard.clear()
    wave = musiclm("waltz", 2, seconds=0.2, seed=0, progress=False)
    assert wave.shape[1] <= 0.2 * 24_000
    assert max(heard) <= 0.2 * RATE
    monkeypatch.setattr(codec, "target_sample_hz", None)
    with pytest.raises(ValueError, match="a codec that says its rate"):
        musiclm("waltz", 2, max_length=4, progress=False)


def test_any_joint_embedding(clips):
    class Silent(nn.Module):
        get_audio_latents, get_text_latents = Joint.get_audio_latents, Joint.get_text_latents

        def __init__(self):
            super().__init__()
            self.heard, self.read = torch.randn(129, 16), torch.randn(128, 16)

    with pytest.raises(ValueError, match="dim_latent"):
        MuLaNEmbedQuantizer(Silent(), (DIM,) * 3)
    quantizer = MuLaNEmbedQuantizer(
        Silent(), (DIM,) * 3, rq_num_quantizers=2, codebook_size=4, dim_latent=16
    ).fit(clips, progress=False)
    assert quantizer(raw_texts=["a", "b"]).shape == (2, 2, DIM)
    assert quantizer(wavs=torch.stack(clips[:3]), namespace="fine").shape == (3, 2, DIM)
    with pytest.raises(ValueError, match="get_audio_latents"):
        MuLaNEmbedQuantizer(nn.Linear(2, 2), (DIM,) * 3)


def test_a_long_piece_for_a_text(parts, clips, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    musiclm = make_musiclm(parts, make_quantizer().fit(clips, progress=False))
    musiclm.audio_lm.coarse.transformer.coarse_logit_weights.data[:, -1] = 0.0
    options = dict(seconds=0.9, window_seconds=0.4, prime_seconds=0.2, seed=0, progress=False)
    path = tmp_path / "out" / "long.wav"
    written = musiclm.stream_to_file("a slow waltz", path, **options)
    samples, rate = soundfile.read(path)
    assert rate == RATE
    assert len(samples) == written * RATE
    assert written == pytest.approx(0.9, abs=0.02)
    again = musiclm.stream_to_file("a slow waltz", tmp_path / "again.wav", **options)
    assert again == written
    assert (soundfile.read(tmp_path / "again.wav")[0] == samples).all()
    for wrong in (dict(seconds=0), dict(prime_seconds=-1.0), dict(window_seconds=float("inf"))):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            musiclm.stream_to_file("waltz", tmp_path / "no.wav", **{**options, **wrong})
    with pytest.raises(ValueError, match="text"):
        musiclm.stream_to_file(" ", tmp_path / "no.wav", **options)
    assert not (tmp_path / "no.wav").exists()


def test_an_unfitted_codec_is_refused_before_any_sampling(parts, clips, monkeypatch):
    quantizer = make_quantizer().fit(clips, progress=False)
    monkeypatch.setattr(
        "musiclm_fast.audiolm.wrappers.semantic.SemanticTransformerWrapper.generate",
        lambda *a, **k: pytest.fail("sampled"),
    )
    musiclm = make_musiclm((parts[0], MelCodec(4, 10)), quantizer)
    with pytest.raises(ValueError, match="codec: got a MelCodec that is not fitted"):
        musiclm("waltz", seconds=0.2)
    musiclm = make_musiclm((MelKmeans(12), parts[1]), quantizer)
    prime = dict(prime_wave=torch.randn(1, RATE), prime_wave_input_sample_hz=RATE)
    with pytest.raises(ValueError, match="wav2vec: got a MelKmeans that is not fitted"):
        musiclm("waltz", seconds=0.2, **prime)
    with pytest.raises(ValueError, match="finite"):
        make_musiclm(parts, quantizer)("waltz", seconds=float("inf"))
