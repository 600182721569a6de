"""Every benchmark case by name. Shapes are named after real runs; most are read from presets."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
from collections.abc import Iterable

import torch

from benchmarks.cases import Case, dropins
from benchmarks.cases.adaptive_embedding import EmbeddingCase
from benchmarks.cases.adaptive_softmax import SoftmaxCase
from benchmarks.cases.costs import cost_cases
from benchmarks.cases.decode import DecodeCase, DecodeShape, Weights
from benchmarks.cases.encoders import encoder_cases
from benchmarks.cases.few_row_linear import LinearCase
from benchmarks.cases.inkling import inkling_cases
from benchmarks.cases.layer import LayerCase, LayerShape
from benchmarks.cases.model import ModelCase, ModelShape
from benchmarks.cases.parakeet import EncoderCase, all_layers, parakeet_cases
from benchmarks.cases.rel_attention import AttentionCase
from benchmarks.inputs import AttentionShape
from benchmarks.softmax_inputs import SoftmaxShape
from transformer_xl.config import ModelConfig, load_preset

DTYPES = (torch.float32, torch.bfloat16)

# Two minutes of speech in an encoder of NVIDIA's Parakeet family: 8 heads of 64, a frame every
# 80 ms. The batch is one recording, so its key length is the number of frames.
PARAKEET = AttentionShape(
    name="parakeet_2min", B=1, H=8, Tq=1500, Tm=0, D=64, causal=False, key_lens=(1500,)
)
# Layers of Inkling-Small: the bias of a global layer covers 1,024 distances, that of a sliding
# layer its whole window of 512.
INKLING_GLOBAL = AttentionShape(
    name="inkling_small_global",
    B=1,
    H=32,
    Hk=8,
    Tq=2048,
    Tm=0,
    D=128,
    causal=True,
    d_rel=16,
    rel_extent=1024,
)
INKLING_SLIDING = dataclasses.replace(
    INKLING_GLOBAL, name="inkling_small_sliding", rel_extent=512, window=511
)
# One token, or one for each of eight texts, after the memory of a published evaluation.
DECODED = (
    AttentionShape(name="decode_h16_d64_1600", B=1, H=16, Tq=1, Tm=1599, D=64, causal=True),
    AttentionShape(name="decode_h16_d64_1600_b8", B=8, H=16, Tq=1, Tm=1599, D=64, causal=True),
    AttentionShape(name="decode_h8_d128_3800", B=1, H=8, Tq=1, Tm=3799, D=128, causal=True),
)
# A book's chapter in one segment: tensors of Tq · Tk elements do not fit.
LONG = AttentionShape(name="long_16k", B=1, H=8, Tq=16384, Tm=16384, D=64, causal=True)

EVALUATED_TOKENS = 128  # of a segment in the evaluation of `enwik8_large`


def attention_shapes() -> list[AttentionShape]:
    """The shapes that are timed; batches are small, so that two cores need less than a second."""
    return [
        _train_shape("enwik8_base", B=4),
        PARAKEET,
        _train_shape("wt103_base", B=2),
        _eval_shape("enwik8_large", B=1),
    ]


def evaluated_layer(preset: str, *, mem_len: int, clamp_len: int) -> LayerShape:
    """A layer of a published model in its evaluation, with the options that Hugging Face has."""
    run = load_preset(preset)
    config = dataclasses.replace(
        run.model,
        vocab_size=256,
        n_layer=1,
        mem_len=mem_len,
        clamp_len=clamp_len,
        same_length=True,
        untie_r=True,
        first_memory="zeros",
    )
    return LayerShape(name=f"{preset}_layer", config=config, tgt_len=EVALUATED_TOKENS)


def model_shapes() -> list[ModelShape]:
    """The models that are trained and evaluated."""
    preset = load_preset("enwik8_base")
    # A vocabulary of bytes; biases per layer and a first memory of zeros, as Hugging Face has.
    config = dataclasses.replace(
        preset.model, vocab_size=256, n_layer=4, untie_r=True, first_memory="zeros"
    )
    shape = ModelShape(
        name="enwik8_base_4layers",
        config=config,
        batch_size=4,
        tgt_len=preset.train.tgt_len,
        lr=preset.train.lr,
        clip=preset.train.clip,
    )
    return [shape]


def decode_shapes() -> dict[DecodeShape, tuple[Weights, ...]]:
    """The models that write one token after another, each with the dtypes of its weights."""

    def shape(preset: str, batch_size: int, mem_len: int) -> DecodeShape:
        """With the lengths of the published evaluation, or `mem_len` tokens without clamp."""
        run = load_preset(preset)
        lengths = run.evaluate
        is_published = mem_len == lengths.mem_len
        config = dataclasses.replace(
            run.model,
            mem_len=mem_len,
            clamp_len=lengths.clamp_len if is_published else -1,
            same_length=lengths.same_length and is_published,
            untie_r=True,
            first_memory="zeros",
        )
        return DecodeShape(f"{preset}_b{batch_size}_mem{mem_len}", config, batch_size)

    base = [shape("enwik8_base", B, mem_len) for mem_len in (0, 512, 2100) for B in (1, 8)]
    large: tuple[Weights, ...] = ("float32", "bfloat16", "int8")
    return {shape("wt103_large", 1, 1600): large} | dict.fromkeys(base, ("float32",))


def softmax_shapes() -> list[SoftmaxShape]:
    """The adaptive softmaxes of word-level models."""
    return [
        _softmax_shape("wt103_base", N=2048),
        _softmax_shape("wt103_large", N=2048),
        _softmax_shape("lm1b_large", N=512),
    ]


def embedding_shapes() -> list[SoftmaxShape]:
    """The adaptive embeddings of word-level models; tokens have the targets' distribution."""
    return [
        _softmax_shape(preset, N=2048, part="embedding") for preset in ("wt103_base", "wt103_large")
    ]


