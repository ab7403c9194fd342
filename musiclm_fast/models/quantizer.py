"""Quantized MuLaN embeddings that condition the stages of AudioLM."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from vector_quantize_pytorch import ResidualVQ

from musiclm_fast._checks import (
    check_choice,
    check_positive,
    check_positive_int,
    check_shape,
    fail,
)
from musiclm_fast._wording import plural
from musiclm_fast.audio.resampling import resample
from musiclm_fast.models.conditioner import AudioConditionerBase
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.nn.kmeans import kmeans

_WINDOWS_AT_ONCE = 64  # batch size of a long clip's windows; bounds the memory


class MuLaNEmbedQuantizer(AudioConditionerBase):  # type: ignore[misc, valid-type]
    """Residual vector quantizer over a frozen MuLaN, with conditioning embeddings per namespace.

    Source: MusicLM, https://arxiv.org/abs/2301.11325.

    Args:
        mulan: a trained MuLaN, or any module whose ``get_audio_latents(wavs)`` and
            ``get_text_latents(texts=None, raw_texts=None)`` return unit vectors
            ``(B, dim_latent)``. Clips are resampled to its ``sample_hz``, if it has one.
        conditioning_dims: width of the conditioning of each namespace.
        rq_num_quantizers: number of residual codebooks; see :meth:`paper` for MusicLM's sizes.
        rq_ema_decay: decay of the codebooks' moving averages.
        codebook_size: entries of a codebook.
        namespaces: one name per conditioned stage.
        window_seconds: a longer clip is embedded as the mean over windows of this length, which
            requires MuLaN's sample rate. None embeds a clip as a whole.
        window_stride_seconds: distance between the starts of two windows.
        dim_latent: width of the joint embedding, if mulan has no such attribute.

    Raises:
        ValueError: mulan lacks a method or its width, or the number of conditioning_dims is not
            that of namespaces.
    """

    def __init__(
        self,
        mulan: MuLaN,
        conditioning_dims: Sequence[int],
        rq_num_quantizers: int = 8,
        rq_ema_decay: float = 0.9,
        codebook_size: int = 1024,
        namespaces: Sequence[str] = ("semantic", "coarse", "fine"),
        *,
        window_seconds: float | None = None,
        window_stride_seconds: float = 1.0,
        dim_latent: int | None = None,
    ) -> None:
        super().__init__()
        for method in ("get_audio_latents", "get_text_latents"):
            if not callable(getattr(mulan, method, None)):
                fail("mulan", f"a {type(mulan).__name__} without {method}", "a joint embedding")
        dim_latent = getattr(mulan, "dim_latent", dim_latent)
        if dim_latent is None:
            fail("dim_latent", None, f"its width: {type(mulan).__name__} has no dim_latent")
        if not namespaces:
            fail("namespaces", namespaces, "at least one name")
        if len(conditioning_dims) != len(namespaces):
            fail(
                "conditioning_dims",
                plural(len(conditioning_dims), "width"),
                f"one for each of {plural(len(namespaces), 'namespace')}",
            )
        self.mulan = mulan
        self.namespaces = tuple(namespaces)
        self.conditioning_dims = tuple(conditioning_dims)
        self.rq = ResidualVQ(
            dim=dim_latent,
            num_quantizers=rq_num_quantizers,
            codebook_size=codebook_size,
            decay=rq_ema_decay,
            commitment_weight=0,  # the codebooks learn from moving averages only
            kmeans_init=True,
            threshold_ema_dead_code=2,
            quantize_dropout=False,
        )
        self.dim = dim_latent
        self.num_codebooks = rq_num_quantizers
        self.codebook_size = codebook_size
        # ParameterDict sorts the names of a dict. An optimizer's checkpoint identifies parameters
        # by their order, so add them one by one.
        self.cond_embeddings = nn.ParameterDict()
        for namespace, width in zip(namespaces, conditioning_dims, strict=True):
            # Drawn twice, as upstream does, so that the same seed gives the same weights.
            embeddings = nn.Parameter(torch.randn(rq_num_quantizers, codebook_size, width))
            self.cond_embeddings[namespace] = nn.init.normal_(embeddings, std=0.02)
        self.set_default_namespace(self.namespaces[0])
        self._frozen = False
        self._fingerprint: tuple[list[tuple[int, int, int]], str] | None = None
        self.window_seconds = window_seconds
        self.window_stride_seconds = window_stride_seconds
        if window_seconds is not None:
            check_positive("window_seconds", window_seconds)
            check_positive("window_stride_seconds", window_stride_seconds)
            if self.sample_hz is None:
                fail("window_seconds", window_seconds, "None: the MuLaN does not know its rate")

    @classmethod
    def paper(
        cls, mulan: MuLaN, conditioning_dims: Sequence[int], **kwargs: Any
    ) -> MuLaNEmbedQuantizer:
        """MusicLM's quantizer: 12 codebooks of 1024 entries, windows of 10 s every second."""
        sizes = dict(rq_num_quantizers=12, codebook_size=1024, window_seconds=10.0)
        return cls(mulan, conditioning_dims, **{**sizes, **kwargs})

    @property
    def sample_hz(self) -> int | None:
        """Sample rate of MuLaN's clips in Hz; None if it is unknown."""
        front_end = getattr(getattr(self.mulan, "audio", None), "front_end", None)
        rate = getattr(self.mulan, "sample_hz", getattr(front_end, "sample_hz", None))
        return None if rate is None else int(rate)

    @property
    def fitted(self) -> bool:
        """Whether the codebooks are initialized, by :meth:`fit`, training or a checkpoint."""
        return all(bool(layer._codebook.initted) for layer in self.rq.layers)

    def freeze(self) -> MuLaNEmbedQuantizer:
        """Keep the codebooks fixed, in training mode too.

        Otherwise training a stage updates them, so stages trained in sequence see different codes.

        Raises:
            ValueError: the quantizer is not fitted.
        """
        if not self.fitted:
            fail("quantizer", "one that is not fitted", "fit() or a checkpoint first")
        self._frozen = True
        self.rq.eval()
        return self

    def train(self, mode: bool = True) -> MuLaNEmbedQuantizer:
        """Set training mode, except for frozen codebooks."""
        super().train(mode)
        if self._frozen:
            self.rq.eval()
        return self

    def fingerprint(self) -> str:
        """A short hash of MuLaN and the codebooks. A stage works only with those it was trained on.

        The hash is cached. It is computed again when a checksum of the weights has changed.
        """
        training_state = ("cluster_size", "embed_avg", "initted")  # does not affect the codes
        tensors = [
            (name, value)
            for part in (self.mulan, self.rq)
            for name, value in sorted(part.state_dict().items())
            if not name.endswith(training_state)
        ]
        checksums = [_checksum(value) for _, value in tensors]
        if self._fingerprint is None or self._fingerprint[0] != checksums:
            digest = hashlib.sha256()
            for name, value in tensors:
                digest.update(name.encode())
                digest.update(_bytes(value).cpu().numpy().data)
            self._fingerprint = checksums, digest.hexdigest()[:16]
        return self._fingerprint[1]

    @torch.no_grad()
    def fit(
        self,
        data: Tensor | Iterable[Any],
        *,
        batch_size: int = 16,
        iterations: int = 25,
        max_latents: int = 65_536,
        input_sample_hz: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> MuLaNEmbedQuantizer:
        """Fit each codebook by k-means to the residual of those before it, then freeze them.

        Args:
            data: latents ``(N, dim_latent)``; or clips ``(samples,)`` of any lengths, or tuples
                that start with one, for example a data set.
            batch_size: number of clips of equal length that are embedded at once.
            iterations: maximum number of k-means iterations.
            max_latents: maximum number of latents.
            input_sample_hz: rate of the clips; None is MuLaN's.
            seed: seed of the initial centres.
            progress: show a progress bar.

        Returns:
            The quantizer itself.

        Raises:
            ValueError: no data, or latents that are not finite.
        """
        if isinstance(data, Tensor):
            check_shape("data", data, (None, self.dim), "(N, dim_latent)")
            latents = data.detach().float()[:max_latents]
        else:
            latents = self._latents_of(data, batch_size, max_latents, input_sample_hz, progress)
        if latents.shape[0] == 0:
            fail("data", "no rows", "at least one clip or latent")
        if not bool(torch.isfinite(latents).all()):
            fail("data", "latents with NaN or infinity", "finite ones")
        generator = torch.Generator().manual_seed(seed)
        rest = latents.to(next(self.rq.buffers()).device)
        for layer in self.rq.layers:
            centres, counts = kmeans(rest, self.codebook_size, iterations, generator)
            book = layer._codebook
            book.embed.data.copy_(centres[None])
            book.embed_avg.data.copy_((centres * counts[:, None])[None])
            book.cluster_size.data.copy_(counts[None])
            book.initted.data.fill_(True)
            rest = rest - centres[torch.cdist(rest, centres).argmin(dim=1)]
        return self.freeze()

    def _latents_of(
        self, data: Iterable[Any], batch_size: int, limit: int, hz: int | None, progress: bool
    ) -> Tensor:
        check_positive_int("batch_size", batch_size)
        device = next(self.rq.buffers()).device
        found: list[Tensor] = []
        batch: list[Tensor] = []

        def embed() -> None:
            waves = resample(torch.stack(batch), hz, self.sample_hz)
            found.append(self.audio_latents(waves.to(device)))
            batch.clear()

        size = getattr(data, "__len__", lambda: limit)()
        rows = itertools.islice((data[i] for i in range(size)) if hasattr(data, "__getitem__")
                                else iter(data), limit)  # fmt: skip
        for row in tqdm(rows, desc="embedding clips", total=min(size, limit), disable=not progress):
            clip = row[0] if isinstance(row, (tuple, list)) else row
            if batch and (batch[0].shape != clip.shape or len(batch) == batch_size):
                embed()
            batch.append(clip)
        if batch:
            embed()
        return torch.cat(found) if found else torch.empty(0, self.dim)

    def audio_latents(self, wavs: Tensor) -> Tensor:
        """MuLaN latents ``(B, dim_latent)`` of clips ``(B, samples)`` at MuLaN's rate.

        A clip that is longer than a window is embedded window by window.
        """
        self.mulan.eval()
        rate, window = self.sample_hz, self.window_seconds
        if window is None or rate is None or wavs.shape[1] <= int(window * rate):
            latents: Tensor = self.mulan.get_audio_latents(wavs)
            return latents
        windows = wavs.unfold(1, int(window * rate), int(self.window_stride_seconds * rate))
        flat = windows.flatten(0, 1).split(_WINDOWS_AT_ONCE)  # (B * windows, samples)
        each = torch.cat([self.mulan.get_audio_latents(some) for some in flat])
        return F.normalize(each.view(*windows.shape[:2], -1).mean(dim=1), dim=-1)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The conditioning embeddings. MuLaN is frozen and the codebooks have no gradient."""
        return self.cond_embeddings.parameters(recurse)

    def set_default_namespace(self, namespace: str) -> None:
        """Set the namespace of calls that name none."""
        self._default_namespace = self._known_namespace(namespace)

    def _known_namespace(self, namespace: str | None) -> str:
        if namespace is None:
            return self._default_namespace
        check_choice("namespace", namespace, self.namespaces)
        return namespace

    def forward(
        self,
        wavs: Tensor | None = None,
        texts: Tensor | None = None,
        namespace: str | None = None,
        raw_texts: Sequence[str] | None = None,
    ) -> Tensor:
        """Conditioning embeddings of clips or of texts.

        Args:
            wavs: ``(B, samples)`` at MuLaN's rate.
            texts: ``(B, n)`` token ids, in place of clips.
            namespace: name of the embeddings; None is the default namespace.
            raw_texts: B strings, in place of token ids.

        Returns:
            ``(B, quantizers, conditioning dim)``.

        Raises:
            ValueError: not exactly one of wavs, texts and raw_texts; an unknown namespace.
        """
        given = sum(value is not None for value in (wavs, texts, raw_texts))
        if given != 1:
            fail("wavs, texts, raw_texts", f"{given} of them", "exactly one of them")
        namespace = self._known_namespace(namespace)
        with torch.no_grad():
            self.mulan.eval()
            if wavs is not None:
                latents = self.audio_latents(wavs)
            elif texts is not None:
                latents = self.mulan.get_text_latents(texts)
            else:
                latents = self.mulan.get_text_latents(raw_texts=list(raw_texts or ()))
        return self.embed_latents(latents, namespace)

    def embed_latents(self, latents: Tensor, namespace: str | None = None) -> Tensor:
        """Conditioning embeddings of MuLaN latents ``(B, dim_latent)``; see :meth:`forward`."""
        _, indices, _ = self.rq(latents)  # (B, q)
        table = self.cond_embeddings[self._known_namespace(namespace)]  # (q, codebook, dim)
        quantizer = torch.arange(self.num_codebooks, device=indices.device)
        embeds: Tensor = table[quantizer, indices]  # (B, q, dim)
        return embeds


def _bytes(value: Tensor) -> Tensor:
    return value.detach().contiguous().view(-1).view(torch.uint8)


def _checksum(value: Tensor) -> tuple[int, int, int]:
    # An order of magnitude faster than SHA-256. The sum detects writes through `.data`, which do
    # not change the version. The version detects a permutation in place.
    data = _bytes(value)
    whole_words = data.numel() % 8 == 0 and data.storage_offset() % 8 == 0
    total = int(data.view(torch.int64).sum() if whole_words else data.sum())
    return value.data_ptr(), 0 if value.is_inference() else value._version, total
