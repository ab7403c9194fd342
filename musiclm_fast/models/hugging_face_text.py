"""Text towers made of pretrained encoders of Hugging Face transformers."""

from __future__ import annotations

import base64
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from musiclm_fast._checks import (
    check_choice,
    check_dtype,
    check_ndim,
    check_positive_int,
    check_shape,
    describe,
    fail,
)
from musiclm_fast._optional import transformers_class
from musiclm_fast._wording import plural
from musiclm_fast.models.hugging_face import HuggingFaceTower, beside, plain_values
from musiclm_fast.models.towers import register_tower


class HuggingFaceText(HuggingFaceTower):
    """A text encoder of Hugging Face transformers as MuLaN's text tower.

    BERT, RoBERTa, T5's encoder, CLIP's text half, decoders such as GPT-2 or Qwen, and what else
    ``AutoModel`` knows. MuLan itself uses BERT. https://arxiv.org/abs/2208.12415

    Args:
        model: a folder or a name on the Hugging Face Hub; a transformers model; or the
            configuration of one as a dict, for fresh weights.
        tokenizer: a tokenizer of transformers, or its entry of :attr:`arguments`. None takes
            that of ``model``; a model that is not from a folder or the Hub has none, and the
            tower then accepts token ids only.
        frozen: do not train the encoder.
        pooling: ``"mean"`` over a text's tokens, ``"cls"``, its first token, or ``"last"``, its
            last one (for decoders).
        max_seq_len: longest text in tokens; at most the encoder's limit.

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
            tokenizer = beside(model, "AutoTokenizer")
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
                    f"raw_texts: cut to {plural(self.max_seq_len, 'token')}: "
                    f"{cut[0][:40]!r}... (said once)",
                    stacklevel=3,
                )
        device = self.device
        return tokens["input_ids"].to(device), tokens["attention_mask"].bool().to(device)


def _files_of(tokenizer: Any) -> dict[str, Any] | None:
    # A tokenizer as its files: text, or base64 of binary files.
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
                    text = json.dumps(plain_values(json.loads(text)))
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


register_tower("text", HuggingFaceText)
