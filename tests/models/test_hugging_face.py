"""Encoders of transformers as towers, on tiny random models built here."""

from __future__ import annotations

import json

import pytest
import torch

import musiclm_fast
from musiclm_fast._checkpoint import CheckpointError
from musiclm_fast._optional import transformers_class
from musiclm_fast.models.checkpoint import load_mulan, save_checkpoint
from musiclm_fast.models.configuration import mulan_config
from musiclm_fast.models.hugging_face_audio import HuggingFaceAudio
from musiclm_fast.models.hugging_face_text import HuggingFaceText
from musiclm_fast.training.grad_cache import cached_step

pytest.importorskip("transformers")

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "calm", "piano", "loud", "drums", "with", "strings"]
CONV = dict(
    conv_dim=(16, 16), conv_kernel=(10, 8), conv_stride=(8, 8), num_feat_extract_layers=2,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
)  # fmt: skip

TEXTS = {
    "bert": ("BertConfig", dict(vocab_size=40, **SIZES)),
    "roberta": ("RobertaConfig", dict(vocab_size=40, max_position_embeddings=20, **SIZES)),
    "t5": (
        "T5Config",
        dict(vocab_size=40, d_model=32, d_kv=16, d_ff=48, num_layers=3, num_heads=2),
    ),
    "gpt2": (
        "GPT2Config",
        dict(vocab_size=40, n_embd=32, n_layer=3, n_head=2, bos_token_id=2, eos_token_id=3),
    ),
    "clip": (
        "CLIPConfig",
        dict(
            text_config=dict(vocab_size=40, bos_token_id=2, eos_token_id=3, **SIZES),
            vision_config=dict(image_size=32, patch_size=16, **SIZES),
        ),
    ),
}
WAV2VEC = ("Wav2Vec2FeatureExtractor", dict(sampling_rate=8000))
AUDIOS = {
    "wav2vec2": ("Wav2Vec2Config", dict(**SIZES, **CONV), WAV2VEC),
    "hubert, layer norm": (
        "HubertConfig",
        dict(**SIZES, **CONV, feat_extract_norm="layer", do_stable_layer_norm=True),
        ("Wav2Vec2FeatureExtractor", dict(sampling_rate=8000, return_attention_mask=True)),
    ),
    "ast": (
        "ASTConfig",
        dict(max_length=128, num_mel_bins=32, **SIZES),
        ("ASTFeatureExtractor", dict(max_length=128, num_mel_bins=32)),
    ),
    "whisper": (
        "WhisperConfig",
        dict(
            vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, d_model=32,
            decoder_start_token_id=3, encoder_layers=3, encoder_attention_heads=2,
            encoder_ffn_dim=48, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=48,
            max_source_positions=100,
        ),
        ("WhisperFeatureExtractor", dict(chunk_length=2)),
    ),
    "wav2vec2-bert": (
        "Wav2Vec2BertConfig",
        dict(vocab_size=40, **SIZES),
        ("SeamlessM4TFeatureExtractor", dict()),
    ),
}  # fmt: skip


def random_model(config, values):
    torch.manual_seed(0)
    built = transformers_class(config)(**values)
    return transformers_class("AutoModel").from_config(built)


def word_tokenizer(**options):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]")
    return transformers_class("PreTrainedTokenizerFast")(
        tokenizer_object=fast, **{"pad_token": "[PAD]", **special, **options}
    )


def text_tower(name="bert", **options):
    options.setdefault("tokenizer", word_tokenizer())
    return HuggingFaceText(random_model(*TEXTS[name]), **options)


def audio_tower(name="wav2vec2", **options):
    config, values, (extractor, own) = AUDIOS[name]
    options.setdefault("feature_extractor", transformers_class(extractor)(**own))
    return HuggingFaceAudio(random_model(config, values), **options)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def own_audio():
    torch.manual_seed(0)
    return musiclm_fast.AudioSpectrogramTransformer(
        16, 3, (64, 16), heads=2, dim_head=8, front_end="mulan"
    )


CAPTIONS = ["calm piano", "loud drums with strings", "piano"]


