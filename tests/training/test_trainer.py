"""MuLaNTrainer beyond upstream: optimizers, schedules, averages, steps that are skipped."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset

from musiclm_fast import MuLaN
from musiclm_fast.datasets.sampling import EpochBatches, SeededRows, SharedBatches, training_loader
from musiclm_fast.evaluation.metrics import collapsed_loss
from musiclm_fast.nn.transformer import Transformer
from musiclm_fast.training.monitor import (
    CollapseMonitor,
    Readings,
    SkippedSteps,
    Speed,
    loss_without_learning,
)
from musiclm_fast.training.mulan import MuLaNTrainer
from musiclm_fast.training.optimizer import WeightAverage, make_optimizer, schedule_factor
from musiclm_fast.training.options import (
    OptimizerConfig,
    RunOptions,
    ScheduleConfig,
    TrainingConfig,
)
from musiclm_fast.training.random_state import random_state, set_random_state
from musiclm_fast.training.validation import _recall
from tests.training.runs import QUIET, Noisy, make_mulan, make_trainer

PLAIN: dict[str, Any] = dict(
    optimizer=None, weight_decay=0, schedule="constant", warmup_steps=0, ema_decay=None,
    grad_accum_every=1, save_model_every=100,
)  # fmt: skip


def quiet_mulan(**options: Any) -> MuLaN:
    return make_mulan(dropout=0.0, audio=QUIET, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- order of rows


def test_processes_share_batches() -> None:
    """Two processes with batches of 3 see what one with a batch of 6 sees, from any start."""
    for start in (0, 4):
        alone = iter(SharedBatches(EpochBatches(20, 6, 0, start), 1, 0))
        both = [iter(SharedBatches(EpochBatches(20, 6, 0, start), 2, i)) for i in (0, 1)]
        for _ in range(7):
            assert next(alone) == next(both[0]) + next(both[1])
    first = [next(iter(SharedBatches(EpochBatches(20, 6, 0, 4), 1, 0)))]
    alone = iter(SharedBatches(EpochBatches(20, 6, 0), 1, 0))
    assert [next(alone) for _ in range(5)][4:] == first


class Chancy(Dataset[list[float]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> list[float]:
        chance = [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002
        return [float(index), *chance]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_are_functions_of_seed_and_place(num_workers: int) -> None:
    """Whatever workers read them, and wherever one begins; the generators are left alone."""

    def some(start: int, count: int, seed: int = 3) -> list[Any]:
        loader = training_loader(
            Chancy(), batch_size=2, seed=seed, start=start, processes=1, index=0,
            collate=lambda rows: {"rows": rows}, num_workers=num_workers, pin_memory=False,
        )  # fmt: skip
        return [next(loader)["rows"] for _ in range(count)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole = some(0, 12)
    assert torch.equal(torch.get_rng_state(), before)
    assert some(7, 5) == whole[7:]
    assert some(0, 1, seed=4) != whole[:1]
    rows = [tuple(row) for batch in whole for row in batch]
    assert len(set(rows)) == len(rows), "another epoch draws anew"


def test_draw_goes_before_indexing() -> None:
    class Drawn(Noisy):
        def draw(self, index: int, seed: int) -> tuple[int, int]:
            return index, seed

    rows = SeededRows(Subset(Subset(Drawn(), [9, 8, 7]), [2, 0]), 5)
    assert rows[0, 11][0] == 7
    assert rows[0, 11] != rows[0, 12]
    assert rows[0, 11][1] == rows[1, 11][1] < 2**63


def test_random_states_come_back() -> None:
    cpu = torch.device("cpu")
    state = random_state(cpu)
    np.random.standard_normal()  # noqa: NPY002 - leaves half of a pair behind
    between = random_state(cpu)
    drawn = [torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.random()]  # noqa: NPY002
    set_random_state(between, cpu)
    again = [torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.random()]  # noqa: NPY002
    assert again == drawn
    set_random_state(state, cpu)


# ---- optimizers


def test_what_decays() -> None:
    model = make_mulan(hierarchical_contrastive_loss=False)
    names = {id(p): name for name, p in model.named_parameters()}

    def parts(**options: Any) -> tuple[list[dict[str, Any]], set[str], set[str]]:
        groups = make_optimizer(model, OptimizerConfig(weight_decay=0.2, **options)).param_groups
        decayed, others = ({names[id(p)] for p in group["params"]} for group in groups)
        return groups, decayed, others

    groups, decayed, others = parts()
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    assert decayed | others == set(names.values())
    assert "audio.transformer.layers.0.0.to_q.weight" in decayed
    assert "text_to_latents.weight" in decayed
    assert {
        "text.token_emb.weight", "text.pos_emb.weight", "text.cls_token", "contrast.temperatures",
        "audio_to_latents.bias", "audio.norm.learned_gamma", "audio.to_patch_tokens.1.weight",
        "audio.transformer.layers.0.0.q_scale",
    } <= others  # fmt: skip
    _, every, vectors = parts(decay_all_matrices=True)
    assert every - decayed >= {"text.token_emb.weight", "text.pos_emb.weight"}
    assert all(p.ndim >= 2 for name, p in model.named_parameters() if name in every)
    assert all(p.ndim < 2 for name, p in model.named_parameters() if name in vectors)


def test_frozen_parameters_are_left_out_and_stay(tmp_path: Path) -> None:
    mulan = make_mulan()
    mulan.text.requires_grad_(False)
    before = weights(mulan.text)
    trainer = make_trainer(tmp_path, mulan=mulan)
    trainer.train_step()
    for name, tensor in mulan.text.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert sum(len(g["params"]) for g in trainer.optim.param_groups) == len(
        [p for p in mulan.parameters() if p.requires_grad]
    )
    with pytest.raises(ValueError, match="no parameter that needs a gradient"):
        make_optimizer(mulan.requires_grad_(False), OptimizerConfig())


@pytest.mark.parametrize("name", ["adam", "adamw", "lion"])
def test_optimizers_learn(name: str, tmp_path: Path) -> None:
    lr = 3e-4 if name == "lion" else 3e-3
    trainer = make_trainer(
        tmp_path, mulan=quiet_mulan(), **PLAIN | dict(optimizer=name, lr=lr, num_train_steps=30)
    )
    losses = [trainer.train_step()["loss"] for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (
            "linear",
            [0.25, 0.5, 0.75, 1, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1],
        ),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, None, None, None, 0.55, None, None, None, 0.1]),
    ],
)
def test_schedules(kind: str, expected: list[float | None]) -> None:
    schedule = ScheduleConfig(kind, warmup_steps=4, final=0.1)  # type: ignore[arg-type]
    options = RunOptions(schedule=schedule, training=TrainingConfig(steps=12))
    for step, value in enumerate(expected):
        if value is not None:
            assert schedule_factor(step, options) == pytest.approx(value)
    assert schedule_factor(99, options) == pytest.approx(expected[-1])


def test_the_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lr=1.0, num_train_steps=4, final_lr=0.5)
    seen = []
    for _ in range(4):
        trainer.train_step()
        seen.append(trainer.optim.param_groups[0]["lr"])
    assert seen == pytest.approx([0.5, 1.0, 1.0, 0.75])


def test_the_average_of_weights() -> None:
    model = nn.Linear(3, 2)
    average, expected = WeightAverage(model, 0.5), None
    for n in range(6):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        decay = min(0.5, (1 + n) / (10 + n))
        own = model.weight.detach().clone()
        expected = own if expected is None else decay * expected + (1 - decay) * own
        average.update_parameters(model)
        torch.testing.assert_close(average.module.weight, expected)
    assert not average.train().training and not average.module.weight.requires_grad
    with pytest.raises(ValueError, match="ema_decay: got 1"):
        WeightAverage(model, 1.0)


# ---- steps


def test_accumulation_adds_up(tmp_path: Path) -> None:
    """Two batches a step: the mean of both batches' gradients, and the loss their mean."""
    trainer = make_trainer(
        tmp_path, mulan=quiet_mulan(), dataset=Noisy(noise=0.0),
        **PLAIN | dict(grad_accum_every=2, max_grad_norm=None),
    )  # fmt: skip
    model = trainer.unwrapped
    batches = trainer._loader()
    losses = [model(**next(batches)) for _ in range(2)]
    (sum(losses) / 2).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found: dict[str, Tensor] = {}
    step = trainer._update

    def update(skipped: Tensor) -> None:
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        step(skipped)

    trainer._update = update
    log = trainer.train_step()
    assert log["loss"] == pytest.approx(sum(x.item() for x in losses) / 2)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


