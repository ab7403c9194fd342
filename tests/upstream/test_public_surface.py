"""Every public name, argument, default and method of upstream exists here."""

from __future__ import annotations

import inspect

import pytest
from torch import nn

import musiclm_fast
from tests.upstream import live

NAMES = (
    "MuLaN",
    "MuLaNEmbedQuantizer",
    "MusicLM",
    "AudioSpectrogramTransformer",
    "TextTransformer",
    "SoftmaxContrastiveLearning",
    "SigmoidContrastiveLearning",
    "MuLaNTrainer",
)
# how upstream's trainer sorts a row's fields; ours does that in its collate function
INTERNAL = {"data_tuple_to_kwargs"}

every_class = pytest.mark.parametrize("name", NAMES)


def test_the_list_is_complete(upstream: live.Upstream):
    public = {name for name, value in vars(upstream.musiclm).items() if inspect.isclass(value)}
    assert public == set(NAMES)


def own_methods(cls: type) -> dict[str, object]:
    inherited = set(dir(nn.Module))
    own = {name for name in dir(cls) if not name.startswith("_") and name not in inherited}
    overridden = {name for name in ("__init__", "forward", "parameters") if name in vars(cls)}
    return {name: inspect.getattr_static(cls, name) for name in (own | overridden) - INTERNAL}


def same_default(ours: object, theirs: object) -> bool:
    # None stands for upstream's empty dict and for its function that does nothing
    return ours == theirs or (ours is None and (theirs == {} or inspect.isfunction(theirs)))


@every_class
def test_methods_and_properties(upstream: live.Upstream, name: str):
    ours, theirs = getattr(musiclm_fast, name), getattr(upstream.musiclm, name)
    for method, value in own_methods(theirs).items():
        assert hasattr(ours, method), f"{name}.{method} is missing"
        is_property = isinstance(inspect.getattr_static(ours, method), property)
        assert is_property == isinstance(value, property), f"{name}.{method}"


@every_class
def test_arguments_and_defaults(upstream: live.Upstream, name: str):
    ours, theirs = getattr(musiclm_fast, name), getattr(upstream.musiclm, name)
    for method, value in own_methods(theirs).items():
        if not callable(value):
            continue
        wanted = inspect.signature(getattr(theirs, method)).parameters
        found = inspect.signature(getattr(ours, method)).parameters
        for parameter in wanted.values():
            where = f"{name}.{method}({parameter.name})"
            assert parameter.name in found, f"{where} is missing"
            own = found[parameter.name]
            assert same_default(own.default, parameter.default), where
            assert own.kind in (parameter.kind, parameter.POSITIONAL_OR_KEYWORD), where
        # what can be given by place keeps its place; whatever is added has a default
        places = [p.name for p in wanted.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert list(found)[: len(places)] == places, f"{name}.{method}"
        for added in found.keys() - wanted.keys():
            extra = found[added]
            optional = extra.default is not extra.empty or extra.kind in (
                extra.VAR_KEYWORD,
                extra.VAR_POSITIONAL,
            )
            assert optional, f"{name}.{method}({added}) has no default"
