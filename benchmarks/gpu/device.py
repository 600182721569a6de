"""The one question that every stage asks before its first launch."""

from __future__ import annotations

import torch

from benchmarks.gpu.stages import Unavailable

NO_DEVICE = "no CUDA device"


def require() -> torch.device:
    """The GPU.

    Raises:
        Unavailable: there is none, with "no CUDA device" and why torch sees none.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    built = "is not built for CUDA" if torch.version.cuda is None else "sees none"
    raise Unavailable(f"{NO_DEVICE} (torch {torch.__version__} {built})")
