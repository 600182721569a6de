"""Empty input gives empty results: no tokens, no rows, no frames. A mean over no targets is 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.config import ModelConfig
from transformer_xl.integrations import AdaptiveLogSoftmaxWithLoss, ProjectedAdaptiveLogSoftmax
from transformer_xl.model import TransformerXL
from transformer_xl.nn import (
    AdaptiveEmbedding,
    AdaptiveSoftmax,
    GroupedQueryAttention,
    RelativeBias,
    RelativeMultiHeadAttention,
    SampledSoftmax,
)
from txl_kernels import rel_attention

V, D, CUTOFFS = 20, 8, (5, 12)
SHAPES = [(2, 0), (0, 3), (0, 0)]
backends = pytest.mark.parametrize("backend", ["auto", "reference"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
SOFTMAXES: dict[str, Callable[..., AdaptiveSoftmax]] = {
    "plain": lambda **options: AdaptiveSoftmax(V, D, D, **options),
    "one-table": lambda **options: AdaptiveSoftmax(V, D, D, CUTOFFS, **options),
    "bins": lambda **options: AdaptiveSoftmax(V, D, D, CUTOFFS, 2, **options),
    "sampled": lambda **options: AdaptiveSoftmax(V, D, D, n_sample=4, **options),
}


def assert_gradients_are_zero(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@backends
@shapes
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"clamp_len": 2}, {"window": (3, 1)}], ids=str)
def test_attention(
    backend: str, shape: tuple[int, int], causal: bool, options: dict[str, Any]
) -> None:
    B, T = shape
    module = RelativeMultiHeadAttention(D, 2, 4, causal=causal, backend=backend, **options)
    x = torch.randn(B, T, D)
    for layer_memory in (None, torch.randn(B, 0, D), torch.randn(B, 4, D)):
        module.zero_grad()
        out = module(x, layer_memory)
        assert out.shape == x.shape
        out.sum().backward()
        assert_gradients_are_zero(module)


@backends
@shapes
def test_grouped_query_attention(backend: str, shape: tuple[int, int]) -> None:
    rel = RelativeBias(D, 2, 3, 5)
    module = GroupedQueryAttention(D, 2, 1, 4, rel=rel, backend=backend)
    x = torch.randn(*shape, D)
    out = module(x, key_start=torch.zeros(shape, dtype=torch.int64))
    assert out.shape == x.shape
    out.sum().backward()
    assert_gradients_are_zero(module)


@backends
def test_streams_may_have_blocks_without_frames(backend: str) -> None:
    module = RelativeMultiHeadAttention(D, 2, 4, backend=backend)
    x, cache, outputs = torch.randn(2, 5, D), None, []
    for T in (0, 2, 0, 3, 0):
        n_read = sum(out.shape[1] for out in outputs)
        block = x[:, n_read : n_read + T]
        out, cache = module.stream(block, cache, cache_len=5)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), module(x))
    assert module.stream(x[:0], cache_len=3)[1].k.shape == (0, 2, 3, 4)


@backends
@pytest.mark.parametrize("kind", SOFTMAXES)
@pytest.mark.parametrize("shape", [*SHAPES, (0,)], ids=str)
def test_adaptive_softmax(kind: str, backend: str, shape: tuple[int, ...]) -> None:
    module = SOFTMAXES[kind](backend=backend)
    hidden, target = torch.randn(*shape, D), torch.zeros(shape, dtype=torch.int64)
    for reduction in ("mean", "sum"):
        module.zero_grad()
        loss = module(hidden, target, reduction=reduction)
        assert loss.item() == 0
        loss.backward()
        assert_gradients_are_zero(module)
    assert module(hidden, target, reduction="none").shape == shape
    assert module.log_prob(hidden).shape == (*shape, V)
    assert [part.shape for part in module.topk(hidden, 3)] == [(*shape, 3)] * 2
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0}):
        assert module.sample(hidden, **options).shape == shape


@pytest.mark.parametrize("kind", SOFTMAXES)
def test_a_mean_over_ignored_targets_alone_is_0(kind: str) -> None:
    module = SOFTMAXES[kind]()
    loss = module(torch.randn(2, 3, D), torch.full((2, 3), -100))
    assert loss.item() == 0
    loss.backward()
    assert_gradients_are_zero(module)


@backends
@shapes
def test_adaptive_embedding(backend: str, shape: tuple[int, int]) -> None:
    for sparse in (False, True):
        module = AdaptiveEmbedding(V, D, D, CUTOFFS, 2, sparse=sparse, backend=backend)
        out = module(torch.zeros(shape, dtype=torch.int64))
        assert out.shape == (*shape, D)
        out.sum().backward()
        assert not module.emb_layers[0].weight.grad.to_dense().any()


@backends
def test_replacements_of_other_modules(backend: str) -> None:
    hidden, target = torch.randn(0, D), torch.zeros(0, dtype=torch.int64)
    torchs = AdaptiveLogSoftmaxWithLoss(D, V, list(CUTOFFS), 2.0, backend=backend)
    output, loss = torchs(hidden, target)
    assert output.shape == (0,)
    assert loss.item() == torchs.loss(hidden, target).item() == 0
    assert torchs.log_prob(hidden).shape == (0, V)
    assert torchs.predict(hidden).shape == (0,)
    theirs = ProjectedAdaptiveLogSoftmax(V, D, D, CUTOFFS, 2, backend=backend)
    for T in (0, 1):
        labels = torch.zeros(2, T, dtype=torch.int64)
        assert theirs(torch.randn(2, T, D), labels).shape == (0,)


@pytest.mark.parametrize("training", [True, False])
def test_sampled_softmax(training: bool) -> None:
    module = SampledSoftmax(V, D, 4).train(training)
    assert module(torch.randn(2, 0, D), torch.zeros(2, 0, dtype=torch.int64)).item() == 0


@backends
@shapes
@pytest.mark.parametrize(
    "options",
    [{}, {"cutoffs": CUTOFFS, "div_val": 2}, {"same_length": True}, {"first_memory": "zeros"}],
    ids=str,
)
def test_the_model(backend: str, shape: tuple[int, int], options: dict[str, Any]) -> None:
    sizes = {"n_layer": 2, "d_model": D, "n_head": 2, "d_head": 4, "d_inner": 8, "mem_len": 6}
    model = TransformerXL(ModelConfig(vocab_size=V, **sizes, **options), backend=backend).eval()
    tokens = torch.zeros(shape, dtype=torch.int64)
    output = model(tokens, targets=tokens)
    assert output.hidden.shape == (*shape, D)
    assert output.loss.item() == 0
    output.loss.backward()
    assert_gradients_are_zero(model)
    assert model(tokens, targets=tokens, reduction="none").loss.shape == shape
    assert model.log_probs(output.hidden).shape == (*shape, V)

    segment = torch.randint(0, V, (shape[0], 4))
    expected = model(segment)
    actual = model(segment, output.memory if shape[1] == 0 else None)
    torch.testing.assert_close(actual.hidden, expected.hidden)
    same = model(segment[:, :0], expected.memory).memory
    torch.testing.assert_close(same, expected.memory)
    if model.config.first_memory == "empty":
        documents = torch.zeros(shape, dtype=torch.bool)
        actual = model(tokens, document_start=documents)
        torch.testing.assert_close(actual.memory, output.memory)


@backends
@pytest.mark.parametrize(("Tq", "Tm", "Ts"), [(0, 0, 0), (0, 2, 3), (3, 0, 0)])
@pytest.mark.parametrize("B", [0, 2])
def test_the_op_without_queries_or_keys(B: int, Tq: int, Tm: int, Ts: int, backend: str) -> None:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    inputs = [tensor(B, 2, T, 4) for T in (Tq, Ts, Ts, Tm, Tm)]
    q, k, v, mem_k, mem_v = inputs
    r = tensor(1, 2, max(Tm + Ts, 1), 4)
    out = rel_attention(q, k, v, r, mem_k=mem_k, mem_v=mem_v, causal=True, backend=backend)
    assert out.shape == q.shape
    assert not out.any()
    for gradient in torch.autograd.grad(out.sum(), [*inputs, r]):
        assert not gradient.any()
