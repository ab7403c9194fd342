"""MuLaN: a joint embedding of music and text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import (
    NonFiniteError,
    check_floating,
    check_ndim,
    check_positive,
    check_positive_int,
    check_tensor,
    describe,
    fail,
)
from musiclm_fast._wording import plural
from musiclm_fast.audio.reading import read_sound
from musiclm_fast.audio.resampling import resample
from musiclm_fast.models.arguments import record_arguments
from musiclm_fast.models.draws import AudioDraws
from musiclm_fast.models.losses import (
    MultiLayerContrastiveLoss,
    interspersed_indices,
    make_contrastive_loss,
)
from musiclm_fast.models.pretrained import Pretrained
from musiclm_fast.models.towers import AudioTower, Tower
from musiclm_fast.nn.modes import evaluation_mode
from musiclm_fast.ops.contrastive._labels import check_labels


class MuLaN(Pretrained, nn.Module):
    """Joint embedding of music and text, learned by contrast. https://arxiv.org/abs/2208.12415

    Args:
        audio_transformer: the audio tower.
        text_transformer: the text tower.
        dim_latent: width of the joint space.
        decoupled_contrastive_learning: leave the positive pair out of the denominators.
        hierarchical_contrastive_loss: add the loss at intermediate layers (ViCHA).
        hierarchical_contrastive_loss_layers: how many; default the smaller depth less one.
        sigmoid_contrastive_loss: sigmoid loss in place of softmax.
        max_temperature: cap on the losses' learned temperatures (CLIP: 100); None leaves them free.
        loss_strategy: how ranks share a batch: ``"all_gather"``, ``"ring"`` (least memory) or
            ``"local"``, see :func:`musiclm_fast.ops.distributed_contrastive_loss`.
    """

    audio_layers_indices: Tensor
    text_layers_indices: Tensor
    arguments: dict[str, Any]

    @record_arguments
    def __init__(
        self,
        audio_transformer: AudioTower,
        text_transformer: Tower,
        dim_latent: int = 128,
        decoupled_contrastive_learning: bool = True,
        hierarchical_contrastive_loss: bool = False,
        hierarchical_contrastive_loss_layers: int | None = None,
        sigmoid_contrastive_loss: bool = False,
        *,
        max_temperature: float | None = None,
        loss_strategy: str = "all_gather",
    ) -> None:
        super().__init__()
        self.dim_latent = dim_latent
        self.audio = audio_transformer
        self.text = text_transformer
        self.text_to_latents = nn.Linear(self.text.dim, dim_latent)
        self.audio_to_latents = nn.Linear(self.audio.dim, dim_latent)
        self.contrast = make_contrastive_loss(
            1, decoupled_contrastive_learning, sigmoid_contrastive_loss, max_temperature,
            loss_strategy,
        )  # fmt: skip
        self.multi_layer_contrastive_learning: MultiLayerContrastiveLoss | None = None
        if not hierarchical_contrastive_loss:
            return
        shallower = min(audio_transformer.depth, text_transformer.depth)
        layers = hierarchical_contrastive_loss_layers
        layers = shallower - 1 if layers is None else layers
        if not 0 < layers < shallower:
            fail(
                "hierarchical_contrastive_loss_layers",
                layers,
                f"1 to {shallower - 1}, fewer than the blocks of the shallower tower",
            )
        self.register_buffer(
            "text_layers_indices", interspersed_indices(layers, text_transformer.depth)
        )
        self.register_buffer(
            "audio_layers_indices", interspersed_indices(layers, audio_transformer.depth)
        )
        self.multi_layer_contrastive_learning = MultiLayerContrastiveLoss(
            audio_dim=self.audio.dim, text_dim=self.text.dim, dim_latent=dim_latent,
            layers=layers, decoupled_contrastive_learning=decoupled_contrastive_learning,
            sigmoid_contrastive_loss=sigmoid_contrastive_loss, max_temperature=max_temperature,
            strategy=loss_strategy,
        )  # fmt: skip

    @overload
    def get_audio_latents(
        self,
        wavs: Tensor | Sequence[Tensor],
        *,
        lengths: Tensor | None = None,
        input_sample_hz: int | None = None,
        audio_draws: AudioDraws | None = None,
    ) -> Tensor: ...

    @overload
    def get_audio_latents(
        self,
        wavs: Tensor | Sequence[Tensor],
        return_all_layers: Literal[True],
        *,
        lengths: Tensor | None = None,
        input_sample_hz: int | None = None,
        audio_draws: AudioDraws | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def get_audio_latents(
        self,
        wavs: Tensor | Sequence[Tensor],
        return_all_layers: bool = False,
        *,
        lengths: Tensor | None = None,
        input_sample_hz: int | None = None,
        audio_draws: AudioDraws | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed clips.

        Args:
            wavs: ``(B, samples)``, a list of B clips ``(samples,)``, or spectrograms where the
                audio tower accepts those.
            return_all_layers: also return the tower's intermediate layers.
            lengths: ``(B,)`` integer samples of each clip of a padded batch; the embedding of a
                clip is that of the clip alone.
            input_sample_hz: rate of wavs in Hz, if it is not the audio tower's.
            audio_draws: what the audio tower's ``draw`` made for these clips, in place of new
                draws.

        Returns:
            Unit vectors ``(B, dim_latent)``; with ``return_all_layers`` also
            ``(depth - 1, B, patches, audio dim)``, zeros beyond a clip's own patches.
        """
        latents, layers, _ = self._audio_latents(
            wavs, return_all_layers, lengths, input_sample_hz, audio_draws
        )
        if layers is None:
            return latents
        return latents, layers

    def _audio_latents(
        self,
        wavs: Tensor | Sequence[Tensor],
        return_all_layers: bool,
        lengths: Tensor | None,
        input_sample_hz: int | None,
        audio_draws: AudioDraws | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # latents, layers if asked for, and each clip's patches where they differ
        if audio_draws is not None and not hasattr(self.audio, "draw"):
            fail("audio_draws", "draws", f"None: {type(self.audio).__name__} takes none")
        result = self.audio(
            wavs, return_all_layers=return_all_layers, lengths=lengths,
            input_sample_hz=input_sample_hz,
            **({} if audio_draws is None else {"draws": audio_draws}),
        )  # fmt: skip
        embeds, *rest = result if return_all_layers else (result,)
        layers, tokens = (*rest, None, None)[:2]
        return F.normalize(self.audio_to_latents(embeds), dim=-1), layers, tokens

    @torch.no_grad()
    def embed_audio(
        self,
        sound: str | os.PathLike[str] | Tensor,
        *,
        input_sample_hz: int | None = None,
        window_seconds: float = 10.0,
        stride_seconds: float = 1.0,
        mix_down: bool = False,
        batch_size: int = 16,
    ) -> Tensor:
        """Embed a sound of any length: the average over windows of it, as MusicLM does.

        ``normalize(mean_w latent(window w))``; windows start every ``stride_seconds``, and a last
        one ends where the sound ends. A sound shorter than a window is embedded whole. The model
        is in evaluation mode meanwhile, so the result is the same every time.

        Args:
            sound: a file (wav, flac, ogg, mp3), or ``(samples,)`` floating, or
                ``(channels, samples)`` with mix_down.
            input_sample_hz: rate of a tensor in Hz, if it is not the audio tower's.
            window_seconds, stride_seconds: length of a window, and from one to the next.
            mix_down: average several channels; without it they are an error.
            batch_size: windows that run at once.

        Returns:
            A unit vector ``(dim_latent,)``.

        Raises:
            ValueError, TypeError: several channels without mix_down, an empty sound, NaN or
                infinity, a front end that does not know its rate.
            FileNotFoundError: there is no such file.
            ImportError: soundfile or soxr is not installed, where they are needed.

        Source: https://arxiv.org/abs/2301.11325 (MusicLM, section 4.1).
        """
        rate = self.audio.front_end.sample_hz
        if rate is None:
            fail("sound", "a front end without sample_hz", "one that knows its rate")
        check_positive("window_seconds", window_seconds)
        check_positive("stride_seconds", stride_seconds)
        check_positive_int("batch_size", batch_size)
        shortest = getattr(self.audio, "shortest_clip", 1)  # not every tower makes patches
        window = round(window_seconds * rate)
        if window < shortest:
            fail("window_seconds", window_seconds, f"at least {shortest / rate} s")
        wav = self._mono(sound, rate, input_sample_hz, mix_down)
        if len(wav) < shortest:
            fail("sound", f"{len(wav) / rate:.3f} s", f"at least {shortest / rate} s")
        window = min(window, len(wav))
        stride = max(1, round(stride_seconds * rate))
        last = len(wav) - window
        starts = [*range(0, last, stride), last]
        total = wav.new_zeros(self.dim_latent, dtype=torch.float64)
        with evaluation_mode(self):
            for begin in range(0, len(starts), batch_size):
                some = starts[begin : begin + batch_size]
                clips = torch.stack([wav[start : start + window] for start in some])
                total += self.get_audio_latents(clips).double().sum(dim=0)
        return F.normalize(total, dim=0).to(self.audio_to_latents.weight.dtype)

    def _mono(
        self,
        sound: str | os.PathLike[str] | Tensor,
        rate: int,
        input_sample_hz: int | None,
        mix_down: bool,
    ) -> Tensor:
        # (samples,) at the tower's rate, on the model's device
        device = self.audio_to_latents.weight.device
        allowed = "mono, or mix_down=True"
        if input_sample_hz is not None:
            check_positive_int("input_sample_hz", input_sample_hz)
        if isinstance(sound, (str, os.PathLike)):
            if input_sample_hz is not None:
                fail("input_sample_hz", input_sample_hz, "None: a file knows its rate")
            read = read_sound(sound, rate)
            if read.file_channels > 1 and not mix_down:
                fail(
                    "sound",
                    f"{plural(read.file_channels, 'channel')} in {os.fspath(sound)!r}",
                    allowed,
                )
            return read.wav.to(device)
        if not isinstance(sound, Tensor):
            fail("sound", describe(sound), "a file's path or a torch.Tensor", TypeError)
        check_ndim("sound", sound, (1, 2), "(samples,) or (channels, samples)")
        check_floating("sound", sound)
        if sound.ndim == 2:
            if not mix_down:
                fail("sound", describe(sound), allowed)
            sound = sound.mean(dim=0)
        if not len(sound):
            fail("sound", describe(sound), "at least one sample")
        if sound.device.type == "cpu" and not sound.isfinite().all():
            bad = int((~sound.isfinite()).nonzero()[0])
            fail("sound", f"NaN or infinity in sample {bad}", "finite samples", NonFiniteError)
        changed = resample(
            sound.detach(), rate if input_sample_hz is None else input_sample_hz, rate
        )
        return changed.to(device)

    @overload
    def get_text_latents(
        self, texts: Tensor | None = None, raw_texts: list[str] | None = None
    ) -> Tensor: ...

    @overload
    def get_text_latents(
        self, texts: Tensor | None, raw_texts: list[str] | None, return_all_layers: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def get_text_latents(
        self,
        texts: Tensor | None = None,
        raw_texts: list[str] | None = None,
        return_all_layers: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed texts.

        Args:
            texts: ``(B, n)`` token ids.
            raw_texts: B strings, in place of token ids.
            return_all_layers: also return the tower's intermediate layers.

        Returns:
            Unit vectors ``(B, dim_latent)``; with ``return_all_layers`` also
            ``(depth - 1, B, 1 + n, text dim)``.
        """
        if not return_all_layers:
            return F.normalize(self.text_to_latents(self.text(texts, raw_texts)), dim=-1)
        embeds, layers = self.text(texts, raw_texts, return_all_layers=True)
        return F.normalize(self.text_to_latents(embeds), dim=-1), layers

    def forward(
        self,
        wavs: Tensor | Sequence[Tensor],
        texts: Tensor | None = None,
        raw_texts: list[str] | None = None,
        return_latents: bool = False,
        return_similarities: bool = False,
        return_pairwise_similarities: bool = False,
        *,
        lengths: Tensor | None = None,
        input_sample_hz: int | None = None,
        return_loss_latents: bool = False,
        audio_draws: AudioDraws | None = None,
        labels: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Any, ...]:
        """Contrastive loss of B pairs, or what one of the flags asks for.

        Several captions of one clip may be in a batch, each with the clip. With the clip's number
        as label they are positives of one another, which they would be negatives of without::

            wavs = torch.stack([piano, piano, drums])
            texts = ["a piano piece", "a slow solo", "loud drums"]
            loss = mulan(wavs, raw_texts=texts, labels=torch.tensor([0, 0, 1]))

        Args:
            wavs: ``(B, samples)``, a list of B clips ``(samples,)``, or spectrograms where the
                audio tower accepts those.
            texts: ``(B, n)`` token ids.
            raw_texts: B strings, in place of token ids.
            return_latents: return both sets of unit vectors ``(B, dim_latent)``.
            return_similarities: return the cosine of each pair ``(B,)``.
            return_pairwise_similarities: return all cosines ``(B clips, B texts)``.
            lengths: ``(B,)`` integer samples of each clip of a padded batch.
            input_sample_hz: rate of wavs in Hz, if it is not the audio tower's.
            return_loss_latents: return what :meth:`loss_of_latents` takes: a tuple of latents, and
                the losses' own parameters by name. All that the loss depends on is then in what
                forward returns, as DistributedDataParallel and fully_shard want it.
            audio_draws: what the audio tower's ``draw`` made for these clips, in place of new
                draws.
            labels: ``(B,)`` integers, the clip of each pair, or a tuple ``(clips', texts')``; the
                pairs of clips and texts with equal labels are positives, on all ranks. See
                :func:`musiclm_fast.ops.contrastive_loss`.

        Raises:
            ValueError, TypeError: see the towers and the loss; batches of different sizes; both or
                none of texts and raw_texts; labels with a flag that asks for no loss.
        """
        if not isinstance(wavs, (list, tuple)):
            check_tensor("wavs", wavs)
        if (texts is None) == (raw_texts is None):
            both = "both" if texts is not None else "neither"
            fail("texts, raw_texts", both, "exactly one of them")
        count = len(raw_texts) if raw_texts is not None else texts.shape[0]  # type: ignore[union-attr]
        if not return_pairwise_similarities and count != len(wavs):
            found = describe(wavs) if isinstance(wavs, Tensor) else plural(len(wavs), "clip")
            fail("wavs", found, f"as many clips as there are texts ({count})")
        others = return_latents, return_similarities, return_pairwise_similarities
        if labels is not None and (return_loss_latents or any(others)):
            fail("labels", describe(labels), "None: a flag asks for something else than the loss")
        check_labels(labels, count)
        wants_layers = self.multi_layer_contrastive_learning is not None and not any(others)
        audio, audio_layers, audio_tokens = self._audio_latents(
            wavs, wants_layers, lengths, input_sample_hz, audio_draws
        )
        text_layers = None
        if wants_layers:
            text, text_layers = self.get_text_latents(texts, raw_texts, True)
        else:
            text = self.get_text_latents(texts, raw_texts)

        if return_latents:
            return audio, text
        if return_similarities:
            return (audio * text).sum(dim=-1)
        if return_pairwise_similarities:
            return audio @ text.t()
        latents: tuple[Tensor, ...] = (audio, text)
        if self.multi_layer_contrastive_learning is not None:
            assert audio_layers is not None and text_layers is not None
            latents += self.multi_layer_contrastive_learning.latents(
                audio_layers[self.audio_layers_indices],
                text_layers[self.text_layers_indices],
                audio_tokens,
            )
        if not return_loss_latents:
            return self.loss_of_latents(*latents, labels=labels)
        # Times one: what leaves forward may not be a weight that a wrapper frees afterwards.
        parameters = {
            f"{name}.{own}": parameter * 1.0
            for name, module in self._losses().items()
            for own, parameter in module.named_parameters()
        }
        return latents, parameters

    def _losses(self) -> dict[str, nn.Module]:
        losses: dict[str, nn.Module] = {"contrast": self.contrast}
        if self.multi_layer_contrastive_learning is not None:
            layers = self.multi_layer_contrastive_learning.contrast
            losses["multi_layer_contrastive_learning.contrast"] = layers
        return losses

    def loss_of_latents(
        self,
        audio: Tensor,
        text: Tensor,
        layer_audio: Tensor | None = None,
        layer_text: Tensor | None = None,
        *,
        parameters: Mapping[str, Tensor] | None = None,
        labels: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Contrastive loss of unit vectors ``(B, dim_latent)``.

        Args:
            audio, text: the towers' latents.
            layer_audio, layer_text: ``(layers, B, dim_latent)`` latents of intermediate layers,
                where MuLaN has the hierarchical loss.
            parameters: temperatures and biases by name, in place of the losses' own: forward
                returns them with ``return_loss_latents``.
            labels: as in forward, of all layers.
        """
        losses = []
        sides = ((audio, text), (layer_audio, layer_text))
        for (name, module), pair in zip(self._losses().items(), sides, strict=False):
            own = None
            if parameters is not None:
                own = {n: parameters[f"{name}.{n}"] for n, _ in module.named_parameters()}
            losses.append(module(*pair, parameters=own, labels=labels))
        total: Tensor = losses[0] if len(losses) == 1 else losses[0] + losses[1]
        return total


MuLaN.rebuilt_as = MuLaN
