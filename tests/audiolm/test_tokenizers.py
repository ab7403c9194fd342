"""Semantic tokenizers and codecs: the embedded ones, HuBERT's conversion, EnCodec."""

import argparse
import collections
import pickle

import joblib
import numpy as np
import pytest
import torch

from musiclm_fast._optional import transformers_class
from musiclm_fast.audiolm import EncodecWrapper, HubertWithKmeans, MelCodec, MelKmeans
from musiclm_fast.audiolm.hubert_checkpoints import (
    convert_kmeans,
    load_centres,
    load_fairseq_hubert,
)
from musiclm_fast.nn.kmeans import kmeans, nearest

EncodecConfig, EncodecModel, HubertConfig, HubertModel = (
    transformers_class(name)
    for name in ("EncodecConfig", "EncodecModel", "HubertConfig", "HubertModel")
)
RATE = 16_000


def notes(count=12, seconds=1.0, rate=RATE):
    """Decaying tones of different pitches."""
    time = torch.arange(int(seconds * rate)) / rate
    pitches = 110 * 2 ** (torch.arange(count) / 6)
    tones = [sum(torch.sin(2 * torch.pi * p * h * time) / h for h in (1, 2, 3)) for p in pitches]
    return [0.3 * tone * torch.exp(-3 * time) for tone in tones]


def test_kmeans_finds_separate_clusters():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(8, 5, generator=generator) * 10
    points = (truth[:, None] + 0.1 * torch.randn(8, 30, 5, generator=generator)).flatten(0, 1)
    centres, counts = kmeans(points, 8, generator=generator)
    assert counts.tolist() == [30.0] * 8
    assert nearest(truth, centres)[1].max() < 0.1


def test_kmeans_with_fewer_points_than_clusters():
    points = torch.randn(3, 4)
    centres, counts = kmeans(points, 7)
    assert nearest(points, centres)[1].max() < 1e-6
    assert counts.sum() == 3


def test_semantic_tokens_tell_notes_apart():
    clips = notes()
    tokenizer = MelKmeans(codebook_size=32).fit(clips)
    ids = tokenizer(torch.stack(clips))
    assert ids.shape == (12, 25)
    assert len({tuple(row.tolist()) for row in ids}) == 12
    quiet = tokenizer(torch.stack(clips) * 0.9)
    assert (quiet == ids).float().mean() > 0.8
    other = MelKmeans(codebook_size=32)
    other.load_state_dict(tokenizer.state_dict())
    assert torch.equal(other(torch.stack(clips)), ids)


def test_codec_rebuilds_the_spectrogram():
    clips = notes()
    codec = MelCodec(num_quantizers=4, codebook_size=64).fit(clips)
    waves = torch.stack(clips)
    embeds, ids, _ = codec(waves, return_encoded=True)
    assert ids.shape == (12, 50, 4)
    assert ids.max() < 64
    assert torch.equal(codec.get_emb_from_indices(ids), embeds)
    frames = codec.mel(waves)
    errors = [
        (codec.get_emb_from_indices(ids[..., :q]) - frames).square().mean().item()
        for q in range(1, 5)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * frames.var().item()
    rebuilt = codec.decode_from_codebook_indices(ids)
    assert rebuilt.shape == (12, 1, RATE)
    heard = codec.mel(rebuilt[:, 0])
    assert (heard - frames).square().mean() < 0.15 * frames.var()
    assert torch.equal(codec.decode_from_codebook_indices(ids), rebuilt)


def test_stft_and_back():
    codec = MelCodec(num_quantizers=1, codebook_size=2)
    wave = torch.randn(2, 3200)
    inner = codec.mel.istft(codec.mel.stft(wave))
    torch.testing.assert_close(inner[:, 400:-400], wave[:, 400:-400], atol=1e-4, rtol=1e-4)


def test_other_rates_are_resampled():
    clips = notes(rate=22_050)
    codec = MelCodec(num_quantizers=2, codebook_size=16).fit(clips, input_sample_hz=22_050)
    _, ids, _ = codec(torch.stack(clips), input_sample_hz=22_050)
    assert ids.shape == (12, 50, 2)


def test_unfitted_and_too_short():
    with pytest.raises(ValueError, match="not fitted"):
        MelKmeans()(torch.randn(1, 16_000))
    codec = MelCodec(num_quantizers=1, codebook_size=4).fit(notes(2))
    with pytest.raises(ValueError, match="at least 320 samples"):
        codec(torch.randn(1, 100))
    with pytest.raises(ValueError, match="at least one"):
        MelKmeans().fit([])


# ---- HuBERT

TINY = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=1, intermediate_size=96,
    conv_dim=[16] * 3, conv_kernel=[10, 3, 3], conv_stride=[5, 2, 2],
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
)  # fmt: skip


