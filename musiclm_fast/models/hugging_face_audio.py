"""Audio towers made of pretrained encoders of Hugging Face transformers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from musiclm_fast._checks import check_choice, check_finite, fail
from musiclm_fast._optional import transformers_class
from musiclm_fast._wording import plural
from musiclm_fast.audio.batching import as_batch
from musiclm_fast.models.hugging_face import HuggingFaceTower, beside, plain_values
from musiclm_fast.models.towers import register_tower

_MIN_SECONDS = 0.1  # of a clip: feature extractors have no clear error for less


@dataclass(frozen=True)
class EncoderFrontEnd:
    """An encoder's front end: ``sample_hz``, the rate in Hz it takes."""

    sample_hz: int


class HuggingFaceAudio(HuggingFaceTower):
    """An audio encoder of Hugging Face transformers as MuLaN's audio tower.

    Encoders of waveforms (wav2vec 2.0, HuBERT, WavLM, Data2Vec) and of spectrograms (AST, Whisper's
    encoder, Wav2Vec2-BERT, CLAP's audio half), each with the features it was pretrained on.

    Args:
        model: a folder or a name on the Hugging Face Hub; a transformers model; or the
            configuration of one as a dict, for fresh weights.
        feature_extractor: a feature extractor of transformers, or its entry of :attr:`arguments`;
            it defines the sample rate. None takes that of ``model``.
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
            feature_extractor = beside(model, "AutoFeatureExtractor")
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
        self.arguments["feature_extractor"] = plain_values(feature_extractor.to_dict())
        call = inspect.signature(feature_extractor.__call__).parameters
        self._call = {"return_attention_mask": True} if "return_attention_mask" in call else {}
        self.max_samples = self._max_samples()

    def _max_samples(self) -> int | None:
        # Longest input of a spectrogram encoder; its extractor pads or truncates to it.
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
            force_no_patch_dropout: no effect; for compatibility with our own tower.
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
        sizes = [x.shape[1]] * len(x) if lengths is None else lengths.tolist()
        self._check_sizes(sizes)
        check_finite("x", x, lengths)
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

    def _check_sizes(self, sizes: list[int]) -> None:
        rate = self.front_end.sample_hz
        least = round(_MIN_SECONDS * rate)
        most = self.max_samples or max(sizes)
        for clip, size in enumerate(sizes):
            if size < least:
                fail(
                    "x",
                    f"{plural(size, 'sample')} of clip {clip}",
                    f"at least {least} ({_MIN_SECONDS} s)",
                )
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


register_tower("audio", HuggingFaceAudio)
