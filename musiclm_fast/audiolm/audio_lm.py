"""AudioLM: the three stages in sequence, from a condition to a wave."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musiclm_fast._checks import check_ndim, check_positive, check_positive_int, fail
from musiclm_fast._optional import require
from musiclm_fast.audio.reading import read_sound
from musiclm_fast.audio.resampling import resample
from musiclm_fast.audiolm.coarse import CoarseTransformer
from musiclm_fast.audiolm.fine import FineTransformer
from musiclm_fast.audiolm.sampling import as_sampling
from musiclm_fast.audiolm.semantic import SemanticTransformer
from musiclm_fast.audiolm.wrappers.base import inference
from musiclm_fast.audiolm.wrappers.coarse import CoarseTransformerWrapper
from musiclm_fast.audiolm.wrappers.fine import FineTransformerWrapper
from musiclm_fast.audiolm.wrappers.semantic import SemanticTransformerWrapper

STAGES = ("semantic", "coarse", "fine")
_FADE_SECONDS = 0.02  # cross-fade between two windows of a long piece


class AudioLM(nn.Module):
    """Generates audio from semantic, coarse and fine tokens, with upstream's arguments.

    Source: https://arxiv.org/abs/2209.03143.

    Args:
        wav2vec: semantic tokenizer; needed for audio prompts and for lengths in seconds.
        codec: codec of the acoustic tokens.
        semantic_transformer, coarse_transformer, fine_transformer: the stages.
        audio_conditioner: embeds an audio prompt as the condition, if no other is given.
        unique_consecutive: the stages were trained on semantic tokens without repeats.

    Raises:
        ValueError: stages, tokenizer and codec disagree on a size.
    """

    def __init__(
        self,
        *,
        wav2vec: nn.Module | None,
        codec: nn.Module,
        semantic_transformer: SemanticTransformer,
        coarse_transformer: CoarseTransformer,
        fine_transformer: FineTransformer,
        audio_conditioner: nn.Module | None = None,
        unique_consecutive: bool = True,
    ) -> None:
        super().__init__()
        self.audio_conditioner = audio_conditioner
        stages = {
            "semantic_transformer": semantic_transformer,
            "coarse_transformer": coarse_transformer,
            "fine_transformer": fine_transformer,
        }
        for size, first, second in (
            ("num_semantic_tokens", "semantic_transformer", "coarse_transformer"),
            ("codebook_size", "coarse_transformer", "fine_transformer"),
            ("num_coarse_quantizers", "coarse_transformer", "fine_transformer"),
        ):
            wanted, got = (getattr(stages[name], size) for name in (first, second))
            if wanted != got:
                fail(second, f"{size}={got}", f"{first}'s {wanted}")
        self.semantic_has_condition = semantic_transformer.has_condition
        self.coarse_has_condition = coarse_transformer.has_condition
        self.fine_has_condition = fine_transformer.has_condition
        self.needs_text = any(stage.has_condition for stage in stages.values())
        self.semantic = SemanticTransformerWrapper(
            wav2vec=wav2vec, transformer=semantic_transformer,
            audio_conditioner=audio_conditioner, unique_consecutive=unique_consecutive,
        )  # fmt: skip
        self.coarse = CoarseTransformerWrapper(
            wav2vec=wav2vec, codec=codec, transformer=coarse_transformer,
            audio_conditioner=audio_conditioner, unique_consecutive=unique_consecutive,
        )  # fmt: skip
        self.fine = FineTransformerWrapper(
            codec=codec, transformer=fine_transformer, audio_conditioner=audio_conditioner
        )

    @property
    def device(self) -> torch.device:
        """Device of the stages."""
        return self.semantic.device

    @property
    def sample_hz(self) -> int | None:
        """Rate of generated waves in Hz; None if the codec does not specify it."""
        rate: int | None = getattr(self.fine.codec, "target_sample_hz", None)
        return rate

    @inference
    def forward(
        self,
        *,
        batch_size: int = 1,
        text: list[str] | None = None,
        text_embeds: Tensor | Mapping[str, Tensor] | None = None,
        prime_wave: Tensor | None = None,
        prime_wave_input_sample_hz: int | None = None,
        prime_wave_path: str | Path | None = None,
        max_length: int | None = None,
        return_coarse_generated_wave: bool = False,
        mask_out_generated_fine_tokens: bool = False,
        seconds: float | None = None,
        max_time_steps: int | None = None,
        sampling: Mapping[str, Any] | None = None,
        seed: int | None = None,
        progress: bool = True,
        as_upstream: bool = False,
    ) -> Tensor | list[Tensor | None]:
        """Generate waves.

        Args:
            batch_size: number of rows; the condition or the prompt can raise it.
            text: texts, one per row or one for all, embedded by the stages' T5.
            text_embeds: ``(B or 1, c, cond_dim)`` for all stages, or one per stage by the names
                semantic, coarse and fine.
            prime_wave: ``(B, samples)``, the audio prompt to continue.
            prime_wave_input_sample_hz: its rate; required with it.
            prime_wave_path: a sound file in place of prime_wave.
            max_length: maximum number of semantic tokens, default 2048.
            return_coarse_generated_wave: stop after the coarse stage and decode its tokens.
            mask_out_generated_fine_tokens: see :class:`FineTransformerWrapper`.
            seconds: length of the generated audio, in place of max_length and max_time_steps.
            max_time_steps: maximum number of codec frames, default 512.
            sampling: a :class:`musiclm_fast.audiolm.Sampling` or a dict of its fields by stage
                name.
            seed: makes the result reproducible.
            progress: show progress bars.
            as_upstream: generate as upstream does, see ``generate`` of the wrappers.

        Returns:
            ``(B, samples)`` at the codec's rate. If lengths differ, a list of one wave per row,
            None for an empty row.
        """
        check_positive_int("batch_size", batch_size)
        for name in sampling or {}:
            if name not in STAGES:
                fail("sampling", f"a stage {name!r}", ", ".join(STAGES))
        options: dict[str, dict[str, Any]] = {
            name: {**as_sampling((sampling or {}).get(name)), "progress": progress}
            for name in STAGES
        }
        primed = prime_wave is not None or prime_wave_path is not None
        self._check_fitted(primed)
        embeds = self._embeds(text, text_embeds, primed)
        prime_wave, prime_hz = self._prime(prime_wave, prime_wave_input_sample_hz, prime_wave_path)
        rows = [e.shape[0] for e in embeds.values() if e is not None]
        batch_size = max([batch_size, *rows, 0 if prime_wave is None else prime_wave.shape[0]])
        if prime_wave is not None and prime_wave.shape[0] != batch_size:
            prime_wave = prime_wave.expand(batch_size, -1)
        if seconds is not None:
            max_length, max_time_steps = self._lengths(seconds, max_length, max_time_steps)
        primes: dict[str, Tensor | None] = dict.fromkeys(STAGES)
        if prime_wave is not None:
            semantic_ids = self.semantic._semantic_ids(prime_wave, prime_hz)
            ids = self.coarse._acoustic_ids(prime_wave, prime_hz)
            split = self.coarse.num_coarse_quantizers
            primes = dict(semantic=semantic_ids, coarse=ids[..., :split], fine=ids[..., split:])
            if seconds is not None and max_length is not None:
                max_length += semantic_ids.shape[1]
            if self.needs_text and all(value is None for value in embeds.values()):
                embeds = self._prompt_embeds(prime_wave, prime_hz)
        seeds: list[int | None] = [None] * 3 if seed is None else [seed, seed + 1, seed + 2]
        semantic = self.semantic.generate(
            text_embeds=embeds["semantic"], batch_size=batch_size, seed=seeds[0],
            max_length=2048 if max_length is None else max_length,
            prime_ids=primes["semantic"], **options["semantic"],
        )  # fmt: skip
        coarse = self.coarse.generate(
            text_embeds=embeds["coarse"], semantic_token_ids=semantic, seed=seeds[1],
            max_time_steps=512 if max_time_steps is None else max_time_steps,
            reconstruct_wave=return_coarse_generated_wave, as_upstream=as_upstream,
            prime_coarse_token_ids=primes["coarse"], **options["coarse"],
        )  # fmt: skip
        if return_coarse_generated_wave:
            waves: Tensor | list[Tensor | None] = coarse
            return waves
        fine: Tensor | list[Tensor | None] = self.fine.generate(
            text_embeds=embeds["fine"], coarse_token_ids=coarse, seed=seeds[2],
            reconstruct_wave=True, as_upstream=as_upstream,
            mask_out_generated_fine_tokens=mask_out_generated_fine_tokens,
            prime_fine_token_ids=primes["fine"], **options["fine"],
        )  # fmt: skip
        return fine

    def _check_fitted(self, primed: bool) -> None:
        # An unfitted codec would otherwise fail only after all sampling.
        parts = {"codec": self.fine.codec, **({"wav2vec": self.semantic.wav2vec} if primed else {})}
        for name, part in parts.items():
            if not getattr(part, "fitted", True):
                fail(name, f"a {type(part).__name__} that is not fitted",
                     "fit() or its checkpoint first")  # fmt: skip

    def _embeds(
        self, text: list[str] | None, text_embeds: Any, primed: bool
    ) -> dict[str, Tensor | None]:
        # Condition of each stage; None if it has none or the prompt will be embedded.
        conditioned = [name for name in STAGES if getattr(self, f"{name}_has_condition")]
        if text is not None and text_embeds is not None:
            fail("text", "given", "None beside text_embeds")
        if text is not None and conditioned:
            text_embeds = getattr(self, conditioned[0]).embed_text(text)
        if conditioned and text_embeds is None:
            if self.audio_conditioner is not None and primed:
                return dict.fromkeys(STAGES)
            fail("text, text_embeds", "neither", f"a condition for {', '.join(conditioned)}")
        embeds: dict[str, Tensor | None] = {}
        for name in STAGES:
            given = text_embeds
            if isinstance(text_embeds, Mapping):
                given = text_embeds.get(name)
            embeds[name] = given if name in conditioned else None
            if name in conditioned and given is None:
                fail("text_embeds", f"nothing for {name}", "an embedding per conditioned stage")
        return embeds

    def _prompt_embeds(self, wave: Tensor, hz: int | None) -> dict[str, Tensor | None]:
        # Condition of each stage from the prompt, which is embedded once.
        conditioner: Any = self.audio_conditioner
        wave = resample(wave, hz, getattr(conditioner, "sample_hz", None))
        if not hasattr(conditioner, "embed_latents"):
            return {name: conditioner(wavs=wave, namespace=name) for name in STAGES}
        latents = conditioner.audio_latents(wave)
        return {name: conditioner.embed_latents(latents, name) for name in STAGES}

    def _prime(
        self, wave: Tensor | None, hz: int | None, path: str | Path | None
    ) -> tuple[Tensor | None, int | None]:
        if wave is not None and path is not None:
            fail("prime_wave_path", "given", "None beside prime_wave")
        if path is not None:
            hz = self.sample_hz or 44_100
            wave = read_sound(path, hz).wav[None]
        if wave is None:
            return None, None
        check_ndim("prime_wave", wave, 2, "(B, samples)")
        if hz is None:
            fail("prime_wave_input_sample_hz", None, "the rate of prime_wave in Hz")
        if wave.shape[1] == 0:
            fail("prime_wave", "no samples", "at least one")
        return wave.to(self.device), hz

    def _lengths(
        self, seconds: float, max_length: int | None, max_time_steps: int | None
    ) -> tuple[int, int]:
        # Numbers of semantic tokens and codec frames
        check_seconds("seconds", seconds)
        if max_length is not None or max_time_steps is not None:
            fail("seconds", seconds, "None beside max_length or max_time_steps")
        parts: list[Any] = [self.semantic.wav2vec, self.fine.codec]
        if parts[0] is None:
            fail("seconds", seconds, "a length in tokens: there is no semantic tokenizer")
        tokens, frames = (
            seconds * part.target_sample_hz / _samples_per_token(part) for part in parts
        )
        return max(1, round(tokens)), max(1, round(frames))

    def stream(
        self,
        *,
        seconds: float,
        window_seconds: float = 10.0,
        prime_seconds: float = 5.0,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        """Generate a long piece in windows. Each continues the end of the piece so far.

        Args:
            seconds: length of the piece.
            window_seconds: length of new audio per window.
            prime_seconds: length of the prompt, the end of the piece so far.
            **kwargs: passed to :meth:`forward` for each window. The batch has one row.

        Yields:
            ``(1, samples)``, the new audio of each window at the codec's rate.
        """
        check_seconds("seconds", seconds)
        check_seconds("window_seconds", window_seconds)
        check_seconds("prime_seconds", prime_seconds)
        rate = self.sample_hz
        if rate is None:
            fail("codec", "one without target_sample_hz", "a codec that says its rate")
        if kwargs.get("text") is not None:  # embedded once for all windows
            embeds = self._embeds(kwargs.pop("text"), kwargs.get("text_embeds"), primed=False)
            kwargs["text_embeds"] = embeds
        seed = kwargs.pop("seed", None)
        left, prime, index = seconds, None, 0
        held: Tensor | None = None  # end of the last window, not yet yielded
        fade = round(_FADE_SECONDS * rate)
        while round(left * rate) > 0:
            new = min(window_seconds, left)
            wave = self(
                **kwargs, seconds=new, seed=None if seed is None else seed + 3 * index,
                prime_wave=prime, prime_wave_input_sample_hz=None if prime is None else rate,
            )  # fmt: skip
            wave = wave[0][None] if isinstance(wave, list) and wave[0] is not None else wave
            known = 0 if prime is None else prime.shape[1]
            if not isinstance(wave, Tensor) or wave.shape[1] <= known:
                break  # the model ended the piece
            fresh = wave[:, known:]
            whole = fresh if prime is None else torch.cat((prime, fresh), dim=1)
            if held is not None:
                # Both windows decoded this overlap. Cross-fade to avoid a click.
                rise = torch.linspace(0, 1, held.shape[1], device=wave.device)
                joint = torch.lerp(held, wave[:, known - held.shape[1] : known], rise)
                fresh = torch.cat((joint, fresh), dim=1)
            step = _samples_per_token(self.fine.codec)
            kept = min(int(prime_seconds * rate), whole.shape[1]) // step * step
            prime = whole[:, whole.shape[1] - kept :]
            spare = min(fade, kept, fresh.shape[1])
            fresh, held = fresh.split((fresh.shape[1] - spare, spare), dim=1)
            if fresh.shape[1]:
                yield fresh
            left -= new
            index += 1
        if held is not None and held.shape[1]:
            yield held

    def stream_to_file(self, path: str | Path, **kwargs: Any) -> float:
        """Write each window of :meth:`stream` to a sound file; return the seconds written.

        The file is created after the first window, so an earlier error leaves no file.

        Raises:
            ValueError: the model ended at once.
        """
        soundfile = require("soundfile")

        pieces = self.stream(**kwargs)
        first = next(pieces, None)
        if first is None:
            fail("path", str(path), "another seed: the model ended at once")
        rate = self.sample_hz
        assert rate is not None
        written = 0
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with soundfile.SoundFile(str(path), "w", samplerate=rate, channels=1) as file:
            for wave in itertools.chain((first,), pieces):
                file.write(wave[0].clamp(-1, 1).float().cpu().numpy())
                file.flush()
                written += wave.shape[1]
        return written / rate


def check_seconds(name: str, value: float) -> None:
    """Check that ``value`` is a finite number of seconds above zero."""
    check_positive(name, value)
    if value == math.inf:
        fail(name, value, "a finite number of seconds")


def _samples_per_token(part: Any) -> int:
    sizes = [getattr(part, name, None) for name in ("downsample_factor", "seq_len_multiple_of")]
    known = [int(size) for size in sizes if size]
    if not known:
        fail("seconds", "given", f"a {type(part).__name__} that says its downsample_factor")
    return known[0]