def test_gradient_caching_is_the_same_step(tmp_path: Path) -> None:
    ends = []
    for chunk in (None, 3):
        mulan = make_mulan(dropout=0.0)  # masks and patch dropout are drawn alike
        trainer = make_trainer(
            tmp_path / str(chunk), mulan=mulan,
            **PLAIN | dict(grad_cache_chunk=chunk, num_train_steps=3, grad_accum_every=2),
        )  # fmt: skip
        ends.append(([trainer.train_step()["loss"] for _ in range(3)], weights(mulan)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)


def test_activation_checkpointing_replays_chance(tmp_path: Path) -> None:
    """Dropout, masks and patch dropout on: the same losses and weights, to the bit."""
    ends = []
    for again in (False, True):
        mulan = make_mulan(dropout=0.2)
        trainer = make_trainer(
            tmp_path / str(again), mulan=mulan, **PLAIN | dict(activation_checkpointing=again)
        )
        ends.append(([trainer.train_step()["loss"] for _ in range(3)], weights(mulan)))
        blocks = [m for m in mulan.modules() if isinstance(m, Transformer)]
        assert [m.checkpoint_blocks for m in blocks] == [again] * 2
    assert ends[0][0] == ends[1][0]
    for name, tensor in ends[0][1].items():
        assert torch.equal(tensor, ends[1][1][name]), name


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one precision per process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_bf16(tmp_path: Path, fresh_accelerate: None) -> None:
    """Weights stay float32, the loss moves as in float32, checkpoints load, averages work."""
    trainer = make_trainer(
        tmp_path, mulan=quiet_mulan(), mixed_precision="bf16", num_train_steps=20, lr=3e-3,
        save_model_every=10,
    )  # fmt: skip
    seen: set[torch.dtype] = set()
    trainer.unwrapped.audio.transformer.layers[0][0].to_q.register_forward_hook(
        lambda module, inputs, output: seen.add(output.dtype)
    )
    losses: list[float] = []
    trainer.train(log_fn=lambda log: losses.append(log["loss"]))
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.unwrapped.parameters())
    assert sum(losses[-5:]) < sum(losses[:5])
    assert MuLaN.from_pretrained(tmp_path / "latest").audio.dim == 16
    assert make_trainer(
        tmp_path, mulan=quiet_mulan(), mixed_precision="bf16", num_train_steps=20, lr=3e-3,
        resume=True,
    ).step == 20  # fmt: skip