def linear_cases() -> list[LinearCase]:
    """The product with `qkv_net` of `enwik8_large` for the rows of a decoding step."""
    model = load_preset("enwik8_large").model
    N, K = 3 * model.n_head * model.d_head, model.d_model
    return [
        LinearCase(rows, N, K, dtype, quantised)
        for dtype, quantised in ((torch.float32, False), (torch.bfloat16, True))
        for rows in (1, 8, 16)
    ]


def timed_cases() -> list[Case]:
    """All cases that are timed, in the order of the table."""
    attention = [
        AttentionCase(shape, dtype, direction)
        for shape in attention_shapes()
        for dtype in DTYPES
        for direction in ("forward", "backward", "forward+backward")
    ]
    decoded = [AttentionCase(shape, dtype, "forward") for shape in DECODED for dtype in DTYPES]
    inkling = [
        AttentionCase(shape, torch.float32, direction)
        for shape in (INKLING_GLOBAL, INKLING_SLIDING)
        for direction in ("forward", "forward+backward")
    ]
    models = [
        ModelCase(shape, dtype, work)
        for shape in model_shapes()
        for dtype in DTYPES
        for work in ("train_step", "evaluate")
    ]
    layer = evaluated_layer("enwik8_large", mem_len=3800, clamp_len=1000)
    models += [LayerCase(layer, dtype) for dtype in DTYPES]
    models += [DecodeCase(s, weights) for s, kinds in decode_shapes().items() for weights in kinds]
    softmaxes = [
        SoftmaxCase(shape, dtype, work)
        for shape in softmax_shapes()
        for dtype in DTYPES
        for work in ("loss", "nll")
    ]
    embeddings = [
        EmbeddingCase(shape, dtype, gradients)
        for shape in embedding_shapes()
        for dtype in DTYPES
        for gradients in ("dense", "sparse")
    ]
    own = [*attention, *decoded, *inkling, *cost_cases(), *softmaxes, *embeddings]
    return [*own, *linear_cases(), *models, *dropin_cases()]


def dropin_cases() -> list[Case]:
    """Patched classes of other libraries, which only some environments have."""
    kinds = {"global": INKLING_GLOBAL, "sliding": INKLING_SLIDING}
    return [*parakeet_cases(), *inkling_cases(kinds), *encoder_cases()]


def memory_cases() -> list[Case]:
    """Cases of which only the memory of ours is measured."""
    return [AttentionCase(LONG, torch.float32, "forward+backward")]


def long_cases() -> list[Case]:
    """Cases that run once, ours alone: a run takes minutes."""
    return [EncoderCase(all_layers("20min"))]


def runnable(cases: Iterable[Case]) -> list[Case]:
    """The cases without the drop-ins where their library is absent."""
    has_library = dropins.is_available()
    return [c for c in cases if has_library or not isinstance(c, dropins.DropInCase)]


@functools.cache
def _cases() -> dict[str, Case]:
    known = (*timed_cases(), *memory_cases(), *long_cases())
    return {case.name: case for case in known}


def case(name: str) -> Case:
    """The case `name`; ValueError with the nearest name if there is none."""
    cases = _cases()
    if name not in cases:
        near = difflib.get_close_matches(name, cases, n=1, cutoff=0.0)
        raise ValueError(f"unknown case {name!r}; did you mean {near[0]!r}?")
    return cases[name]


def select(cases: Iterable[Case], patterns: Iterable[str]) -> list[Case]:
    """The cases whose name contains a match of one of the patterns."""
    within = [f"*{pattern}*" for pattern in patterns]
    return [c for c in cases if any(fnmatch.fnmatch(c.name, pattern) for pattern in within)]


def _train_shape(preset: str, *, B: int) -> AttentionShape:
    """A training segment of a published run, after a full memory."""
    run = load_preset(preset)
    return _shape(f"{preset}_train", run.model, B, Tq=run.train.tgt_len, Tm=run.model.mem_len)


def _eval_shape(preset: str, *, B: int) -> AttentionShape:
    """A segment of a published evaluation, after a full memory."""
    run = load_preset(preset)
    lengths = run.evaluate
    return _shape(f"{preset}_eval", run.model, B, Tq=lengths.tgt_len, Tm=lengths.mem_len)


def _softmax_shape(preset: str, *, N: int, part: str = "softmax") -> SoftmaxShape:
    """A published model's adaptive softmax, without a projection of the head, or its embedding."""
    model = load_preset(preset).model
    return SoftmaxShape(
        name=f"{preset}_{part}",
        N=N,
        d=model.embed_width(0),
        V=model.vocab_size,
        cutoffs=model.cutoffs,
        div_val=model.div_val,
    )


def _shape(name: str, model: ModelConfig, B: int, *, Tq: int, Tm: int) -> AttentionShape:
    H, D = model.n_head, model.d_head
    return AttentionShape(name=name, B=B, H=H, Tq=Tq, Tm=Tm, D=D, causal=True)
