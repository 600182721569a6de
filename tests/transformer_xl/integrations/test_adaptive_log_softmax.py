"""torch's module in place: the same numbers from the same state dict, and what torch's lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_xl.integrations import AdaptiveLogSoftmaxWithLoss, from_fairseq

SIZES: list[tuple[int, int, list[int], dict[str, Any]]] = [
    (16, 60, [10, 30], {"div_value": 2.0}),
    (16, 60, [10, 30], {"div_value": 2.0, "head_bias": True}),
    (12, 10, [1, 2, 9], {"div_value": 1.5, "head_bias": True}),
    (8, 700, [40], {}),
]


def pair(
    in_features: int, n_classes: int, cutoffs: list[int], options: dict[str, Any], **ours: Any
) -> tuple[nn.AdaptiveLogSoftmaxWithLoss, AdaptiveLogSoftmaxWithLoss]:
    """torch's module, and ours with its state."""
    torch.manual_seed(0)
    theirs = nn.AdaptiveLogSoftmaxWithLoss(in_features, n_classes, cutoffs, **options).double()
    made = AdaptiveLogSoftmaxWithLoss(in_features, n_classes, cutoffs, **options, **ours).double()
    made.load_state_dict(theirs.state_dict())
    return theirs, made


@pytest.fixture(params=SIZES, ids=str)
def size(request: pytest.FixtureRequest) -> Any:
    return request.param


def inputs(size: Any, N: int = 37) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, size[0], dtype=torch.float64, generator=generator)
    return hidden.requires_grad_(), torch.randint(0, size[1], (N,), generator=generator)


def gradients(loss: Tensor, hidden: Tensor, module: nn.Module) -> tuple[Tensor, ...]:
    """Zeros where torch gives none: of a cluster without targets."""
    leaves = [hidden, *module.parameters()]
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


def test_outputs_and_gradients_are_torchs(size: Any) -> None:
    theirs, made = pair(*size)
    hidden, target = inputs(size)
    outputs = [module(hidden, target) for module in (theirs, made)]
    assert type(outputs[0]) is type(outputs[1])
    torch.testing.assert_close(outputs[1], outputs[0])
    losses = [out.loss + out.output.sin().sum() for out in outputs]
    due = gradients(losses[0], hidden, theirs)
    torch.testing.assert_close(gradients(losses[1], hidden, made), due)


def test_loss_alone_is_the_loss(size: Any) -> None:
    theirs, made = pair(*size)
    hidden, target = inputs(size)
    losses = theirs(hidden, target).loss, made.loss(hidden, target)
    torch.testing.assert_close(losses[1], losses[0])
    due = gradients(losses[0], hidden, theirs)
    torch.testing.assert_close(gradients(losses[1], hidden, made), due)


def test_log_prob_and_predict_are_torchs(size: Any) -> None:
    theirs, made = pair(*size)
    hidden = inputs(size)[0].detach()
    torch.testing.assert_close(made.log_prob(hidden), theirs.log_prob(hidden))
    assert torch.equal(made.predict(hidden), theirs.log_prob(hidden).argmax(1))


def test_one_token_without_a_batch(size: Any) -> None:
    theirs, made = pair(*size)
    hidden, target = (x[0] for x in inputs(size))
    torch.testing.assert_close(made(hidden, target), theirs(hidden, target))
    assert made(hidden, target).output.shape == ()


def test_a_module_is_taken_over_with_its_very_parameters(size: Any) -> None:
    theirs, _ = pair(*size)
    made = AdaptiveLogSoftmaxWithLoss.from_module(theirs.eval(), reduction="sum")
    assert not made.training
    assert all(a is b for a, b in zip(made.parameters(), theirs.parameters(), strict=True))
    hidden, target = inputs(size)
    torch.testing.assert_close(made(hidden, target).loss, theirs(hidden, target).loss * 37)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_targets_and_reductions(reduction: Any) -> None:
    theirs, made = pair(*SIZES[1], ignore_index=59, reduction=reduction)
    hidden, target = inputs(SIZES[1])
    target[::3] = 59
    scored = target != 59
    due = torch.zeros(37, dtype=torch.float64)
    due[scored] = -theirs(hidden[scored], target[scored]).output
    reduced = {"mean": due.sum() / scored.sum(), "sum": due.sum(), "none": due}[reduction]
    out = made(hidden, target)
    torch.testing.assert_close(out.output, -due)
    torch.testing.assert_close(out.loss, reduced)
    torch.testing.assert_close(made.loss(hidden, target), reduced)
    (grad,) = torch.autograd.grad(out.loss.sum(), hidden)
    assert not grad[~scored].any()