# ---- steps that are not finite


def poisoned(trainer: MuLaNTrainer, at: set[int], value: float) -> None:
    """The loss of those steps, counted from 1, is not finite."""
    backward = trainer.backward

    def bad(inputs: dict[str, Any], share: float) -> Tensor:
        loss = backward(inputs, share)
        if trainer.step + 1 in at:
            next(p for p in trainer.unwrapped.parameters()).grad.fill_(value)
        return loss

    trainer.backward = bad


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "lion"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_changes_nothing(optimizer: str, value: float, tmp_path: Path) -> None:
    """The step is counted and skipped; weights, moments and their step count are as before."""
    trainer = make_trainer(tmp_path, **PLAIN | dict(optimizer=optimizer))
    poisoned(trainer, {2}, value)
    trainer.train_step()
    before = weights(trainer.unwrapped)
    moments = json.dumps([[t.tolist() for t in s.values()] for s in trainer.optim.state.values()])
    trainer.train_step()
    assert moments == json.dumps(
        [[t.tolist() for t in s.values()] for s in trainer.optim.state.values()]
    )
    for name, tensor in trainer.unwrapped.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert (trainer.step, trainer.skipped_steps.total, trainer.skipped_steps.in_a_row) == (2, 1, 1)
    trainer.train_step()
    assert (trainer.skipped_steps.total, trainer.skipped_steps.in_a_row) == (1, 0)
    assert not torch.equal(next(iter(trainer.unwrapped.parameters())), next(iter(before.values())))


