"""NVIDIA NeMo's Conformer encoders with random weights, and calls of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.nemo import load

SIZES = {
    "feat_in": 16,
    "n_layers": 2,
    "d_model": 24,
    "n_heads": 3,
    "subsampling": "dw_striding",
    "subsampling_factor": 8,
    "subsampling_conv_channels": 6,
    "conv_kernel_size": 5,
    "ff_expansion_factor": 2,
    "pos_emb_max_len": 64,
}
CAUSAL = {
    "causal_downsampling": True,
    "conv_context_size": "causal",
    "conv_norm_type": "layer_norm",
}
RIGHT_CONTEXT = {"att_context_style": "chunked_limited_with_rc", "conv_context_style": "dcc"}
LOCAL = {"self_attention_model": "rel_pos_local_attn"}


def _chunked(left: int, right: int) -> dict[str, Any]:
    return {"att_context_style": "chunked_limited", "att_context_size": [left, right], **CAUSAL}


def _local(left: int, right: int) -> dict[str, Any]:
    return {**LOCAL, "att_context_size": [left, right]}


# Arguments of ConformerEncoder; `default` is the context that a user sets afterwards.
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full-sdpa": {"use_pytorch_sdpa": True},
    "full-tied_biases": {"untie_biases": False},
    "full-reduction": {"reduction": "pooling", "reduction_position": 0, "reduction_factor": 2},
    "window": {"att_context_size": [4, 2]},
    "window-causal": {"att_context_size": [-1, 0], **CAUSAL},
    "window-sdpa": {"att_context_size": [4, 2], "use_pytorch_sdpa": True},
    "chunked": _chunked(6, 2),
    "chunked-all_left": _chunked(-1, 2),
    "chunked-one_frame": _chunked(4, 0),
    "right_context-full": {**RIGHT_CONTEXT},
    "right_context": {**RIGHT_CONTEXT, "default": [4, 3, 2]},
    "right_context-long": {**RIGHT_CONTEXT, "default": [3, 2, 40]},
    "local": _local(4, 4),
    "local-left": _local(5, 1),
    "local-more_left": _local(5, 3),
    "local-right": _local(1, 4),
    "local-more_right": _local(3, 4),
    "local-causal": {**_local(6, 0), **CAUSAL},
}


def build(name: str, seed: int = 0, **options: Any) -> Any:
    """The encoder of a case in eval mode; all weights are random and large enough to matter."""
    sizes = {**SIZES, **CASES[name], **options}
    default = sizes.pop("default", None)
    torch.manual_seed(seed)
    encoder = load().ConformerEncoder(**sizes).eval()
    if default is not None:
        encoder.set_default_att_context_size(default)
    return with_random_weights(encoder)


def with_random_weights(module: Any) -> Any:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return module


def features(lengths: list[int]) -> dict[str, Tensor]:
    """Eight mel frames for each frame of the encoder."""
    n_mel = torch.tensor(lengths) * 8
    generator = torch.Generator().manual_seed(1)
    signal = torch.randn(len(lengths), 16, int(n_mel.max()), generator=generator)
    return {"audio_signal": signal, "length": n_mel}


def results(encoder: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of all frames, of padding too, and the gradients of all parameters from them."""
    out, lengths = encoder(**inputs)
    encoder.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = {f"d{n}": p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "lengths": lengths.float(), **grads}


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """|actual - expected| / |expected|; of gradients of almost 0 relative to the largest one."""
    assert actual.keys() == expected.keys()
    largest = max(float(x.norm()) for x in expected.values())
    return {
        name: float((actual[name] - x).norm())
        / (float(x.norm()) + (0.0 if name == "out" else 1e-2 * largest))
        for name, x in expected.items()
    }


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], error: float) -> None:
    for name, found in errors(actual, expected).items():
        assert found <= error, f"{name}: {found}"