def test_a_cluster_without_targets_gets_a_zero_gradient() -> None:
    _, made = pair(*SIZES[0])
    hidden, target = inputs(SIZES[0])
    made(hidden, target.clamp(max=9)).loss.backward()
    for tail in made.tail:
        assert all(p.grad is not None and not p.grad.any() for p in tail.parameters())


def test_compiles_in_one_graph_where_torchs_does_not() -> None:
    theirs, made = (module.float() for module in pair(*SIZES[0]))
    hidden, target = (x.detach() for x in inputs(SIZES[0]))
    hidden = hidden.float()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, target), theirs(hidden, target))
    loss = torch.compile(made.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss(hidden, target), theirs(hidden, target).loss)


def test_works_under_autocast() -> None:
    _, made = pair(*SIZES[0])
    hidden, target = inputs(SIZES[0])
    made.float()
    expected = made(hidden.float(), target).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = made(hidden.float(), target).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("wrong", [-1, 60])
def test_a_target_out_of_range_is_named(wrong: int) -> None:
    _, made = pair(*SIZES[0])
    with pytest.raises(IndexError, match=rf"target must be in \[0, 60\), got {wrong}"):
        made(torch.zeros(1, 16, dtype=torch.float64), torch.tensor([wrong]))


@pytest.mark.parametrize("shapes", [((3, 4, 16), (3, 4)), ((16,), (1,)), ((3, 16), ())])
def test_shapes_that_do_not_fit_are_named(shapes: Any) -> None:
    _, made = pair(*SIZES[0])
    hidden, target = torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected \[N, d\] and \[N\], or \[d\] and \[\], got"):
        made(hidden, target)


def test_an_unknown_reduction_is_named() -> None:
    with pytest.raises(ValueError, match="reduction: expected mean, sum or none, got 'max'"):
        AdaptiveLogSoftmaxWithLoss(4, 9, [3], reduction="max")  # type: ignore[arg-type]


# ---- fairseq, re-stated: no biases; words and clusters of a tied head projected apart

D, CUTOFFS, V = 12, (10, 30), 60


def fairseq_state(kind: str) -> tuple[dict[str, Tensor], Tensor, list[tuple[Tensor, Tensor]]]:
    """A state dict as fairseq names it; the head [c0 + 2, D]; each tail's [d_k, D], [V_k, d_k]."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    widths = {"square": (D, D)}.get(kind, (6, 3))
    tails = [(normal(w, D), normal(n, w)) for w, n in zip(widths, (20, 30), strict=True)]
    state = {"version": torch.tensor([1])}
    words, clusters, narrow = normal(10, D), normal(2, D), normal(10, 5)
    if kind in ("plain", "square"):
        state["head.weight"] = torch.cat([words, clusters])
    elif kind == "tied":
        state |= {"head.word_proj.weight": words, "head.class_proj.weight": clusters}
    else:
        projection = normal(5, D)
        words = narrow @ projection
        state |= {"head.word_proj.0.weight": projection, "head.word_proj.1.weight": narrow}
        state |= {"head.class_proj.weight": clusters}
    for k, (projection, weight) in enumerate(tails):
        stored = projection.t().clone() if kind == "tied" else projection
        state |= {f"tail.{k}.0.weight": stored, f"tail.{k}.2.weight": weight}
    if kind != "plain":
        state["head._float_tensor"] = torch.zeros(1)
    return state, torch.cat([words, clusters]), tails


def fairseq_log_prob(hidden: Tensor, head: Tensor, tails: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What fairseq's get_log_prob computes, in evaluation."""
    first = (hidden @ head.T).log_softmax(1)
    parts = [first[:, : CUTOFFS[0]]]
    for k, (projection, weight) in enumerate(tails):
        own = F.linear(F.linear(hidden, projection), weight).log_softmax(1)
        parts.append(own + first[:, CUTOFFS[0] + k, None])
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", ["plain", "tied", "tied-narrow", "square"])
def test_fairseqs_state_gives_its_probabilities(kind: str) -> None:
    state, head, tails = fairseq_state(kind)
    made = from_fairseq(state, tie_proj=False if kind == "square" else None, ignore_index=1)
    hidden = torch.randn(7, D, dtype=torch.float64)
    torch.testing.assert_close(made.log_prob(hidden), fairseq_log_prob(hidden, head, tails))
    assert made.cutoffs == [*CUTOFFS, V]
    assert made.ignore_index == 1
    state["tail.0.2.weight"].zero_()
    assert all(parameter.any() for parameter in made.parameters())  # copies, not views


def test_fairseqs_state_is_refused_where_it_cannot_be_read() -> None:
    state, *_ = fairseq_state("square")
    with pytest.raises(ValueError, match="tie_proj must be given, as a projection is 12 x 12"):
        from_fairseq(state)
    del state["version"]
    with pytest.raises(ValueError, match=r"expected .*`version`.*, got head\._float_tensor"):
        from_fairseq(state)
