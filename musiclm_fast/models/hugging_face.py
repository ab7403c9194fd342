"""Towers made of pretrained encoders of Hugging Face transformers.

A tower keeps the encoder's configuration and its tokenizer or feature extractor among its own
arguments, and the weights in its ``state_dict``. So a saved MuLaN is whole: it is rebuilt without
a download, and nothing in it is executed.
"""

from __future__ import annotations

import base64
import inspect
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from musiclm_fast._checks import (
    check_choice,
    check_dtype,
    check_finite,
    check_floating,
    check_ndim,
    check_positive_int,
    check_shape,
    describe,
    fail,
)
from musiclm_fast.models.configuration import register_tower
from musiclm_fast.models.sound import as_batch
from musiclm_fast.models.transformers_class import transformers_class

_ORIGINS = frozenset({"_name_or_path", "name_or_path", "is_local", "local_files_only"})
_MIN_SECONDS = 0.1  # of a clip: feature extractors have no message of their own for less


class _HuggingFaceTower(nn.Module):
    """What both towers share: the encoder, its width and depth, freezing.

    The encoder's own masking in training (SpecAugment of wav2vec 2.0 and its kin) and layer drop
    are off: they draw from numpy, which no checkpoint holds and no replayed forward pass repeats.

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
        """Where the parameters lie."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
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


class HuggingFaceText(_HuggingFaceTower):
    """A text encoder of Hugging Face transformers as MuLaN's text tower.

    BERT, RoBERTa, T5's encoder, CLIP's text half, decoders such as GPT-2 or Qwen, and what else
    ``AutoModel`` knows. MuLan itself uses BERT. https://arxiv.org/abs/2208.12415

    Args:
        model: a folder or a name on the Hugging Face Hub; a transformers model; or the
            configuration of one as a dict, for fresh weights.
        tokenizer: a tokenizer of transformers, or what :attr:`arguments` holds of one. None takes
            the one beside ``model``; a model that is not from a folder or the Hub has none, and
            the tower then takes token ids only.
        frozen: do not train the encoder.
        pooling: ``"mean"`` over a text's tokens, ``"cls"``, its first token, or ``"last"``, its
            last one (for decoders).
        max_seq_len: longest text in tokens; less where the encoder takes less.

    Raises:
        ImportError: transformers is not installed.
        OSError: there is no such folder or name.
        TypeError: the model cannot be rebuilt from its configuration (its code is not a part of
            transformers).
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        frozen: bool = True,
        pooling: str = "mean",
        max_seq_len: int = 256,
    ) -> None:
        check_choice("pooling", pooling, ("mean", "cls", "last"))
        check_positive_int("max_seq_len", max_seq_len)
        super().__init__(model, "text_model", frozen, pooling)
        if tokenizer is None:
            tokenizer = _beside(model, "AutoTokenizer")
        files = tokenizer if isinstance(tokenizer, dict) else _files_of(tokenizer)
        self.tokenizer = _tokenizer_of(tokenizer) if isinstance(tokenizer, dict) else tokenizer
        self.max_seq_len = min(max_seq_len, self._longest())
        self.pad_id: int = self._pad_id()
        if self.tokenizer is not None:
            if self.tokenizer.pad_token is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token
            self.tokenizer.padding_side = "right"  # decoders count positions from the left
        self._warned = False
        self.arguments.update(tokenizer=files, max_seq_len=max_seq_len)

    def _longest(self) -> int:
        # The longest text that the tokenizer and the position embedding know.
        config = cast(Any, self.model).config
        longest: list[int] = [getattr(self.tokenizer, "model_max_length", 10**30)]
        if isinstance(getattr(config, "max_position_embeddings", None), int):
            embeddings = getattr(self.model, "embeddings", None)
            positions = getattr(embeddings, "position_embeddings", None)
            padding = getattr(positions, "padding_idx", None)  # RoBERTa's positions start above it
            longest.append(config.max_position_embeddings - (0 if padding is None else padding + 1))
        return min(longest)

    def _pad_id(self) -> int:
        for owner in (self.tokenizer, cast(Any, self.model).config):
            if isinstance(pad := getattr(owner, "pad_token_id", None), int):
                return pad
        return 0

    def forward(
        self,
        x: Tensor | None = None,
        raw_texts: list[str] | None = None,
        mask: Tensor | None = None,
        return_all_layers: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed texts, given as token ids or as strings.

        Args:
            x: ``(B, n)`` integer token ids of the encoder's own vocabulary.
            raw_texts: B strings, which the encoder's own tokenizer encodes; longer ones than
                ``max_seq_len`` tokens are cut, with a warning the first time.
            mask: ``(B, n)`` bool, True where a token takes part; None is ``x != pad_id``.
            return_all_layers: also return the earlier blocks' outputs, pooled in the same way.

        Returns:
            ``(B, dim)``; with ``return_all_layers`` also ``(depth - 1, B, 1, dim)``.

        Raises:
            ValueError, TypeError: both or none of x and raw_texts, wrong shape or dtype, an empty
                batch, strings where there is no tokenizer, a sequence that is too long.
        """
        if (x is None) == (raw_texts is None):
            fail("x, raw_texts", "both" if x is not None else "neither", "exactly one of them")
        if raw_texts is not None:
            x, mask = self._tokenize(raw_texts)
        assert x is not None
        check_ndim("x", x, 2, "(B, n) of token ids")
        check_dtype("x", x, (torch.int64, torch.int32))
        if not x.shape[0] or not x.shape[1]:
            fail("x", describe(x), "at least one text of at least one token")
        if x.shape[1] > self.max_seq_len:
            fail("x", describe(x), f"at most max_seq_len = {self.max_seq_len} tokens")
        if mask is None:
            mask = x != self.pad_id
        check_shape("mask", mask, tuple(x.shape), "of x")
        check_dtype("mask", mask, torch.bool)
        inputs = {"input_ids": x, "attention_mask": mask.long()}
        out, layers = self._run(inputs, mask, return_all_layers)
        return out if layers is None else (out, layers[:, :, None])

    def _tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        # ids and mask (B, n) on the encoder's device
        if self.tokenizer is None:
            fail("raw_texts", "strings", "token ids: this tower was built without a tokenizer")
        if not texts:
            fail("raw_texts", "an empty batch", "at least one text")
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_seq_len,
            return_tensors="pt",
        )  # fmt: skip
        if not self._warned and tokens["input_ids"].shape[1] == self.max_seq_len:
            whole = self.tokenizer(list(texts), add_special_tokens=True)["input_ids"]
            cut = [text for text, ids in zip(texts, whole) if len(ids) > self.max_seq_len]
            if cut:
                self._warned = True
                warnings.warn(
                    f"raw_texts: cut to {self.max_seq_len} tokens: {cut[0][:40]!r}... (said once)",
                    stacklevel=3,
                )
        device = self.device
        return tokens["input_ids"].to(device), tokens["attention_mask"].bool().to(device)


