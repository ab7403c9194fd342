"""MuLaN and its towers: shapes, equivalences, front ends and bad input."""

import copy

import pytest
import torch
from torch.nn import functional as F

from musiclm_fast import (
    AudioSpectrogramTransformer,
    FrontEnd,
    MuLaN,
    MuLaNEmbedQuantizer,
    MusicLM,
    TextTransformer,
)
from musiclm_fast.models.audio_tower import posemb_sincos_2d
from musiclm_fast.models.draws import AudioDraws
from musiclm_fast.models.front_end import PRESETS, draw_span
from musiclm_fast.ops import use_backend
from musiclm_fast.ops.attention import attention_reference, grid_codes, grid_offsets

SMALL = dict(dim=32, depth=2, heads=2, dim_head=16)


def audio_tower(**arguments):
    torch.manual_seed(0)
    return AudioSpectrogramTransformer(**{**SMALL, **arguments})


def make_mulan(front_end=None, **arguments):
    torch.manual_seed(0)
    return MuLaN(audio_tower(front_end=front_end), TextTransformer(**SMALL), 16, **arguments)


@pytest.fixture
def wavs():
    return torch.randn(3, 4000, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def texts():
    return torch.randint(1, 1000, (3, 7), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("front_end", [None, *PRESETS])
def test_latents_are_unit_vectors_and_gradients_reach_every_parameter(front_end, wavs, texts):
    mulan = make_mulan(front_end)
    loss = mulan(wavs, texts)
    loss.backward()
    assert loss.isfinite()
    unused = [n for n, p in mulan.named_parameters() if p.grad is None]
    assert unused == []
    latents = mulan.eval().get_audio_latents(wavs)
    assert latents.shape == (3, 16)
    torch.testing.assert_close(latents.norm(dim=-1), torch.ones(3))


def test_flags_agree_with_each_other(wavs, texts):
    mulan = make_mulan().eval()
    audio, text = mulan(wavs, texts, return_latents=True)
    pairwise = mulan(wavs, texts, return_pairwise_similarities=True)
    torch.testing.assert_close(pairwise, audio @ text.t())
    torch.testing.assert_close(mulan(wavs, texts, return_similarities=True), pairwise.diagonal())


def test_raw_texts_equal_their_tokens(wavs):
    from musiclm_fast.tokenizer import tokenizer

    mulan = make_mulan().eval()
    words = ["calm piano", "a loud brass band plays", ""]
    ids = tokenizer.tokenize(words)
    torch.testing.assert_close(mulan(wavs, raw_texts=words), mulan(wavs, ids))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (4, 1), (3, 4)])
def test_offset_table_equals_the_mlp_of_every_pair(height, width):
    tower = audio_tower()
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2).float()
    pairs = grid[:, None] - grid[None, :]
    dense = tower.dynamic_pos_bias_mlp(pairs).permute(2, 0, 1)
    table = tower._bias_table(height, width)
    codes = grid_codes(height, width).long()
    radius = table.shape[1] // 2
    assert int((codes[:, None] - codes[None, :]).abs().max()) < radius
    torch.testing.assert_close(table[:, codes[:, None] - codes[None, :] + radius], dense)
    offsets = grid_offsets(height, width)
    assert len(offsets) == 2 * radius + 1


def test_order_of_kept_patches_does_not_change_the_embedding(wavs):
    tower = audio_tower().eval()
    grid = tower.draw(wavs).grid
    kept = torch.rand(3, grid[0] * grid[1]).argsort(dim=1)[:, :20]
    outs = []
    for order in (kept, kept.sort(dim=1).values):
        outs.append(tower(wavs, draws=AudioDraws(grid, kept=order, share=0.25)))
    torch.testing.assert_close(outs[0], outs[1])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_all_layers(depth, wavs):
    tower = audio_tower(depth=depth).eval()
    out, layers = tower(wavs, return_all_layers=True)
    assert layers.shape[0] == depth - 1
    torch.testing.assert_close(out, tower(wavs))


def test_spectrogram_input_equals_waveform_input(wavs):
    tower = audio_tower().eval()
    spec = tower.spec(wavs)
    for time_first in (True, False):
        other = audio_tower(accept_spec=True, accept_spec_time_first=time_first).eval()
        given = spec.transpose(1, 2) if time_first else spec
        torch.testing.assert_close(other(given), tower(wavs))


