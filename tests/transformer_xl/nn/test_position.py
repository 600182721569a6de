"""R by distance: rows, clamping, precision, and no more rows than distances that occur."""

from __future__ import annotations

import pytest
import torch

from transformer_xl.nn import RelativePositions, SinusoidalPositions

D = 6


def at_distance(distance: float) -> torch.Tensor:
    angle = distance / 10000 ** (torch.arange(0, D, 2).double() / D)
    return torch.cat([angle.sin(), angle.cos()])


def positions(n_queries: int, n_keys: int, **options: object) -> RelativePositions:
    module = SinusoidalPositions(D, **options)  # type: ignore[arg-type]
    return module(n_queries, n_keys, dtype=torch.float64, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "n_queries", "n_keys", "left", "right"),
    [
        ({}, 3, 8, 7, 0),
        ({}, 1, 1, 0, 0),
        ({"clamp_len": 4}, 3, 8, 4, 0),
        ({"clamp_len": 9}, 3, 8, 7, 0),
        ({"window": (5, None)}, 3, 8, 5, 0),
        ({"window": (5, None), "clamp_len": 2}, 3, 8, 2, 0),
        ({"causal": False}, 8, 8, 7, 7),
        ({"causal": False}, 3, 8, 7, 2),
        ({"causal": False, "window": (4, 1)}, 5, 8, 4, 1),
        ({"causal": False, "clamp_len": 3}, 5, 8, 3, 3),
    ],
)
def test_rows_are_the_distances_that_occur(
    options: dict[str, object], n_queries: int, n_keys: int, left: int, right: int
) -> None:
    found = positions(n_queries, n_keys, **options)
    expected = torch.stack([at_distance(d) for d in range(left, -right - 1, -1)])
    torch.testing.assert_close(found.embedding, expected, rtol=0, atol=1e-14)
    assert found.clamp == ("clamp_len" in options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("clamp_len", [-1, 1, 3, 20])
@pytest.mark.parametrize("window", [None, (2, 1), (30, None)])
def test_every_visible_pair_finds_the_row_of_its_distance(
    causal: bool, clamp_len: int, window: tuple[int, int] | None
) -> None:
    n_queries, n_keys = 5, 9
    found = positions(n_queries, n_keys, causal=causal, clamp_len=clamp_len, window=window)
    for i in range(n_queries):
        for j in range(n_keys):
            distance = i + n_keys - n_queries - j
            left, right = window or (None, None)
            seen = (left is None or distance <= left) and (right is None or -distance <= right)
            if not seen or (causal and distance < 0):
                continue
            m = j - i + found.offset
            if found.clamp:
                m = min(max(m, 0), len(found.embedding) - 1)
                distance = min(max(distance, -clamp_len), clamp_len)
            torch.testing.assert_close(found.embedding[m], at_distance(distance))


def test_float16_tells_all_long_distances_apart() -> None:
    module = SinusoidalPositions(64)
    R = module(1, 4000, dtype=torch.float16, device=torch.device("cpu")).embedding
    exact = module(1, 4000, dtype=torch.float64, device=torch.device("cpu")).embedding
    assert R.dtype == torch.float16
    torch.testing.assert_close(R.double(), exact, rtol=0, atol=1e-3)
    assert len(R.unique(dim=0)) == 4000


@pytest.mark.parametrize("d_model", [0, 7, -2])
def test_an_odd_width_is_refused(d_model: int) -> None:
    with pytest.raises(ValueError, match="d_model: expected a positive even number"):
        SinusoidalPositions(d_model)
