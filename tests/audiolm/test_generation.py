"""Generation without upstream: seeds, guidance, prompts, padding, long pieces."""

import pytest
import torch

from musiclm_fast.audiolm import (
    AudioLM,
    CoarseTransformer,
    CoarseTransformerWrapper,
    FineTransformer,
    FineTransformerWrapper,
    MelCodec,
    MelKmeans,
    Sampling,
    SemanticTransformer,
    SemanticTransformerWrapper,
)
from musiclm_fast.audiolm.sampling import align_right, draw
from musiclm_fast.ops import use_backend
from tests.audiolm.test_tokenizers import RATE, notes

SIZES = dict(dim=32, depth=2, heads=2, dim_head=16)
STAGES = {
    "semantic": (SemanticTransformer, dict(num_semantic_tokens=12)),
    "coarse": (
        CoarseTransformer,
        dict(num_semantic_tokens=12, codebook_size=10, num_coarse_quantizers=2),
    ),
    "fine": (
        FineTransformer, dict(codebook_size=10, num_coarse_quantizers=2, num_fine_quantizers=2)
    ),
}  # fmt: skip


def stage(name, seed=0, **options):
    torch.manual_seed(seed)
    kind, sizes = STAGES[name]
    return kind(**SIZES, **sizes, **options).eval()


CONDITIONED = dict(audio_text_condition=True, drop_text_embeds=True)


def conditioned(name, **options):
    own = {k: v for k, v in CONDITIONED.items() if name != "coarse" or k != "drop_text_embeds"}
    return stage(name, **own, **options)


def wrapped(name, **options):
    kinds = dict(
        semantic=SemanticTransformerWrapper,
        coarse=CoarseTransformerWrapper,
        fine=FineTransformerWrapper,
    )
    return kinds[name](transformer=conditioned(name, **options))


def inputs(name, batch=1):
    generator = torch.Generator().manual_seed(1)
    if name == "semantic":
        return dict(max_length=15, batch_size=batch)
    if name == "coarse":
        ids = torch.randint(0, 12, (1, 7), generator=generator).expand(batch, -1)
        return dict(semantic_token_ids=ids, max_time_steps=6)
    ids = torch.randint(0, 10, (1, 6, 2), generator=generator).expand(batch, -1, -1)
    return dict(coarse_token_ids=ids)


EMBEDS = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", STAGES)
def test_seeds_reproduce_and_differ(name):
    wrapper = wrapped(name).train()
    call = dict(**inputs(name), text_embeds=EMBEDS, filter_thres=0.2, temperature=3.0)
    call["progress"] = False
    first = wrapper.generate(**call, seed=3)
    assert torch.equal(first, wrapper.generate(**call, seed=3))
    assert not torch.equal(first, wrapper.generate(**call, seed=4))
    assert wrapper.training
    state = torch.get_rng_state()
    wrapper.generate(**call, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", STAGES)
def test_greedy_rows_equal_one_row(name):
    wrapper = wrapped(name)
    call = dict(text_embeds=EMBEDS, temperature=0, progress=False)
    one = wrapper.generate(**inputs(name), **call)
    three = wrapper.generate(**inputs(name, 3), **call)
    assert torch.equal(three, one.expand_as(three))


@pytest.mark.parametrize("name", STAGES)
def test_steps_equal_one_forward(name):
    """Greedy tokens are those that the forward pass over all of them finds likeliest."""
    wrapper = wrapped(name)
    transformer = wrapper.transformer
    call = dict(text_embeds=EMBEDS, temperature=0, cond_scale=2.0, progress=False)
    ids = wrapper.generate(**inputs(name), **call)
    common = dict(text_embeds=EMBEDS, cond_scale=2.0)
    with torch.no_grad():
        if name == "semantic":
            known = ids[ids != -1][None]
            logits = transformer.forward_with_cond_scale(ids=known, **common)
            assert torch.equal(logits.argmax(-1)[:, : known.shape[1]], known)
        elif name == "coarse":
            semantic = torch.unique_consecutive(inputs(name)["semantic_token_ids"][0])[None]
            _, logits = transformer.forward_with_cond_scale(
                semantic_token_ids=semantic, coarse_token_ids=ids, **common
            )
            best = logits[:, :-1, :-1].argmax(-1)  # no end token but between time steps
            assert torch.equal(best, ids.flatten(1))
        else:
            _, logits = transformer.forward_with_cond_scale(
                **inputs(name), fine_token_ids=ids, **common
            )
            assert torch.equal(logits[:, :-1].argmax(-1), ids.flatten(1))


def test_guidance_acts():
    wrapper = wrapped("semantic")
    call = dict(max_length=20, text_embeds=EMBEDS * 3, temperature=0, progress=False)
    plain, guided = (wrapper.generate(**call, cond_scale=s) for s in (1.0, 8.0))
    assert not torch.equal(plain[:, : guided.shape[1]], guided[:, : plain.shape[1]])


def test_primes_of_different_lengths_are_rows_of_their_own():
    wrapper = wrapped("semantic")
    prime = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, -1, -1, -1]])
    call = dict(text_embeds=EMBEDS, temperature=0, progress=False)
    both = wrapper.generate(max_length=12, prime_ids=prime, **call)
    alone = wrapper.generate(max_length=9, prime_ids=prime[1:, :3], **call)
    assert torch.equal(both[1, : alone.shape[1]], alone[0])
    assert torch.equal(both[0, :6], prime[0])


