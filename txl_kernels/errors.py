"""The one exception of txl_kernels that PyTorch and Python do not have."""

from __future__ import annotations


class BackendUnavailableError(RuntimeError):
    """A backend asked for by name is missing, or does not serve this call; the message says why."""
