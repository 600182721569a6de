"""The headline shapes and cases on a GPU, the most important first; needs no package but torch."""

from __future__ import annotations

import functools

import torch

from benchmarks.cases import Case
from benchmarks.cases.adaptive_softmax import SoftmaxCase
from benchmarks.cases.rel_attention import AttentionCase
from benchmarks.inputs import AttentionShape
from benchmarks.softmax_inputs import SoftmaxShape

# Training segments after a memory of their length, with the head sizes of published models.
TRAIN = tuple(
    AttentionShape(name=f"train_d{D}", B=8, H=16, Tq=2048, Tm=2048, D=D, causal=True)
    for D in (64, 128)
)
# Ten minutes of speech in an encoder of NVIDIA's Parakeet family.
PARAKEET = AttentionShape(
    name="parakeet_10min", B=1, H=8, Tq=7500, Tm=0, D=64, causal=False, key_lens=(7500,)
)
# One token after enwik8's evaluation memory, a batch of them.
DECODE = AttentionShape(name="decode", B=32, H=16, Tq=1, Tm=3799, D=64, causal=True)
# Keys and values, and r once per head, in bfloat16.
DECODE_BYTES = 2 * DECODE.H * DECODE.D * (2 * DECODE.B * DECODE.n_keys + DECODE.n_rows)
# Layers of Inkling-Small.
_layer = functools.partial(AttentionShape, B=1, H=32, Hk=8, Tm=0, D=128, d_rel=16, causal=True)
INKLING = tuple(
    _layer(name=f"inkling_{kind}_{Tq // 1024}k", Tq=Tq, rel_extent=extent, window=window)
    for Tq in (8192, 32768, 2048)
    for kind, extent, window in (("global", 1024, None), ("sliding", 512, 511))
)
ATTENTION = (*TRAIN, DECODE, *INKLING[:2], PARAKEET, *INKLING[2:])
# WikiText-103's large model.
SOFTMAX = SoftmaxShape(
    name="wt103_large", N=8192, d=1024, V=267_735, cutoffs=(20_000, 40_000, 200_000), div_val=4
)


N_FIRST = 2 * len(TRAIN) + 3  # cases of training, decoding and the softmax


def device_cases(device: str = "cuda") -> list[Case]:
    """The timed cases, in bfloat16; the most important are first."""
    dtype = torch.bfloat16
    cases: list[Case] = [
        AttentionCase(shape, dtype, direction, device)
        for shape in ATTENTION
        for direction in (("forward",) if shape is DECODE else ("forward", "backward"))
    ]
    n = N_FIRST - 2
    cases[n:n] = [SoftmaxCase(SOFTMAX, dtype, work, device) for work in ("loss", "nll")]
    return cases
