"""The attention calls that are timed on a GPU, ours and each way that one would go instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.inputs import AttentionInputs, AttentionShape, random_inputs
from benchmarks.peers import eager, sdpa
from txl_kernels import rel_attention

Attend = Callable[[], Tensor]

OURS = "ours"
EAGER, COMPILED, SDPA_BIAS, FLEX = "eager", "compiled", "sdpa+bias", "flex"
FLASH, CUDNN = "flash", "cudnn, all pairs"
PEERS_AT_ONCE, COMPILED_PEERS = (EAGER, SDPA_BIAS), (COMPILED, FLEX)
PEERS = (*PEERS_AT_ONCE, *COMPILED_PEERS)
YARDSTICKS = (FLASH, CUDNN)

# A training segment behind a memory of its length, head sizes of wt103 and of enwik8_large.
TRAIN = tuple(
    AttentionShape(name=f"train_d{D}", B=8, H=16, Tq=2048, Tm=2048, D=D, causal=True)
    for D in (64, 128)
)
# One token behind enwik8's evaluation memory, a batch of them.
DECODE = AttentionShape(name="decode", B=32, H=16, Tq=1, Tm=3799, D=64, causal=True)

USEFUL_FLOP = {"forward": 6, "backward": 16, "forward+backward": 22}
PLAIN_FLOP = {"forward": 4, "backward": 10, "forward+backward": 14}


def inputs_on(
    shape: AttentionShape, device: torch.device, *, requires_grad: bool, seed: int = 0
) -> AttentionInputs:
    """Normal bfloat16 values on `device`."""
    return random_inputs(
        shape, torch.bfloat16, requires_grad=requires_grad, seed=seed, device=device
    )


def bind(name: str, shape: AttentionShape, inputs: AttentionInputs) -> tuple[Attend, list[Tensor]]:
    """A contender as a call without arguments, and the leaves that its backward pass serves.

    What does not depend on the inputs' values (masks, joined keys of the yardsticks) is made
    here, outside the time.
    """
    leaves = list(inputs.leaves())
    if name == OURS:
        call = functools.partial(rel_attention, **inputs._asdict(), causal=True)
        return call, leaves
    if name in YARDSTICKS:
        return _yardstick(name, shape, inputs)
    if name == FLEX:
        return functools.partial(
            _flex(), shape, _block_mask(shape, inputs.q.device), inputs
        ), leaves
    hidden = eager.hidden_keys(shape.Tq, shape.n_keys, None, True, device=inputs.q.device)
    way: Callable[..., Tensor] = {
        EAGER: eager.rel_attention,
        SDPA_BIAS: sdpa.with_position_bias,
        COMPILED: _compiled(),
    }[name]
    return functools.partial(way, inputs, hidden), leaves


def attended_pairs(name: str, shape: AttentionShape) -> int:
    """(query, key) pairs of a contender's work, over rows and heads."""
    if name == CUDNN:
        return shape.B * shape.H * shape.Tq * shape.n_keys
    return shape.attended_pairs


def flop(name: str, shape: AttentionShape, direction: str) -> int:
    """Useful FLOP: 6·D or 4·D a pair forward, 16·D or 10·D backward, with or without positions."""
    per_pair = (PLAIN_FLOP if name in YARDSTICKS else USEFUL_FLOP)[direction]
    return per_pair * shape.D * attended_pairs(name, shape)


def _yardstick(
    name: str, shape: AttentionShape, inputs: AttentionInputs
) -> tuple[Attend, list[Tensor]]:
    """Attention without positions, on keys that need no joining."""
    joined = eager.with_memory(inputs)
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in (inputs.q, *joined)]
    # Aligned bottom right: `is_causal` is aligned top left where Tq and Tk differ.
    mask: Any = causal_lower_right(shape.Tq, shape.n_keys) if name == FLASH else None
    backend = SDPBackend.FLASH_ATTENTION if name == FLASH else SDPBackend.CUDNN_ATTENTION

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            # With such a mask torch would go on to another kernel without a word.
            if name == FLASH and not can_use_flash_attention(
                SDPAParams(*leaves, None, 0, False, False)
            ):
                raise RuntimeError("torch's flash attention does not take this call")
            return scaled_dot_product_attention(*leaves, attn_mask=mask)

    return attend, leaves


def with_captured_scores(
    attention: Callable[..., Any], shape: AttentionShape, block_mask: Any, inputs: AttentionInputs
) -> Tensor:
    """FlexAttention whose score function reads the position scores, materialised before it."""
    keys, values = eager.with_memory(inputs)
    scale, last, last_row = shape.D**-0.5, shape.Tq - 1, shape.n_rows - 1
    position = (inputs.q + inputs.r_r_bias[:, None]) @ inputs.r.mT * scale  # [B, H, Tq, R]

    def add_position(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + position[b, h, i, torch.clamp(j - i + last, max=last_row)]

    out: Tensor = attention(
        inputs.q + inputs.r_w_bias[:, None],
        keys,
        values,
        score_mod=add_position,
        block_mask=block_mask,
        scale=scale,
    )
    return out


@functools.cache
def _flex() -> Callable[..., Tensor]:
    compiled = torch.compile(flex_attention, dynamic=False)
    return functools.partial(with_captured_scores, compiled)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(eager.rel_attention, dynamic=False)


def _block_mask(shape: AttentionShape, device: torch.device) -> Any:
    def sees(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + shape.Tm

    return create_block_mask(sees, None, None, shape.Tq, shape.n_keys, device=str(device))
