"""Towers made of pretrained encoders of Hugging Face transformers.

A tower keeps the encoder's configuration and its tokenizer or feature extractor among its own
arguments, and the weights in its ``state_dict``. So a saved MuLaN is complete: it is rebuilt
without a download, and nothing in it is executed.
"""

from __future__ import annotations

import inspect
import json
import os
from typing import Any, cast

import torch
from torch import Tensor, nn

from musiclm_fast._checks import describe, fail
from musiclm_fast._optional import transformers_class

_ORIGINS = frozenset({"_name_or_path", "name_or_path", "is_local", "local_files_only"})


class HuggingFaceTower(nn.Module):
    """Base of both towers: the encoder, its width and depth, freezing.

    The encoder's own masking in training (SpecAugment, as in wav2vec 2.0) and layer drop are off:
    they draw from numpy, whose state is neither saved nor replayed.

    Attributes:
        dim: width of the encoder.
        depth: number of blocks whose outputs can be asked for; 1 where the encoder's widths differ
            from block to block.
        frozen: the encoder is not trained: it stays in evaluation mode, none of its parameters
            requires a gradient, and it runs under ``no_grad``.
    """

    arguments: dict[str, Any]
    model: nn.Module

    def __init__(self, model: Any, part: str, frozen: bool, pooling: str) -> None:
        super().__init__()
        self.model, config = _encoder(model, part)
        own = cast(Any, self.model).config
        if not isinstance(getattr(own, "hidden_size", None), int):
            fail("model", type(self.model).__name__, "an encoder whose config has hidden_size")
        for name, off in (("apply_spec_augment", False), ("layerdrop", 0.0)):
            if hasattr(own, name):
                setattr(own, name, off)
        self.dim: int = own.hidden_size
        self.depth: int = 1 if hasattr(own, "depths") else own.num_hidden_layers
        self.frozen, self.pooling = frozen, pooling
        self.arguments = {"model": config, "frozen": frozen, "pooling": pooling}
        takes = inspect.signature(self.model.forward).parameters
        self._takes = frozenset(takes)
        self._options = {"use_cache": False} if "use_cache" in takes else {}
        if frozen:
            self.model.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Any:
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.model.parameters()).dtype

    def _run(
        self, inputs: dict[str, Any], mask: Tensor | None, return_all_layers: bool
    ) -> tuple[Tensor, Tensor | None]:
        # (B, dim), and (depth - 1, B, dim) of the earlier blocks
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            result = self.model(
                **inputs, **self._options, output_hidden_states=return_all_layers, return_dict=True
            )
            last = result.last_hidden_state
            out = self._pooled(last, mask)
            if not return_all_layers:
                return out, None
            earlier = [self._pooled(h, mask) for h in result.hidden_states[1 : self.depth]]
            layers = torch.stack(earlier) if earlier else out.new_zeros(0, *out.shape)
            return out, layers

    def _pooled(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        # hidden (B, n, d), or a map (B, d, height, width); mask (B, n) bool -> (B, d)
        if hidden.ndim == 4:
            hidden = hidden.flatten(2).transpose(1, 2)
        if self.pooling == "cls":
            return hidden[:, 0]
        if mask is None:
            return hidden[:, -1] if self.pooling == "last" else hidden.mean(dim=1)
        if self.pooling == "last":
            place = torch.arange(hidden.shape[1], device=hidden.device)
            last = place.masked_fill(~mask, 0).amax(dim=1)  # (B,)
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        total = hidden.masked_fill(~mask[:, :, None], 0.0).sum(dim=1)
        return total / mask.sum(dim=1, keepdim=True).clamp(min=1).to(total.dtype)


def _encoder(model: Any, part: str) -> tuple[nn.Module, dict[str, Any]]:
    # The encoder inside a model (part: the half of a two-tower model), and the configuration that
    # builds the same one.
    if isinstance(model, dict):
        return _inside(_from_config(model), part), model
    if isinstance(model, (str, os.PathLike)):
        try:
            whole = transformers_class("AutoModel").from_pretrained(os.fspath(model))
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise OSError(
                f"model: got {os.fspath(model)!r}, expected a folder with a model of transformers "
                f"or its name on the Hugging Face Hub ({reason})"
            ) from error
        return _inside(whole.float(), part), plain_values(whole.config.to_dict())
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        fail("model", describe(model), "a name, a folder or a model of transformers", TypeError)
    owner = cast(Any, model)
    config = plain_values(owner.config.to_dict())
    try:
        with torch.device("meta"):
            rebuilt = _inside(_from_config(config), part)
    except ValueError as error:
        raise TypeError(f"model: {type(model).__name__} is no class of AutoModel's") from error
    inner = [owner, getattr(owner, part, None), getattr(owner, "base_model", None)]
    if hasattr(owner, "get_encoder"):
        inner.append(owner.get_encoder())
    shapes = {name: t.shape for name, t in rebuilt.state_dict().items()}
    for found in inner:
        if not isinstance(found, nn.Module) or type(found) is not type(rebuilt):
            continue
        if {name: t.shape for name, t in found.state_dict().items()} == shapes:
            return found, config
    return fail(
        "model", type(model).__name__,
        f"a model that its configuration rebuilds (it gives a {type(rebuilt).__name__})", TypeError,
    )  # fmt: skip


def _from_config(config: dict[str, Any]) -> Any:
    values = dict(config)
    try:
        built = transformers_class("AutoConfig").for_model(values.pop("model_type"), **values)
        model = transformers_class("AutoModel").from_config(built)
    except KeyError as error:
        raise ValueError("model: got a configuration without model_type") from error
    return model.float()


def _inside(model: Any, part: str) -> nn.Module:
    if isinstance(half := getattr(model, part, None), nn.Module):
        return half
    both = isinstance(getattr(model, "encoder", None), nn.Module)
    if both and isinstance(getattr(model, "decoder", None), nn.Module):
        return cast(nn.Module, model.get_encoder())
    return cast(nn.Module, model)


def beside(model: Any, auto: str) -> Any:
    """The tokenizer or feature extractor of a model's folder or name; None if it has none."""
    if not isinstance(model, (str, os.PathLike)):
        model = getattr(model, "name_or_path", "")
    if not model:
        return None
    try:
        return transformers_class(auto).from_pretrained(os.fspath(model))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"model: {os.fspath(model)!r} has no {auto[4:].lower()} ({reason})"
        ) from error


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON, without the path of its folder.

    Reading it back gives the same values.
    """
    plain: dict[str, Any] = json.loads(
        json.dumps(values, default=str),
        object_hook=lambda found: {k: v for k, v in found.items() if k not in _ORIGINS},
    )
    return plain
