"""``musiclm-fast plan``: the largest batch for a GPU's memory."""

from __future__ import annotations

import argparse
import re

from musiclm_fast._wording import plural

HELP = "largest batch for a GPU's memory, and the cost of a step"
# In addition to the step's tensors: CUDA's context and libraries, attention's workspace.
RESERVED = 1.0e9
# Share of the rest that the allocator can use; fragmentation takes the remainder.
USABLE = 0.92
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def size(text: str) -> float:
    """Bytes of ``"24GB"``, ``"80e9"`` or ``"16GiB"``."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or number <= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a size such as 24GB")
    unit = _UNITS[found[2]]
    if found[3]:
        unit = 2 ** (10 * ("kmgt".index(found[2]) + 1)) if found[2] else 1
    return number * unit


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--gpu-memory", type=size, required=True, metavar="SIZE", help="such as 24GB"
    )
    parser.add_argument("--seconds", type=float, required=True, help="length of a clip")
    parser.add_argument("--dim", type=int, default=512, help="width of both towers (%(default)s)")
    parser.add_argument("--depth", type=int, default=6, help="blocks of each tower (%(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="heads of 64 values (%(default)s)")
    parser.add_argument(
        "--front-end", default="mulan", choices=("upstream", "mulan", "ast"),
        help="front end of the audio tower (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--sample-hz", type=int, metavar="HZ", help="rate of the clips; default: the front end's"
    )
    parser.add_argument(
        "--text-tokens",
        type=int,
        default=77,
        metavar="N",
        help="tokens of the longest text (%(default)s)",
    )
    parser.add_argument(
        "--precision", default="bf16", choices=("bf16", "float32"),
        help="bf16 is autocast with float32 weights (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--optimizer", default="adam", choices=("adam", "lion"), help="(%(default)s)"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="report this batch instead")


def run(args: argparse.Namespace) -> int:
    """Report the largest batch of MuLaN's training step that fits in a GPU's memory.

    Also the use of the memory and a lower bound of a step's time. All is computed from the shapes;
    nothing is run.
    """
    from musiclm_fast import cost
    from musiclm_fast._checks import check_positive, check_positive_int, fail
    from musiclm_fast._tables import aligned
    from musiclm_fast.models.front_end import resolve_front_end

    check_positive("seconds", args.seconds)
    for name in ("dim", "depth", "heads", "text_tokens"):
        check_positive_int(name, getattr(args, name))
    front = resolve_front_end(args.front_end)
    rate = args.sample_hz or front.sample_hz
    if rate is None:
        fail(
            "sample_hz",
            None,
            f"a rate in Hz, which front end {args.front_end!r} lacks",
        )
    check_positive_int("sample_hz", rate)
    tower = cost.Tower(dim=args.dim, depth=args.depth, heads=args.heads)
    step = cost.mulan_step(
        round(args.seconds * rate), 1, text_tokens=args.text_tokens, audio=tower, text=tower,
        bands=front.bands, hop_length=front.hop_length or front.win_length // 2,
        precision=args.precision,
    )  # fmt: skip
    values = 2 if args.optimizer == "adam" else 1
    usable = max(0.0, args.gpu_memory - RESERVED) * USABLE
    most = cost.largest_batch(step, usable, values)
    if args.batch is not None:
        check_positive_int("batch", args.batch)
    shown = args.batch or most
    patches = plural(step.audio_tokens, "patch", "patches")
    print(
        f"{step.parameters / 1e6:.1f} M parameters, {patches} of a clip, "
        f"{plural(step.text_tokens, 'token')} of a text, {args.precision}, {args.optimizer}"
    )
    print(f"largest batch in {args.gpu_memory / 1e9:.1f} GB: {plural(most, 'pair')}")
    if not shown:
        needed = cost.memory(step, values).total / USABLE + RESERVED
        print(f"not even one pair fits: one pair needs {needed / 1e9:.1f} GB")
        return 1
    at = step.with_batch(shown)
    memory = cost.memory(at, values)
    print(f"\nat {plural(shown, 'pair')}")
    parts = {
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "forward and backward": memory.forward_backward,
        "CUDA and workspaces": RESERVED,
        "between tensors": (memory.total / USABLE) - memory.total,
    }
    rows = [(f"  {name}", f"{value / 1e9:.2f}", "GB") for name, value in parts.items()]
    ops = cost.step_ops(at)
    operations = sum(op.operations for op in ops)
    rows.append(("  operations of a step", f"{operations / 1e12:.2f}", "TFLOP"))
    for device in cost.DEVICES.values():
        seconds = cost.seconds(ops, device, args.precision)
        rows.append((f"  at least, on {device.name}", f"{1e3 * seconds:.1f}", "ms a step"))
    print(aligned([(name, f"{value} {unit:<9}") for name, value, unit in rows]))
    return 0