@pytest.mark.parametrize("name", TEXTS)
def test_text_equals_the_encoder(name):
    tower = text_tower(name, pooling="mean").eval()
    assert (tower.dim, tower.depth) == (32, 3)
    with torch.no_grad():
        out, layers = tower(raw_texts=CAPTIONS, return_all_layers=True)
        assert out.shape == (3, 32) and layers.shape == (2, 3, 1, 32)
        for row, text in enumerate(CAPTIONS):  # alone, so without padding
            ids = torch.tensor([word_tokenizer()(text)["input_ids"]])
            full = tower.model(input_ids=ids, output_hidden_states=True)
            torch.testing.assert_close(out[row], full.last_hidden_state[0].mean(dim=0))
            for layer in range(2):
                expected = full.hidden_states[layer + 1][0].mean(dim=0)
                torch.testing.assert_close(layers[layer, row, 0], expected)


@pytest.mark.parametrize("pooling, place", [("cls", 0), ("last", -1)])
def test_pooling_of_one_token(pooling, place):
    tower = text_tower("gpt2", pooling=pooling).eval()
    ids = torch.tensor([word_tokenizer()("piano")["input_ids"]])
    with torch.no_grad():
        out = tower(raw_texts=CAPTIONS)
        torch.testing.assert_close(out[2], tower.model(ids).last_hidden_state[0, place])


def test_text_takes_token_ids():
    tower = text_tower().eval()
    ids = word_tokenizer()(CAPTIONS, padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(tower(ids), tower(raw_texts=CAPTIONS))
    without = HuggingFaceText(random_model(*TEXTS["bert"]))
    with pytest.raises(ValueError, match="raw_texts: got strings, expected token ids"):
        without(raw_texts=CAPTIONS)


def test_a_decoder_without_a_pad_token():
    tower = text_tower("gpt2", tokenizer=word_tokenizer(pad_token=None)).eval()
    with torch.no_grad():
        torch.testing.assert_close(tower(raw_texts=CAPTIONS)[2], tower(raw_texts=["piano"])[0])


def test_long_texts_are_cut_and_said_once():
    tower = text_tower("roberta").eval()
    assert tower.max_seq_len == 20 - 2  # RoBERTa's positions start at 2
    long = "piano " * 40
    with pytest.warns(UserWarning, match="cut to 18 tokens: 'piano piano"):
        cut = tower(raw_texts=[long])
    assert torch.equal(tower(raw_texts=[long]), cut)
    with pytest.raises(ValueError, match="at most max_seq_len = 18"):
        tower(torch.ones(1, 19, dtype=torch.int64))


SLOW_AUDIOS = ("whisper", "wav2vec2-bert")  # their extractors run in numpy


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW_AUDIOS else ()) for n in AUDIOS]
)
def test_audio_equals_the_encoder(name):
    tower = audio_tower(name).eval()
    rate = tower.front_end.sample_hz
    assert (tower.dim, tower.depth) == (32, 3)
    clips = [noise(rate), noise(rate)[: rate // 2] + 0.1]
    with torch.no_grad():
        out, layers = tower(clips, return_all_layers=True)
        assert out.shape == (2, 32) and layers.shape == (2, 2, 1, 32)
        for row, clip in enumerate(clips):
            torch.testing.assert_close(tower(clip[None])[0], out[row])
            features = tower.feature_extractor(
                clip.numpy(), sampling_rate=rate, return_tensors="pt"
            )
            full = tower.model(**features, output_hidden_states=True)
            tokens = full.last_hidden_state.shape[1]
            own = -(-len(clip) // 320) if name == "whisper" else tokens  # 10 ms frames, in pairs
            torch.testing.assert_close(out[row], full.last_hidden_state[0, :own].mean(dim=0))
            expected = full.hidden_states[2][0, :own].mean(dim=0)
            torch.testing.assert_close(layers[1, row, 0], expected)


@pytest.mark.slow
def test_clap_audio():
    config = dict(
        text_config=dict(vocab_size=40, **SIZES),
        audio_config=dict(
            depths=[2, 2], num_attention_heads=[2, 2], patch_embeds_hidden_size=16, hidden_size=32,
            num_hidden_layers=2, spec_size=256, window_size=8,
        ),
    )  # fmt: skip
    extractor = transformers_class("ClapFeatureExtractor")(truncation="rand_trunc")
    tower = HuggingFaceAudio(random_model("ClapConfig", config), feature_extractor=extractor).eval()
    assert tower.front_end.sample_hz == 48000
    with torch.no_grad():
        out = tower(noise(2, 48000))
        features = extractor(
            list(noise(2, 48000).numpy()), sampling_rate=48000, return_tensors="pt"
        )
        torch.testing.assert_close(out, tower.model(**features).pooler_output)
    assert tower.depth == 1
    with pytest.raises(ValueError, match="hierarchical_contrastive_loss_layers"):
        musiclm_fast.MuLaN(tower, text_tower(), hierarchical_contrastive_loss=True)


def test_clips_of_a_batch_at_another_rate():
    tower = audio_tower().eval()
    with torch.no_grad():
        padded = tower(noise(2, 8000), lengths=torch.tensor([8000, 5000]))
        torch.testing.assert_close(padded[1], tower(noise(2, 8000)[1:, :5000])[0])
        assert tower(noise(1, 16000), input_sample_hz=16000).shape == (1, 32)


@pytest.mark.parametrize("hierarchical", [False, True])
def test_round_trip_without_a_download(tmp_path, hierarchical, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = musiclm_fast.MuLaN(
        audio_tower(pooling="cls"),
        text_tower("t5", frozen=False),
        dim_latent=8,
        hierarchical_contrastive_loss=hierarchical,
    ).eval()
    config = mulan_config(model)
    assert json.loads(json.dumps(config)) == config  # what config.json holds
    save_checkpoint(tmp_path / "mulan.pt", model)
    loaded, _ = load_mulan(tmp_path / "mulan.pt")
    assert mulan_config(loaded) == config
    assert (loaded.audio.frozen, loaded.text.frozen) == (True, False)
    with torch.no_grad():
        ours, theirs = (m(noise(3, 8000), raw_texts=CAPTIONS) for m in (model, loaded))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in SLOW_AUDIOS else ())
        for n in ("ast", *SLOW_AUDIOS)
    ],
)
def test_feature_extractors_are_rebuilt(name):
    tower = audio_tower(name).eval()
    again = HuggingFaceAudio(**json.loads(json.dumps(tower.arguments))).eval()
    again.load_state_dict(tower.state_dict())
    assert again.arguments == tower.arguments
    with torch.no_grad():
        assert torch.equal(again(noise(2, 16000)), tower(noise(2, 16000)))


def test_from_folders(tmp_path):
    random_model(*TEXTS["bert"]).save_pretrained(tmp_path / "text")
    word_tokenizer().save_pretrained(tmp_path / "text")
    random_model(*AUDIOS["wav2vec2"][:2]).save_pretrained(tmp_path / "audio")
    transformers_class("Wav2Vec2FeatureExtractor")(sampling_rate=8000).save_pretrained(
        tmp_path / "audio"
    )
    text, audio = HuggingFaceText(tmp_path / "text"), HuggingFaceAudio(str(tmp_path / "audio"))
    with torch.no_grad():
        assert torch.equal(text(raw_texts=CAPTIONS), text_tower()(raw_texts=CAPTIONS))
        assert torch.equal(audio(noise(2, 8000)), audio_tower()(noise(2, 8000)))
    model = musiclm_fast.MuLaN.from_config(
        {
            "audio": {"class": "HuggingFaceAudio", "model": str(tmp_path / "audio")},
            "text": {"class": "HuggingFaceText", "model": str(tmp_path / "text")},
            "mulan": {"dim_latent": 8},
        }
    )
    assert str(tmp_path) not in json.dumps(mulan_config(model))


def gradients(model, step):
    model.zero_grad()
    step(model)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [True, False])
