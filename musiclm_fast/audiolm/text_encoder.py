"""T5 text embeddings. The encoder is loaded at the first call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from musiclm_fast._checks import fail
from musiclm_fast._optional import transformers_class

DEFAULT_T5_NAME = "google/t5-v1_1-base"


MAX_TOKENS = 256


# Widths of common encoders, so that building a stage needs no network.
_WIDTHS = {
    "t5-small": 512, "t5-base": 768, "t5-large": 1024, "t5-3b": 1024, "t5-11b": 1024,
    "t5-v1_1-small": 512, "t5-v1_1-base": 768, "t5-v1_1-large": 1024, "t5-v1_1-xl": 2048,
    "t5-v1_1-xxl": 4096,
    "flan-t5-small": 512, "flan-t5-base": 768, "flan-t5-large": 1024, "flan-t5-xl": 2048,
    "flan-t5-xxl": 4096,
}  # fmt: skip


def encoded_dim(name: str) -> int:
    """Width of a T5's embeddings, from its configuration unless the T5 is a common one."""
    short = name.removeprefix("google/").removeprefix("google-t5/")
    if short in _WIDTHS:
        return _WIDTHS[short]
    return int(transformers_class("T5Config").from_pretrained(name).d_model)


@cache
def _model_and_tokenizer(name: str) -> tuple[Any, Any]:
    model = transformers_class("T5EncoderModel").from_pretrained(name).eval()
    return model, transformers_class("AutoTokenizer").from_pretrained(name)


@torch.no_grad()
def t5_encode_text(
    texts: str | list[str],
    name: str = DEFAULT_T5_NAME,
    output_device: torch.device | str | None = None,
) -> Tensor:
    """Embed texts with a T5 encoder, which is downloaded at the first call.

    Args:
        texts: one text or several, truncated to 256 tokens.
        name: name of the T5 on the Hugging Face hub, or a folder.
        output_device: device of the encoder and the result.

    Returns:
        ``(B, n, width)``, zero after each text's end.

    Raises:
        ValueError: no text, or an empty one.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        fail("text", repr(texts), "at least one text, none of them empty")
    model, tokenizer = _model_and_tokenizer(name)
    if output_device is not None:
        model = model.to(output_device)
    encoded = tokenizer(
        texts, return_tensors="pt", padding="longest", max_length=MAX_TOKENS, truncation=True
    ).to(model.device)
    embeds = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask)
    mask = encoded.attention_mask[..., None].bool()
    masked: Tensor = embeds.last_hidden_state.masked_fill(~mask, 0.0)
    return masked