def test_position_embedding_is_the_formula():
    table = posemb_sincos_2d(3, 5, 16, torch.device("cpu"))
    row, column = 2, 4
    omega = 1 / 10_000 ** (torch.arange(4) / 3)
    expected = torch.cat(
        [(column * omega).sin(), (column * omega).cos(), (row * omega).sin(), (row * omega).cos()]
    )
    torch.testing.assert_close(table[row * 5 + column], expected)


def test_masks_are_sized_by_fraction_and_drawn_per_sample():
    torch.manual_seed(0)
    spans = draw_span(0.2, 100, 500, torch.device("cpu"))
    width = spans[:, 0, 1] - spans[:, 0, 0]
    assert spans.shape == (500, 1, 2)
    assert width.max() < 20
    assert width.float().mean() > 8
    assert spans.min() >= 0
    assert spans.max() <= 100
    assert draw_span(80, 65, None, torch.device("cpu")).shape == (1, 1, 2)


def test_hierarchical_loss_adds_the_layers(wavs, texts):
    plain = make_mulan().eval()
    torch.manual_seed(0)
    both = make_mulan(hierarchical_contrastive_loss=True).eval()
    both.load_state_dict(plain.state_dict(), strict=False)
    layers = both.multi_layer_contrastive_learning
    _, audio = both.get_audio_latents(wavs, return_all_layers=True)
    _, text = both.get_text_latents(texts, return_all_layers=True)
    extra = layers(audio_layers=audio[[0]], text_layers=text[[0]])
    torch.testing.assert_close(both(wavs, texts), plain(wavs, texts) + extra)


def test_half_precision_and_float64(wavs, texts):
    mulan = make_mulan().eval()
    full = mulan(wavs, texts)
    double = copy.deepcopy(mulan).double()(wavs.double(), texts)
    torch.testing.assert_close(full, double.float())  # to float32's own rounding
    with torch.autocast("cpu", torch.bfloat16):
        half = mulan(wavs, texts)
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_compiles_without_graph_break(preset):
    mulan = make_mulan(preset).train()
    compiled = torch.compile(mulan, fullgraph=True, backend="aot_eager")
    wavs = torch.randn(3, 4000)
    texts = torch.randint(1, 1000, (3, 7))
    torch.manual_seed(3)
    expected = mulan(wavs, texts)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(wavs, texts), expected)


def test_attention_reference_is_what_the_modules_run(wavs, texts):
    mulan = make_mulan().eval()
    with use_backend("torch"):
        expected = mulan(wavs, texts)
    torch.testing.assert_close(mulan(wavs, texts), expected)
    q = torch.randn(1, 2, 3, 4)
    plain = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(attention_reference(q, q, q), plain)