def test_bad_steps_in_a_row_end_the_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_skipped_steps=3)
    poisoned(trainer, {2, 4, 5, 6}, math.nan)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step 6 \(4 in all\)"):
        trainer.train()
    assert [path.name for path in trainer.run.checkpoints().values()] == ["mulan.3"]
    resumed = make_trainer(tmp_path, max_skipped_steps=3, resume=True)
    assert (resumed.skipped_steps.total, resumed.skipped_steps.in_a_row) == (1, 0)


def test_a_clip_of_nan_is_a_skipped_step(tmp_path: Path, capsys: Any) -> None:
    """The model refuses it on the CPU; the order of data goes on as if it had not."""

    class Broken(Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            wav, text = super().__getitem__(index)
            return (wav * math.nan if index == 3 else wav), text

    trainer = make_trainer(
        tmp_path, dataset=Broken(), **PLAIN | dict(valid_frac=0, num_train_steps=5)
    )
    trainer.valid_ds = Noisy()
    trainer.train()
    assert trainer.skipped_steps.total == 1
    assert "skipped: loss nan" in capsys.readouterr().out
    for p in trainer.unwrapped.parameters():
        assert p.isfinite().all()


def test_counting_skipped_steps() -> None:
    skips = SkippedSteps(2)
    for step, skipped in enumerate([True, False, True]):
        skips.note(step, skipped)
    assert (skips.total, skips.in_a_row) == (2, 1)
    with pytest.raises(FloatingPointError):
        skips.note(4, True)


# ---- collapse


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(decoupled_contrastive_learning=False),
        dict(sigmoid_contrastive_loss=True),
        dict(hierarchical_contrastive_loss=True),
    ],
    ids=str,
)
def test_the_loss_of_equal_similarities(options: dict[str, Any]) -> None:
    """What the modules compute from equal latents (for the sigmoid at its best bias)."""
    torch.manual_seed(0)
    mulan = make_deep(**options)
    same = nn.functional.normalize(torch.ones(7, 8), dim=-1)
    if options.get("sigmoid_contrastive_loss"):
        with torch.no_grad():
            mulan.contrast.bias.fill_(-math.log(6) - 10)
    latents = [same, same]
    if options.get("hierarchical_contrastive_loss"):
        latents += [same[None].expand(2, -1, -1)] * 2
    expected = mulan.loss_of_latents(*latents).item()
    assert loss_without_learning(mulan, 7) == pytest.approx(expected, rel=1e-5)


def make_deep(**options: Any) -> MuLaN:
    from musiclm_fast import AudioSpectrogramTransformer, TextTransformer

    sizes = dict(dim=16, depth=3, heads=2, dim_head=8)
    text = TextTransformer(num_tokens=30, **sizes)
    return MuLaN(AudioSpectrogramTransformer(**sizes), text, dim_latent=8, **options)


def test_a_collapsed_run_is_warned_about_once(tmp_path: Path, capsys: Any) -> None:
    """A tower that says the same of every clip: the loss is ln(B - 1) and stays there."""
    mulan = quiet_mulan()
    for layer in (mulan.audio_to_latents, mulan.text_to_latents):
        nn.init.zeros_(layer.weight)
        layer.requires_grad_(False)
    trainer = make_trainer(
        tmp_path, mulan=mulan, **PLAIN | dict(num_train_steps=40, warmup_steps=5)
    )
    trainer._collapse.window = 20
    trainer.train()
    said = capsys.readouterr().out
    assert said.count("the model learns nothing") == 1
    assert "1.099 is its value when all similarities are equal" in said
    warning = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in warning if "warning" in entry] == [25]


