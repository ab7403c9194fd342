"""Generation of the semantic stage, against audiolm-pytorch: dim 512, depth 6, guidance 3 from
text embeddings, on one thread; in full mode also eight samples at once.

Parity is checked first: both draw the same tokens from the same noise.

Guidance needs a condition that can be dropped. audiolm-pytorch's semantic stage drops it for texts,
not for given embeddings, so given embeddings replace its T5, in both.

Reading every weight once per token bounds the step: 80 MB at dim 512, depth 6.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings

SIZES = dict(dim=512, depth=6, num_semantic_tokens=500, audio_text_condition=True)
EMBEDS = torch.randn(1, 8, 512, generator=torch.Generator().manual_seed(0))


def pair() -> tuple[Any, Any]:
    """audiolm-pytorch's stage and ours with equal weights, both able to drop the condition."""
    from musiclm_fast.audiolm import SemanticTransformer
    from tests.upstream import live

    torch.manual_seed(0)
    theirs = live.load().audiolm.SemanticTransformer(**SIZES).eval()
    theirs.to_logits.bias.data[-1] = -1e9  # never ends
    theirs.embed_text = lambda text, output_device=None: EMBEDS.expand(len(text), -1, -1)
    ours = SemanticTransformer(**SIZES, drop_text_embeds=True).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def theirs_generate(model: Any, length: int, seed: int = 0) -> torch.Tensor:
    """The loop of their wrapper on texts, so that guidance drops the condition."""
    from audiolm_pytorch.audiolm_pytorch import gumbel_sample, top_k

    torch.manual_seed(seed)
    ids, cache, logits = torch.empty(1, 0, dtype=torch.long), None, None
    with torch.inference_mode():
        for _ in range(length):
            new, cache = model.forward_with_cond_scale(
                ids=ids, text=[""], cond_scale=3.0, kv_cache=cache, return_kv_cache=True
            )
            logits = new if logits is None else torch.cat((logits, new), dim=1)
            drawn = gumbel_sample(top_k(logits[:, -1], thres=0.9))
            ids = torch.cat((ids, drawn[:, None]), dim=1)
    return ids


def ours_generate(model: Any, length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    from musiclm_fast.audiolm import SemanticTransformerWrapper

    torch.manual_seed(seed)
    wrapper = SemanticTransformerWrapper(transformer=model)
    return wrapper.generate(max_length=length, text_embeds=EMBEDS, batch_size=batch, progress=False)


def check(theirs: Any, ours: Any) -> None:
    """Both draw the same tokens from the same noise.

    Raises:
        AssertionError: they do not.
    """
    same = torch.equal(theirs_generate(theirs, 12), ours_generate(ours, 12))
    assert same, "other tokens than audiolm-pytorch from the same noise"


def results(settings: Settings) -> list[Result]:
    """Tokens of the semantic stage on one thread; traffic is every weight, read once a token."""
    if settings.mode == "gpu":
        return []
    with harness.one_thread():
        theirs, ours = pair()
        weights = sum(p.numel() * p.element_size() for p in ours.parameters())
        found = []
        for tokens in settings.pick([128], full=[64, 256, 1024], tiny=[4]):
            runs = {
                "ours": (functools.partial(ours_generate, ours, tokens), "ours"),
                "audiolm-pytorch": (functools.partial(theirs_generate, theirs, tokens), "peer"),
            }
            if settings.mode == "full":
                eight = functools.partial(ours_generate, ours, tokens, 8)
                runs["ours, 8 samples"] = (eight, "ours")
            contenders = {
                name: Contender(
                    lambda run=run: run, traffic=1.0 * weights * tokens, role=role,
                    once=role == "peer" and settings.mode == "quick",
                )
                for name, (run, role) in runs.items()
            }  # fmt: skip
            found += harness.measure(
                "semantic generation, dim 512, depth 6, guidance 3, 1 thread", f"{tokens} tokens",
                contenders, settings, check=functools.partial(check, theirs, ours), rounds=3,
                axes={"tokens": tokens},
                headline=f"semantic generation, {tokens} tokens, guidance 3, 1 thread"
                if tokens == 128
                else "",
            )  # fmt: skip
    return found
