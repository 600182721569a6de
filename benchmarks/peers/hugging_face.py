"""The module of a model in Hugging Face's transformers."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.cases import PeerUnavailableError

VERSION = "5.24.0"  # of transformers, the first one with Inkling 2
# Arguments of `InklingTextConfig` and `Inkling2TextConfig`, for tests.
TINY_INKLING: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "swa_num_attention_heads": 6,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 6,
    "d_rel": 5,
    "rel_extent": 9,
    "log_scaling_n_floor": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


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
