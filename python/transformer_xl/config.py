"""What a run is: frozen dataclasses for the model, its data, its training and its evaluation, read
from packaged YAML presets and changed field by field. The words are the original's."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal, TypeVar

from transformer_xl.config_fields import check_name, section_from_dict, to_dict
from transformer_xl.messages import shortened

T = TypeVar("T")

# Fields of a model that may change while its weights keep their meaning.
ADJUSTABLE = frozenset(
    {"mem_len", "clamp_len", "same_length", "dropout", "dropatt", "sample_softmax"}
    | {"gradient_checkpointing"}
)
# Fields that determine the first weights alone.
INITIAL = frozenset({"init", "init_range", "init_std", "proj_init_std"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Transformer-XL, exactly. The defaults are the paper's 12-layer character model.

    Args:
        vocab_size: number of tokens V.
        cutoffs: first token of each tail cluster of the adaptive softmax; () is a plain softmax.
        div_val: cluster k is embedded in d_embed // div_val**k dimensions (1: one table for all).
        n_layer, d_model, n_head, d_head, d_inner: sizes; d_inner is the feed-forward width.
        d_embed: width of the first embedding bin; None means d_model.
        mem_len: hidden states kept per layer, in tokens.
        clamp_len: distances above it (in tokens) share one embedding; 0 or less: no clamp.
        same_length: every query sees the same number of keys, `same_length_keys`.
        same_length_keys: "mem_len" (the original PyTorch code) or "mem_len+1" (TensorFlow, NVIDIA),
            the query's own position counted.
        dropout: on embeddings, R, sublayer outputs, inside the feed-forward, before the softmax.
        dropatt: on the attention probabilities.
        tie_weight: softmax weights are the embedding tables (biases stay separate).
        tie_projs: per bin, whether its softmax projection is the embedding's; () ties none.
        sample_softmax: while training, tokens drawn to estimate the softmax's sum from (without
            cutoffs; tokens must be numbered by falling frequency); 0 or less: it is exact.
        proj_same_dim: with div_val > 1, project a bin also where its width equals d_model.
        pre_lnorm: LayerNorm before each sublayer instead of after its residual sum.
        final_lnorm: one more LayerNorm before the softmax.
        layer_norm_epsilon: 1e-5 in the PyTorch code, 1e-12 in the TensorFlow code.
        untie_r: r_w_bias and r_r_bias per layer instead of one pair for all layers.
        attn_type: 0, relative positions as in the paper.
        first_memory: a memory before the first segment is "empty" (PyTorch) or "zeros" that are
            attended to (TensorFlow).
        init, init_range, init_std, proj_init_std: initialisation: "normal" with init_std or
            "uniform" in ±init_range; projections always normal with proj_init_std.
        gradient_checkpointing: recompute each layer in the backward pass instead of storing it.

    Raises:
        ValueError: a size that is not positive, a probability outside [0, 1), cutoffs that do not
            rise inside (0, vocab_size), same_length without memory, an unserved attn_type.
    """

    vocab_size: int
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1
    n_layer: int = 12
    d_model: int = 512
    d_embed: int | None = None
    n_head: int = 8
    d_head: int = 64
    d_inner: int = 2048
    mem_len: int = 512
    clamp_len: int = -1
    same_length: bool = False
    same_length_keys: Literal["mem_len", "mem_len+1"] = "mem_len"
    dropout: float = 0.1
    dropatt: float = 0.0
    tie_weight: bool = True
    tie_projs: tuple[bool, ...] = ()
    proj_same_dim: bool = True
    sample_softmax: int = -1
    pre_lnorm: bool = False
    final_lnorm: bool = False
    layer_norm_epsilon: float = 1e-5
    untie_r: bool = False
    attn_type: int = 0
    first_memory: Literal["empty", "zeros"] = "empty"
    init: Literal["normal", "uniform"] = "normal"
    init_range: float = 0.1
    init_std: float = 0.02
    proj_init_std: float = 0.01
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "div_val", "n_layer", "d_model", "n_head", "d_head", "d_inner"):
            _require(self, name, getattr(self, name) > 0, "a positive integer")
        _require(self, "d_embed", self.d_embed is None or self.d_embed > 0, "None or positive")
        _require(self, "mem_len", self.mem_len >= 0, "0 or more tokens")
        _require(self, "dropout", 0 <= self.dropout < 1, "a probability in [0, 1)")
        _require(self, "dropatt", 0 <= self.dropatt < 1, "a probability in [0, 1)")
        ends = (0, *self.cutoffs, self.vocab_size)
        rising = all(left < right for left, right in itertools.pairwise(ends))
        _require(self, "cutoffs", rising, f"tokens rising inside (0, {self.vocab_size})")
        bins = len(self.cutoffs) + 1
        _require(self, "tie_projs", len(self.tie_projs) in (0, bins), f"() or {bins} bools")
        _require(self, "div_val", self.div_val == 1 or bins > 1, "1 where there are no cutoffs")
        sampled = self.sample_softmax > 0
        _require(self, "sample_softmax", not (sampled and bins > 1), "-1 where there are cutoffs")
        smallest = self.embed_width(bins - 1)
        _require(self, "div_val", smallest > 0, "small enough to leave the last bin a dimension")
        _require(self, "attn_type", self.attn_type == 0, "0 (1, 2 and 3 are not there yet)")
        check_lengths(self.mem_len, self.same_length)

    def embed_width(self, cluster: int) -> int:
        """Width of the embedding of bin `cluster`, `d_embed // div_val**cluster`."""
        width: int = (self.d_embed or self.d_model) // self.div_val**cluster
        return width


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A corpus and how it becomes tokens.

    Args:
        name: enwik8, text8, wt103, lm1b, ptb, char_ptb, wt2, stdlib (the source of this Python's
            standard library) or text (plain files).
        path: folder or file that holds it; None: the folder data/<name> (stdlib needs none).
        tokenizer: "dataset" is the data set's own; else what a token is.
        bpe_size: subwords to learn, for the tokenizer "bpe".
        tokenizer_file: a tokenizer.json to use instead of learning, for the tokenizer "bpe".
        protocol: which reading of a questionable corpus; "dataset" is the data set's first.
        cache_dir: folder of the encoded token files.
    """

    name: str
    path: str | None = None
    tokenizer: Literal["dataset", "byte", "char", "word", "bpe"] = "dataset"
    bpe_size: int = 8192
    tokenizer_file: str | None = None
    protocol: str = "dataset"
    cache_dir: str = "data/cache"

    def __post_init__(self) -> None:
        for name in ("path", "tokenizer_file", "cache_dir"):
            _require(self, name, _is_path(getattr(self, name)), "a path")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """An optimisation run; lengths in tokens, intervals in steps.

    Args:
        batch_size: streams trained side by side, over all processes.
        tgt_len: tokens per segment.
        max_step: optimiser steps.
        lr, beta1, beta2, eps, weight_decay: Adam.
        scheduler, warmup_step, eta_min: the learning rate; `decay_rate`, `patience` and `lr_min`
            belong to "dev_perf", which follows the validation loss.
        clip: largest global norm of the gradient; 0 does not clip.
        batch_chunk: parts a batch is split into, gradients accumulated.
        eval_batch_size, eval_tgt_len, max_eval_steps: validation during training; the last is the
            number of segments scored of each stream, 0 or less: all.
        eval_interval, log_interval, checkpoint_interval: steps between each.
        seed: of weights, dropout and data order.
        autocast: "auto" uses bf16 where the processor gains from it.
        compile: train through torch.compile.
        backend: the implementation that every op of `txl_kernels` must run; "auto" chooses.
    """

    batch_size: int = 22
    tgt_len: int = 512
    max_step: int = 400_000
    lr: float = 2.5e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    scheduler: Literal["cosine", "inv_sqrt", "dev_perf", "constant"] = "cosine"
    warmup_step: int = 0
    eta_min: float = 0.0
    decay_rate: float = 0.5
    patience: int = 0
    lr_min: float = 0.0
    clip: float = 0.25
    batch_chunk: int = 1
    eval_batch_size: int = 10
    eval_tgt_len: int = 128
    max_eval_steps: int = -1
    eval_interval: int = 4000
    log_interval: int = 200
    checkpoint_interval: int = 4000
    seed: int = 1111
    autocast: Literal["off", "bf16", "auto"] = "off"
    compile: bool = False
    backend: Literal["auto", "reference", "native", "triton"] = "auto"

    def __post_init__(self) -> None:
        positive = ("batch_size", "tgt_len", "max_step", "batch_chunk", "eval_batch_size")
        intervals = ("eval_tgt_len", "eval_interval", "log_interval", "checkpoint_interval")
        for name in (*positive, *intervals):
            _require(self, name, getattr(self, name) > 0, "a positive integer")
        for name in ("lr", "weight_decay", "warmup_step", "eta_min", "clip", "patience", "lr_min"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("beta1", "beta2"):
            _require(self, name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        _require(self, "eps", self.eps >= 0, "0 or more")
        _require(self, "decay_rate", 0 < self.decay_rate <= 1, "a number in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """A scoring protocol: lengths in tokens, as ModelConfig has them, the split scored, and how
    many segments of each stream (`max_eval_steps`, 0 or less: all)."""

    batch_size: int = 10
    tgt_len: int = 128
    mem_len: int = 512
    clamp_len: int = -1
    same_length: bool = False
    split: Literal["train", "valid", "test"] = "test"
    max_eval_steps: int = -1

    def __post_init__(self) -> None:
        for name in ("batch_size", "tgt_len"):
            _require(self, name, getattr(self, name) > 0, "a positive integer")
        check_lengths(self.mem_len, self.same_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about a run, one section each."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)


def check_lengths(mem_len: int, same_length: bool) -> None:
    """Raise ValueError for lengths under which a query would see no key at all."""
    if mem_len < 0:
        raise ValueError(f"mem_len: expected 0 or more tokens, got {mem_len}")
    if same_length and mem_len == 0:
        raise ValueError(
            "same_length: expected mem_len > 0 (it counts the keys seen), got 0; turn it off with "
            "same_length=false, or --no-same-length of evaluate"
        )


def preset_names() -> list[str]:
    """Names of the packaged presets, one per published run and the demo."""
    files = (resources.files(__package__) / "configs").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_preset(name: str) -> RunConfig:
    """The packaged preset `name`; an unknown one raises ValueError with the nearest name."""
    import yaml  # only presets need it, the model and its layers do not

    check_name("preset", name, preset_names())
    text = (resources.files(__package__) / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    return from_dict(yaml.safe_load(text))


def override(config: RunConfig, changes: Mapping[str, object]) -> RunConfig:
    """`config` with fields changed by dotted name, `{"train.lr": "1e-3", "model.cutoffs": "9,99"}`.

    Text is read as the field's type. Raises ValueError for an unknown name (with the nearest one)
    or a value of another type. All changes of a section are checked together.
    """
    sections = to_dict(config)
    for dotted, value in changes.items():
        section, dot, name = dotted.partition(".")
        holders = [f"{each}.{section}" for each, fields in sections.items() if section in fields]
        if not dot and holders:
            raise ValueError(
                f"unknown field {dotted!r}: expected SECTION.FIELD, such as {' or '.join(holders)}"
            )
        check_name("section", section, sections)
        check_name(f"field of {section}", name, sections[section])
        sections[section][name] = value
    return from_dict(sections)


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The inverse of `to_dict`; fields that are absent take their defaults."""
    return section_from_dict(RunConfig, values)


def _require(config: object, name: str, holds: bool, expected: str) -> None:
    if not holds:
        value = shortened(getattr(config, name))
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _is_path(value: str | None) -> bool:
    """Whether the system can have a file of this name; None is one by default."""
    try:
        return value is None or b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False