def fairseq_names(weights, norm):
    """transformers' HuBERT weights under the names fairseq gives them."""
    renamed = {}
    for key, value in weights.items():
        key = key.replace("parametrizations.weight.original0", "weight_g")
        key = key.replace("parametrizations.weight.original1", "weight_v")
        for ours, theirs in (
            (".conv.", ".0."),
            (".attention.", ".self_attn."),
            ("feed_forward.intermediate_dense", "fc1"),
            ("feed_forward.output_dense", "fc2"),
            ("encoder.pos_conv_embed.0.", "encoder.pos_conv.0."),
            ("feature_projection.projection", "post_extract_proj"),
            ("feature_projection.layer_norm", "layer_norm"),
            ("masked_spec_embed", "mask_emb"),
        ):
            key = key.replace(ours, theirs)
        if "conv_layers" in key:
            key = key.replace("layer_norm.", "2.1." if norm == "layer" else "2.")
        elif "encoder.layers" in key and "final_layer_norm" not in key:
            key = key.replace("layer_norm", "self_attn_layer_norm")
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_fairseq_checkpoint_without_fairseq(tmp_path, norm):
    torch.manual_seed(0)
    layered = norm == "layer"
    config = HubertConfig(
        **TINY, feat_extract_norm=norm, conv_bias=layered, do_stable_layer_norm=layered
    )
    model = HubertModel(config).eval()
    weights = fairseq_names(model.state_dict(), norm)
    weights["final_proj.weight"] = torch.randn(4, 64)
    # a configuration of classes that torch does not take, as fairseq's
    content = {"model": weights, "args": argparse.Namespace(arch="hubert"),
               "cfg": collections.Counter(a=1)}  # fmt: skip
    torch.save(content, tmp_path / "hubert.pt")
    loaded = load_fairseq_hubert(tmp_path / "hubert.pt")
    wave = torch.randn(2, 4000)
    with torch.no_grad():
        expected = model(wave, output_hidden_states=True).hidden_states
        actual = loaded(wave, output_hidden_states=True).hidden_states
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_pickles_are_not_run(tmp_path):
    torch.save({"model": {}, "args": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="not fairseq's HuBERT"):
        load_fairseq_hubert(tmp_path / "bad.pt")
    joblib.dump({"cluster_centers_": np.eye(3), "x": Harmful()}, tmp_path / "bad.bin")
    assert load_centres(tmp_path / "bad.bin").shape == (3, 3)
    objects = np.array([Harmful(), 1], dtype=object)
    joblib.dump({"cluster_centers_": np.eye(3), "x": objects}, tmp_path / "worse.bin")
    with pytest.raises(ValueError, match="no cluster centres"):
        load_centres(tmp_path / "worse.bin")


@pytest.mark.parametrize("compress", [0, 3])
def test_centres_of_scikit_learn(tmp_path, compress):
    sklearn = pytest.importorskip("sklearn.cluster")
    model = sklearn.MiniBatchKMeans(n_clusters=5, n_init=1).fit(
        np.random.default_rng(0).random((60, 64))
    )
    joblib.dump(model, tmp_path / "km.bin", compress=compress)
    convert_kmeans(tmp_path / "km.bin", tmp_path / "km.npz")
    centres = torch.from_numpy(model.cluster_centers_).float()
    assert torch.equal(load_centres(tmp_path / "km.npz"), centres)
    torch.manual_seed(0)
    hubert = HubertModel(HubertConfig(**TINY))
    tokenizer = HubertWithKmeans(hubert, tmp_path / "km.bin", output_layer=2)
    wave = torch.randn(2, 4000)
    ids = tokenizer(wave, flatten=False)
    features = tokenizer.features(wave)
    expected = torch.cdist(features, centres.expand(2, -1, -1)).argmin(-1)
    assert torch.equal(ids, expected)
    assert tokenizer.codebook_size == 5
    assert tokenizer.downsample_factor == 20


def test_hubert_from_a_folder_and_fitted(tmp_path):
    HubertModel(HubertConfig(**TINY)).save_pretrained(tmp_path)
    tokenizer = HubertWithKmeans(tmp_path, output_layer=3, codebook_size=6)
    with pytest.raises(ValueError, match="without centres"):
        tokenizer(torch.randn(1, 4000))
    tokenizer.fit(notes(4, 0.25))
    assert tokenizer(torch.stack(notes(4, 0.25))).unique().numel() > 2
    with pytest.raises(ValueError, match="output_layer"):
        HubertWithKmeans(tmp_path, output_layer=4)
    with pytest.raises(FileNotFoundError):
        HubertWithKmeans(tmp_path, tmp_path / "absent.npz", output_layer=1)
    (tmp_path / "text.bin").write_bytes(pickle.dumps("nothing"))
    with pytest.raises(ValueError, match="no cluster centres"):
        load_centres(tmp_path / "text.bin")


@pytest.mark.parametrize("kind", ["Wav2Vec2", "WavLM", "Hubert"])
def test_any_audio_model_of_transformers(tmp_path, kind):
    """A folder or a name: transformers finds the class by the configuration."""
    model = transformers_class(f"{kind}Model")(transformers_class(f"{kind}Config")(**TINY)).eval()
    model.save_pretrained(tmp_path)
    tokenizer = HubertWithKmeans(
        tmp_path, output_layer=2, codebook_size=5, target_sample_hz=24_000
    ).fit(notes(4, 0.25), input_sample_hz=RATE)
    assert type(tokenizer.model).__name__ == f"{kind}Model"
    wave = torch.stack(notes(3, 0.25, rate=24_000))
    with torch.no_grad():
        features = model(wave, output_hidden_states=True).hidden_states[2]
    expected = torch.cdist(features, tokenizer.cluster_centers.expand(3, -1, -1)).argmin(-1)
    assert torch.equal(tokenizer(wave), expected)


# ---- EnCodec


def encodec():
    torch.manual_seed(0)
    config = EncodecConfig(
        target_bandwidths=[1.5, 3.0], num_filters=4, hidden_size=16, codebook_size=1024,
        codebook_dim=16, num_lstm_layers=1,
    )  # fmt: skip
    model = EncodecModel(config).eval()
    for layer in model.quantizer.layers:
        layer.codebook.embed.copy_(torch.randn_like(layer.codebook.embed))
    return model


def test_encodec_is_transformers_encodec():
    model = encodec()
    codec = EncodecWrapper(model=model, bandwidth=3.0)
    wave = torch.randn(2, 3200)
    with torch.no_grad():
        whole = model.encode(wave[:, None], bandwidth=3.0)
        decoded = model.decode(whole.audio_codes, whole.audio_scales)[0]
    _, ids, _ = codec(wave, return_encoded=True)
    assert ids.shape == (2, 10, 4)
    assert torch.equal(ids.transpose(1, 2), whole.audio_codes.reshape(2, 4, 10))
    torch.testing.assert_close(codec.decode_from_codebook_indices(ids), decoded)
    assert (codec.num_quantizers, codec.codebook_size, codec.downsample_factor) == (4, 1024, 320)
    assert not codec.train().model.training


def test_encodec_checks():
    with pytest.raises(ValueError, match="bandwidth"):
        EncodecWrapper(model=encodec(), bandwidth=7.0)
    with pytest.raises(ValueError, match="target_sample_hz"):
        EncodecWrapper(target_sample_hz=16_000)


@pytest.mark.parametrize("rate", [24_000, 32_000])
def test_encodec_by_rate(rate, monkeypatch):
    """The model that is fetched, its rate and its codes."""
    asked = []

    def fetched(name):
        asked.append(name)
        model = encodec()
        model.config.sampling_rate = rate
        return model

    monkeypatch.setattr(EncodecModel, "from_pretrained", fetched)
    codec = EncodecWrapper(target_sample_hz=rate)
    assert asked == [f"facebook/encodec_{rate // 1000}khz"]
    assert codec.target_sample_hz == rate
    _, ids, _ = codec(torch.stack(notes(2, 0.2)), input_sample_hz=RATE)
    assert ids.shape[1] == -(-int(0.2 * rate) // codec.downsample_factor)