def test_align_right():
    moved, lengths = align_right(torch.tensor([[1, 2, -1], [3, 4, 5], [-1, -1, -1]]), -1)
    assert moved.tolist() == [[-1, 1, 2], [3, 4, 5], [-1, -1, -1]]
    assert lengths.tolist() == [2, 3, 0]


def test_rows_that_end_leave_the_batch(monkeypatch):
    wrapper = wrapped("semantic")
    wrapper.transformer.to_logits.bias.data[-1] += 3.0  # ends are likely
    sizes = []
    original = type(wrapper.transformer.to_logits).forward

    def watch(self, x):
        if self is wrapper.transformer.to_logits:
            sizes.append(x.shape[0])
        return original(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", watch)
    ids = wrapper.generate(
        max_length=200, batch_size=6, text_embeds=EMBEDS, filter_thres=0.0, seed=0, progress=False
    )
    assert sizes[0] == 12
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 12
    assert ids.shape[1] < 200
    ended = (ids == -1).int()
    assert torch.equal(ended.cummax(dim=1).values, ended)


def test_padding_of_semantic_tokens_changes_nothing():
    wrapper = wrapped("coarse")
    ids = torch.tensor([[1, 2, 3, -1, -1], [4, 5, 6, 7, 8]])
    call = dict(text_embeds=EMBEDS, temperature=0, max_time_steps=4, progress=False)
    both = wrapper.generate(semantic_token_ids=ids, **call)
    alone = wrapper.generate(semantic_token_ids=ids[:1, :3], **call)
    assert torch.equal(both[:1], alone)


def test_fine_rows_stop_where_their_coarse_tokens_do():
    wrapper = wrapped("fine", centred_pos_bias=True)
    coarse = torch.randint(0, 10, (2, 6, 2), generator=torch.Generator().manual_seed(0))
    coarse[1, 3:] = -1
    call = dict(text_embeds=EMBEDS, temperature=0, progress=False)
    both = wrapper.generate(coarse_token_ids=coarse, **call)
    alone = wrapper.generate(coarse_token_ids=coarse[1:, :3], **call)
    assert torch.equal(both[1:, :3], alone)
    assert (both[1, 3:] == -1).all()
    assert (both[0] >= 0).all()


def test_centred_bias_is_the_same_at_any_length():
    centred, uncentred = (stage("fine", centred_pos_bias=c) for c in (True, False))
    ids = torch.randint(0, 10, (1, 12))
    for model, same in ((centred, True), (uncentred, False)):
        short = model(ids[:, :8], ids[:, :4])[1]
        long = model(torch.cat((ids[:, :8], torch.full((1, 8), -1)), 1), ids[:, :4])[1]
        assert torch.allclose(short, long, atol=1e-5) == same


def test_draw():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(4000, -1)
    noise = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw(logits, noise, 1.0, 0.5), minlength=4) / 4000
    wanted = torch.tensor([0.0, 3.0, 0.0, 2.0]).exp() * torch.tensor([0.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(counts, wanted / wanted.sum(), atol=0.03, rtol=0)
    assert (draw(logits, None, 0.0) == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(max_length=0), "max_length"),
        (dict(max_length=4, text_embeds=None), "text, text_embeds"),
        (dict(max_length=4, text_embeds=torch.randn(1, 3, 31)), "text_embeds"),
        (dict(max_length=4, text_embeds=torch.randn(3, 3, 32), batch_size=2), "3 rows"),
        (dict(max_length=4, temperature=-1.0), "temperature"),
        (dict(max_length=4, filter_thres=2.0), "filter_thres"),
        (dict(max_length=4, prime_ids=torch.ones(1, 4, dtype=torch.long) .cumsum(1)), "prime's 4"),
        (dict(max_length=4, batch_size=0), "batch_size"),
    ],
)  # fmt: skip
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        wrapped("semantic").generate(**{"text_embeds": EMBEDS, **call}, progress=False)


