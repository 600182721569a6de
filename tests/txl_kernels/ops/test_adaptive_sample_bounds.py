"""Sampling ends: any temperature, any logits, and at most one sort of the vocabulary per row."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from txl_kernels import adaptive_log_prob, adaptive_sample

V, CUTOFFS, D = 60, (10, 25), 6
OPTIONS = [
    {},
    {"temperature": 0},
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_p": 0.9},
    {"top_k": 5, "top_p": 0.9, "temperature": 2.0},
]


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    tails = [(normal(3, D), normal(15, 3), normal(15)), (None, normal(35, D), None)]
    return {
        "head_weight": normal(12, D),
        "head_bias": normal(12),
        "tails": tails,
        "cutoffs": CUTOFFS,
    }


@pytest.fixture
def hidden():
    return torch.randn(64, D, generator=torch.Generator().manual_seed(1))


def converted(weights, dtype):
    tails = [tuple(x if x is None else x.to(dtype) for x in tail) for tail in weights["tails"]]
    head = {name: weights[name].to(dtype) for name in ("head_weight", "head_bias")}
    return {**weights, **head, "tails": tails}


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 9, "top_p": 0.5}])
@pytest.mark.parametrize("temperature", [1e-9, 1e-30, 1e-37, 1e-40, 1e-46, 1e-300, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_tiny_temperature_is_greedy(weights, hidden, dtype, temperature, options):
    weights, hidden = converted(weights, dtype), (100 * hidden).to(dtype)
    greedy = adaptive_log_prob(hidden, **weights).argmax(1)
    drawn = adaptive_sample(hidden, **weights, temperature=temperature, **options)
    assert torch.equal(drawn, greedy)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.999}], ids=str)
@pytest.mark.parametrize("temperature", [1e20, 1e39, 1e300])
def test_a_huge_temperature_draws_evenly_from_what_is_not_forbidden(weights, temperature, options):
    weights["head_bias"][0] = weights["head_bias"][10] = -math.inf  # token 0, first tail
    drawn = adaptive_sample(
        torch.randn(1, D).expand(20_000, D),
        **weights,
        temperature=temperature,
        **options,
        generator=torch.Generator().manual_seed(2),
    ).bincount(minlength=V)
    expected = torch.full((V,), 1 / 44)
    expected[0] = expected[10:25] = 0
    torch.testing.assert_close(drawn / 20_000, expected, rtol=0, atol=0.006)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_row_is_named(weights, hidden, bad, options):
    hidden[37, 2] = bad
    with pytest.raises(ValueError, match=r"adaptive_sample: the logits .* be finite.* in row 37"):
        adaptive_sample(hidden, **weights, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [3, 11], ids=["token", "cluster"])
def test_a_bad_bias_of_the_head_is_an_error(weights, hidden, column, bad, options):
    weights["head_bias"][column] = bad
    with pytest.raises(ValueError, match="adaptive_sample: the logits of every row must be finite"):
        adaptive_sample(hidden, **weights, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_weight_of_a_cluster_that_is_read_is_an_error(weights, hidden, bad, options):
    weights["tails"][0][2][4] = bad
    weights["head_bias"][10] = 50.0  # every row draws this cluster
    with pytest.raises(ValueError, match="adaptive_sample: the logits of every row must be finite"):
        adaptive_sample(hidden, **weights, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_possible_token_is_an_error(weights, hidden, options):
    weights["head_bias"].fill_(-math.inf)
    with pytest.raises(ValueError, match="adaptive_sample: the logits of every row must be finite"):
        adaptive_sample(hidden, **weights, **options)


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_options_that_are_not_finite_are_named(weights, hidden, name, value):
    with pytest.raises(ValueError, match=f"adaptive_sample: {name}"):
        adaptive_sample(hidden, **weights, **{name: value})


def test_equally_probable_tokens_are_kept_together():
    rows, weight = torch.ones(4000, 1), torch.tensor([[2.0], [1.0], [1.0], [1.0], [-5.0]])
    drawn = adaptive_sample(rows, weight, [], cutoffs=(), top_p=0.5).unique()
    assert drawn.tolist() == [0, 1, 2, 3]
    drawn = adaptive_sample(rows, weight, [], cutoffs=(), top_p=0.5, top_k=4).unique()
    assert len(drawn) == 2


class Work(TorchDispatchMode):
    """Counts the elements that are sorted and multiplied, and the largest tensor."""

    def __init__(self):
        super().__init__()
        self.sorted = self.products = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        largest = max((x.numel() for x in tensors if isinstance(x, torch.Tensor)), default=0)
        self.largest = max(self.largest, largest)
        name = function.overloadpacket.__name__
        self.sorted += args[0].numel() if name in ("sort", "topk") else 0
        self.products += largest if name in ("mm", "addmm") else 0
        return result


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.001},
        {"top_p": 0.9, "temperature": 1e-9},
        {"top_p": 0.9, "temperature": 1e9},
        {"top_k": 20_000},
        {"top_k": 20_000, "top_p": 0.5},
        {"temperature": 0.7},
        {},
    ],
    ids=str,
)
def test_a_row_costs_at_most_one_sort_of_a_flat_vocabulary(options):
    V, N = 50_000, 100
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, 4, generator=generator) * 1e-4
    hidden = torch.randn(N, 4, generator=generator)
    with Work() as work:
        tokens = adaptive_sample(hidden, weight, [], cutoffs=(), **options)
    assert ((tokens >= 0) & (tokens < V)).all()
    assert work.sorted <= N * V
    assert work.products <= N * V + V  # logits, and the cut weights
    assert work.largest < N * V