class _StubAudioLM(torch.nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.audio_conditioner = None
        self.outputs = list(outputs)
        self.seen = []

    def forward(self, text_embeds, **kwargs):
        self.seen.append((text_embeds, kwargs))
        return self.outputs[len(self.seen) - 1]


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return MuLaNEmbedQuantizer(make_mulan(), (24, 8, 8), codebook_size=16).eval()


def test_quantizer_gathers_each_namespace(quantizer, wavs, texts):
    with torch.no_grad():
        quantizer.train()(wavs=torch.randn(20, 4000))  # k-means
    quantizer.eval()
    embeds = quantizer(wavs=wavs)
    assert embeds.shape == (3, 8, 24)
    _, indices, _ = quantizer.rq(quantizer.mulan.get_audio_latents(wavs))
    for q in range(8):
        expected = quantizer.cond_embeddings["semantic"][q][indices[:, q]]
        torch.testing.assert_close(embeds[:, q], expected)
    assert quantizer(texts=texts, namespace="fine").shape == (3, 8, 8)
    quantizer.set_default_namespace("coarse")
    torch.testing.assert_close(quantizer(wavs=wavs), quantizer(wavs=wavs, namespace="coarse"))
    assert len(list(quantizer.parameters())) == 3


@pytest.mark.parametrize("as_list", [False, True])
def test_musiclm_keeps_the_most_similar_sample(quantizer, as_list):
    waves = torch.randn(5, 1, 4000, generator=torch.Generator().manual_seed(5))
    outputs = [list(w) for w in waves] if as_list else list(waves)
    audio_lm = _StubAudioLM(outputs)
    music = MusicLM(audio_lm, quantizer)("calm piano", num_samples=5, extra=1)
    text = quantizer.mulan.get_text_latents(raw_texts=["calm piano"])
    best = int((quantizer.mulan.get_audio_latents(waves[:, 0]) @ text.t()).argmax())
    assert torch.equal(music[0] if as_list else music, waves[best][0] if as_list else waves[best])
    assert audio_lm.seen[0][1] == {"extra": 1}


@pytest.mark.parametrize(
    ("wavs", "message"),
    [
        (torch.randn(0, 4000), "empty batch"),
        (torch.randn(2, 2, 4000), r"\(B, samples\)"),
        (torch.full((2, 4000), torch.nan), "NaN or infinity in clip 0"),
        (torch.cat([torch.ones(1, 4000), torch.full((1, 4000), torch.inf)]), "in clip 1"),
        (torch.ones(2, 4000, dtype=torch.int16), "floating-point"),
        (torch.randn(2, 100), r"at least one patch of 16 bands and 16 frames \(180 samples\)"),
    ],
)
def test_bad_audio(wavs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        audio_tower()(wavs)


def test_bad_texts_and_batches(wavs):
    mulan = make_mulan()
    ids = torch.randint(1, 100, (3, 5))
    with pytest.raises(ValueError, match=r"wavs.*as many clips as there are texts \(2\)"):
        mulan(wavs, ids[:2])
    with pytest.raises(ValueError, match="texts, raw_texts: got both"):
        mulan(wavs, ids, raw_texts=["a"] * 3)
    with pytest.raises(ValueError, match="texts, raw_texts: got neither"):
        mulan(wavs)
    with pytest.raises(ValueError, match="token id 49408"):
        mulan(wavs, ids + 49403 + (5 - ids))
    with pytest.raises(ValueError, match="token id -1"):
        mulan(wavs, ids * 0 - 1)
    with pytest.raises(TypeError, match="int64 or int32"):
        mulan(wavs, ids.float())
    with pytest.raises(ValueError, match="max_seq_len = 256"):
        mulan(wavs, torch.ones(3, 257, dtype=torch.long))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: audio_tower(front_end="nope"), "one of 'upstream', 'mulan', 'ast'"),
        (lambda: audio_tower(front_end="reference"), "expected its new name 'upstream'"),
        (lambda: audio_tower(front_end="mulan", spec_n_fft=256), "give one of the two"),
        (lambda: audio_tower(spec_win_length=300), "at most n_fft = 128"),
        (lambda: audio_tower(dim=30), "multiple of 4"),
        (lambda: audio_tower(patch_size=80), "at most the 65 bands"),
        (lambda: audio_tower(patch_dropout_prob=1.0), r"probability in \[0, 1\)"),
        (lambda: FrontEnd(n_mels=64), "sample_hz"),
        (lambda: FrontEnd(sample_hz=16000, n_mels=64, f_max=9000.0), "Nyquist"),
        (lambda: make_mulan(hierarchical_contrastive_loss=True,
                            hierarchical_contrastive_loss_layers=2), "1 to 1"),
        (lambda: MuLaNEmbedQuantizer(make_mulan(), (8, 8)), "one for each of 3 namespaces"),
        (lambda: MuLaNEmbedQuantizer(make_mulan(), (), namespaces=()), "at least one name"),
    ],
)  # fmt: skip
def test_bad_configurations(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_conditioning(quantizer, wavs, texts):
    with pytest.raises(ValueError, match="namespace: got 'x', expected one of 'semantic'"):
        quantizer(wavs=wavs, namespace="x")
    with pytest.raises(ValueError, match="exactly one"):
        quantizer(wavs=wavs, texts=texts)
    music = MusicLM(_StubAudioLM([]), quantizer)
    with pytest.raises(ValueError, match="num_samples"):
        music("piano", num_samples=0)
    with pytest.raises(ValueError, match="text"):
        music("  ")
    conditioned = _StubAudioLM([])
    conditioned.audio_conditioner = quantizer
    with pytest.raises(ValueError, match="audio_conditioner"):
        MusicLM(conditioned, quantizer)
