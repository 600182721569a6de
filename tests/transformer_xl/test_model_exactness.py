"""The model against the original's semantics of `attn_type` 0, written in its way: time first,
concatenated memory, unused queries of the memory, the shift by padding and viewing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from transformer_xl.config import ModelConfig
from transformer_xl.memory import Memory
from transformer_xl.model import TransformerXL

State = dict[str, Tensor]
SMALL = ModelConfig(
    vocab_size=40, n_layer=3, d_model=12, n_head=2, d_head=5, d_inner=16, mem_len=7, init_std=0.3
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout-in-evaluation": {"dropout": 0.5, "dropatt": 0.5},
    "one-table-with-clusters": {"cutoffs": (10, 25)},
    "narrow-table": {"d_embed": 6},
    "narrow-table-with-clusters": {
        "d_embed": 6,
        "cutoffs": (10, 25),
        "tie_projs": (False, True, True),
    },
    "bins": {"cutoffs": (10, 25), "div_val": 2, "tie_projs": (False, True, True)},
    "bins-untied": {"cutoffs": (10, 25), "div_val": 2, "tie_weight": False},
    "bins-first-unprojected": {"cutoffs": (10, 25), "div_val": 2, "proj_same_dim": False},
    "pre-lnorm": {"pre_lnorm": True},
    "pre-lnorm-final": {"pre_lnorm": True, "final_lnorm": True, "layer_norm_epsilon": 1e-12},
    "untied-biases": {"untie_r": True},
    "zero-memory": {"first_memory": "zeros"},
    "zero-memory-same-length": {
        "first_memory": "zeros",
        "same_length": True,
        "same_length_keys": "mem_len+1",
    },
    "clamp": {"clamp_len": 4},
    "same-length": {"same_length": True},
    "same-length-plus-one": {"same_length": True, "same_length_keys": "mem_len+1", "clamp_len": 3},
    "no-memory": {"mem_len": 0},
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_losses_and_memory_are_the_originals(name: str, backend: str) -> None:
    check_against_original(dataclasses.replace(SMALL, **ARCHITECTURES[name]), backend, [5, 4, 8])


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    mem_len=st.integers(1, 12),
    clamp_len=st.integers(-1, 14),
    same_length=st.booleans(),
    same_length_keys=st.sampled_from(["mem_len", "mem_len+1"]),
    first_memory=st.sampled_from(["empty", "zeros"]),
)
def test_all_lengths_give_the_originals_numbers(lengths: list[int], **options: Any) -> None:
    check_against_original(dataclasses.replace(SMALL, n_layer=2, **options), "reference", lengths)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_the_originals(name: str, backend: str) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, **ARCHITECTURES[name])
    model = TransformerXL(config, backend=backend).double().eval()
    first, tokens, targets = torch.randint(0, config.vocab_size, (3, 2, 5)).unbind()
    memory = model(first).memory
    loss = model(tokens, memory, targets).loss

    aliases = model.state_dict(keep_vars=True)  # a tied tensor under each of its names
    state = {key: value.detach().clone().requires_grad_() for key, value in aliases.items()}
    layer_memories = list(memory.hidden.transpose(1, 2).unbind())
    hidden, _ = original_segment(state, config, tokens, layer_memories)
    log_probs = original_log_probs(state, config, hidden)
    nll = -log_probs.gather(-1, targets[..., None]).mean()
    found = torch.autograd.grad(nll, list(state.values()), materialize_grads=True)

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        names = zip(aliases.values(), found, strict=True)
        close(gradient, torch.stack([g for alias, g in names if alias is parameter]).sum(0))


def test_other_lengths_than_trained_give_the_originals_numbers() -> None:
    model = TransformerXL(SMALL).double().eval()
    model.set_lengths(mem_len=11, clamp_len=3, same_length=True)
    evaluated = dataclasses.replace(SMALL, mem_len=11, clamp_len=3, same_length=True)
    check_model(model, evaluated, [6, 6, 2])


def check_against_original(config: ModelConfig, backend: str, lengths: list[int]) -> None:
    torch.manual_seed(0)
    check_model(TransformerXL(config, backend=backend).double().eval(), config, lengths)


def check_model(model: TransformerXL, config: ModelConfig, lengths: list[int]) -> None:
    """Segments of `lengths` tokens one after the other, each compared."""
    state = model.state_dict()
    original_memories = original_first_memory(config, batch_size=2)
    memory: Memory | None = None
    for length in lengths:
        tokens, targets = torch.randint(0, config.vocab_size, (2, 2, length)).unbind()
        output = model(tokens, memory, targets, reduction="none")
        hidden, original_memories = original_segment(state, config, tokens, original_memories)
        log_probs = original_log_probs(state, config, hidden)
        nll = -log_probs.gather(-1, targets[..., None]).squeeze(-1)

        close(output.hidden, hidden)
        close(output.loss, nll)
        close(model.log_probs(output.hidden), log_probs)
        close(output.memory.hidden, torch.stack(original_memories).transpose(1, 2))
        memory = output.memory


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def original_first_memory(config: ModelConfig, batch_size: int) -> list[Tensor]:
    length = config.mem_len if config.first_memory == "zeros" else 0
    shape = (length, batch_size, config.d_model)
    return [torch.zeros(shape, dtype=torch.float64) for _ in range(config.n_layer)]


def original_segment(
    state: State, config: ModelConfig, tokens: Tensor, layer_memories: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states [B, T, d_model] and the next memory, per layer [M, B, d_model]."""
    x = original_embedding(state, config, tokens.t())  # [T, B, d_model]
    T, M = len(x), len(layer_memories[0])
    ones = torch.ones(T, M + T)
    masked = ones.triu(1 + M)
    if config.same_length:
        window = config.mem_len + (config.same_length_keys == "mem_len+1")
        too_many = M + T - window
        masked += ones.tril(-(T - too_many if too_many > 0 else T))

    position = torch.arange(M + T - 1, -1, -1.0, dtype=torch.float64)
    if config.clamp_len > 0:
        position.clamp_(max=config.clamp_len)
    frequency = 10000 ** -(torch.arange(0, config.d_model, 2).double() / config.d_model)
    angle = torch.outer(position, frequency)
    R = torch.cat([angle.sin(), angle.cos()], dim=1)  # [M + T, d_model]

    new_memories = []
    for number, layer_memory in enumerate(layer_memories):
        kept = torch.cat([layer_memory, x])
        new_memories.append(kept[max(0, M + T - config.mem_len) :])
        layer = {
            key.removeprefix(f"layers.{number}."): value
            for key, value in state.items()
            if not key.startswith("layers.") or key.startswith(f"layers.{number}.")
        }
        x = original_layer(layer, config, x, layer_memory, R, masked.bool())
    if config.final_lnorm:
        x = norm(state, "final_layer_norm", config, x)
    return x.transpose(0, 1), new_memories


