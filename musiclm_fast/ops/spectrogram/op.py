"""Fused power or log-mel spectrogram with masks: contract, checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from musiclm_fast._checks import (
    check_choice,
    check_dtype,
    check_finite_clips,
    check_floating,
    check_ndim,
    check_not_negative_int,
    check_positive,
    check_positive_int,
    check_same_device,
    check_shape,
    describe,
    fail,
)
from musiclm_fast._dispatch import Backend, Dispatcher, torch_backend
from musiclm_fast._wording import plural
from musiclm_fast.ops import _compiled
from musiclm_fast.ops.spectrogram import _cpp, _cuda
from musiclm_fast.ops.spectrogram._autograd import PAD_MODES
from musiclm_fast.ops.spectrogram.reference import num_frames, spectrogram_reference


def spectrogram(
    wav: Tensor,
    *,
    n_fft: int,
    win_length: int | None = None,
    hop_length: int | None = None,
    window: Tensor | None = None,
    pad: int = 0,
    center: bool = True,
    pad_mode: str = "reflect",
    power: float = 2.0,
    stretch_rate: float | Tensor | None = None,
    mel: Tensor | None = None,
    log_offset: float | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    freq_mask: Tensor | None = None,
    time_mask: Tensor | None = None,
    mask_value: float = 0.0,
    crop: tuple[int, int] = (1, 1),
    lengths: Tensor | None = None,
    check_finite: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Spectrogram of a batch of clips, in this order of steps::

        S = |STFT(wav padded by pad zeros)|                  torchaudio's conventions
        S = stretch_time(S, stretch_rate)                    if given; keeps the number of frames
        S = S ** power
        S = mel^T S                                          if given
        S = ln(S + log_offset)                               if given
        S = (S - mean) / std
        S = mask_value inside any freq_mask or time_mask span
        S = 0 beyond a clip's own frames                     if lengths are given
        S = S[:, :F // crop[0] * crop[0], :T // crop[1] * crop[1]]

    Args:
        wav: ``(B, samples)`` floating.
        n_fft: length of the Fourier transform, in samples.
        win_length: length of the window, at most n_fft; None is n_fft (or the given window's).
        hop_length: step between frames, in samples; None is ``win_length // 2``.
        window: ``(win_length,)``; None is a periodic Hann window.
        pad: zeros added on both sides, in samples.
        center: frame t is centred on sample ``t * hop_length``; both ends are padded by n_fft // 2.
        pad_mode: of that padding: reflect, constant, replicate or circular.
        power: 1 gives magnitudes, 2 power.
        stretch_rate: speed of a true time stretch, or ``(B,)`` floating, one for each clip;
            None for none.
        mel: ``(n_fft // 2 + 1, bands)`` filters, as :func:`mel_filters` makes them.
        log_offset: added before the natural logarithm; None for no logarithm.
        mean, std: fixed normalisation after the logarithm.
        freq_mask: ``(1 or B, k, 2)`` int64 spans of bands, start and end (excluded).
        time_mask: ``(1 or B, k, 2)`` int64 spans of frames.
        mask_value: what masked entries hold (they carry no gradient).
        crop: (bands, frames): the result is cut down to whole multiples.
        lengths: ``(B,)`` int64 samples of each clip; padding and reflection use each clip's own.
            Samples beyond them are never read. Values on a GPU are not checked (the kernel clamps
            them); on the CPU a clip that is too short is an error.
        check_finite: look for NaN and infinity in wav; None does so on the CPU only, because on a
            GPU it waits for the device. Not done while compiling.
        backend: ``"cuda"``, ``"cpp"`` or ``"torch"``; None takes the first that supports the call.

    Returns:
        ``(B, F, T)``: F is the bands (``n_fft // 2 + 1`` without mel) and T the frames of the
        longest clip, both cropped. float32, or float64 for float64 input. Gradients reach wav.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is not as above.
        BackendError: the named backend cannot run this call.

    Sources: https://arxiv.org/abs/1904.08779 (SpecAugment).
    """
    check_ndim("wav", wav, 2, "(B, samples)")
    check_floating("wav", wav)
    check_positive_int("n_fft", n_fft)
    if window is not None:
        check_ndim("window", window, 1, "(win_length,)")
        win_length = window.shape[0] if win_length is None else win_length
        check_shape("window", window, (win_length,), "(win_length,)")
    win_length = n_fft if win_length is None else win_length
    check_positive_int("win_length", win_length)
    if win_length > n_fft:
        fail("win_length", win_length, f"at most n_fft = {n_fft}")
    hop_length = win_length // 2 if hop_length is None else hop_length
    check_positive_int("hop_length", hop_length)
    if window is None:
        window = torch.hann_window(win_length, device=wav.device)
    check_choice("pad_mode", pad_mode, PAD_MODES)
    check_positive("power", power)
    check_positive("std", std)
    if log_offset is not None:
        check_positive("log_offset", log_offset)
    check_not_negative_int("pad", pad)
    batch, samples = wav.shape
    _check_stretch_rate(stretch_rate, batch)
    _check_lengths(lengths, wav, shortest_clip(n_fft, pad, center, pad_mode), n_fft)
    n_freqs = n_fft // 2 + 1
    if mel is not None:
        check_shape("mel", mel, (n_freqs, None), "(n_fft // 2 + 1, bands)")
        check_floating("mel", mel)
    for name, mask in (("freq_mask", freq_mask), ("time_mask", time_mask)):
        if mask is not None:
            check_ndim(name, mask, 3, "(1 or B, spans, 2)")
            rows = 1 if mask.shape[0] == 1 else batch
            check_shape(name, mask, (rows, None, 2), "(1 or B, spans, 2)")
            check_dtype(name, mask, torch.int64)
    for name, size in zip(("crop[0]", "crop[1]"), crop, strict=True):
        check_positive_int(name, size)
    check_same_device(
        "wav", wav, window=window, mel=mel, freq_mask=freq_mask, time_mask=time_mask,
        lengths=lengths, stretch_rate=stretch_rate if isinstance(stretch_rate, Tensor) else None,
    )  # fmt: skip
    if crop[1] > num_frames(samples, n_fft, hop_length, pad, center):
        each = plural(hop_length, "sample")
        fail("wav", describe(wav), f"at least crop[1] = {crop[1]} frames of {each}")

    if wav.device.type == "cpu" if check_finite is None else check_finite:
        check_finite_clips("wav", wav, lengths)

    arguments = dict(
        wav=wav, n_fft=n_fft, hop_length=hop_length, window=window, pad=pad, center=center,
        pad_mode=pad_mode, power=float(power), stretch_rate=stretch_rate, mel=mel,
        log_offset=log_offset, mean=float(mean), std=float(std), freq_mask=freq_mask,
        time_mask=time_mask, mask_value=float(mask_value), crop=crop, lengths=lengths,
    )  # fmt: skip
    return dispatcher.select(backend, wav.device, **arguments).run(**arguments)


