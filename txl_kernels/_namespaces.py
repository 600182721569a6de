"""The operators in torch: a namespace for each backend with kernels, and one for the self-tests.

`tools/hub` replaces this file in the kernel that it generates for Hugging Face's `kernels`: one
process may load that kernel and import txl_kernels.
"""

from __future__ import annotations

from typing import Any

import torch

NATIVE: Any = torch.ops.txl_native
TRITON: Any = torch.ops.txl_triton
VERIFY: Any = torch.ops.txl_verify
# The namespaces in which the ops are registered.
REGISTERED: tuple[Any, ...] = (NATIVE, TRITON)


def backend_of(namespace: str) -> str:
    """The backend whose operators are in `torch.ops.<namespace>`."""
    return "native" if namespace == NATIVE.name else "triton"
