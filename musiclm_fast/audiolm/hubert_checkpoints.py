"""Checkpoints of HuBERT and its k-means, read without fairseq and without executing code."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musiclm_fast._optional import require, transformers_class


def load_audio_model(source: str | Path | nn.Module, **kwargs: Any) -> nn.Module:
    """A transformers model from a model, a folder, a name or fairseq's HuBERT ``.pt``.

    Raises:
        ValueError: the file is not a fairseq HuBERT.
    """
    if isinstance(source, nn.Module):
        return source
    path = Path(source)
    if path.is_file():
        return load_fairseq_hubert(path)
    model: nn.Module = transformers_class("AutoModel").from_pretrained(str(source), **kwargs)
    return model


class _Inert(dict):  # type: ignore[type-arg]
    # Replaces any class that a pickle names. It accepts any state and does nothing.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.given = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return _Inert()

    def append(self, item: Any) -> None:
        """Called by pickle to fill a list."""

    def extend(self, items: Any) -> None:
        """Called by pickle to fill a list."""


def load_fairseq_hubert(path: str | Path) -> nn.Module:
    """fairseq's HuBERT checkpoint as transformers' HubertModel.

    The file is read weights-only. The classes that its configuration pickles are replaced by
    inert ones, so none of its code runs. The architecture is inferred from the weights' shapes.

    Raises:
        ValueError: the file cannot be read or does not hold a HuBERT.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        names = get_unsafe_globals_in_checkpoint(str(path))
        inert: list[Any] = [(type("Inert", (_Inert,), {}), name) for name in names]
        with safe_globals(inert):
            weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
        if not isinstance(weights, dict) or "post_extract_proj.weight" not in weights:
            raise ValueError("it holds no weights of a HuBERT")
    except Exception as error:
        raise ValueError(f"checkpoint_path: {path} is not fairseq's HuBERT: {error}") from error
    model: nn.Module = transformers_class("HubertModel")(_hubert_config(weights))
    own = model.state_dict()
    converted = {name: value for key, value in weights.items() if (name := _hubert_key(key, own))}
    absent = own.keys() - converted.keys() - {"masked_spec_embed"}
    if absent:
        raise ValueError(f"checkpoint_path: {path} lacks {', '.join(sorted(absent)[:3])}")
    model.load_state_dict(converted, strict=False)
    return model.eval()


def _hubert_config(weights: dict[str, Tensor]) -> Any:
    width = weights["post_extract_proj.weight"].shape[0]
    layers = 1 + max(int(m[1]) for k in weights if (m := re.match(r"encoder\.layers\.(\d+)\.", k)))
    convolutions = sorted(
        (int(m[1]), value.shape)
        for k, value in weights.items()
        if (m := re.fullmatch(r"feature_extractor\.conv_layers\.(\d+)\.0\.weight", k))
    )
    # A group-norm extractor has one norm, in its first layer; layer norm has one per layer.
    per_layer = any(".2.1.weight" in key for key in weights if "conv_layers" in key)
    kernels = [shape[2] for _, shape in convolutions]
    positions = weights["encoder.pos_conv.0.weight_v"].shape  # (width, width / groups, kernel)
    return transformers_class("HubertConfig")(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=weights["encoder.layers.0.fc1.weight"].shape[0],
        conv_dim=[shape[0] for _, shape in convolutions],
        conv_kernel=kernels,
        conv_stride=[5] + [2] * (len(kernels) - 1),
        conv_bias="feature_extractor.conv_layers.0.0.bias" in weights,
        feat_extract_norm="layer" if per_layer else "group",
        do_stable_layer_norm=per_layer,
        num_conv_pos_embeddings=positions[2],
        num_conv_pos_embedding_groups=positions[0] // positions[1],
        feat_proj_layer_norm=True,
    )


_HUBERT_PARTS = (
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.", r"feature_extractor.conv_layers.\1.conv."),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.(1\.)?",
     r"feature_extractor.conv_layers.\1.layer_norm."),
    (r"post_extract_proj\.", "feature_projection.projection."),
    (r"layer_norm\.", "feature_projection.layer_norm."),
    (r"mask_emb$", "masked_spec_embed"),
    (r"encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"encoder.layers.\1.layer_norm."),
    (r"encoder\.layers\.(\d+)\.self_attn\.", r"encoder.layers.\1.attention."),
    (r"encoder\.layers\.(\d+)\.fc1\.", r"encoder.layers.\1.feed_forward.intermediate_dense."),
    (r"encoder\.layers\.(\d+)\.fc2\.", r"encoder.layers.\1.feed_forward.output_dense."),
)  # fmt: skip


def _hubert_key(key: str, own: dict[str, Any]) -> str | None:
    for pattern, replacement in _HUBERT_PARTS:
        renamed, count = re.subn("^" + pattern, replacement, key)
        if count:
            key = renamed
            break
    if key not in own:  # weight norm as a parametrization
        key = key.replace("weight_g", "parametrizations.weight.original0")
        key = key.replace("weight_v", "parametrizations.weight.original1")
    return key if key in own else None


def load_centres(path: str | Path) -> Tensor:
    """Cluster centres ``(clusters, dim)`` from ``.npz``, ``.npy`` or scikit-learn's joblib file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no centres.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"kmeans_path: no file {str(path)!r}")
    try:
        if path.suffix in (".npz", ".npy"):
            loaded: Any = np.load(path, allow_pickle=False)
            centres = loaded if path.suffix == ".npy" else loaded["cluster_centers"]
        else:
            centres = _joblib_centres(path)
        return torch.from_numpy(np.ascontiguousarray(centres, dtype=np.float32))
    except Exception as error:
        raise ValueError(f"kmeans_path: {path} holds no cluster centres: {error}") from error


def convert_kmeans(source: str | Path, target: str | Path) -> None:
    """Write the centres of a joblib k-means to a plain ``.npz`` without executing the pickle."""
    np.savez(target, cluster_centers=load_centres(source).numpy())


# First bytes of the formats that joblib compresses with. A pickle starts with 0x80.
_COMPRESSORS = (
    (b"\x78", zlib.decompress), (b"\x1f\x8b", gzip.decompress), (b"BZh", bz2.decompress),
    (b"\xfd7zXZ", lzma.decompress), (b"\x5d\x00", lzma.decompress),
)  # fmt: skip


def _joblib_centres(path: Path) -> Any:
    require("joblib")
    from joblib.numpy_pickle import NumpyArrayWrapper, NumpyUnpickler

    class Arrays(NumpyArrayWrapper):  # type: ignore[misc]
        def read_array(self, *args: Any, **kwargs: Any) -> Any:
            if self.dtype.hasobject:  # joblib would unpickle it without restrictions
                raise pickle.UnpicklingError("an array of objects")
            return super().read_array(*args, **kwargs)

    class Reader(NumpyUnpickler):  # type: ignore[misc]
        def find_class(self, module: str, name: str) -> Any:
            if name == "NumpyArrayWrapper" and module.startswith("joblib"):
                return Arrays
            if module == "numpy" and name in ("ndarray", "dtype"):
                return getattr(np, name)
            if module.startswith("numpy.") and name in ("_reconstruct", "scalar"):
                return super().find_class(module, name)
            return _Inert

    data = path.read_bytes()
    for magic, decompress in _COMPRESSORS:
        if data.startswith(magic):
            data = decompress(data)
            break
    model = Reader(str(path), io.BytesIO(data), ensure_native_byte_order=False).load()
    state = model if isinstance(model, dict) and "cluster_centers_" in model else model.state
    return state["cluster_centers_"]
