"""What runs where: ``python -m musiclm_fast.info`` prints versions, the build and every backend."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Any

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

    import musiclm_fast
    import musiclm_fast.ops
    from musiclm_fast import _dispatch, _extension

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
        "version": musiclm_fast.__version__,
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


def main() -> None:
    """Print :func:`render` of :func:`collect`."""
    print(render(collect()))


if __name__ == "__main__":
    main()
