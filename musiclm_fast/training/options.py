"""Options of a training run, declared once.

The same fields serve the configuration files, ``--help``, the constructors of the trainers and the
options that a checkpoint saves. A field's ``argument`` is its name as a trainer's keyword argument:
the name that upstream uses, where upstream has it. Importing this imports neither torch nor numpy.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any, Literal

from musiclm_fast._config import ConfigError, convert_field, explanations, setting


def check_range(config: Any, allowed: str, *names: str) -> None:
    """Check numbers of a configuration; None passes.

    Args:
        config: has the fields.
        allowed: ``"> 0"``, ``">= 0"``, ``">= 2"``, ``"[0, 1)"`` or ``"[0, 1]"``.
        names: of the fields.

    Raises:
        ConfigError: one is out of range.
    """
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if allowed.startswith("["):
            fits = 0 <= value < 1 or (value == 1 and allowed.endswith("]"))
            wanted = f"a share in {allowed}"
        elif allowed == "> 0":
            fits, wanted = 0 < value < math.inf, "above 0"
        else:
            least = int(allowed.removeprefix(">= "))
            fits, wanted = least <= value < math.inf, f"at least {least}"
        if not fits:
            raise ConfigError(f"{name}: got {value!r}, expected {wanted}")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer.

    Args:
        name: adamw, lion (wants a third of the learning rate or less), or adam
        learning_rate: the highest, after the warm-up
        betas: of the moments
        weight_decay: of weight matrices; norms, biases, scales and embeddings do not decay
        decay_all_matrices: embeddings and tokens decay too, as in audiolm-pytorch
        max_grad_norm: gradients are clipped to this norm; null for no clipping
    """

    name: Literal["adamw", "lion", "adam"] = setting("adamw", argument="optimizer")
    learning_rate: float = setting(5e-4, argument="lr")
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    decay_all_matrices: bool = False
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_range(self, "> 0", "learning_rate", "max_grad_norm")
        check_range(self, ">= 0", "weight_decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas: got {list(self.betas)}, expected two numbers in [0, 1)")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run.

    Args:
        name: how it falls after the warm-up
        warmup_steps: steps in which it rises linearly
        final: share of the learning rate at the end
    """

    name: Literal["cosine", "linear", "constant"] = setting("cosine", argument="schedule")
    warmup_steps: int = 200
    final: float = setting(0.02, argument="final_lr")

    def __post_init__(self) -> None:
        check_range(self, ">= 0", "warmup_steps")
        check_range(self, "[0, 1]", "final")


@dataclass(frozen=True)
class TrainingConfig:
    """The run.

    Args:
        output: folder of the checkpoints, the log and this configuration
        steps: optimizer steps
        batch_size: clips per step and process
        accumulate: batches per optimizer step
        precision: bf16 on a GPU that has it; no is float32; null leaves it to accelerate
        max_skipped_steps: steps with a loss or gradient that is not finite are skipped; so many in
            a row end the run
        seed: of every random draw
        save_every: steps between checkpoints
        keep_last: delete older checkpoints of this run but for so many newest; null deletes none
        keep_best: where older ones are deleted, keep the best so many by validation too
        log_every: steps between lines of log.jsonl and calls of trackers
        log_with: accelerate's trackers, such as [tensorboard] or [wandb]
    """

    output: str = setting("results", argument="results_folder", may_change=True)
    steps: int = setting(10_000, argument="num_train_steps")
    batch_size: int = 64
    accumulate: int = setting(1, argument="grad_accum_every")
    precision: Literal["no", "bf16", "fp16"] | None = setting("no", argument="mixed_precision")
    max_skipped_steps: int = setting(10, may_change=True)
    seed: int = setting(0, argument="random_split_seed")
    save_every: int = setting(500, argument="save_model_every", may_change=True)
    keep_last: int | None = setting(None, may_change=True)
    keep_best: int = setting(3, may_change=True)
    log_every: int = setting(10, may_change=True)
    log_with: tuple[str, ...] = setting((), may_change=True)

    def __post_init__(self) -> None:
        check_range(
            self, "> 0", "steps", "batch_size", "accumulate", "save_every", "max_skipped_steps",
            "keep_last", "log_every",
        )  # fmt: skip
        check_range(self, ">= 0", "keep_best", "seed")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation during training.

    Args:
        share: of the clips that are kept out of training
        every: steps between validations; null is with every checkpoint
        rows: most clips that a validation looks at
        best_by: what makes a checkpoint the best
    """

    share: float = setting(0.05, argument="valid_frac")
    every: int | None = setting(None, argument="valid_every", may_change=True)
    rows: int = setting(1024, argument="valid_rows", may_change=True)
    best_by: Literal["valid_loss"] = "valid_loss"

    def __post_init__(self) -> None:
        check_range(self, "[0, 1)", "share")
        check_range(self, "> 0", "every", "rows")


