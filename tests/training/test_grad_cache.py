"""Gradient caching against the unchunked step."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from musiclm_fast import AudioSpectrogramTransformer, MuLaN, TextTransformer, testing
from musiclm_fast.models.front_end import FrontEnd
from musiclm_fast.training.grad_cache import cached_step

SIZE = dict(dim=32, depth=3, heads=2, dim_head=16)


def make(dropout: float = 0.0, audio: dict[str, Any] | None = None, **options: Any) -> MuLaN:
    torch.manual_seed(0)
    dropouts = dict(attn_dropout=dropout, ff_dropout=dropout)
    mulan = MuLaN(
        AudioSpectrogramTransformer(
            **{**SIZE, **dropouts, "spec_n_fft": 64, "spec_win_length": 24, **(audio or {})}
        ),
        TextTransformer(num_tokens=50, **SIZE, **dropouts),
        dim_latent=16,
        **options,
    )
    return mulan.double()  # so that equal means equal


def inputs(batch: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    wavs = torch.randn(batch, 1500, generator=generator, dtype=torch.float64)
    return wavs, torch.randint(1, 50, (batch, 7), generator=generator)


def gradients(model: nn.Module, step: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = step(model)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def unchunked(model: nn.Module) -> Tensor:
    loss = model(*inputs())
    loss.backward()
    return loss


def same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-11, atol=0)
    assert a[1].keys() == b[1].keys()
    for name, grad in a[1].items():
        torch.testing.assert_close(
            grad, b[1][name], rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(sigmoid_contrastive_loss=True),
        dict(hierarchical_contrastive_loss=True),
        dict(hierarchical_contrastive_loss=True, sigmoid_contrastive_loss=True),
    ],
    ids=["decoupled", "sigmoid", "hierarchical", "hierarchical sigmoid"],
)
@pytest.mark.parametrize("chunk_size", [4, 11])
def test_equals_the_unchunked_step(
    chunk_size: int, options: dict[str, Any], training: bool
) -> None:
    """In training with SpecAugment, one mask for the batch, and patch dropout."""
    model = make(audio=dict(spec_aug_freq_mask=10), **options).train(training)
    expected = gradients(model, unchunked)
    found = gradients(model, lambda m: cached_step(m, *inputs(), chunk_size=chunk_size))
    same(found, expected)


@pytest.mark.parametrize("options", [{}, dict(hierarchical_contrastive_loss=True)], ids=str)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_labels_reach_across_chunks(sigmoid: bool, options: dict[str, Any]) -> None:
    model = make(sigmoid_contrastive_loss=sigmoid, **options).eval()
    audio, text = testing.contrastive_labels(11)
    for labels in ((audio, text), audio):

        def whole(m: nn.Module, given: Any = labels) -> Tensor:
            loss: Tensor = m(*inputs(), labels=given)
            loss.backward()
            return loss

        expected = gradients(model, whole)
        assert abs(expected[0] - gradients(model, unchunked)[0]) > 1e-3
        step = functools.partial(cached_step, chunk_size=4, labels=labels)
        same(gradients(model, lambda m, s=step: s(m, *inputs())), expected)


def test_dropout_is_replayed() -> None:
    """Against the same chunks with gradients all at once, which draw the same dropout."""
    wavs, texts = inputs()

    def all_at_once(m: nn.Module) -> Tensor:
        chunks = [slice(i, i + 4) for i in range(0, len(wavs), 4)]
        parts = [m(wavs[c], texts[c], return_loss_latents=True)[0] for c in chunks]
        loss = m.loss_of_latents(*(torch.cat(p, dim=-2) for p in zip(*parts, strict=True)))
        loss.backward()
        return loss

    quiet = dict(spec_aug_freq_mask=0, spec_aug_time_mask=0, patch_dropout_prob=0.0)
    model = make(dropout=0.2, audio=quiet).train()
    expected = gradients(model, all_at_once)
    found = gradients(model, lambda m: cached_step(m, *inputs(), chunk_size=4))
    same(found, expected)
    other = gradients(model.eval(), lambda m: cached_step(m, *inputs(), chunk_size=4))
    assert not torch.allclose(other[0], found[0])  # the dropout was on


def test_gradients_accumulate_and_scale() -> None:
    model = make().eval()
    _, once = gradients(model, lambda m: cached_step(m, *inputs(), chunk_size=5))
    for _ in range(2):
        cached_step(model, *inputs(), chunk_size=5, backward=lambda loss: (loss * 4).backward())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 9 * once[name], rtol=1e-9, atol=1e-12)


def test_autocast_surrounds_the_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    found: dict[str, bool] = {}
    loss_of_latents = model.loss_of_latents

    def loss(*latents: Tensor, **options: Any) -> Tensor:
        found["loss"] = torch.is_autocast_enabled("cpu")
        return loss_of_latents(*latents, **options)

    def backward(whole: Tensor) -> None:
        found["backward"] = torch.is_autocast_enabled("cpu")
        whole.backward()

    monkeypatch.setattr(model, "loss_of_latents", loss)
    cached_step(
        model, *inputs(), chunk_size=4, backward=backward,
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )  # fmt: skip
    assert found == {"loss": True, "backward": False}


def test_the_generator_moves_on() -> None:
    model = make(dropout=0.1).train()
    torch.manual_seed(5)
    first = cached_step(model, *inputs(), chunk_size=4)
    assert not torch.equal(first, cached_step(model, *inputs(), chunk_size=4))


@pytest.mark.parametrize("options", [{}, dict(hierarchical_contrastive_loss=True)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("how", ["list", "lengths", "other rate", "alike"])
def test_clips_of_their_own_lengths(how: str, training: bool, options: dict[str, Any]) -> None:
    """Chunks are padded to other lengths than the whole batch, and group their clips otherwise: no
    clip sees it, and each has the masks and the patches that the whole batch's draws gave it."""
    front_end = FrontEnd(
        n_fft=64, win_length=24, freq_mask=0.3, time_mask=0.3, masks_per_sample=True,
        time_stretch=0.1, sample_hz=16_000,
    )  # fmt: skip
    audio = dict(spec_n_fft=128, front_end=front_end, patch_dropout_prob=0.4)
    model = make(audio=audio, **options).train(training)
    wavs, texts = inputs()
    lengths = torch.tensor([600 + 90 * (7 * i % 11) for i in range(len(wavs))])
    clips: Any = [w[:n] for w, n in zip(wavs, lengths, strict=True)]
    more: dict[str, Any] = {}
    if how == "lengths":
        clips, more = wavs, dict(lengths=lengths)
    elif how == "other rate":
        more = dict(input_sample_hz=8_000)
    elif how == "alike":
        clips = list(wavs)

    def whole(m: nn.Module) -> Tensor:
        loss: Tensor = m(clips, texts, **more)
        loss.backward()
        return loss

    expected = gradients(model, whole)
    for chunk_size in (3, 11):
        step = functools.partial(cached_step, chunk_size=chunk_size, **more)
        same(gradients(model, lambda m, s=step: s(m, clips, texts)), expected)


