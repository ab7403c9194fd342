"""Embeddings of whole sounds, window by window: for evaluation, ``embed`` and ``search``."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from musiclm_fast._checks import check_positive, check_positive_int, fail
from musiclm_fast.datasets.captioned_sounds import CaptionedSounds
from musiclm_fast.datasets.decoding import UnreadableSoundError
from musiclm_fast.models.checkpoint import load_mulan
from musiclm_fast.models.configuration import mulan_config
from musiclm_fast.models.mulan import MuLaN

_SILENCE = 1e-4  # windows whose peak is below it (-80 dB) are skipped as silent


_BLOCK = 32  # windows read at once


_AHEAD = 2  # files read ahead of the embedding


@dataclass(frozen=True)
class Embedded:
    """The windows of a sound.

    Args:
        starts: ``(windows,)`` float64, in seconds.
        latents: ``(windows, d)`` float32 unit vectors; of a sound that cannot be embedded, none.
        seconds: length of the sound.
        reason: why there are no windows; else empty.
    """

    starts: np.ndarray
    latents: np.ndarray
    seconds: float = 0.0
    reason: str = ""

    def mean(self) -> np.ndarray:
        """Unit vector ``(d,)`` of the whole sound: the mean of its windows', normalized.

        Source: https://arxiv.org/abs/2301.11325 (MusicLM, section 4.1).
        """
        mean = self.latents.mean(axis=0)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), dtype=np.float32)


class Embedder:
    """Embeds sounds window by window with a trained MuLaN.

    Args:
        mulan: the model; it is put into evaluation mode.
        sample_hz: rate of the sounds, in Hz; None is the audio tower's.
        window_seconds: length of a window; None is 10 s.
        stride_seconds: step between windows; None is ``window_seconds``.
        batch_size: windows per forward pass.

    Raises:
        ValueError: no rate is known, or a number is not positive.
    """

    def __init__(
        self,
        mulan: MuLaN,
        sample_hz: int | None = None,
        window_seconds: float | None = None,
        stride_seconds: float | None = None,
        batch_size: int = 16,
    ) -> None:
        rate = mulan.audio.front_end.sample_hz or sample_hz
        if rate is None:
            fail("model", "one that does not know its sample rate", "one that does")
        window = 10.0 if window_seconds is None else window_seconds
        stride = window if stride_seconds is None else stride_seconds
        check_positive("window_seconds", window)
        check_positive("stride_seconds", stride)
        check_positive_int("batch_size", batch_size)
        self.mulan, self.sample_hz = mulan.eval(), int(rate)
        self.window_seconds, self.stride_seconds = float(window), float(stride)
        self.batch_size = batch_size

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        window_seconds: float | None = None,
        stride_seconds: float | None = None,
        batch_size: int = 16,
    ) -> Embedder:
        """The model of a checkpoint (a file or a folder), with windows of its clips' length.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            CheckpointError: it is not a usable checkpoint.
        """
        mulan, extra = load_mulan(path)
        if window_seconds is None:
            window_seconds = extra.get("clip_seconds")
        return cls(mulan, extra.get("sample_rate"), window_seconds, stride_seconds, batch_size)

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.mulan.dim_latent

    def fingerprint(self) -> str:
        """A hash of all that determines the embeddings of sounds: audio tower and windows."""
        digest = hashlib.blake2b(digest_size=16)
        config = mulan_config(self.mulan)
        own = [config["audio"], config["mulan"], self.sample_hz]
        windows = [self.window_seconds, self.stride_seconds]
        digest.update(json.dumps([own, windows], sort_keys=True, default=str).encode())
        for name, value in sorted(self.mulan.state_dict().items()):
            if name.startswith(("audio.", "audio_to_latents.")):
                digest.update(name.encode())
                data = value.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(data.numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit vectors ``(n, d)`` float32 of texts, on the CPU.

        Raises:
            ValueError: a text is empty.
        """
        for text in texts:
            if not text.strip():
                fail("text", repr(text), "words")
        parts = [
            self.mulan.get_text_latents(raw_texts=list(texts[begin : begin + batch_size]))
            for begin in range(0, len(texts), batch_size)
        ]
        return torch.cat(parts).float().cpu()

    def sounds(self, sounds: CaptionedSounds) -> Iterator[tuple[int, Embedded]]:
        """Embed all windows of all sounds, in order; unreadable sounds get a reason.

        Windows start every ``stride_seconds``; the last one ends at the end of the sound. A shorter
        sound is embedded as a whole. Silent windows are skipped.

        Args:
            sounds: opened with the embedder's ``sample_hz`` and ``clip_seconds=None``.

        Yields:
            A sound's index and its windows, as soon as they are complete.
        """
        if sounds.sample_hz != self.sample_hz or sounds.clip_seconds is not None:
            found = f"{sounds.sample_hz} Hz, clips of {sounds.clip_seconds} s"
            fail("sounds", found, f"{self.sample_hz} Hz, whole (clip_seconds=None)")
        waiting: deque[_Pending] = deque()
        ready: list[Tensor] = []  # windows of the pending sounds, in order
        for pending, windows in self._read_ahead(sounds):
            waiting.append(pending)
            for window in windows:
                ready.append(window)
                if len(ready) == self.batch_size:
                    _deliver(waiting, self._embed(ready))
                    ready = []
                    yield from self._complete(waiting)
            yield from self._complete(waiting)  # one without windows
        if ready:
            _deliver(waiting, self._embed(ready))
        yield from self._complete(waiting)

    def _complete(self, waiting: deque[_Pending]) -> Iterator[tuple[int, Embedded]]:
        while waiting and waiting[0].complete():
            done = waiting.popleft()
            yield done.index, done.embedded(self.dim)

    def _read_ahead(self, sounds: CaptionedSounds) -> Iterator[tuple[_Pending, list[Tensor]]]:
        with ThreadPoolExecutor(_AHEAD) as threads:
            futures: deque[Future[tuple[_Pending, list[Tensor]]]] = deque()
            try:
                for index in range(len(sounds)):
                    futures.append(threads.submit(self._read, sounds, index))
                    if len(futures) > _AHEAD:
                        yield futures.popleft().result()
                while futures:
                    yield futures.popleft().result()
            finally:
                for future in futures:
                    future.cancel()

    def _read(self, sounds: CaptionedSounds, index: int) -> tuple[_Pending, list[Tensor]]:
        # A sound's windows. Long files are read in blocks, so that the whole sound is in memory
        # only as mono at the model's rate.
        pending = _Pending(index)
        windows: list[Tensor] = []
        try:
            pending.seconds = seconds = sounds.seconds(index)
            starts = self._starts(seconds)
            length = round(self.window_seconds * self.sample_hz)
            for begin in range(0, len(starts), _BLOCK):
                some = starts[begin : begin + _BLOCK]
                wav = sounds.window(index, some[0], some[-1] - some[0] + self.window_seconds)
                for start in some:
                    at = round((start - some[0]) * self.sample_hz)
                    at = min(at, max(0, len(wav) - length))  # a sample of rounding at the end
                    window = wav[at : at + length]
                    if len(window) and window.abs().max() >= _SILENCE:
                        windows.append(window.clone())
                        pending.starts.append(start)
            if not windows:
                pending.reason = "nothing but silence"
        except UnreadableSoundError as error:
            pending.reason, pending.starts, windows = str(error), [], []
        return pending, windows

    def _starts(self, seconds: float) -> list[float]:
        last = seconds - self.window_seconds
        if last <= 0:
            return [0.0]
        count = math.ceil(round(last / self.stride_seconds, 9))
        return [*(place * self.stride_seconds for place in range(count)), last]

    @torch.no_grad()
    def _embed(self, windows: list[Tensor]) -> list[np.ndarray | str]:
        # A unit vector for each window, or the reason why there is none.
        try:
            return [*self._latents(windows)]
        except ValueError as error:
            if len(windows) == 1:
                return [str(error)]
        return [result for window in windows for result in self._embed([window])]

    def _latents(self, windows: list[Tensor]) -> np.ndarray:
        device = self.mulan.audio_to_latents.weight.device
        latents = self.mulan.get_audio_latents([window.to(device) for window in windows])
        return latents.float().cpu().numpy()


class _Pending:
    # A sound whose windows are being embedded; results are vectors or reasons.
    def __init__(self, index: int) -> None:
        self.index = index
        self.seconds = 0.0
        self.reason = ""
        self.starts: list[float] = []
        self.results: list[np.ndarray | str] = []

    def complete(self) -> bool:
        return len(self.results) == len(self.starts)

    def embedded(self, dim: int) -> Embedded:
        reasons = [result for result in self.results if isinstance(result, str)]
        reason = self.reason or (reasons[0] if reasons else "")
        if reason:
            return Embedded(np.zeros(0), np.zeros((0, dim), np.float32), self.seconds, reason)
        latents = np.stack([result for result in self.results if not isinstance(result, str)])
        return Embedded(np.array(self.starts), latents, self.seconds)


def _deliver(waiting: deque[_Pending], results: list[np.ndarray | str]) -> None:
    # Results come in the order of the windows of the pending sounds.
    missing = (p for p in waiting for _ in range(len(p.starts) - len(p.results)))
    for pending, result in zip([*missing], results):
        pending.results.append(result)
