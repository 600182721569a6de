"""What must hold of a Transformer-XL: recurrence, invariances, sizes, names, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_xl.config import ModelConfig, load_preset
from transformer_xl.memory import Memory
from transformer_xl.model import TransformerXL

SMALL = ModelConfig(
    vocab_size=30, n_layer=2, d_model=12, n_head=2, d_head=5, d_inner=16, mem_len=6, init_std=0.3
)
PARAMETERS = {  # total, in layers
    "enwik8_base": (41_055_436, 40_949_760),
    "enwik8_large": (277_231_820, 277_020_672),
    "text8_base": (40_964_635, 40_949_760),
    "text8_large": (277_050_395, 277_020_672),
    "wt103_base": (151_107_538, 41_066_400),
    "wt103_large": (285_170_506, 245_532_672),
    "lm1b_base": (357_812_065, 245_532_672),
    "lm1b_large": (841_295_961, 700_274_688),
}


def build(**options: Any) -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(dataclasses.replace(SMALL, **options)).double().eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 30, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_configurations_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = TransformerXL(load_preset(name).model)
    sizes = [
        sum(parameter.numel() for parameter in module.parameters())
        for module in (model, model.layers)
    ]
    assert tuple(sizes) == PARAMETERS[name]


@pytest.mark.parametrize("lengths", [[1] * 12, [5, 7], [3, 1, 8], [2, 2, 2, 2, 2, 2]])
@pytest.mark.parametrize("keys", ["mem_len", "mem_len+1"])
def test_segment_by_segment_equals_one_long_pass_at_the_same_reach(
    lengths: list[int], keys: str
) -> None:
    model, tokens = build(same_length=True, same_length_keys=keys), draw(2, 12)
    expected = model(tokens, None, tokens, reduction="none")
    memory: Memory | None = None
    hidden, losses = [], []
    for segment in tokens.split(lengths, dim=1):
        output = model(segment, memory, segment, reduction="none")
        memory = output.memory
        hidden.append(output.hidden)
        losses.append(output.loss)
    torch.testing.assert_close(torch.cat(hidden, dim=1), expected.hidden)
    torch.testing.assert_close(torch.cat(losses, dim=1), expected.loss)


def test_a_memory_that_holds_everything_equals_one_long_pass() -> None:
    model, tokens = build(mem_len=50), draw(2, 12)
    memory = model(tokens[:, :7]).memory
    hidden = model(tokens[:, 7:], memory).hidden
    torch.testing.assert_close(hidden, model(tokens).hidden[:, 7:])


def test_memory_receives_no_gradient_but_its_projections_do() -> None:
    model, tokens = build().train(), draw(2, 4)
    memory = model(tokens).memory
    watched = memory._replace(hidden=memory.hidden.clone().requires_grad_())
    output = model(tokens[:, :1], watched, tokens[:, :1])
    assert not output.memory.hidden.requires_grad
    output.loss.backward()
    assert watched.hidden.grad is None
    # With one query and no memory its only key has probability 1, so that k has no gradient.
    k_rows = model.layers[0].dec_attn.qkv_net.weight.grad[10:20]
    assert k_rows.abs().max() > 1e-6
    model.zero_grad()
    model(tokens[:, :1], None, tokens[:, :1]).loss.backward()
    assert model.layers[0].dec_attn.qkv_net.weight.grad[10:20].abs().max() < 1e-12


def test_the_graph_does_not_grow_with_segments() -> None:
    model, tokens = build().train(), draw(2, 4)
    first = model(tokens)
    second = model(tokens, first.memory, tokens)
    gradients = torch.autograd.grad(second.loss, first.hidden, allow_unused=True)
    assert gradients == (None,)


def test_shifting_absolute_positions_changes_nothing() -> None:
    model, tokens = build(same_length=True, n_layer=1), draw(1, 40)
    window = 6
    alone = model(tokens[:, 20 : 20 + window]).hidden[:, -1]
    late = model(tokens[:, : 20 + window]).hidden[:, -1]
    torch.testing.assert_close(alone, late)


def test_permuting_the_batch_permutes_the_result() -> None:
    model, tokens = build(), draw(4, 5)
    order = torch.tensor([2, 0, 3, 1])
    memory = model(tokens).memory.reset(torch.tensor([False, True, False, False]))
    output = model(tokens, memory)
    permuted = Memory(memory.hidden[:, order], memory.start[order])
    torch.testing.assert_close(model(tokens[order], permuted).hidden, output.hidden[order])


@pytest.mark.parametrize("first_memory", ["empty", "zeros"])
def test_a_reset_row_is_a_fresh_row(first_memory: str) -> None:
    model, tokens = build(first_memory=first_memory), draw(3, 8)
    memory = model(tokens).memory.reset(torch.tensor([False, True, False]))
    output, fresh = model(tokens, memory), model(tokens)
    torch.testing.assert_close(output.hidden[1], fresh.hidden[1])
    again = model(tokens, output.memory).hidden
    torch.testing.assert_close(again[1], model(tokens, fresh.memory).hidden[1])
    assert not torch.allclose(again[0], model(tokens, fresh.memory).hidden[0])


def test_lengths_change_at_evaluation_and_come_back() -> None:
    model, tokens = build(), draw(2, 9)
    before = model(tokens, model(tokens).memory).hidden
    model.set_lengths(mem_len=3, clamp_len=2, same_length=True)
    assert (model.mem_len, model.clamp_len, model.same_length) == (3, 2, True)
    assert model(tokens).memory.length == 3
    assert not torch.allclose(model(tokens).hidden, before)
    model.set_lengths(mem_len=6, clamp_len=-1, same_length=False)
    torch.testing.assert_close(model(tokens, model(tokens).memory).hidden, before)


def test_losses_are_means_sums_or_tokens() -> None:
    model, tokens, targets = build(), draw(2, 5), draw(2, 5, seed=2)
    targets[1, 2:] = -100
    nll = model(tokens, None, targets, reduction="none").loss
    assert nll.shape == (2, 5)
    assert nll[1, 2:].eq(0).all()
    torch.testing.assert_close(model(tokens, None, targets, reduction="sum").loss, nll.sum())
    torch.testing.assert_close(model(tokens, None, targets).loss, nll.sum() / 7)
    assert model(tokens).loss is None


def test_probabilities_sum_to_1_with_clusters() -> None:
    model = build(cutoffs=(10, 20), div_val=2)
    probs = model.log_probs(model(draw(2, 5)).hidden).exp()
    assert probs.shape == (2, 5, 30)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 5, dtype=probs.dtype))


def test_dropout_stands_where_the_original_has_it() -> None:
    model, shapes = build(dropout=0.3).train(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.3
            module.register_forward_hook(lambda _m, args, _o: shapes.append(tuple(args[0].shape)))
    model(draw(2, 5), model.init_memory(2))
    hidden, R, inner = (2, 5, 12), (5, 12), (2, 5, 16)
    assert shapes == [hidden, R, *[hidden, inner, hidden] * 2, hidden]


def test_tied_tensors_are_one() -> None:
    model = build(cutoffs=(10, 20), div_val=2, tie_projs=(False, True, True))
    for k in range(3):
        assert model.crit.out_layers[k].weight is model.word_emb.emb_layers[k].weight
        tied = model.crit.out_projs[k] is model.word_emb.emb_projs[k]
        assert tied == (k > 0)
    untied = build(tie_weight=False)
    assert untied.crit.out_layers[0].weight is not untied.word_emb.emb_layers[0].weight


def test_state_dict_has_the_names_of_the_original() -> None:
    names = set(build().state_dict())
    layer = {"qkv_net.weight", "r_net.weight", "o_net.weight"}
    assert {f"layers.1.dec_attn.{name}" for name in layer} <= names
    assert {"layers.0.pos_ff.CoreNet.0.weight", "layers.0.pos_ff.CoreNet.3.bias"} <= names
    assert {"r_w_bias", "r_r_bias", "word_emb.emb_layers.0.weight"} <= names
    assert {"crit.out_layers.0.weight", "crit.out_layers.0.bias"} <= names
    per_layer = set(build(untie_r=True).state_dict())
    assert "layers.1.dec_attn.r_w_bias" in per_layer
    assert "r_w_bias" not in per_layer


@pytest.mark.parametrize(
    ("tokens", "targets", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), None, ValueError, r"tokens: expected \[B, T\]"),
        (torch.zeros(2, 3), None, TypeError, "tokens: expected int64, got torch.float32"),
        (draw(2, 3), draw(2, 4), ValueError, r"targets: expected \[2, 3\], got \[2, 4\]"),
        (draw(2, 3), torch.zeros(2, 3), TypeError, "targets: expected int64"),
        (torch.tensor([[0, 30]]), None, IndexError, r"tokens.*\b30\b"),
        (torch.tensor([[-1, 3]]), None, IndexError, "tokens"),
        (draw(1, 2), torch.tensor([[3, 30]]), IndexError, r"target.*\b30\b"),
        (draw(1, 2), torch.tensor([[3, -1]]), IndexError, "target"),
    ],
)
def test_bad_input_is_named(
    tokens: Tensor, targets: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()(tokens, None, targets)


@pytest.mark.parametrize(
    "options", [{"n_layer": 3}, {"d_model": 16}], ids=["other-depth", "other-width"]
)
def test_the_memory_of_another_model_is_refused(options: dict[str, Any]) -> None:
    foreign = build(**options)(draw(2, 4)).memory
    with pytest.raises(ValueError, match=r"memory: expected hidden \[2, 2, 4, 12\].*got \["):
        build()(draw(2, 4), foreign)


def test_the_memory_of_another_batch_dtype_or_device_is_refused() -> None:
    model = build()
    memory = model(draw(2, 4)).memory
    with pytest.raises(ValueError, match=r"memory: expected hidden \[2, 3, 4, 12\]"):
        model(draw(3, 4), memory)
    with pytest.raises(TypeError, match=r"memory: expected torch.float64.*got torch.float32"):
        model(draw(2, 4), memory._replace(hidden=memory.hidden.float()))
    with pytest.raises(TypeError, match=r"memory: expected .* on cpu .*got .* on meta"):
        model(draw(2, 4), memory._replace(hidden=memory.hidden.to("meta")))


def test_same_length_without_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="same_length: expected mem_len > 0"):
        build(same_length=True, mem_len=0)
    model = build(same_length=True)
    with pytest.raises(ValueError, match="same_length: expected mem_len > 0"):
        model.set_lengths(mem_len=0)
    assert model.mem_len == 6