@pytest.mark.parametrize("time_first", [False, True])
def test_spectrograms(time_first: bool) -> None:
    """In training: masks and dropped patches of a batch of spectrograms."""
    audio = dict(accept_spec=True, accept_spec_time_first=time_first, spec_aug_time_mask=10)
    model = make(audio=audio).train()
    _, texts = inputs()
    specs = torch.rand(len(texts), 33, 60, dtype=torch.float64)
    specs = specs.transpose(1, 2) if time_first else specs

    def whole(m: nn.Module) -> Tensor:
        loss: Tensor = m(specs, texts)
        loss.backward()
        return loss

    expected = gradients(model, whole)
    same(gradients(model, lambda m: cached_step(m, specs, texts, chunk_size=4)), expected)


def test_under_distributed_data_parallel(tmp_path: Any) -> None:
    model = make().eval()
    expected = gradients(model, unchunked)
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        # The last blocks' intermediate outputs are unused, as in the unchunked step.
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        loss, grads = gradients(wrapped, lambda m: cached_step(m, *inputs(), chunk_size=4))
    finally:
        dist.destroy_process_group()
    same((loss, {n.removeprefix("module."): g for n, g in grads.items()}), expected)


def test_bad_input() -> None:
    model = make()
    wavs, texts = inputs()
    with pytest.raises(ValueError, match="chunk_size"):
        cached_step(model, wavs, texts, chunk_size=0)
    with pytest.raises(ValueError, match="texts"):
        cached_step(model, wavs, texts[:3], chunk_size=4)
    with pytest.raises(ValueError, match="wavs"):
        cached_step(model, wavs[:0], texts[:0], chunk_size=4)
    with pytest.raises(ValueError, match="lengths"):
        cached_step(model, wavs, texts, chunk_size=4, lengths=torch.full((3,), 1500))
    with pytest.raises(ValueError, match="backward"):
        cached_step(model, wavs, texts, chunk_size=4, backward=lambda loss: None)
    model.audio.register_forward_pre_hook(lambda *_: pytest.fail("the towers ran before the check"))
    with pytest.raises(ValueError, match="labels"):
        cached_step(model, wavs, texts, chunk_size=4, labels=torch.arange(4))


@pytest.mark.slow
def test_a_batch_of_1024_in_the_memory_of_64() -> None:
    """Clips of 1 s, by the benchmark's own lines with a smaller model."""
    from benchmarks.bench_grad_cache import measured
    from benchmarks.harness import MIB, in_fresh_process

    def peak(how: str, clips: int) -> int:
        found = in_fresh_process(measured, how, 128, 2, clips, 64)
        return int(found["bytes"])

    # Linear memory would be 16 times as much; measured are 107 and 84 MiB.
    assert peak("cached", 1024) < 1.25 * peak("plain", 64) + 20 * MIB


def test_the_memory_benchmark_compares_before_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_grad_cache as bench

    bench.check_parity()
    monkeypatch.setattr(bench, "step", _with_a_wrong_gradient(bench.step))
    with pytest.raises(AssertionError, match="contrast"):
        bench.check_parity()


def _with_a_wrong_gradient(step: Any) -> Any:
    def wrong(model: Any, wavs: Tensor, texts: Tensor, chunk: int | None) -> Tensor:
        loss: Tensor = step(model, wavs, texts, chunk)
        if chunk is not None:
            model.contrast.temperatures.grad *= 1.0001
        return loss

    return wrong


def test_under_autocast() -> None:
    """Autocast keeps cast weights for its whole region: those of the pass without gradients must
    not serve the one with. As near to float32 as the unchunked step."""
    model = make().float().train()
    wavs, texts = inputs()
    wavs = wavs.float()

    def whole(m: nn.Module) -> Tensor:
        loss: Tensor = m(wavs, texts)
        loss.backward()
        return loss

    exact = gradients(model, whole)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(model, whole)
        found = gradients(model, lambda m: cached_step(m, wavs, texts, chunk_size=4))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=0)
    assert found[1].keys() == exact.keys()
    # Moves all of a row's scores alike, which softmax does not see: its gradient is rounding.
    del exact["audio.dynamic_pos_bias_mlp.4.bias"]
    for name, grad in exact.items():
        allowed = 2 * (expected[1][name] - grad).norm() + 0.01 * grad.norm()  # bfloat16's eps
        assert (found[1][name] - grad).norm() <= allowed, name
