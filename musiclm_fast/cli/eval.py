"""``musiclm-fast eval``: evaluate a model on captioned sounds."""

from __future__ import annotations

import argparse
import sys

from musiclm_fast.cli._common import add_model, add_source, load_embedder

HELP = "retrieval, zero-shot labels and embedding collapse on captioned sounds"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_source(parser)
    add_model(parser)
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="csv with path and labels (a;b), or json: adds zero-shot accuracy and ROC-AUC",
    )
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="write report.json and figures to this folder"
    )
    parser.add_argument(
        "--map",
        choices=("auto", "pca", "tsne"),
        default="auto",
        help="projection of the embeddings (default: t-SNE if scikit-learn is installed)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate a model on captioned sounds.

    Recall, median rank and mAP@10 in both directions, and embedding collapse; with --labels also
    zero-shot accuracy and ROC-AUC. The results are deterministic.
    """
    import json

    from tqdm import tqdm

    from musiclm_fast._optional import missing
    from musiclm_fast.datasets.opening import open_dataset
    from musiclm_fast.evaluation.evaluate import evaluate, write_report
    from musiclm_fast.evaluation.labels import Labels

    labels = None if args.labels is None else Labels.read(args.labels)
    embedder = load_embedder(args)
    sounds = open_dataset(
        args.source, sample_hz=embedder.sample_hz, clip_seconds=None, kind=args.kind,
        audio=args.audio, captions=args.captions,
    )  # fmt: skip
    with tqdm(total=len(sounds), desc="embedding", unit="sound", leave=False, delay=0.5) as bar:
        report = evaluate(embedder, sounds, labels, lambda done, _: bar.update(done - bar.n))
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        print(report.table())
    if args.output is not None:
        written = write_report(report, args.output, args.map)
        print("wrote " + ", ".join(map(str, written)), file=sys.stderr)
        if len(written) == 1:
            print(missing("matplotlib"), file=sys.stderr)
    return 0
