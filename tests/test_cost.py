"""The cost model against the model itself: parameters, operations, and peak memory as measured."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import musiclm_fast
from musiclm_fast import cli, cost
from musiclm_fast.cli.plan import size

SIZES = dict(dim=48, depth=3, heads=2, dim_head=16)
WITHIN = 0.15  # of the measured peak: what the memory model promises


def make(samples: int = 4000, batch: int = 2, tokens: int = 9) -> tuple[torch.nn.Module, cost.Step]:
    model = musiclm_fast.MuLaN(
        musiclm_fast.AudioSpectrogramTransformer(**SIZES), musiclm_fast.TextTransformer(**SIZES)
    )
    tower = cost.Tower(**SIZES)
    step = cost.mulan_step(
        samples, batch, text_tokens=tokens, audio=tower, text=tower, n_fft=128, hop_length=12
    )
    return model, step


def test_parameters_are_the_models() -> None:
    model, step = make()
    assert step.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tower", ["text", "audio"])
def test_products_are_those_that_torch_counts(tower: str) -> None:
    """All of a tower's but attention, which is an op of its own that torch does not look into."""
    model, step = make(batch=3)
    if tower == "text":
        inputs, sizes, tokens = torch.randint(1, 100, (3, 9)), step.text, step.text_tokens
        other = 0.0
    else:
        inputs, sizes, tokens = torch.randn(3, 4000), step.audio, step.audio_tokens
        by_name = {op.name: op.operations for op in cost.step_ops(step)}
        other = by_name["patch embedding"] + by_name["position table"]
    with FlopCounterMode(display=False) as counter:
        getattr(model.train(), tower)(inputs).sum().backward()
    counted = sum(p.operations for p in cost.products(sizes, 3, tokens) if not p.keys)
    # Nobody wants the gradient of a patch or of an offset: a third of those two is not computed.
    assert counted + other == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert counted <= counter.get_total_flops()


def test_only_the_class_token_leaves_the_last_text_block() -> None:
    tower = cost.Tower(depth=2, reads="first")
    every = cost.products(dataclasses.replace(tower, reads="all"), 2, 10)
    less = cost.products(tower, 2, 10)
    saved = sum(p.operations for p in every) - sum(p.operations for p in less)
    last = {p.name: p.operations / 2 for p in every}  # of one of the two blocks
    expected = 0.9 * sum(x for name, x in last.items() if name != "keys and values")
    assert saved == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["README", "10 s x 2"])
def test_memory_is_within_15_percent_of_the_measured_peak(case: str) -> None:
    from benchmarks import bench_training_step as bench

    shapes = bench.CASES[case]
    measured = bench.apart(bench.OURS, shapes)[1]
    predicted = cost.memory(shapes.counted()).forward_backward
    print(f"{case}: {measured / 2**20:.0f} MiB measured, {predicted / 2**20:.0f} predicted")
    assert predicted == pytest.approx(measured, rel=WITHIN)


def test_memory_grows_with_the_batch_and_the_largest_batch_fits() -> None:
    step = cost.mulan_step(160_000, 1)
    limit = 24e9
    most = cost.largest_batch(step, limit)
    assert most > 1
    assert cost.memory(step.with_batch(most)).total <= limit
    assert cost.memory(step.with_batch(most + 1)).total > limit
    assert cost.largest_batch(step, 1e6) == 0
    mixed = dataclasses.replace(step, precision="bf16")
    assert cost.largest_batch(mixed, limit) > most


def test_no_device_is_faster_than_its_rates() -> None:
    ops = cost.step_ops(cost.mulan_step(160_000, 64))
    products = sum(op.operations for op in ops if op.matrix)
    for device in cost.DEVICES.values():
        assert cost.seconds(ops, device) >= products / device.products["float32"]
    assert cost.seconds(ops, cost.DEVICES["h100"], "bf16") < cost.seconds(
        ops, cost.DEVICES["a100"], "bf16"
    )


def test_clips_shorter_than_a_patch() -> None:
    with pytest.raises(ValueError, match="samples: got 100, expected at least 2400"):
        cost.mulan_step(100, 1)


@pytest.mark.parametrize(
    "text, expected",
    [("24GB", 24e9), ("16GiB", 16 * 2**30), ("80e9", 80e9), (" 1.5 tb", 1.5e12), ("500m", 5e8)],
)
def test_sizes(text: str, expected: float) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["24 apples", "-1GB", "0", "", "1.2.3GB", "GB"])
def test_bad_sizes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", f"--gpu-memory={text}", "--seconds", "10"])
    assert f"got {text!r}, expected a size such as 24GB" in capsys.readouterr().err


def test_plan_tells_the_largest_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--gpu-memory", "24GB", "--seconds", "10"]) == 0
    told = capsys.readouterr().out
    most = int(told.split("largest batch in 24.0 GB: ")[1].split()[0].replace(",", ""))
    assert cli.main(["plan", "--gpu-memory", "80GB", "--seconds", "10"]) == 0
    assert int(capsys.readouterr().out.split("80.0 GB: ")[1].split()[0].replace(",", "")) > 3 * most
    assert f"at {most:,} pairs" in told
    assert "on H100" in told


def test_plan_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--gpu-memory", "1.2GB", "--seconds", "10"]) == 1
    assert "not even one pair fits: one pair needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seconds", "0"], "seconds: got 0.0, expected a number above 0"),
        (["--seconds", "9", "--front-end", "upstream"], "sample_hz: got None"),
        (["--seconds", "9", "--batch", "0"], "batch: got 0"),
        (["--seconds", "0.01"], "samples: got 160"),
    ],
)
def test_plan_of_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--gpu-memory", "24GB", *arguments]) == 2
    assert message in capsys.readouterr().err
