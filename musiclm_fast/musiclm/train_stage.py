"""From a configuration to a trained stage in a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from musiclm_fast._checkpoint import CheckpointError
from musiclm_fast._config import ConfigError, differences, from_plain
from musiclm_fast._progress import progress_bar
from musiclm_fast._wording import plural
from musiclm_fast.datasets.sampling import FixedRows
from musiclm_fast.datasets.sound_folder import SoundFolder
from musiclm_fast.models.checkpoint import load_mulan
from musiclm_fast.musiclm.config import TrainStageConfig
from musiclm_fast.musiclm.project import PARTS, MusicProject, saved_sizes
from musiclm_fast.training import configured_run
from musiclm_fast.training.accelerated import PartialState
from musiclm_fast.training.options import RunOptions
from musiclm_fast.training.preparation import check_trackers, processes_on_cpu
from musiclm_fast.training.run_folder import RunFolder, stage_form

SAMPLE_HZ = 16_000  # of the clips: what tokenizer and codec hear


def stage_config(values: dict[str, Any]) -> TrainStageConfig:
    """A configuration from what was given; sizes that were not are those of the output folder.

    Raises:
        ConfigError: a field is unknown, of a wrong type or out of range.
        CheckpointError: the output folder holds parts of other sizes than were given.
    """
    config = from_plain(TrainStageConfig(), values)
    output = config.training.output
    if not (Path(output) / PARTS).is_file():
        return config
    sizes = saved_sizes(output)
    config = from_plain(replace(TrainStageConfig(), music=sizes), values)
    if found := differences(sizes, config.music):
        raise CheckpointError(
            f"music: {output!r} holds tokenizer, codec and quantizer of other sizes "
            f"({'; '.join(found)}); choose another training.output"
        )
    return config


def check_same_run(stage: str, config: TrainStageConfig) -> bool:
    """Whether the output folder holds a run of the stage to go on with.

    Raises:
        CheckpointError: it holds one of another configuration; the message names the fields.
    """
    folder = Path(config.training.output) / stage
    if not (folder / configured_run.CONFIG_FILE).is_file():  # MusicProject.train's: see its options
        return RunFolder(folder, stage_form(stage)).latest() is not None
    return configured_run.check_same_run(config, folder, stage_form(stage))


def train_stage(stage: str, config: TrainStageConfig, *, restart: bool = False) -> dict[str, float]:
    """Train a stage, or go on where an earlier run of it stopped.

    The first stage in an output folder fits tokenizer, codec and quantizer.

    Args:
        stage: semantic, coarse or fine.
        config: the run.
        restart: delete an earlier run of the stage.

    Returns:
        See :meth:`MusicProject.train`.

    Raises:
        KeyboardInterrupt: Ctrl-C (or SIGTERM) came; the step was finished and the run saved.
        ConfigError, CheckpointError, OSError, FloatingPointError: see :func:`stage_config` and
            :meth:`MusicProject.train`.
    """
    data, output = config.data, Path(config.training.output)
    if data.source is None:
        raise ConfigError("data.source: got null, expected a folder of sound files")
    length = round(data.clip_seconds * SAMPLE_HZ)
    clips = SoundFolder(data.source, SAMPLE_HZ, max_length=length)
    state = PartialState(cpu=processes_on_cpu())
    _check_data(config, len(clips), state.num_processes)
    if restart and state.is_main_process:
        configured_run.delete_run(output / stage, stage_form(stage))
    state.wait_for_everyone()
    check_same_run(stage, config)
    with state.main_process_first():
        project = _open(config, clips)
    if state.is_main_process:
        configured_run.write_config(config, output / stage)
    log = project.train(
        stage, clips, SAMPLE_HZ, options=RunOptions.of(config), num_workers=data.num_workers,
        restart=restart,
    )  # fmt: skip
    if state.is_main_process:
        print(
            f"{stage}: loss {log['loss']:.3f}, in validation {log['valid_loss']:.3f}, "
            f"after {plural(int(log['steps']), 'step')}, in {output}"
        )
    return log


def _check_data(config: TrainStageConfig, clips: int, processes: int) -> None:
    # What would fail after minutes of fitting fails before.
    check_trackers(config.training.log_with)
    rows = int((1 - config.validation.share) * clips)
    needed = config.training.batch_size * processes
    if rows < needed:
        raise ConfigError(
            f"training.batch_size: got {config.training.batch_size}, {plural(needed, 'clip')} a "
            f"step, expected at most the {plural(rows, 'sound')} to train on ({clips} in all)"
        )


def _open(config: TrainStageConfig, clips: SoundFolder) -> MusicProject:
    # The project of the output folder, or a new one that is fitted.
    output = config.training.output
    if (Path(output) / PARTS).is_file():
        return MusicProject(output)
    torch.manual_seed(config.training.seed)  # of the codebooks and the conditioning embeddings
    mulan, extra = load_mulan(config.mulan)
    front_end: Any = mulan.audio.front_end
    known = front_end.sample_hz or extra.get("sample_rate")
    if known not in (None, front_end.sample_hz):
        raise ValueError(f"mulan: {config.mulan!r} hears {known} Hz but cannot resample")
    project = MusicProject(output, mulan, config.music)
    rows = FixedRows(clips, config.training.seed)
    some = range(min(len(clips), config.data.fit_clips))
    project.fit([rows[index] for index in progress_bar(some, desc="reading")], SAMPLE_HZ)
    return project
