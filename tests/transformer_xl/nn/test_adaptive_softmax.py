"""AdaptiveSoftmax: probabilities, losses in token order, tied shapes, targets out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from transformer_xl.nn import AdaptiveEmbedding, AdaptiveSoftmax
from txl_kernels import resolve

V, CUTOFFS = 20, (5, 12)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "narrow": {"d_embed": 4},
    "one-table": {"cutoffs": CUTOFFS},
    "one-narrow-table": {"cutoffs": CUTOFFS, "d_embed": 4},
    "bins": {"cutoffs": CUTOFFS, "div_val": 2},
    "bins-first-unprojected": {"cutoffs": CUTOFFS, "div_val": 2, "proj_same_dim": False},
}


@pytest.fixture(params=KINDS)
def softmax(request: pytest.FixtureRequest) -> AdaptiveSoftmax:
    torch.manual_seed(0)
    module = AdaptiveSoftmax(V, **{"d_embed": 8, "d_proj": 8, **KINDS[request.param]}).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def hidden_and_target() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 7, 8, dtype=torch.float64, generator=generator)
    target = torch.randint(0, V, (2, 7), generator=generator)
    target[0, 3] = -100
    return hidden, target


def test_probabilities_sum_to_1(softmax: AdaptiveSoftmax) -> None:
    hidden, _ = hidden_and_target()
    log_prob = softmax.log_prob(hidden)
    assert log_prob.shape == (2, 7, V)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(2, 7, dtype=torch.float64))


def test_losses_are_in_token_order_and_reduced_over_scored_targets(
    softmax: AdaptiveSoftmax,
) -> None:
    hidden, target = hidden_and_target()
    scored = target != -100
    picked = softmax.log_prob(hidden).gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    expected = -picked * scored
    nll = softmax(hidden, target, reduction="none")
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(softmax(hidden, target, reduction="sum"), expected.sum())
    torch.testing.assert_close(softmax(hidden, target), expected.sum() / scored.sum())


def test_mean_loss_has_the_gradients_of_the_losses(softmax: AdaptiveSoftmax) -> None:
    hidden, target = hidden_and_target()
    hidden.requires_grad_()
    inputs = [hidden, *softmax.parameters()]
    of_mean = torch.autograd.grad(softmax(hidden, target), inputs)
    by_token = softmax(hidden, target, reduction="none").sum() / (target != -100).sum()
    torch.testing.assert_close(of_mean, torch.autograd.grad(by_token, inputs))


def test_names_of_the_original() -> None:
    bins = AdaptiveSoftmax(V, 8, 8, CUTOFFS, 2)
    names = {f"out_layers.{k}.{part}" for k in range(3) for part in ("weight", "bias")}
    names |= {f"out_projs.{k}" for k in range(3)} | {"cluster_weight", "cluster_bias"}
    assert set(bins.state_dict()) == names
    assert bins.out_projs[2].shape == (8, 2)
    plain = AdaptiveSoftmax(V, 8, 8)
    assert set(plain.state_dict()) == {"out_layers.0.weight", "out_layers.0.bias"}


def test_an_unknown_reduction_is_refused() -> None:
    hidden, target = hidden_and_target()
    with pytest.raises(ValueError, match="reduction: expected mean, sum or none, got 'max'"):
        AdaptiveSoftmax(V, 8, 8).double()(hidden, target, reduction="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [-1, V])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range_is_named(target: int, reduction: Any) -> None:
    with pytest.raises(IndexError, match="target"):
        AdaptiveSoftmax(V, 8, 8)(torch.zeros(1, 8), torch.tensor([target]), reduction=reduction)


def test_draws_and_the_likeliest_have_the_shape_of_what_they_follow(
    softmax: AdaptiveSoftmax,
) -> None:
    hidden, _ = hidden_and_target()
    log_prob = softmax.log_prob(hidden)
    values, tokens = softmax.topk(hidden, 3)
    torch.testing.assert_close((values, tokens), tuple(log_prob.topk(3)))
    assert torch.equal(softmax.sample(hidden, temperature=0), log_prob.argmax(-1))
    drawn = softmax.sample(hidden, top_k=3, generator=torch.Generator().manual_seed(0))
    assert (drawn[..., None] == tokens).any(-1).all()


@pytest.mark.parametrize("first_token", [0, 5, 12], ids=["head", "first-tail", "second-tail"])
def test_all_targets_in_one_cluster_leave_zero_gradients_in_the_others(
    softmax: AdaptiveSoftmax, first_token: int
) -> None:
    """Zero, not absent: what DDP waits for. The clusters' columns of the head do get one."""
    hidden, _ = hidden_and_target()
    target = torch.full((2, 7), first_token)
    target[1] += 3
    softmax(hidden, target).backward()
    assert all(parameter.grad is not None for parameter in softmax.parameters())
    if softmax.cutoffs:
        ends = (0, *softmax.cutoffs, V)
        k = ends.index(first_token)
        table = [layer.weight.grad for layer in softmax.out_layers]
        table = table if len(table) > 1 else list(table[0].split([5, 7, 8]))
        assert {n for n, grad in enumerate(table) if grad.any()} == {0, k}
        assert softmax.cluster_weight.grad.any()