def test_learning_is_not_collapse() -> None:
    level = collapsed_loss(64)
    monitor = CollapseMonitor(level, after=10, window=20)
    generator = random.Random(0)
    assert not any(monitor.note(s, 4.9 - 0.02 * s + 0.1 * generator.random()) for s in range(200))
    monitor = CollapseMonitor(level, after=10, window=20)
    flat = [bool(monitor.note(s, level + 0.02 * generator.uniform(-1, 1))) for s in range(1, 60)]
    assert flat.index(True) == 29 and sum(flat) == 1


# ---- validation, logs, speed


def test_validation(tmp_path: Path) -> None:
    """The loss and recall of the averaged model on the held-out rows, by hand; nothing is moved."""
    mulan = quiet_mulan()
    trainer = make_trainer(tmp_path, mulan=mulan, valid_frac=0.5, batch_size=4)
    for _ in range(2):
        trainer.train_step()
    state, before = torch.get_rng_state(), trainer.unwrapped.training
    found = trainer.validate()
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.unwrapped.training is before
    assert trainer.validate() == found
    rows = SeededRows(trainer.valid_ds, trainer.seed)
    wavs, texts = (
        torch.stack(column) for column in zip(*(rows[i, i] for i in range(10)), strict=True)
    )
    model = trainer.average.module
    with torch.no_grad():
        similarity = model(wavs, texts, return_pairwise_similarities=True)
        losses = [model(wavs[i : i + 4], texts[i : i + 4]).item() for i in (0, 4)]
    place = (similarity >= similarity.diagonal()[:, None]).sum(1)
    back = (similarity >= similarity.diagonal()).sum(0)
    assert found["valid_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    for k in (1, 5, 10):
        assert found[f"valid_audio_to_text_recall@{k}"] == (place <= k).double().mean()
        assert found[f"valid_text_to_audio_recall@{k}"] == (back <= k).double().mean()


def test_recall_with_repeated_texts() -> None:
    """Clips 0 and 2 share a text: either is right for it, and it is one candidate, not two."""
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    audio = torch.tensor([[0.9, 0.1], [0.8, 0.5], [0.1, 0.3]])
    there, back = _recall(audio, text, ["a", "b", "a"])
    assert there == pytest.approx({1: 1 / 3, 5: 1, 10: 1})
    assert back == {1: 1, 5: 1, 10: 1}


def test_a_validation_set_of_its_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, valid_dataset=Noisy(9), valid_rows=5)
    assert len(trainer.ds) == 20
    assert "valid_recall@1" in trainer.validate()
    trainer.valid_ds = Noisy(1)
    assert list(trainer.validate()) == ["valid_loss"]


