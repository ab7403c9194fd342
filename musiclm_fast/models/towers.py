"""The interface of a tower, and the registry of tower classes for configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from musiclm_fast._checks import check_choice, fail
from musiclm_fast.models.draws import AudioDraws

_TOWERS: dict[str, dict[str, type[nn.Module]]] = {"audio": {}, "text": {}}
KINDS = tuple(_TOWERS)


class Tower(Protocol):
    """A module that embeds clips or texts as vectors.

    Attributes:
        dim: width of the embeddings.
        depth: number of blocks whose outputs can be returned.
        arguments: plain values; ``cls(**arguments)`` is the tower with fresh weights.
    """

    dim: int
    depth: int
    arguments: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``(B, dim)``, and with ``return_all_layers`` the earlier blocks' outputs."""


class AudioTower(Tower, Protocol):
    """A tower of clips.

    Attributes:
        front_end: has ``sample_hz``, the rate of its clips in Hz, or None if it is not known.
    """

    front_end: Any


class DrawingTower(AudioTower, Protocol):
    """An audio tower that draws random numbers apart from dropout's.

    It takes them as ``draws``, so that a second pass over the same clips, or over a part of them,
    sees the same. A tower without the methods is not asked for any.
    """

    def as_batch(
        self,
        x: Tensor | Sequence[Tensor],
        lengths: Tensor | None = None,
        *,
        input_sample_hz: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Clips as one padded batch at the tower's rate, and their lengths."""

    def draw(self, x: Tensor | Sequence[Tensor], *, lengths: Tensor | None = None) -> AudioDraws:
        """Make the draws of a batch."""


def register_tower(kind: str, tower: type[nn.Module]) -> type[nn.Module]:
    """Register a custom tower class, so that configurations can name it.

    Args:
        kind: ``"audio"`` or ``"text"``.
        tower: a class whose instances have ``arguments``, plain values with which
            ``tower(**arguments)`` builds the same architecture. ``record_arguments`` of
            ``models.arguments`` provides them for most classes.

    Raises:
        ValueError: unknown kind, or the name belongs to another class.
    """
    check_choice("kind", kind, KINDS)
    known = _TOWERS[kind].setdefault(tower.__name__, tower)
    if known is not tower:
        fail("tower", tower.__qualname__, f"another name: {tower.__name__} is taken")
    return tower


def registered(kind: str) -> dict[str, type[nn.Module]]:
    """The registered classes of a kind, by name."""
    check_choice("kind", kind, KINDS)
    return dict(_TOWERS[kind])


def tower_config(kind: str, tower: nn.Module) -> dict[str, Any]:
    """A tower as plain values: its class's name and its arguments.

    Raises:
        TypeError: its class is not registered.
    """
    name = type(tower).__name__
    if _TOWERS[kind].get(name) is not type(tower):
        names = " or ".join(_TOWERS[kind])
        raise TypeError(
            f"model.{kind}: got {name}, expected {names}, or a class given to "
            "musiclm_fast.models.towers.register_tower"
        )
    return {"class": name, **cast(Tower, tower).arguments}
