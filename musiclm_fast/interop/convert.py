"""Conversion of musiclm-pytorch's models and weights to this package."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from musiclm_fast._checks import check_choice, describe, fail
from musiclm_fast._wording import plural
from musiclm_fast.models.audio_tower import AudioSpectrogramTransformer
from musiclm_fast.models.losses import SigmoidContrastiveLearning, SoftmaxContrastiveLearning
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.models.quantizer import MuLaNEmbedQuantizer
from musiclm_fast.models.text_tower import TextTransformer
from musiclm_fast.musiclm.musiclm import MusicLM


def from_upstream(model: nn.Module) -> nn.Module:
    """Convert a musiclm-pytorch model, with its weights, mode, dtype and device.

    Args:
        model: a MuLaN, AudioSpectrogramTransformer, TextTransformer, SoftmaxContrastiveLearning,
            SigmoidContrastiveLearning, MuLaNEmbedQuantizer or MusicLM of musiclm-pytorch.

    Returns:
        The model of the same name of this package. Nothing is shared with ``model`` except a
        MusicLM's AudioLM.

    Raises:
        TypeError: another kind of model.
    """
    name = type(model).__name__
    if name not in _BUILDERS:
        fail("model", describe(type(model)), "a model named " + ", ".join(_BUILDERS), TypeError)
    ours = _BUILDERS[name](model)
    if name != "MusicLM":
        first = next(iter(model.state_dict().values()))
        floating = next(v for v in model.state_dict().values() if v.is_floating_point())
        ours.to(device=first.device, dtype=floating.dtype)
        ours.load_state_dict(model.state_dict())
    modes = {path: module.training for path, module in model.named_modules()}
    for path, part in ours.named_modules():
        part.training = modes.get(path, model.training)
    return ours


def _transformer_arguments(transformer: Any, dim: int) -> dict[str, Any]:
    attn, ff = transformer.layers[0]
    return {
        "dim": dim,
        "depth": len(transformer.layers),
        "dim_head": attn.q_scale.shape[0],
        "heads": attn.heads,
        "attn_dropout": attn.attn_dropout.p,
        "ff_mult": _ff_mult(dim, ff[4].in_features),
        "ff_dropout": ff[3].p,
    }


def _ff_mult(dim: int, hidden: int) -> float:
    # The width is int(dim * mult * 2 / 3); prefer the whole number that gives it.
    whole = (m for m in range(1, 33) if int(dim * m * 2 / 3) == hidden)
    return next(whole, (hidden + 0.5) * 1.5 / dim)


def _audio(model: Any) -> AudioSpectrogramTransformer:
    spec, aug = model.spec, model.aug
    return AudioSpectrogramTransformer(
        **_transformer_arguments(model.transformer, model.dim),
        patch_size=tuple(model.patch_size),
        accept_spec=model.accept_spec,
        accept_spec_time_first=model.accept_spec_time_first,
        spec_n_fft=spec.n_fft,
        spec_power=spec.power,
        spec_win_length=spec.win_length,
        spec_hop_length=spec.hop_length,
        spec_pad=spec.pad,
        spec_center=spec.center,
        spec_pad_mode=spec.pad_mode,
        spec_aug_stretch_factor=float(aug[0].phase_advance[-1, 0]) / math.pi,
        spec_aug_freq_mask=aug[1].mask_param,
        spec_aug_time_mask=aug[2].mask_param,
        patch_dropout_prob=model.patch_dropout_prob,
    )


def _text(model: Any) -> TextTransformer:
    return TextTransformer(
        **_transformer_arguments(model.transformer, model.dim),
        num_tokens=model.token_emb.num_embeddings,
        max_seq_len=model.max_seq_len,
        pad_id=model.pad_id,
    )


def _softmax(model: Any) -> SoftmaxContrastiveLearning:
    return SoftmaxContrastiveLearning(
        layers=model.temperatures.shape[0],
        decoupled_contrastive_learning=model.decoupled_contrastive_learning,
    )


def _sigmoid(model: Any) -> SigmoidContrastiveLearning:
    return SigmoidContrastiveLearning(layers=model.temperatures.shape[0])


def _mulan(model: Any) -> MuLaN:
    multi = model.multi_layer_contrastive_learning
    return MuLaN(
        audio_transformer=_audio(model.audio),
        text_transformer=_text(model.text),
        dim_latent=model.dim_latent,
        decoupled_contrastive_learning=getattr(
            model.contrast, "decoupled_contrastive_learning", False
        ),
        hierarchical_contrastive_loss=multi is not None,
        hierarchical_contrastive_loss_layers=None if multi is None else multi.layers,
        sigmoid_contrastive_loss=hasattr(model.contrast, "bias"),
    )


def _quantizer(model: Any) -> MuLaNEmbedQuantizer:
    first = next(iter(model.cond_embeddings.values()))
    ours = MuLaNEmbedQuantizer(
        mulan=_mulan(model.mulan),
        conditioning_dims=model.conditioning_dims,
        rq_num_quantizers=model.num_codebooks,
        codebook_size=first.shape[1],
        namespaces=model.namespaces,
    )
    ours.rq = copy.deepcopy(model.rq)
    ours.set_default_namespace(model._default_namespace)
    return ours


def _musiclm(model: Any) -> MusicLM:
    quantizer = from_upstream(model.mulan_embed_quantizer)
    assert isinstance(quantizer, MuLaNEmbedQuantizer)
    return MusicLM(audio_lm=model.audio_lm, mulan_embed_quantizer=quantizer)


_BUILDERS: dict[str, Callable[[Any], nn.Module]] = {
    "MuLaN": _mulan,
    "AudioSpectrogramTransformer": _audio,
    "TextTransformer": _text,
    "SoftmaxContrastiveLearning": _softmax,
    "SigmoidContrastiveLearning": _sigmoid,
    "MuLaNEmbedQuantizer": _quantizer,
    "MusicLM": _musiclm,
}


# Arguments that the weights do not determine; defaults are assumed unless given.
_ASSUMED: dict[str, tuple[str, ...]] = {
    "audio": (
        "spec_n_fft", "spec_hop_length", "spec_power", "spec_pad", "spec_center", "spec_pad_mode",
        "accept_spec", "accept_spec_time_first",
    ),
    "text": ("pad_id",),
    "mulan": ("decoupled_contrastive_learning",),
}  # fmt: skip


def config_of_weights(
    weights: Mapping[str, Tensor], given: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a MuLaN of musiclm-pytorch, from the shapes of its weights.

    Args:
        weights: its ``state_dict``.
        given: constructor arguments that shapes do not determine, ``{"audio": {...}, "text": {...},
            "mulan": {...}}``.

    Returns:
        What ``MuLaN.from_config`` takes, and the assumed arguments by path.

    Raises:
        ValueError: the weights are not a MuLaN's; patches that are not square, or a window that
            does not fit the default transform, without given values.
    """
    given = {kind: dict(arguments) for kind, arguments in (given or {}).items()}
    for kind in given:
        check_choice("given", kind, _ASSUMED)
    needed = ("audio.spec.window", "text.token_emb.weight", "text_to_latents.weight")
    if missing := [name for name in needed if name not in weights]:
        fail("weights", f"no {missing[0]}", "the state_dict of a MuLaN of musiclm-pytorch")
    window, patch = (
        len(weights["audio.spec.window"]),
        len(weights["audio.to_patch_tokens.1.weight"]),
    )
    audio: dict[str, Any] = {
        **_transformer_of_weights(weights, "audio."),
        "spec_win_length": window,
        "spec_aug_stretch_factor": float(weights["audio.aug.0.phase_advance"][-1, 0]) / math.pi,
    }
    side = math.isqrt(patch)
    if side * side == patch:
        audio["patch_size"] = (side, side)
    elif "patch_size" not in given.get("audio", {}):
        fail("audio.patch_size", f"patches of {plural(patch, 'value')}", "two sizes to be given")
    if window > 128 and "spec_n_fft" not in given.get("audio", {}):
        fail(
            "audio.spec_n_fft",
            f"a window of {plural(window, 'sample')}",
            "the transform's to be given",
        )
    text = {
        **_transformer_of_weights(weights, "text."),
        "num_tokens": weights["text.token_emb.weight"].shape[0],
        "max_seq_len": weights["text.pos_emb.weight"].shape[0],
    }
    layers = weights.get("multi_layer_contrastive_learning.contrast.temperatures")
    mulan: dict[str, Any] = {
        "dim_latent": weights["text_to_latents.weight"].shape[0],
        "sigmoid_contrastive_loss": "contrast.bias" in weights,
        "hierarchical_contrastive_loss": layers is not None,
        "hierarchical_contrastive_loss_layers": None if layers is None else len(layers),
    }
    found = {"audio": audio, "text": text, "mulan": mulan}
    config = {kind: {**found[kind], **given.get(kind, {})} for kind in found}
    classes = (("audio", AudioSpectrogramTransformer), ("text", TextTransformer), ("mulan", MuLaN))
    assumed: dict[str, Any] = {}
    for kind, cls in classes:
        parameters = inspect.signature(cls.__init__).parameters
        for name in _ASSUMED[kind]:
            if name not in config[kind]:
                assumed[f"{kind}.{name}"] = parameters[name].default
    return config, assumed


def _transformer_of_weights(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    blocks = {
        int(found[1])
        for name in weights
        if (found := re.match(rf"{re.escape(prefix)}transformer\.layers\.(\d+)\.", name))
    }
    if not blocks:
        fail("weights", f"no {prefix}transformer", "the state_dict of a MuLaN of musiclm-pytorch")
    first = f"{prefix}transformer.layers.0."
    query, dim_head = weights[f"{first}0.to_q.weight"], len(weights[f"{first}0.q_scale"])
    dim = query.shape[1]
    return {
        "dim": dim,
        "depth": max(blocks) + 1,
        "heads": query.shape[0] // dim_head,
        "dim_head": dim_head,
        "ff_mult": _ff_mult(dim, weights[f"{first}1.4.weight"].shape[1]),
    }
