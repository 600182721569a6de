"""The distribution that tokens are drawn from, and the random numbers of each row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transformer_xl.sampling import RowGenerators, Sampling

EDGE = 1e-9  # distance to a threshold at which rounding decides whether a token is kept
PROBS = [0.4, 0.3, 0.2, 0.06, 0.04]


def log_probs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows or [PROBS], dtype=torch.float64).log()


def kept(options: Sampling, seen: Tensor | None = None) -> list[int]:
    (probs,) = options.probabilities(options.scores(log_probs(), seen))
    assert probs.sum().item() == pytest.approx(1.0)
    return probs.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Sampling(), [0, 1, 2, 3, 4]),
        (Sampling(temperature=0.0), [0]),
        (Sampling(temperature=1e-300), [0]),
        (Sampling(top_k=2), [0, 1]),
        (Sampling(top_k=99), [0, 1, 2, 3, 4]),
        (Sampling(top_p=0.69), [0, 1]),
        (Sampling(top_p=0.71), [0, 1, 2]),
        (Sampling(top_p=1e-9), [0]),
        (Sampling(top_p=1.0), [0, 1, 2, 3, 4]),
        (Sampling(min_p=0.5), [0, 1, 2]),
        (Sampling(min_p=1.0), [0]),
        (Sampling(banned=(0, 3)), [1, 2, 4]),
        (Sampling(banned=(0,), temperature=0.0), [1]),
        (Sampling(top_k=4, min_p=0.16), [0, 1, 2]),
        (Sampling(temperature=0.5, top_p=0.84), [0, 1]),  # 0.54 and 0.30 of the squares
    ],
)
def test_which_tokens_are_kept(options: Sampling, expected: list[int]) -> None:
    assert kept(options) == expected


def test_tokens_as_probable_as_the_last_are_kept() -> None:
    options = Sampling(top_k=2)
    probs = options.probabilities(log_probs([0.4, 0.2, 0.2, 0.2]))
    assert (probs > 0).all()


def test_the_penalty_makes_seen_tokens_less_probable() -> None:
    options = Sampling(repetition_penalty=2.0)
    seen = torch.tensor([[True, False, False, False, False]])
    scores = options.scores(log_probs(), seen)
    assert scores[0].exp().tolist() == pytest.approx([0.16, *PROBS[1:]])
    with pytest.raises(ValueError, match="seen: expected"):
        options.scores(log_probs())


OPTIONS = st.builds(
    Sampling,
    temperature=st.floats(0.05, 3),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.floats(0.5, 3),
    banned=st.sets(st.integers(1, 5)).map(tuple),
)


@given(OPTIONS, st.lists(st.tuples(st.floats(-50, 0), st.booleans()), min_size=6, max_size=12))
def test_the_order_is_that_of_transformers(
    options: Sampling, tokens: list[tuple[float, bool]]
) -> None:
    """The steps one by one, from the definitions of transformers."""
    values, seen = zip(*tokens, strict=True)
    scores = torch.tensor(values, dtype=torch.float64).log_softmax(0)
    found = options.probabilities(options.scores(scores[None], torch.tensor([seen])))[0]

    expected = [
        s * options.repetition_penalty if flag else s
        for s, flag in zip(scores.tolist(), seen, strict=True)
    ]
    expected = [-math.inf if i in options.banned else s for i, s in enumerate(expected)]
    raw = expected
    expected = [s / options.temperature for s in expected]
    edges = set()  # tokens that rounding may keep or drop
    if options.top_k is not None:
        least = sorted(expected, reverse=True)[: options.top_k][-1]
        edges |= near_ties(raw, raw[expected.index(least)])
        expected = [s if s >= least else -math.inf for s in expected]
    if options.top_p is not None:
        probs, mass = softmax(expected), 0.0
        for rank, i in enumerate(sorted(range(len(probs)), key=lambda i: -probs[i])):
            if math.isclose(mass, options.top_p, rel_tol=0, abs_tol=EDGE):
                edges.add(i)
            if rank > 0 and mass >= options.top_p:
                expected[i] = -math.inf
            else:
                last = i
            mass += probs[i]
        edges |= near_ties(raw, raw[last])
    probs = softmax(expected)
    low = (options.min_p or 0.0) * max(probs)
    edges |= {i for i, q in enumerate(probs) if math.isclose(q, low, rel_tol=EDGE)}
    expected = [s if q >= low else -math.inf for s, q in zip(expected, probs, strict=True)]
    near = torch.tensor(softmax(expected), dtype=torch.float64)
    # By rounding, a token at the edge of a truncation may be kept by one computation alone.
    assert torch.allclose(found, near, atol=1e-9) or differ_at(found, near, edges)


def softmax(scores: list[float]) -> list[float]:
    best = max(scores)
    weights = [math.exp(s - best) for s in scores]
    return [w / math.fsum(weights) for w in weights]


def near_ties(values: list[float], threshold: float) -> set[int]:
    """The values at the threshold, if they are not all equal."""
    near = {i for i, value in enumerate(values) if math.isclose(value, threshold, rel_tol=EDGE)}
    return near if len({values[i] for i in near}) > 1 else set()


def differ_at(found: Tensor, expected: Tensor, edges: set[int]) -> bool:
    """Whether some tokens at an edge, and no others, are kept by one alone."""
    different = {int(i) for i in ((found > 0) != (expected > 0)).nonzero()}
    both = (found > 0) & (expected > 0)
    ours, theirs = (probs[both] / probs[both].sum() for probs in (found, expected))
    return bool(different) and different <= edges and torch.allclose(ours, theirs, atol=1e-9)


def test_draws_have_the_distribution() -> None:
    n = 20_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = Sampling().draw(log_probs().expand(n, -1), uniform)
    shares = drawn.bincount(minlength=5) / n
    assert shares.tolist() == pytest.approx(PROBS, abs=1e-4)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_the_smallest_set_of_a_large_vocabulary(spread: float, p: float) -> None:
    """Whether few or nearly all of the tokens belong to it, and other ones in each row."""
    torch.manual_seed(0)
    scores = (torch.randn(3, 5000, dtype=torch.float64) * spread).log_softmax(1)
    found = Sampling(top_p=p).probabilities(scores) > 0
    for row, kept in zip(scores.exp(), found, strict=True):
        ordered = row.sort(descending=True).values
        sums = ordered.cumsum(0)
        least, most = (int((sums < p + edge).sum()) + 1 for edge in (-EDGE, EDGE))
        assert least <= int(kept.sum()) <= most
        assert row[kept].min() >= row[~kept].max()


def test_draws_of_top_k_have_the_distribution() -> None:
    n = 6000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    probs = log_probs([0.1, 0.3, 0.2, 0.2, 0.05, 0.15]).expand(n, -1)
    options = Sampling(top_k=2)  # two tokens are as probable as the second
    shares = options.draw(probs, uniform).bincount(minlength=6) / n
    expected = options.probabilities(probs[:1])[0]
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert shares.tolist() == pytest.approx([0, 3 / 7, 2 / 7, 2 / 7, 0, 0], abs=1e-3)


@pytest.mark.parametrize("options", [Sampling(top_k=4), Sampling(top_k=4, top_p=0.7)])
def test_the_draw_of_equal_scores_does_not_depend_on_the_other_rows(options: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, 3, (1, 300), generator=generator).float()  # a hundred maxima
    others = torch.randn(2, 300, generator=generator)
    others[1, :200] = 9.0
    for value in torch.linspace(0, 0.99, 40, dtype=torch.float64):
        alone = options.draw(row.log_softmax(1), value[None])
        for other in others:
            batch = torch.stack([other, row[0]]).log_softmax(1)
            assert options.draw(batch, value.expand(2))[1] == alone[0]


def test_the_ends_of_the_interval_draw_kept_tokens() -> None:
    rows = log_probs([0.0, 0.5, 0.0, 0.5, 0.0]).expand(2, -1)
    uniform = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert Sampling().draw(rows, uniform).tolist() == [1, 3]


def test_a_row_draws_the_same_numbers_in_every_batch() -> None:
    alone, together = RowGenerators(7, 1), RowGenerators(7, 3)
    for _ in range(4):
        drawn = together.uniform()
        assert drawn[0] == alone.uniform()[0]
        assert len(set(drawn.tolist())) == 3
    assert RowGenerators(8, 1).uniform() != RowGenerators(7, 1).uniform()
    assert RowGenerators(-1, 1).uniform() == RowGenerators((1 << 64) - 1, 1).uniform()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": math.nan}, "temperature: expected a finite number, got nan"),
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"top_k": 0}, "top_k: expected None or at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p: expected None or a probability in \(0, 1\], got 0.0"),
        ({"min_p": 1.5}, r"min_p: expected None or a probability in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a finite number above 0"),
    ],
)
def test_numbers_outside_their_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


def test_impossible_requests_are_refused() -> None:
    uniform = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"banned: expected tokens in \[0, 5\), got \[5\]"):
        Sampling(banned=(5,)).draw(log_probs(), uniform)
    with pytest.raises(ValueError, match="banned: expected at most 4 tokens, got all"):
        Sampling(banned=(0, 1, 2, 3, 4)).draw(log_probs(), uniform)
    with pytest.raises(ValueError, match="log_probs: expected finite numbers"):
        Sampling().draw(torch.full((1, 3), math.nan), uniform)
    certain = torch.tensor([[0.0, -math.inf, -math.inf]])
    for banned in (Sampling(banned=(0,)), Sampling(banned=(0,), temperature=0.0, top_k=1)):
        with pytest.raises(ValueError, match="banned, repetition_penalty: expected a finite"):
            banned.draw(certain, uniform)
    with pytest.raises(ValueError, match="seed: expected an integer"):
        RowGenerators(1 << 64, 1)