@dataclass(frozen=True)
class EncoderFrontEnd:
    """What is known of an encoder's own front end: ``sample_hz``, the rate in Hz it takes."""

    sample_hz: int


class HuggingFaceAudio(_HuggingFaceTower):
    """An audio encoder of Hugging Face transformers as MuLaN's audio tower.

    Encoders of waveforms (wav2vec 2.0, HuBERT, WavLM, Data2Vec) and of spectrograms (AST, Whisper's
    encoder, Wav2Vec2-BERT, CLAP's audio half), each with the features it was pretrained on.

    Args:
        model: a folder or a name on the Hugging Face Hub; a transformers model; or the
            configuration of one as a dict, for fresh weights.
        feature_extractor: a feature extractor of transformers, or what :attr:`arguments` holds of
            one; it knows the sample rate. None takes the one beside ``model``.
        frozen: do not train the encoder.
        pooling: ``"mean"`` over time, or ``"cls"``, the first token (AST's class token).

    Raises:
        ImportError: transformers is not installed.
        OSError: there is no such folder or name.
        TypeError: the model cannot be rebuilt from its configuration (its code is not a part of
            transformers, as MERT's), or has no feature extractor.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: Any,
        *,
        feature_extractor: Any = None,
        frozen: bool = True,
        pooling: str = "mean",
    ) -> None:
        check_choice("pooling", pooling, ("mean", "cls"))
        super().__init__(model, "audio_model", frozen, pooling)
        if feature_extractor is None:
            feature_extractor = _beside(model, "AutoFeatureExtractor")
        if feature_extractor is None:
            fail(
                "feature_extractor", "None for a model that is not from a folder",
                "transformers' feature extractor for it, which knows the sample rate", TypeError,
            )  # fmt: skip
        if isinstance(feature_extractor, dict):
            feature_extractor = _extractor_of(feature_extractor)
        self.feature_extractor = feature_extractor
        self.front_end = EncoderFrontEnd(int(feature_extractor.sampling_rate))
        self.takes_waveforms = type(feature_extractor).__name__ == "Wav2Vec2FeatureExtractor"
        self.arguments["feature_extractor"] = _plain(feature_extractor.to_dict())
        call = inspect.signature(feature_extractor.__call__).parameters
        self._call = {"return_attention_mask": True} if "return_attention_mask" in call else {}
        self.max_samples = self._max_samples()

    def _max_samples(self) -> int | None:
        # What a spectrogram encoder takes at most; its extractor pads to that, and cuts the rest.
        own = self.feature_extractor
        for name in ("n_samples", "nb_max_samples"):
            if isinstance(getattr(own, name, None), int):
                return int(getattr(own, name))
        if type(own).__name__ == "ASTFeatureExtractor":
            return int(
                own.max_length * 0.01 * own.sampling_rate
            )  # Kaldi's 10 ms from frame to frame
        return None

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        force_no_patch_dropout: bool = False,
        return_all_layers: bool = False,
        *,
        lengths: Tensor | None = None,
        input_sample_hz: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed clips; a clip's embedding does not depend on the others' lengths.

        Waveforms stay on their device; the features of a spectrogram encoder are made by its
        extractor on the CPU.

        Args:
            x: waveforms ``(B, samples)`` or a list of clips ``(samples,)``.
            force_no_patch_dropout: without effect; there for our own tower's callers.
            return_all_layers: also return the earlier blocks' outputs, pooled in the same way.
            lengths: ``(B,)`` integer samples of each clip; None where all fill the batch. Read on
                the host.
            input_sample_hz: rate of the waveforms in Hz, if it is not the encoder's.

        Returns:
            ``(B, dim)``; with ``return_all_layers`` also ``(depth - 1, B, 1, dim)``.

        Raises:
            ValueError, TypeError: wrong shape or dtype, an empty batch, NaN or infinite samples
                (checked on CPU tensors), a clip that is too short or longer than the encoder takes.
        """
        x, lengths = as_batch(x, lengths, from_hz=input_sample_hz, to_hz=self.front_end.sample_hz)
        check_ndim("x", x, 2, "(B, samples): mono; mix stereo down first")
        check_floating("x", x)
        if x.shape[0] == 0:
            fail("x", "an empty batch", "at least one clip")
        sizes = [x.shape[1]] * len(x) if lengths is None else lengths.tolist()
        self._check_sizes(sizes, x.shape[1])
        check_finite("x", x if lengths is None else _own_samples(x, lengths))
        groups: dict[int, list[int]] = {}
        for clip, size in enumerate(sizes):
            # Where the extractor pads all clips to one length, they run together.
            groups.setdefault(0 if self.max_samples else size, []).append(clip)
        parts = []
        for clips in groups.values():
            wavs = [x[clip, : sizes[clip]] for clip in clips]
            parts.append(self._run(*self._features(wavs), return_all_layers))
        order = torch.tensor([clip for clips in groups.values() for clip in clips])
        back = order.argsort().to(parts[0][0].device)
        out = torch.cat([part[0] for part in parts])[back]
        if not return_all_layers:
            return out
        layers = torch.cat([cast(Tensor, part[1]) for part in parts], dim=1)[:, back]
        return out, layers[:, :, None]

    def _check_sizes(self, sizes: list[int], longest: int) -> None:
        rate = self.front_end.sample_hz
        least = round(_MIN_SECONDS * rate)
        most = min(longest, self.max_samples or longest)
        for clip, size in enumerate(sizes):
            if size < least:
                fail("x", f"{size} samples of clip {clip}", f"at least {least} ({_MIN_SECONDS} s)")
            if size > most and size > longest:
                fail("lengths", f"{size} of clip {clip}", f"at most the {longest} of x")
            if size > most:
                seconds = f"{size / rate:g} s of clip {clip}"
                fail("x", seconds, f"at most {most / rate:g} s, which this encoder takes")

    def _features(self, wavs: list[Tensor]) -> tuple[dict[str, Any], Tensor | None]:
        # What the encoder takes, and which of its tokens are a clip's own, (B, n) bool
        if self.takes_waveforms:  # of one length
            batch = torch.stack(wavs).to(self.device).float()
            if self.feature_extractor.do_normalize:
                variance, mean = torch.var_mean(batch, dim=1, keepdim=True, correction=0)
                batch = (batch - mean) / (variance + 1e-7).sqrt()
            return {"input_values": batch.to(self.dtype)}, None
        features = self.feature_extractor(
            [wav.detach().float().cpu().numpy() for wav in wavs],
            sampling_rate=self.front_end.sample_hz, return_tensors="pt", **self._call,
        )  # fmt: skip
        frames = features.get("attention_mask")
        inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in features.items()
            if name in self._takes
        }
        return inputs, None if frames is None else frames.bool().to(self.device)

    def _pooled(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        # The mask is of the extractor's frames, of which a token holds one or, in Whisper, two.
        if mask is not None and hidden.ndim == 3:
            mask = mask[:, :: mask.shape[1] // hidden.shape[1]][:, : hidden.shape[1]]
        return super()._pooled(hidden, mask if hidden.ndim == 3 else None)


def _own_samples(x: Tensor, lengths: Tensor) -> Tensor:
    beyond = torch.arange(x.shape[1], device=x.device) >= lengths.to(x.device)[:, None]
    return x.masked_fill(beyond, 0.0)


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
        return _inside(whole.float(), part), _plain(whole.config.to_dict())
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        fail("model", describe(model), "a name, a folder or a model of transformers", TypeError)
    owner = cast(Any, model)
    config = _plain(owner.config.to_dict())
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


def _beside(model: Any, auto: str) -> Any:
    # The tokenizer or feature extractor of a model's folder or name; None where there is no such.
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


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    # As JSON has it: what a configuration is read back as must equal what it was. The folder that
    # it came from is no part of it.
    plain: dict[str, Any] = json.loads(
        json.dumps(values, default=str),
        object_hook=lambda found: {k: v for k, v in found.items() if k not in _ORIGINS},
    )
    return plain


def _files_of(tokenizer: Any) -> dict[str, Any] | None:
    # A tokenizer as its files: text, or base64 of what is no text.
    if tokenizer is None:
        return None
    if not hasattr(tokenizer, "save_pretrained"):
        fail("tokenizer", describe(tokenizer), "a tokenizer of transformers", TypeError)
    files: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            content = path.read_bytes()
            try:
                text = content.decode("utf-8")
                if path.name == "tokenizer_config.json":
                    text = json.dumps(_plain(json.loads(text)))
                files[path.name] = text
            except UnicodeDecodeError:
                files[path.name] = {"base64": base64.b64encode(content).decode()}
    return files


def _tokenizer_of(files: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            if Path(name).name != name:
                fail("tokenizer", f"a file named {name!r}", "plain names")
            if isinstance(content, dict):
                (Path(folder) / name).write_bytes(base64.b64decode(content["base64"]))
            else:
                (Path(folder) / name).write_bytes(content.encode("utf-8"))
        try:
            return transformers_class("AutoTokenizer").from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except OSError as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"tokenizer: its files cannot be read ({reason})") from error


def _extractor_of(values: dict[str, Any]) -> Any:
    name = values.get("feature_extractor_type")
    base = transformers_class("FeatureExtractionMixin")
    try:
        found = transformers_class(name) if isinstance(name, str) else None
    except AttributeError:
        found = None
    if not (isinstance(found, type) and issubclass(found, base)):
        fail("feature_extractor", repr(name), "the name of a feature extractor of transformers")
    return cast(Any, found).from_dict(dict(values))


register_tower("text", HuggingFaceText)
register_tower("audio", HuggingFaceAudio)
