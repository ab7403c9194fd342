"""``musiclm-fast convert``: weights of musiclm-pytorch as a model of this package."""

from __future__ import annotations

import argparse

HELP = "convert a checkpoint of musiclm-pytorch to a model folder"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", help="a .pt file of MuLaNTrainer, or a MuLaN's state_dict")
    parser.add_argument("--output", "-o", required=True, metavar="FOLDER", help="output folder")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML of constructor arguments, in audio, text and mulan",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="ARGUMENT=VALUE",
        help="one constructor argument, such as --set audio.spec_n_fft=512; repeatable",
    )
    parser.add_argument("--sample-rate", type=int, metavar="HZ", help="sample rate of the clips")
    parser.add_argument("--clip-seconds", type=float, metavar="S", help="length of the clips")


def run(args: argparse.Namespace) -> int:
    """Write the weights of a MuLaN of musiclm-pytorch as model.safetensors and config.json.

    Sizes are read from the weights. Other arguments are upstream's defaults unless given, and are
    listed. The optimizer's state is not converted.
    """
    from musiclm_fast._checkpoint import CheckpointError, read_checkpoint
    from musiclm_fast._config import read_values
    from musiclm_fast.interop.convert import config_of_weights
    from musiclm_fast.models.mulan import MuLaN

    given = read_values(args.config, args.set)
    content = read_checkpoint(args.checkpoint)
    weights = content["model"] if isinstance(content.get("model"), dict) else content
    for kind, arguments in given.items():
        if not isinstance(arguments, dict):
            raise ValueError(f"{kind}: got {arguments!r}, expected constructor arguments")
        if isinstance(arguments.get("patch_size"), list):
            arguments["patch_size"] = tuple(arguments["patch_size"])
    config, assumed = config_of_weights(weights, given)
    model = MuLaN.from_config(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint: {args.checkpoint!r} does not fit the configuration {config}: "
            f"{' '.join(str(error).split())}"
        ) from error
    extra = {"sample_rate": args.sample_rate, "clip_seconds": args.clip_seconds}
    model.save_pretrained(args.output, **{k: v for k, v in extra.items() if v is not None})
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.1f} M parameters written to {args.output}")
    print("assumed, since the weights do not determine it (--set changes it):")
    for name, value in assumed.items():
        print(f"  {name} = {value!r}")
    return 0
