"""The module of a model in Hugging Face's transformers."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.cases import PeerUnavailableError

VERSION = "5.24.0"  # of transformers, the first one with Inkling 2


def modeling(model: str) -> Any:
    """The module of the classes of a model, such as "inkling".

    Raises:
        PeerUnavailableError: this environment has no such transformers.
    """
    try:
        return importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError:
        raise PeerUnavailableError(
            f"this environment has no transformers {VERSION}: make bench-dropins-env"
        ) from None