def shortest_clip(n_fft: int, pad: int, center: bool, pad_mode: str) -> int:
    """Fewest samples of a clip that has a frame and whose padding is defined."""
    if not center:
        needed = n_fft
    else:
        needed = {"reflect": n_fft // 2 + 1, "circular": n_fft // 2}.get(pad_mode, 1)
    return max(1, needed - 2 * pad)


def _check_stretch_rate(rate: float | Tensor | None, batch: int) -> None:
    if rate is None:
        return
    if not isinstance(rate, Tensor):
        check_positive("stretch_rate", rate)
        return
    check_shape("stretch_rate", rate, (batch,), "(B,)")
    check_floating("stretch_rate", rate)
    if rate.device.type == "cpu" and not torch.compiler.is_compiling() and not (rate > 0).all():
        fail("stretch_rate", rate.tolist(), "numbers above 0")


def _check_lengths(lengths: Tensor | None, wav: Tensor, shortest: int, n_fft: int) -> None:
    batch, samples = wav.shape
    allowed = f"at least {plural(shortest, 'sample')} for n_fft = {n_fft}"
    if samples < shortest:
        fail("wav", plural(samples, "sample"), allowed)
    if lengths is None:
        return
    check_shape("lengths", lengths, (batch,), "(B,)")
    check_dtype("lengths", lengths, torch.int64)
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for clip, length in enumerate(lengths.tolist()):
        if length > samples:
            fail(
                "lengths",
                f"{length} of clip {clip}",
                f"at most the {plural(samples, 'sample')} of wav",
            )
        if length < shortest:
            fail("lengths", f"{length} of clip {clip}", allowed)


dispatcher = Dispatcher(
    "spectrogram",
    [
        Backend(
            "cuda",
            _cuda.supports,
            _cuda.run,
            _cuda.available,
            _cuda.self_check,
            _cuda.check_dtypes,
        ),
        _compiled.cpp_backend(_cpp.supports, _cpp.run),
        torch_backend(spectrogram_reference),
    ],
)
