"""A run's configuration beside its checkpoints: written, and compared when the run goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from musiclm_fast._checkpoint import CheckpointError
from musiclm_fast._config import ConfigError, differences, read_config, to_yaml
from musiclm_fast._files import atomic_file
from musiclm_fast.training.run_folder import MULAN, Form, RunFolder

CONFIG_FILE = "config.yaml"


def check_same_run(config: Any, folder: str | os.PathLike[str], form: Form = MULAN) -> bool:
    """Whether a folder holds a run of this configuration to go on with.

    Args:
        config: a configuration with a section ``training``.
        folder: of the run.
        form: of its checkpoints.

    Raises:
        CheckpointError: it holds one of another configuration; the message names the fields.
    """
    output = Path(folder)
    if RunFolder(output, form).latest() is None:
        return False
    advice = "choose another training.output, or --restart to delete that run and train anew"
    file = output / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"training.output: {str(output)!r} holds a run without {CONFIG_FILE}; {advice}"
        )
    try:
        saved = read_config(type(config), file)
    except ConfigError as error:
        raise CheckpointError(
            f"training.output: {str(file)!r} is damaged ({error}); {advice}"
        ) from error
    found = differences(saved, config)
    if config.schedule.name == "constant":  # more steps are then the same run
        found = [each for each in found if not each.startswith("training.steps = ")]
    if found:
        raise CheckpointError(
            f"training.output: {str(output)!r} holds a run of another configuration "
            f"({'; '.join(found)}); {advice}"
        )
    return True


def write_config(config: Any, folder: str | os.PathLike[str]) -> None:
    """Write a run's configuration into its folder."""
    with atomic_file(Path(folder) / CONFIG_FILE) as file:
        file.write(to_yaml(config).encode())


def delete_run(folder: str | os.PathLike[str], form: Form = MULAN) -> None:
    """Delete a run's checkpoints, log and configuration, and nothing else in the folder."""
    RunFolder(folder, form).clear()
    (Path(folder) / CONFIG_FILE).unlink(missing_ok=True)
