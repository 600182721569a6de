"""Weights of a trained model in fewer bits, for evaluation and generation."""

from __future__ import annotations

import importlib
from typing import Any, Literal, get_args

from torch import nn

from transformer_xl.messages import require
from transformer_xl.model import TransformerXL
from transformer_xl.nn.layer_weights import is_quantised

Weights = Literal["bfloat16", "int8"]
EXTRA = "pip install 'transformer-xl[int8]'"


def convert_weights(model: TransformerXL, weights: Weights) -> None:
    """Convert the weights of a model in place, and with them its activations.

    Args:
        model: the model; afterwards it cannot be trained further.
        weights: "bfloat16": all weights, and so activations, keys and values; "int8": the same,
            then `quantize_layers`.

    Raises:
        ValueError: another value of `weights`, or the errors of `quantize_layers`. The model is
            then unchanged.
    """
    kinds = get_args(Weights)
    require("weights", weights, weights in kinds, " or ".join(kinds))
    if weights == "int8":
        _check_quantisable(model)
    model.bfloat16()
    if weights == "int8":
        quantize_layers(model)


def quantize_layers(model: TransformerXL) -> None:
    """Round the linear layers of the decoder layers to int8, in place.

    Each row of a weight has one scale, about 1/127 of the largest magnitude in the row: weight ≈
    int8 · scale. Activations keep the dtype of the model. The embedding and the softmax keep their
    weights, since their kernels read them directly.

    Raises:
        ValueError: the layers are already quantised, or the package torchao is not installed.
    """
    torchao = _check_quantisable(model)
    # The option that changes settings of inductor for the whole process stays off.
    torchao.quantize_(model.layers, torchao.Int8WeightOnlyConfig(set_inductor_config=False))


def quantized_kind(model: TransformerXL) -> str | None:
    """The class of the quantised weights in the decoder layers; None if there are none."""
    linear = (module for module in model.layers.modules() if isinstance(module, nn.Linear))
    kinds = (type(layer.weight).__name__ for layer in linear if is_quantised(layer.weight))
    return next(kinds, None)


def _check_quantisable(model: TransformerXL) -> Any:
    """The functions of torchao, an optional package. Raises the errors of `quantize_layers`."""
    if (kind := quantized_kind(model)) is not None:
        raise ValueError(f"model: expected layers that are not quantised, got weights of {kind}")
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError:
        raise ValueError(
            f"weights: int8 needs the package torchao, which is not installed: {EXTRA}"
        ) from None