class Recorder(GeneralTracker):
    """A tracker of one's own."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.seen: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.seen.append((step, values))


def test_trackers_and_the_log(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(tmp_path, log_with=recorder, log_every=3, save_model_every=4)
    logs: list[dict[str, float]] = []
    trainer.train(log_fn=logs.append)
    assert recorder.config["num_train_steps"] == 8
    assert [step for step, _ in recorder.seen] == [3, 4, 6, 8]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 6, 8]
    assert lines[0]["train_loss"] == pytest.approx(logs[2]["loss"])
    assert lines[1]["valid_loss"] == logs[3]["valid_loss"]
    assert {"grad_norm", "learning_rate", "skipped_steps", "samples/s"} <= lines[0].keys()
    assert len(logs) == 8


def test_speed_counts_pairs_and_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("musiclm_fast.training.monitor.time.perf_counter", lambda: clock[0])
    speed = Speed(sample_hz=100, processes=2)
    assert speed.rates() == {}
    for samples in (400, 200):
        speed.add(2, samples)
        clock[0] += 0.5
        speed.step()
    assert speed.rates() == pytest.approx({"samples/s": 8.0, "s audio/s": 12.0})
    speed.pause()
    clock[0] += 100
    speed.add(2, 400)
    clock[0] += 1
    speed.step()
    assert speed.rates() == pytest.approx({"samples/s": 4.0, "s audio/s": 8.0})


class Event:
    """Stands for one of CUDA: done after so many questions, or when waited for."""

    def __init__(self, asked_until_done: int) -> None:
        self.left, self.waited = asked_until_done, False

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0

    def synchronize(self) -> None:
        self.waited = True


def test_numbers_are_read_late_and_in_order() -> None:
    """As on a GPU: what is not there yet is left, at most 8 steps; nobody waits before."""
    readings, events = Readings(), [Event(0), Event(2), Event(0), *(Event(99) for _ in range(9))]
    for step, event in enumerate(events[:3]):
        readings._pending.append((step, torch.tensor([float(step)]), event))
    assert readings.take() == [(0, [0.0])]
    assert readings.take() == []  # step 2 is there, but comes after step 1
    assert readings.take() == [(1, [1.0]), (2, [2.0])]
    for step, event in enumerate(events[3:], 3):
        readings._pending.append((step, torch.tensor([float(step)]), event))
    assert [step for step, _ in readings.take()] == [3]  # the ninth from the end
    assert [event.waited for event in events[3:]] == [True] + [False] * 8
    assert [step for step, _ in readings.take(wait=True)] == list(range(4, 12))
    assert all(event.waited for event in events[3:])


def test_sounds_that_could_not_be_read_are_reported(tmp_path: Path, capsys: Any) -> None:
    trainer = make_trainer(tmp_path, **PLAIN | dict(num_train_steps=3))
    batches = trainer._loader()

    def with_skips() -> Any:
        for number, batch in enumerate(batches):
            yield {**batch, "skipped": [("a.wav", "no such file")] if number != 1 else []}

    trainer._batches = with_skips()
    trainer.train()
    said = capsys.readouterr().out
    assert said.count("skipped a.wav: no such file") == 1
    assert "1 sound could not be read:\n  a.wav: no such file (2 times)" in said
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["skipped_sounds"] == [["a.wav", "no such file", 2]]


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=1), "batch_size: got 1, expected at least 2"),
        (dict(batch_size=17), "dataset: got 16 rows for training .*at least one batch of 17"),
        (dict(valid_frac=1.0), "valid_frac"),
        (dict(optimizer="sgd"), "optimizer: got 'sgd', expected one of"),
        (dict(use_lion=True, optimizer="adamw"), "use_lion"),
        (dict(schedule="step"), "schedule: got 'step'"),
        (dict(warmup_steps=-1), "warmup_steps: got -1"),
        (dict(final_lr=2.0), "final_lr"),
        (dict(lr=0.0), "lr: got 0.0"),
        (dict(weight_decay=-1.0), "weight_decay"),
        (dict(betas=(0.9, 1.0)), "betas"),
        (dict(mixed_precision="fp8"), "mixed_precision"),
        (
            dict(mixed_precision="bf16", accelerate_kwargs=dict(mixed_precision="no")),
            "accelerate_kw",
        ),
        (dict(ema_decay=1.5), "ema_decay"),
        (dict(grad_cache_chunk=0), "grad_cache_chunk"),
        (dict(best_by="loss"), "best_by"),
        (
            dict(log_with=["aim"]),
            "log_with: got 'aim', expected a tracker of accelerate that is ins",
        ),
        (dict(keep_last=0), "keep_last: got 0"),
        (dict(keep_best=-1), "keep_best: got -1"),
        (dict(num_train_steps=0), "num_train_steps"),
        (dict(max_skipped_steps=0), "max_skipped_steps"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_is_refused(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(TypeError, match="dataset: got Stream, expected one with a length"):
        make_trainer(tmp_path, dataset=Stream())


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["", "activation checkpointing"])
def test_compiled_towers_are_the_same_steps(again: bool, tmp_path: Path) -> None:
    """Losses, averages and checkpoints as without torch.compile; chance is off: it draws anew."""
    ends = []
    for compiled in (False, True):
        mulan = quiet_mulan()
        trainer = make_trainer(
            tmp_path / str(compiled), mulan=mulan, num_train_steps=3,
            compile_towers=compiled, activation_checkpointing=again and compiled,
        )  # fmt: skip
        losses: list[float] = []
        trainer.train(log_fn=lambda log, losses=losses: losses.append(log["loss"]))
        ends.append((losses, weights(MuLaN.from_pretrained(tmp_path / str(compiled) / "latest"))))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    assert ends[0][1].keys() == ends[1][1].keys()
