"""Generation and training of AudioLM's stages, against audiolm-pytorch.

    python benchmarks/bench_generation.py              # the table of results
    python benchmarks/bench_generation.py --quick      # fewer tokens and rounds

Parity first: both draw the same tokens from the same noise, or nothing is timed. Then, in one
process and on one thread, in turn: semantic generation at dim 512, depth 6, guidance 3 from texts'
embeddings; the cost of a token at 64 and at 1,024 tokens; eight samples against one. And a training
step at 1,024 tokens, batch 2, in time and (each in a fresh process) in memory.

Guidance needs a condition that can be hidden. audiolm-pytorch hides it in its semantic stage for
texts alone, not for given embeddings, so its T5 is replaced by given embeddings, in both.

Reading every weight once per token bounds the step: 80 MB at dim 512, depth 6.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings

SIZES = dict(dim=512, depth=6, num_semantic_tokens=500, audio_text_condition=True)
EMBEDS = torch.randn(1, 8, 512, generator=torch.Generator().manual_seed(0))


def pair() -> tuple[Any, Any]:
    """audiolm-pytorch's stage and ours with equal weights, both hiding the condition's embeds."""
    from musiclm_fast.audiolm import SemanticTransformer
    from tests.reference import live

    torch.manual_seed(0)
    theirs = live.load().audiolm.SemanticTransformer(**SIZES).eval()
    theirs.to_logits.bias.data[-1] = -1e9  # never ends
    theirs.embed_text = lambda text, output_device=None: EMBEDS.expand(len(text), -1, -1)
    ours = SemanticTransformer(**SIZES, drop_text_embeds=True).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def theirs_generate(model: Any, length: int, seed: int = 0) -> torch.Tensor:
    """What their wrapper's loop does, on texts, so that guidance hides the condition."""
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


def train_step(model: Any) -> Callable[[], None]:
    model.train()
    ids = torch.randint(0, 500, (2, 1023), generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(2, 8, 512)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        logits = model(ids=ids, text_embeds=embeds)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids.flatten()).backward()

    return run


def memory(which: str) -> int:
    theirs, ours = pair()
    return harness.extra_memory(lambda: train_step(theirs if which == "theirs" else ours))


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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        theirs, ours = pair()
        weights = sum(p.numel() * p.element_size() for p in ours.parameters())
        found = []
        for tokens in settings.pick([128], full=[64, 256, 1024], tiny=[4]):
            runs = {
                "ours": (functools.partial(ours_generate, ours, tokens), "ours"),
                "audiolm-pytorch": (functools.partial(theirs_generate, theirs, tokens), "peer"),
            }
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
    finally:
        torch.set_num_threads(threads)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", choices=("theirs", "ours"))
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory(args.memory)))
        return
    torch.set_num_threads(1)
    theirs, ours = pair()
    if not torch.equal(theirs_generate(theirs, 12), ours_generate(ours, 12)):
        raise SystemExit("other tokens than audiolm-pytorch from the same noise: nothing is timed")

    tokens, rounds = (48, 1) if args.quick else (256, 3)
    results: dict[str, Any] = {}
    runs = {
        "ours": lambda: ours_generate(ours, tokens),
        "theirs": lambda: theirs_generate(theirs, tokens),
        "ours, 8 samples": lambda: ours_generate(ours, tokens, 8),
    }
    times = harness.interleave(runs, rounds=rounds, warmup=0 if args.quick else 1)
    for name, timing in times.items():
        results[f"{name}: ms per token at {tokens}"] = timing.median / tokens * 1e3
    results["theirs / ours"] = harness.ratio(times["theirs"], times["ours"])
    results["8 samples / 1 sample"] = harness.ratio(times["ours, 8 samples"], times["ours"])

    short, long = (16, 128) if args.quick else (64, 1024)
    window = 8 if args.quick else 32
    lengths = {
        str(length): lambda length=length: ours_generate(ours, length)
        for length in (short - window, short, long - window, long)
    }
    times = harness.interleave(lengths, rounds=rounds, warmup=0)
    costs = [
        (times[str(end)].median - times[str(end - window)].median) / window for end in (short, long)
    ]
    results[f"ms per token at {short} and {long}"] = [1e3 * cost for cost in costs]
    results[f"a token at {long} / at {short}"] = costs[1] / costs[0]

    if not args.quick:
        times = harness.interleave({"theirs": train_step(theirs), "ours": train_step(ours)}, 3, 1)
        results["training step: theirs / ours"] = harness.ratio(times["theirs"], times["ours"])
        used = {
            which: harness.in_fresh_process("benchmarks.bench_generation", "--memory", which)
            for which in ("theirs", "ours")
        }
        results["training step: MiB"] = {k: v / harness.MIB for k, v in used.items()}
        results["training memory: ours / theirs"] = used["ours"] / used["theirs"]
    print(json.dumps({**results, **harness.environment()}, indent=1))


if __name__ == "__main__":
    main()
