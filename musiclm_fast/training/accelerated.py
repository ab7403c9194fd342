"""What the trainers use of accelerate, an optional package."""

from musiclm_fast._optional import missing

try:
    from accelerate import Accelerator, PartialState
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import DistributedDataParallelKwargs, gather_object
except ImportError as error:
    raise missing("accelerate", error) from error

__all__ = [
    "Accelerator",
    "DistributedDataParallelKwargs",
    "PartialState",
    "gather_object",
    "get_available_trackers",
]