# ---- all stages


@pytest.fixture(scope="module")
def parts():
    clips = notes(6)
    return (
        MelKmeans(codebook_size=12).fit(clips),
        MelCodec(num_quantizers=4, codebook_size=10).fit(clips),
    )


def audio_lm(parts, **options):
    stages = {f"{name}_transformer": stage(name, **options) for name in STAGES}
    return AudioLM(wav2vec=parts[0], codec=parts[1], **stages)


def test_audio_lm_in_seconds(parts):
    model = audio_lm(parts)
    waves = model(seconds=0.4, batch_size=3, seed=1, progress=False)
    assert isinstance(waves, list) or waves.shape == (3, int(0.4 * RATE))
    again = model(seconds=0.4, batch_size=3, seed=1, progress=False)
    for a, b in zip(waves, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    cooler = {"semantic": Sampling(temperature=0), "coarse": dict(temperature=0.4)}
    model(seconds=0.4, sampling=cooler, progress=False)
    with pytest.raises(ValueError, match="a stage 'corse'"):
        model(seconds=0.4, sampling={"corse": {}}, progress=False)
    with pytest.raises(ValueError, match="seconds"):
        model(seconds=0, progress=False)


def without_ends(model):
    model.semantic.transformer.to_logits.bias.data[-1] = -1e9
    model.coarse.transformer.coarse_logit_weights.data[:, -1] = 0.0
    return model


def test_a_prompt_of_another_rate_and_a_long_piece(parts, tmp_path):
    model = without_ends(audio_lm(parts))
    prime = torch.stack(notes(1, 0.4, rate=22_050))
    wave = model(
        seconds=0.2, prime_wave=prime, prime_wave_input_sample_hz=22_050, progress=False, seed=0,
        sampling={"coarse": dict(temperature=0.1)},
    )  # fmt: skip
    assert isinstance(wave, list) or wave.shape[1] == int(0.6 * RATE)
    options = dict(seconds=1.0, window_seconds=0.4, prime_seconds=0.2, seed=0, progress=False)
    pieces = list(model.stream(**options))
    assert sum(p.shape[1] for p in pieces) <= RATE
    written = model.stream_to_file(tmp_path / "long.wav", **options)
    assert written == pytest.approx(sum(p.shape[1] for p in pieces) / RATE)
    with pytest.raises(ValueError, match="prime_wave_input_sample_hz"):
        model(seconds=0.2, prime_wave=prime, progress=False)


def test_a_long_piece_embeds_its_text_once(parts, monkeypatch):
    model = without_ends(audio_lm(parts, has_condition=True, cond_dim=32))
    texts = []
    monkeypatch.setattr(
        "musiclm_fast.audiolm.stage.t5_encode_text", lambda text, **_: texts.append(text) or EMBEDS
    )
    options = dict(seconds=0.6, window_seconds=0.2, prime_seconds=0.1, seed=0, progress=False)
    pieces = list(model.stream(text=["a slow waltz"], **options))
    assert len(pieces) > 1
    assert texts == [["a slow waltz"]]
    for piece, other in zip(pieces, model.stream(text_embeds=EMBEDS, **options), strict=True):
        assert torch.equal(piece, other)
    with pytest.raises(ValueError, match="None beside text_embeds"):
        next(model.stream(text=["a slow waltz"], text_embeds=EMBEDS, **options))


def test_windows_of_a_long_piece_meet_without_a_jump(parts, monkeypatch):
    """Each window is a constant of its own: where two meet the value changes gradually."""
    model = without_ends(audio_lm(parts))
    levels = iter((0.5, -0.5, 0.25))

    def forward(prime_wave=None, seconds=None, **_):
        known = 0 if prime_wave is None else prime_wave.shape[1]
        return torch.full((1, known + round(seconds * RATE)), next(levels))

    monkeypatch.setattr(model, "forward", forward)
    options = dict(seconds=0.6, window_seconds=0.2, prime_seconds=0.1)
    pieces = list(model.stream(**options))
    wave = torch.cat(pieces, dim=1)[0]
    assert wave.shape == (int(0.6 * RATE),)
    assert wave.diff().abs().max() < 1.1 / (0.02 * RATE)  # 20 ms from one level to the next
    assert [wave[i].item() for i in (100, 5000, 9000)] == [0.5, -0.5, 0.25]


def test_sizes_must_agree(parts):
    torch.manual_seed(0)
    kind, sizes = STAGES["semantic"]
    wrong = kind(**SIZES, **{**sizes, "num_semantic_tokens": 9})
    stages = {f"{name}_transformer": stage(name) for name in ("coarse", "fine")}
    with pytest.raises(ValueError, match="num_semantic_tokens"):
        AudioLM(wav2vec=parts[0], codec=parts[1], semantic_transformer=wrong, **stages)
    kind, sizes = STAGES["fine"]
    wrong = kind(**SIZES, **{**sizes, "num_fine_quantizers": 3})
    with pytest.raises(ValueError, match="quantizers"):
        FineTransformerWrapper(transformer=wrong, codec=parts[1])


def test_one_wave_for_two_rates_is_refused(parts):
    wrapper = CoarseTransformerWrapper(
        transformer=stage("coarse"), wav2vec=parts[0],
        codec=MelCodec(4, 10, target_sample_hz=24_000, downsample_factor=480).fit(
            notes(6, rate=24_000)
        ),
    )  # fmt: skip
    wave = torch.stack(notes(2, 0.4))
    with pytest.raises(ValueError, match="24000 Hz"):
        wrapper(raw_wave=wave, return_loss=True)
    assert torch.isfinite(wrapper(raw_wave=wave, input_sample_hz=RATE, return_loss=True))


@pytest.mark.parametrize("name", STAGES)
def test_building_asks_nobody(name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("the network was asked"))
    model = stage(name, has_condition=True)
    assert model.cond_dim == 768


def test_memory_holds_no_pairs():
    """On the compiled op nothing of one value per pair of tokens is allocated."""
    import musiclm_fast._extension as extension

    if not extension.load():
        pytest.skip("needs the compiled library")
    model = stage("semantic", num_residual_streams=1)
    length, largest = 1024, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes() // 4)
            return out

    with Watch(), use_backend(attention="cpp"):
        model(ids=torch.randint(0, 12, (1, length - 1))).sum().backward()
    assert largest < length * length // 2
