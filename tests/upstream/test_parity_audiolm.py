"""The three stages of AudioLM against audiolm-pytorch: logits, losses, gradients and samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musiclm_fast import audiolm as ours
from tests.upstream import live

pytestmark = pytest.mark.upstream

SIZES = dict(dim=32, depth=2, heads=4)
STAGES: dict[str, dict[str, int]] = {
    "Semantic": dict(num_semantic_tokens=20),
    "Coarse": dict(num_semantic_tokens=20, codebook_size=11, num_coarse_quantizers=3),
    "Fine": dict(codebook_size=11, num_coarse_quantizers=3, num_fine_quantizers=5),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one stream": dict(num_residual_streams=1),
    "no value residual": dict(add_value_residual=False, dim_head=16),
    "no bias": dict(rel_pos_bias=False),
    "flash": dict(flash_attn=True),
    "conditioned": dict(audio_text_condition=True),
    "projected condition": dict(has_condition=True, cond_dim=24),
    "prefix": dict(audio_text_condition=True, cond_as_self_attn_prefix=True),
    "gradient not shrunk": dict(grad_shrink_alpha=1.0),
}


class Codec(nn.Module):
    """Stands for a codec: noise-free codes from a wave, a wave from codes."""

    rq_groups = 1
    num_quantizers = 8
    codebook_size = 11
    target_sample_hz = 16_000
    seq_len_multiple_of = 4
    samples_per_step = 4

    def forward(self, wave: Tensor, return_encoded: bool = False, **_: Any) -> tuple[Any, ...]:
        frames = wave.unflatten(-1, (-1, 4)).sum(-1, keepdim=True)
        codes = (frames * torch.arange(1, 9) * 7).abs().long() % 11
        return None, codes, None

    def decode_from_codebook_indices(self, ids: Tensor) -> Tensor:
        summed = ids.float().sum(-1, keepdim=True)
        return summed.repeat_interleave(self.samples_per_step, 1).transpose(1, 2)


class Tokenizer(nn.Module):
    codebook_size = 20
    target_sample_hz = 16_000
    seq_len_multiple_of = 4
    downsample_factor = 4

    def forward(self, wave: Tensor, flatten: bool = True, **_: Any) -> Tensor:
        return (wave.unflatten(-1, (-1, 4)).sum(-1) * 5).abs().long() % 20


def noisy(module: nn.Module, seed: int = 5) -> nn.Module:
    """The module with 10% of noise on every parameter: a constant hides what a mix-up does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = parameter.std() if parameter.numel() > 1 else parameter.abs()
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise * torch.where(spread > 0, spread, 1.0))
    return module


def both(upstream: live.Upstream, stage: str, **options: Any) -> tuple[Any, Any]:
    """audiolm-pytorch's stage and ours, with equal weights and equal ``state_dict`` keys."""
    torch.manual_seed(0)
    arguments = {**SIZES, **STAGES[stage], **options}
    theirs = noisy(getattr(upstream.audiolm, f"{stage}Transformer")(**arguments))
    mine = getattr(ours, f"{stage}Transformer")(**arguments)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def tokens(stage: str, batch: int = 2) -> dict[str, Tensor]:
    def ids(high: int, length: int) -> Tensor:
        return torch.randint(0, high, (batch, length))

    if stage == "Semantic":
        return dict(ids=ids(20, 13))
    if stage == "Coarse":
        return dict(semantic_token_ids=ids(20, 13), coarse_token_ids=ids(11, 17))
    return dict(coarse_token_ids=ids(11, 12), fine_token_ids=ids(11, 18))


def condition(model: Any, options: dict[str, Any], batch: int = 2) -> dict[str, Tensor]:
    if not model.has_condition:
        return {}
    embeds = torch.randn(batch, 6, options.get("cond_dim", SIZES["dim"]))
    embeds[0, 4:] = 0.0  # padding, where the stage sees it as such
    return dict(text_embeds=embeds)