@pytest.mark.parametrize("N", [1, 2, 31, 257])
def test_any_number_of_tokens(softmax: AdaptiveSoftmax, N: int) -> None:
    hidden = torch.randn(N, 8, dtype=torch.float64)
    target = torch.randint(0, V, (N,))
    picked = softmax.log_prob(hidden).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(softmax(hidden, target, reduction="none"), -picked)
    torch.testing.assert_close(softmax(hidden, target), -picked.mean())


@pytest.mark.parametrize(
    ("vocab_size", "cutoffs"), [(10, (2, 4)), (267_735, (20_000, 40_000, 200_000))], ids=str
)
@pytest.mark.parametrize("div_val", [1, 2])
def test_ten_tokens_and_all_of_wikitext(
    vocab_size: int, cutoffs: tuple[int, ...], div_val: int
) -> None:
    torch.manual_seed(0)
    softmax = AdaptiveSoftmax(vocab_size, 8, 8, cutoffs, div_val)
    hidden = torch.randn(5, 8, requires_grad=True)
    target = torch.tensor([0, cutoffs[0] - 1, cutoffs[0], cutoffs[-1], vocab_size - 1])
    log_prob = softmax.log_prob(hidden)
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(5), rtol=1e-4, atol=0)
    due = -log_prob.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(softmax(hidden, target, reduction="none"), due)
    loss = softmax(hidden, target)
    inputs = [hidden, *softmax.parameters()]
    grads = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(due.mean(), inputs))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["one-table", "bins"])
def test_compiles_in_one_graph(kind: str, reduction: Any) -> None:
    torch.compiler.reset()  # recompiling the same function is limited
    softmax = AdaptiveSoftmax(V, 8, 8, **KINDS[kind]).double()
    hidden, target = hidden_and_target()
    compiled = torch.compile(softmax, fullgraph=True, backend="aot_eager")
    results = [f(hidden, target, reduction=reduction).sum() for f in (compiled, softmax)]
    torch.testing.assert_close(*results)
    got, due = (torch.autograd.grad(loss, list(softmax.parameters())) for loss in results)
    torch.testing.assert_close(got, due)


@pytest.mark.parametrize("kind", ["one-table", "bins", "plain"])
@pytest.mark.parametrize("tied_projections", [False, True])
def test_a_tied_tables_gradient_is_the_sum_of_both(kind: str, tied_projections: bool) -> None:
    embedding, apart = (AdaptiveEmbedding(V, 8, 8, **KINDS[kind]).double() for _ in range(2))
    apart.load_state_dict(embedding.state_dict())
    softmax, alone = (AdaptiveSoftmax(V, 8, 8, **KINDS[kind]).double() for _ in range(2))
    names = ("out_projs", "emb_projs") if tied_projections else ()
    for k, layer in enumerate(embedding.emb_layers):
        softmax.out_layers[k].weight = layer.weight
        if names and embedding.emb_projs[k] is not None:
            softmax.out_projs[k] = embedding.emb_projs[k]
    alone.load_state_dict(softmax.state_dict())
    tokens, targets = torch.randint(0, V, (2, 2, 9))
    softmax(embedding(tokens), targets).backward()
    alone(apart(tokens), targets).backward()
    for k, layer in enumerate(embedding.emb_layers):
        both = apart.emb_layers[k].weight.grad + alone.out_layers[k].weight.grad
        torch.testing.assert_close(layer.weight.grad, both)
        if names and embedding.emb_projs[k] is not None:
            both = apart.emb_projs[k].grad + alone.out_projs[k].grad
            torch.testing.assert_close(embedding.emb_projs[k].grad, both)


def test_joining_the_bins_gradients_makes_one_table() -> None:
    """Slices would fill a table each: as many times the memory as there are bins."""
    softmax = AdaptiveSoftmax(V, 8, 8, CUTOFFS)
    hidden, target = hidden_and_target()
    with torch.profiler.profile() as profile:
        softmax(hidden.float(), target).backward()
    assert "aten::slice_backward" not in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tail", [0, 1, 2], ids=["no-tail", "first-tail", "both-tails"])
def test_one_tables_gradient_is_made_in_place(
    tail: int, reduction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' gradients of the tails are rows of it already; none is copied."""
    _, reason = resolve("adaptive_loss", backend="native", device="cpu", dtype=torch.float32)
    if reason is not None:
        pytest.skip(reason)
    softmax = AdaptiveSoftmax(V, 8, 8, CUTOFFS).double()
    hidden, target = hidden_and_target()
    target.clamp_(max=(*CUTOFFS, V)[tail] - 1)
    parameters = list(softmax.parameters())
    due = torch.autograd.grad(softmax(hidden, target, reduction=reduction).sum(), parameters)
    softmax.backend = "reference"  # whose gradients are copied
    expected = torch.autograd.grad(softmax(hidden, target, reduction=reduction).sum(), parameters)
    torch.testing.assert_close(due, expected)
    softmax.backend = "native"
    loss = softmax(hidden, target, reduction=reduction).sum()
    monkeypatch.setattr(torch, "cat", None)
    actual = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, actual, due))
