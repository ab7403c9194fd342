"""``python -m musiclm_fast.info`` prints versions, the build and every backend.

With ``--check`` it runs the self-check of every kernel that has one instead.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

HELP = "versions, build and backends"
CHECK_HELP = "compare each GPU kernel with its definition, on every device and in every dtype"
_PACKAGES = (
    "torch", "triton", "numpy", "vector-quantize-pytorch", "accelerate", "transformers",
    "musiclm-pytorch", "audiolm-pytorch",
)  # fmt: skip


def collect() -> dict[str, Any]:
    """Versions, the compiled library's state, devices, and each op's backends with their state.

    Returns:
        A dictionary of plain values: ``version``, ``python``, ``platform``, ``packages``,
        ``library`` (loaded, reason, simd, facts), ``devices``, ``threads`` and ``ops``
        (op -> backend -> "available" or why it is not).
    """
    import torch

    from musiclm_fast import _dispatch, _extension
    from musiclm_fast._version import __version__

    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    status = _extension.extension_status()
    ops = {}
    for op, dispatcher in _dispatch.dispatchers().items():
        states = [(backend.name, backend.available()) for backend in dispatcher.backends]
        ops[op] = {name: "available" if ok else reason for name, (ok, reason) in states}
    cuda = torch.cuda.is_available()
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "library": {
            "loaded": status.loaded,
            "reason": status.reason,
            "simd": _extension.simd_level(),
            "facts": dict(status.facts),
        },
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else [],
        "threads": torch.get_num_threads(),
        "ops": ops,
    }


def render(facts: dict[str, Any]) -> str:
    """The facts of :func:`collect` as text for a terminal."""
    lines = [
        f"musiclm_fast {facts['version']}, Python {facts['python']}, {facts['platform']}, "
        f"{facts['threads']} CPU threads",
        "",
        "packages",
        *(f"  {name:<24}{version}" for name, version in facts["packages"].items()),
        "",
        "compiled library",
    ]
    library = facts["library"]
    if library["loaded"]:
        lines.append(f"  loaded; runs at SIMD level {library['simd']}")
    else:
        lines.append(f"  missing: {library['reason']}")
    lines += [f"  {name:<24}{value}" for name, value in library["facts"].items()]
    lines += ["", "CUDA devices", *(f"  {name}" for name in facts["devices"] or ["none"])]
    lines += ["", "ops and their backends, in the order in which they are tried"]
    for op, backends in facts["ops"].items():
        lines.append(f"  {op}")
        lines += [f"    {name:<10}{state}" for name, state in backends.items()]
    return "\n".join(lines)


def check() -> int:
    """Run every self-check on every device and in every dtype; one line for each.

    Returns:
        The number of failed or unfinished checks.
    """
    import torch

    from musiclm_fast import _dispatch

    importlib.import_module("musiclm_fast.ops")  # registers the dispatchers
    cuda = (torch.device("cuda", i) for i in range(torch.cuda.device_count()))
    checks = [
        (op, backend, backend.self_check, device, backend.check_dtypes(device))
        for device in (*cuda, torch.device("cpu"))
        for op, dispatcher in _dispatch.dispatchers().items()
        for backend in dispatcher.backends
        if backend.self_check is not None
    ]
    if not any(dtypes for *_, dtypes in checks):
        print("no kernel with a self-check runs on this machine's devices")
    failures = 0
    for op, backend, self_check, device, dtypes in checks:
        where = f"{op:<18}{backend.name:<8}{device!s:<8}"
        available, reason = backend.available()
        if dtypes and not available:
            print(f"{where}not available: {reason}")
            continue
        for dtype in dtypes:
            start = time.perf_counter()
            try:
                problem = self_check(device, dtype)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            seconds = time.perf_counter() - start
            failures += problem is not None
            name = str(dtype).removeprefix("torch.")
            print(f"{where}{name:<10}{seconds:7.1f} s  {problem or 'passed'}", flush=True)
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    """Print :func:`render` of :func:`collect`, or run :func:`check`.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        1 where a self-check failed, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m musiclm_fast.info", description=HELP)
    parser.add_argument("--check", action="store_true", help=CHECK_HELP)
    if parser.parse_args(argv).check:
        return int(check() > 0)
    print(render(collect()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