def original_layer(
    state: State, config: ModelConfig, w: Tensor, layer_memory: Tensor, R: Tensor, masked: Tensor
) -> Tensor:
    T, B, _ = w.shape
    heads = (config.n_head, config.d_head)
    cat = torch.cat([layer_memory, w])
    if config.pre_lnorm:
        cat = norm(state, "attn_layer_norm", config, cat)
    q, k, v = (cat @ state["dec_attn.qkv_net.weight"].t()).chunk(3, dim=-1)
    q, k, v = q[-T:].view(T, B, *heads), k.view(-1, B, *heads), v.view(-1, B, *heads)
    r = (R @ state["dec_attn.r_net.weight"].t()).view(-1, *heads)
    where = "dec_attn." if config.untie_r else ""
    AC = torch.einsum("ibnd,jbnd->ijbn", q + state[f"{where}r_w_bias"], k)
    BD = torch.einsum("ibnd,jnd->ijbn", q + state[f"{where}r_r_bias"], r)
    scores = (AC + pad_and_view_shift(BD)) / config.d_head**0.5
    probs = scores.masked_fill(masked[:, :, None, None], -torch.inf).softmax(dim=1)
    attended = torch.einsum("ijbn,jbnd->ibnd", probs, v).flatten(2)
    x = w + attended @ state["dec_attn.o_net.weight"].t()
    if config.pre_lnorm:
        return x + feed_forward(state, norm(state, "ff_layer_norm", config, x))
    x = norm(state, "attn_layer_norm", config, x)
    return norm(state, "ff_layer_norm", config, x + feed_forward(state, x))


def pad_and_view_shift(x: Tensor) -> Tensor:
    """Pads x [T, K, …] with a first column of zeros, views it as [K + 1, T] and drops row 0."""
    T, K = x.shape[:2]
    padded = torch.cat([x.new_zeros(T, 1, *x.shape[2:]), x], dim=1)
    return padded.view(K + 1, T, *x.shape[2:])[1:].reshape(x.shape)


def feed_forward(state: State, x: Tensor) -> Tensor:
    inner = F.linear(x, state["pos_ff.CoreNet.0.weight"], state["pos_ff.CoreNet.0.bias"]).relu()
    return F.linear(inner, state["pos_ff.CoreNet.3.weight"], state["pos_ff.CoreNet.3.bias"])


def norm(state: State, name: str, config: ModelConfig, x: Tensor) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    standard = (x - mean) / (variance + config.layer_norm_epsilon).sqrt()
    return standard * state[f"{name}.weight"] + state[f"{name}.bias"]


def original_embedding(state: State, config: ModelConfig, tokens: Tensor) -> Tensor:
    rows = []
    for token in tokens.flatten().tolist():
        k = sum(token >= cutoff for cutoff in config.cutoffs) if config.div_val > 1 else 0
        row = state[f"word_emb.emb_layers.{k}.weight"][token - ((0, *config.cutoffs)[k])]
        if f"word_emb.emb_projs.{k}" in state:
            row = state[f"word_emb.emb_projs.{k}"] @ row
        rows.append(row * config.d_model**0.5)
    return torch.stack(rows).view(*tokens.shape, -1)


def original_log_probs(state: State, config: ModelConfig, hidden: Tensor) -> Tensor:
    """Log-probabilities of all tokens, cluster columns in natural order."""
    ends = (0, *config.cutoffs, config.vocab_size)
    bins = []
    for k in range(len(ends) - 1):
        if config.div_val > 1:
            weight, bias = (state[f"crit.out_layers.{k}.{name}"] for name in ("weight", "bias"))
        else:
            span = slice(ends[k], ends[k + 1])
            weight, bias = (state[f"crit.out_layers.0.{name}"][span] for name in ("weight", "bias"))
        if k == 0 and config.cutoffs:
            weight = torch.cat([weight, state["crit.cluster_weight"]])
            bias = torch.cat([bias, state["crit.cluster_bias"]])
        projected = hidden
        if f"crit.out_projs.{k}" in state:
            projected = hidden @ state[f"crit.out_projs.{k}"]
        bins.append(F.linear(projected, weight, bias).log_softmax(dim=-1))
    first = ends[1]
    tails = [bins[0][..., [first + k]] + tail for k, tail in enumerate(bins[1:])]
    return torch.cat([bins[0][..., :first], *tails], dim=-1)