@dataclass(frozen=True)
class RunOptions:
    """What every training run is told.

    Args:
        optimizer: the optimizer
        schedule: the learning rate over the run
        training: the run
        validation: validation during training
    """

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    @classmethod
    def of(cls, config: Any) -> RunOptions:
        """The four sections of a larger configuration."""
        return cls(config.optimizer, config.schedule, config.training, config.validation)

    def with_arguments(
        self, arguments: dict[str, Any], names: dict[str, str] | None = None
    ) -> RunOptions:
        """These options with some given as a trainer's keyword arguments.

        Args:
            arguments: by name.
            names: argument: another name for it, which may be given in its place.

        Raises:
            TypeError: an argument is unknown, or given twice.
            ValueError: one is of a wrong type or out of range; the message names it as given.
        """
        known = {argument: (section, each) for section, each, argument in self._fields()}
        known |= {own: known[argument] for argument, own in (names or {}).items()}
        given: dict[tuple[str, str], str] = {}
        changes: dict[str, dict[str, Any]] = {}
        for name, value in arguments.items():
            if name not in known:
                raise TypeError(f"unexpected argument {name!r}")
            section, each = known[name]
            if (other := given.setdefault((section, each.name), name)) != name:
                raise TypeError(f"got both {other!r} and {name!r}, which are the same argument")
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if each.name == "log_with":  # one or several; accelerate also takes tracker objects
                several = value if isinstance(value, (list, tuple)) else [value]
                value = tuple(each for each in several if each is not None)
            else:
                value = convert_field(getattr(self, section), each.name, value, name)
            changes.setdefault(section, {})[each.name] = value
        sections = {}
        for section, values in changes.items():
            try:
                sections[section] = dataclasses.replace(getattr(self, section), **values)
            except ConfigError as error:
                field, colon, rest = str(error).partition(":")
                raise ConfigError(f"{given.get((section, field), field)}{colon}{rest}") from None
        return dataclasses.replace(self, **sections)

    def arguments(self, may_change: bool = True) -> dict[str, Any]:
        """The options by argument; without ``may_change`` those that determine the result."""
        return {
            argument: getattr(getattr(self, section), each.name)
            for section, each, argument in self._fields()
            if may_change or not each.metadata.get("may_change")
        }

    def signature(
        self,
        *inits: Callable[..., Any],
        needed: Set[str],
        names: dict[str, str] | None = None,
        defaults: dict[str, Any] | None = None,
    ) -> inspect.Signature:
        """The signature of a constructor whose ``**arguments`` are these options.

        Args:
            *inits: the constructor, and its bases' to which it passes ``**arguments`` on.
            needed: arguments without a default.
            names: argument: the constructor's own name for it.
            defaults: of arguments whose default is not these options'.
        """
        kind, empty = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
        found: dict[str, inspect.Parameter] = {}
        for place, init in enumerate(inits):
            for each in inspect.signature(init).parameters.values():
                if each.kind is not each.VAR_KEYWORD and (place == 0 or each.kind is kind):
                    found.setdefault(each.name, each)
        for argument, value in self.arguments().items():
            name = (names or {}).get(argument, argument)
            default = empty if name in needed else (defaults or {}).get(name, value)
            found.setdefault(name, inspect.Parameter(name, kind, default=default))
        return inspect.Signature([*found.values()])

    def explained(self) -> str:
        """``argument: explanation`` lines, for a docstring."""
        lines = []
        for section, each, argument in self._fields():
            about = explanations(type(getattr(self, section)))[each.name]
            lines.append(f"        {argument}: {about}.")
        return "\n".join(lines)

    def _fields(self) -> Iterator[tuple[str, dataclasses.Field[Any], str]]:
        for section in dataclasses.fields(self):
            for each in dataclasses.fields(getattr(self, section.name)):
                yield section.name, each, each.metadata.get("argument") or each.name