def test_training_and_gradient_caching(frozen):
    model = musiclm_fast.MuLaN(
        audio_tower("hubert, layer norm", frozen=frozen),
        text_tower("bert", frozen=frozen),
        dim_latent=8,
        hierarchical_contrastive_loss=True,
    )
    for module in model.modules():  # dropout draws by chunk
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for tower in (model.audio, model.text):
        for name in ("hidden_dropout", "attention_dropout", "activation_dropout"):
            if hasattr(tower.model.config, name):
                setattr(tower.model.config, name, 0.0)
        for module in tower.modules():
            for name in ("dropout", "dropout_prob", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    model.double().train()  # so that only the order of sums differs, by rounding
    wavs, texts = noise(4, 8000), [*CAPTIONS, "loud piano"]
    plain = gradients(model, lambda m: m(wavs, raw_texts=texts).backward())
    cached = gradients(model, lambda m: cached_step(m, wavs, raw_texts=texts, chunk_size=2))
    assert plain.keys() == cached.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(cached[name], grad, msg=name)
    encoders = [n for n in plain if n.startswith(("audio.", "text."))]
    assert (not encoders) if frozen else len(encoders) > 50


def test_frozen_towers_are_left_alone():
    tower = text_tower()
    model = musiclm_fast.MuLaN(own_audio(), tower, dim_latent=8).train()
    assert not tower.model.training and tower.training
    assert not any(p.requires_grad for p in tower.parameters())
    tower.model.requires_grad_(True)  # as a careless caller might
    assert not tower(raw_texts=CAPTIONS).requires_grad
    model(noise(3, 16000), raw_texts=CAPTIONS).backward()
    assert all(p.grad is None for p in tower.parameters())
    assert model.text_to_latents.weight.grad is not None
    assert text_tower(frozen=False).train().model.training


def test_encoders_do_not_mask_by_numpy():
    tower = audio_tower(frozen=False).train()
    for name in ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"):
        assert hasattr(tower.model.config, name)
    torch.manual_seed(3)
    first = tower(noise(2, 8000))
    torch.manual_seed(3)
    assert torch.equal(tower(noise(2, 8000)), first)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: text_tower(pooling="max"), ValueError, "pooling: got 'max'"),
        (lambda: text_tower(max_seq_len=0), ValueError, "max_seq_len: got 0"),
        (lambda: HuggingFaceText(3), TypeError, r"model: got 3 \(int\)"),
        (lambda: HuggingFaceText(torch.nn.Linear(2, 2)), TypeError, "model: got Linear"),
        (lambda: HuggingFaceText("no/such/folder"), OSError, "model: got 'no/such/folder'"),
        (lambda: HuggingFaceText({}), ValueError, "without model_type"),
        (lambda: HuggingFaceText({"model_type": "nothing"}), ValueError, "nothing"),
        (lambda: text_tower(tokenizer=5), TypeError, "tokenizer: got 5"),
        (lambda: text_tower(tokenizer={"../x": ""}), ValueError, r"a file named '../x'"),
        (lambda: audio_tower(feature_extractor=None), TypeError, "feature_extractor: got None"),
        (
            lambda: audio_tower(feature_extractor={"feature_extractor_type": "BertModel"}),
            ValueError,
            "feature_extractor: got 'BertModel'",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_model_of_code_that_transformers_lacks():
    bert = random_model(*TEXTS["bert"])
    own = type("OwnModel", (type(bert),), {})
    bert.__class__ = own
    with pytest.raises(TypeError, match="OwnModel, expected a model that its configuration"):
        HuggingFaceText(bert)


@pytest.mark.parametrize(
    "name, wav, message",
    [
        ("wav2vec2", torch.zeros(1, 100), "100 samples of clip 0, expected at least 800"),
        ("wav2vec2", torch.zeros(0, 8000), "an empty batch"),
        ("wav2vec2", torch.full((1, 8000), torch.nan), "NaN"),
        ("ast", torch.zeros(1, 32000), r"2 s of clip 0, expected at most 1.28 s"),
    ],
)
def test_bad_clips(name, wav, message):
    with pytest.raises(ValueError, match=message):
        audio_tower(name)(wav)


def test_a_bad_configuration_is_a_checkpoint_error():
    model = musiclm_fast.MuLaN(own_audio(), text_tower(), dim_latent=8)
    config = mulan_config(model)
    config["text"]["model"]["model_type"] = "nothing"
    with pytest.raises(CheckpointError, match="nothing"):
        musiclm_fast.MuLaN.from_config(config)


def test_the_trainer_trains_what_is_not_frozen(tmp_path):
    torch.manual_seed(0)
    model = musiclm_fast.MuLaN(audio_tower(frozen=False), text_tower(), dim_latent=8)
    rows = [(noise(8000) * (1 + row), CAPTIONS[row % 3]) for row in range(8)]
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = musiclm_fast.MuLaNTrainer(
        model, rows, num_train_steps=2, batch_size=2, results_folder=tmp_path / "results",
        valid_frac=0.25, activation_checkpointing=True,
    )  # fmt: skip
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert not any(name.startswith("text.") for name in changed)
    assert sum(name.startswith("audio.model.encoder.layers.") for name in changed) > 20
    loaded = musiclm_fast.MuLaN.from_pretrained(tmp_path / "results" / "latest")
    with torch.no_grad():
        ours, theirs = (m.eval()(noise(3, 8000), raw_texts=CAPTIONS) for m in (model, loaded))
    assert torch.equal(ours, theirs)