def run(
    model: Any, inputs: dict[str, Any], seed: int = 1
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients of their sum with fixed random weights."""
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = model(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(3)
    sum((o * torch.randn(o.shape, generator=generator)).sum() for o in outputs).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return outputs, gradients


def assert_equal_runs(theirs: Any, mine: Any, inputs: dict[str, Any]) -> None:
    """Both in float64, where the only differences left are those of the computation."""
    theirs, mine = theirs.double(), mine.double()
    inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    (expected, expected_grads), (actual, grads) = run(theirs, inputs), run(mine, inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for name, gradient in grads.items():
        scale = float(expected_grads[name].abs().max())
        torch.testing.assert_close(
            gradient, expected_grads[name], rtol=1e-8, atol=1e-9 * max(scale, 1.0), msg=name
        )


@pytest.fixture(autouse=True)
def _float64_positions(upstream: live.Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream hands its bias MLPs float32 offsets whatever the weights' dtype."""
    linear = nn.Linear.forward

    def in_own_dtype(self: nn.Linear, x: Tensor) -> Tensor:
        return linear(self, x.to(self.weight.dtype))

    monkeypatch.setattr(nn.Linear, "forward", in_own_dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("stage", STAGES)
def test_logits_and_gradients(upstream: Any, stage: str, options: dict[str, Any]) -> None:
    theirs, mine = both(upstream, stage, **options)
    inputs = {**tokens(stage), **condition(theirs, options)}
    assert_equal_runs(theirs, mine, inputs)
    inputs = {**tokens(stage), **condition(theirs, options)}
    length = 13 if stage == "Semantic" else 32
    mask = torch.rand(2, length) < 0.8
    mask[:, 0] = True
    assert_equal_runs(theirs, mine, {**inputs, "self_attn_mask": mask})


@pytest.mark.parametrize("probability", [0.0, 1.0])
@pytest.mark.parametrize("stage", STAGES)
def test_dropped_conditions(upstream: Any, stage: str, probability: float) -> None:
    theirs, mine = both(upstream, stage, audio_text_condition=True)
    inputs = {**tokens(stage), **condition(theirs, {}), "cond_drop_prob": probability}
    assert_equal_runs(theirs, mine, inputs)


def test_padding_of_tokens(upstream: Any) -> None:
    theirs, mine = both(upstream, "Semantic")
    ids = tokens("Semantic")["ids"]
    ids[1, 9:] = -1
    assert_equal_runs(theirs, mine, dict(ids=ids, return_loss=True))
    theirs, mine = both(upstream, "Fine")
    inputs = tokens("Fine")
    inputs["coarse_token_ids"][1, 9:] = -1
    inputs["coarse_token_ids"][0, 11] = 11
    assert_equal_runs(theirs, mine, inputs)


def wrap(upstream: live.Upstream, transformer: Any, **options: Any) -> Any:
    """The wrapper of the transformer's own package, with a codec of the kind it insists on."""
    stage = type(transformer).__name__.removesuffix("Transformer")
    theirs = type(transformer).__module__.startswith("audiolm_pytorch")
    if stage != "Semantic":
        bases = (Codec, upstream.audiolm.EncodecWrapper) if theirs else (Codec,)
        codec = type("Codec", bases, {"__init__": nn.Module.__init__})
        options["codec"] = codec()
    package = upstream.audiolm if theirs else ours
    return getattr(package, f"{stage}TransformerWrapper")(transformer=transformer, **options)


LOSSES: dict[str, dict[str, Tensor]] = {
    "Semantic": dict(semantic_token_ids=torch.randint(0, 3, (2, 14))),
    "Coarse": dict(
        semantic_token_ids=torch.randint(0, 3, (2, 14)),
        coarse_token_ids=torch.randint(0, 11, (2, 6, 3)),
    ),
    "Fine": dict(token_ids=torch.randint(0, 11, (2, 6, 8))),
}


@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_losses(upstream: Any, stage: str, training: bool, unique: bool) -> None:
    theirs, mine = both(upstream, stage, audio_text_condition=True)
    options = {} if stage == "Fine" else dict(unique_consecutive=unique)
    wrapped = [wrap(upstream, model, **options) for model in (theirs, mine)]
    for wrapper in wrapped:
        wrapper.train(training)
    inputs = {**LOSSES[stage], **condition(theirs, {}), "return_loss": True}
    # The masks are drawn in float32 in both; all else is compared in float64.
    assert_equal_runs(*wrapped, inputs)


def stepwise(model: Any, stage: str, inputs: dict[str, Any], cached: bool) -> list[Tensor]:
    """Guided logits of the last token at every length of the sequence that grows."""
    growing = "ids" if stage == "Semantic" else f"{stage.lower()}_token_ids"
    caches: dict[str, Any] = {}
    steps = []
    for length in range(inputs[growing].shape[1] + 1):
        result = model.forward_with_cond_scale(
            **{**inputs, growing: inputs[growing][:, :length]},
            cond_scale=3.0, return_kv_cache=True, **(caches if cached else {}),
        )  # fmt: skip
        logits, kept = result
        if stage == "Semantic":
            caches = dict(kv_cache=kept)
            steps.append(logits[:, -1])
        else:
            caches = dict(kv_cache=kept[0], embed_cache=kept[1])
            steps.append(logits[1][:, -1])
    return steps


@pytest.mark.parametrize("options", ["plain", "conditioned", "prefix"])
@pytest.mark.parametrize("stage", STAGES)
def test_guided_logits_with_and_without_cache(upstream: Any, stage: str, options: str) -> None:
    theirs, mine = both(upstream, stage, **OPTIONS[options])
    theirs, mine = theirs.eval(), mine.eval()
    inputs = {**tokens(stage), **condition(theirs, OPTIONS[options])}
    with torch.no_grad():
        expected = stepwise(theirs, stage, inputs, cached=False)
        uncached = stepwise(mine, stage, inputs, cached=False)
        cached = stepwise(mine, stage, inputs, cached=True)
    torch.testing.assert_close(uncached, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", ["plain", "conditioned", "prefix"])
@pytest.mark.parametrize("batch", [3])
@pytest.mark.parametrize("stage", STAGES)
def test_same_noise_same_tokens(upstream: Any, stage: str, batch: int, options: str) -> None:
    theirs, mine = both(upstream, stage, **OPTIONS[options])
    wrappers = [wrap(upstream, model) for model in (theirs, mine)]
    given: dict[str, Any] = condition(theirs, {}, batch)
    if stage == "Semantic":
        given |= dict(max_length=20, batch_size=batch)
    elif stage == "Coarse":
        given |= dict(semantic_token_ids=torch.randint(0, 20, (batch, 9)), max_time_steps=5)
    else:
        given |= dict(coarse_token_ids=torch.randint(0, 11, (batch, 4, 3)))
    for seed in range(2):
        torch.manual_seed(seed)
        # Upstream's cache gives other tokens where the condition is a prefix.
        expected = wrappers[0].generate(**given, use_kv_cache=options != "prefix", filter_thres=0.5)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        parity = {} if stage == "Semantic" else dict(as_upstream=True)
        actual = wrappers[1].generate(**given, **parity, filter_thres=0.5)
        assert torch.equal(actual, expected)
        if not (expected == -1).any():
            assert torch.equal(torch.get_rng_state(), state)


def test_a_prime_of_ids(upstream: Any) -> None:
    theirs, mine = both(upstream, "Semantic")
    prime = torch.tensor([[3, 4, 4, 5, 6], [7, 8, 9, 9, 2]])
    results = []
    for model in (theirs, mine):
        torch.manual_seed(0)
        results.append(wrap(upstream, model).generate(max_length=12, prime_ids=prime))
    assert torch.equal(*results)
    assert torch.equal(results[1][0, :4], torch.tensor([3, 4, 5, 6]))


# ---- the two packages together


def quantizer_of_clips() -> Any:
    from musiclm_fast import MuLaNEmbedQuantizer
    from tests.audiolm.test_conditioning import Joint

    return MuLaNEmbedQuantizer(Joint(), (32,) * 3, rq_num_quantizers=3, codebook_size=8)


def test_their_trainer_takes_our_quantizer(upstream: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """isinstance check included; its checkpoint loads into our stage, and ours into its."""
    from audiolm_pytorch import trainer as theirs
    from audiolm_pytorch.utils import AudioConditionerBase

    from tests.audiolm.test_tokenizers import notes

    monkeypatch.setattr(theirs, "ONE_TRAINER_INSTANTIATED", False)
    clips = notes(8, 0.25)
    quantizer = quantizer_of_clips().fit(clips, progress=False)
    assert isinstance(quantizer, AudioConditionerBase)
    transformer, mine = both(upstream, "Semantic", audio_text_condition=True)
    bases = (Tokenizer, upstream.audiolm.HubertWithKmeans)
    tokenizer = type("Hubert", bases, {"__init__": nn.Module.__init__})()
    trainer = theirs.SemanticTransformerTrainer(
        wav2vec=tokenizer, transformer=transformer, num_train_steps=2, batch_size=2,
        audio_conditioner=quantizer, dataset=_Rows(clips), results_folder=str(tmp_path / "theirs"),
        force_clear_prev_results=False, valid_frac=0.25, accelerate_kwargs={"cpu": True},
    )  # fmt: skip
    trainer.train()
    path = tmp_path / "theirs.pt"
    trainer.save(str(path))
    mine.load(path)
    for name, value in transformer.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value)

    learner = ours.SemanticTransformerTrainer(
        tokenizer, mine, num_train_steps=1, batch_size=2, audio_conditioner=quantizer,
        dataset=_Rows(clips), results_folder=tmp_path / "ours", accelerate_kwargs={"cpu": True},
    )  # fmt: skip
    learner.train()
    learner.save(tmp_path / "ours.pt")
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: load(*a, **{**k, "weights_only": True}))
    transformer.load(str(tmp_path / "ours.pt"))
    for name, value in mine.state_dict().items():
        assert torch.equal(transformer.state_dict()[name], value)


class _Rows(torch.utils.data.Dataset):
    def __init__(self, clips: list[Tensor]) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Tensor:
        return self.clips[index]


def test_musiclm_takes_their_audio_lm(upstream: Any) -> None:
    """Each stage is handed its own namespace; one namespace for all is what theirs does."""
    from musiclm_fast import MusicLM
    from tests.audiolm.test_tokenizers import notes

    pairs = {stage: both(upstream, stage, audio_text_condition=True) for stage in STAGES}
    bases = (Codec, upstream.audiolm.EncodecWrapper)
    codec = type("Codec", bases, {"__init__": nn.Module.__init__})()
    codec.samples_per_step = 32
    quantizer = quantizer_of_clips().fit(notes(8, 0.25), progress=False)
    waves = []
    for side, package in enumerate((upstream.audiolm, ours)):
        stages = {f"{name.lower()}_transformer": pair[side] for name, pair in pairs.items()}
        audio_lm = package.AudioLM(wav2vec=None, codec=codec, **stages)
        # theirs cannot be told how many time steps to draw: 512 are too many here
        if package is not ours:
            audio_lm.coarse.generate = partial(audio_lm.coarse.generate, max_time_steps=10)
        musiclm = MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=quantizer)
        torch.manual_seed(0)
        options = {} if side == 0 else dict(as_upstream=True, max_time_steps=10, progress=False)
        waves.append(musiclm("a slow waltz", num_samples=2, max_length=8, **options))
    assert waves[0].shape == waves[1].shape
    assert torch.equal(*waves)
