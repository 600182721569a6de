"""The operators of this kernel in torch: all are in the namespace of `_ops.py`.

Each version of a kernel has a namespace of its own, so that one process can load several, beside
an installed txl_kernels. There are no native operators.
"""

from __future__ import annotations

from typing import Any

import torch

from txl_kernels._ops import ops

OLDEST_TORCH = (2, 11)

if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
    _oldest = ".".join(map(str, OLDEST_TORCH))
    raise ImportError(f"txl_kernels needs torch {_oldest} or newer, got torch {torch.__version__}")

NATIVE: Any = None
TRITON: Any = ops
VERIFY: Any = ops
# The namespaces in which the ops are registered.
REGISTERED: tuple[Any, ...] = (TRITON,)


def backend_of(namespace: str) -> str:
    """The backend whose operators are in `torch.ops.<namespace>`."""
    return "triton"
