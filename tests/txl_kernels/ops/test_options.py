"""Integer and float options of the public ops: one check for all of them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from txl_kernels import (
    adaptive_embedding,
    adaptive_log_prob,
    adaptive_loss,
    adaptive_nll,
    adaptive_sample,
    adaptive_topk,
    rel_attention,
    rel_shift,
    verify,
    warmup,
)

INF, NAN = float("inf"), float("nan")
TOO_LARGE = 2**63


class Index:
    """An integer that is no Python integer."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


def attend(**options):
    x = torch.linspace(-1, 1, 48).view(1, 2, 3, 8)
    return rel_attention(x, x, x, x, **options)


def shift(**options):
    return rel_shift(torch.linspace(-1, 1, 12).view(3, 4), **options)


def softmax(op, *, target=None, cutoffs=(4,), **options):
    hidden, weight = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(-1, 1, 20).view(5, 4)
    inputs = [hidden] if target is None else [hidden, torch.tensor(target)]
    return op(*inputs, weight, [(None, weight, None)], cutoffs=cutoffs, **options)


def nll(**options):
    return softmax(adaptive_nll, target=[0, 2, 7], **options)


def loss(**options):
    return softmax(adaptive_loss, target=[0, 2, 7], **options)


def log_prob(**options):
    return softmax(adaptive_log_prob, **options)


def topk(**options):
    return softmax(adaptive_topk, **options)[0]


def sample(**options):
    return softmax(adaptive_sample, generator=torch.Generator().manual_seed(0), **options)


def embed(**options):
    tables = [torch.linspace(-1, 1, 8).view(2, 4), torch.linspace(0, 1, 12).view(3, 4)]
    options = {"cutoffs": (2,), **options}
    return adaptive_embedding(torch.tensor([0, 4]), tables, [None, None], **options)


def warm(**sizes):
    call = {"B": 1, "H": 1, "Tq": 2, "D": 4, "dtype": torch.float32, **sizes}
    warmup([call], device="cpu")
    assert verify([call], device="cpu") == []  # "auto" tests no kernels of a CPU
    return torch.zeros(())


INTEGERS = [  # op, the options with an integer in place, its name in messages
    (attend, lambda n: {"offset": n}, "offset"),
    (attend, lambda n: {"window": (n, None)}, "window's left"),
    (attend, lambda n: {"window": (None, n)}, "window's right"),
    (attend, lambda n: {"chunk": (n, 1)}, "chunk's size"),
    (attend, lambda n: {"chunk": (3, n)}, "chunk's left"),
    (attend, lambda n: {"chunk": (3, 1, n)}, "chunk's phase"),
    (shift, lambda n: {"offset": n}, "offset"),
    (shift, lambda n: {"n_keys": n}, "n_keys"),
    (nll, lambda n: {"ignore_index": n}, "ignore_index"),
    (loss, lambda n: {"ignore_index": n}, "ignore_index"),
    (log_prob, lambda n: {"cutoffs": (n,)}, "every cutoff"),
    (topk, lambda n: {"k": n}, "k"),
    (topk, lambda n: {"k": 2, "cutoffs": (n,)}, "every cutoff"),
    (sample, lambda n: {"top_k": n}, "top_k"),
    (embed, lambda n: {"cutoffs": (n,)}, "every cutoff"),
    (warm, lambda n: {"Tm": n}, "Tm"),
]
IDS = [f"{op.__name__}-{name}" for op, _, name in INTEGERS]
NUMBERS = [
    (attend, "scale"),
    (attend, "softcap"),
    (attend, "dropout_p"),
    (embed, "scale"),
    (sample, "temperature"),
    (sample, "top_p"),
]


@pytest.mark.parametrize(("op", "options", "name"), INTEGERS, ids=IDS)
def test_every_kind_of_integer_is_the_same(op, options, name):
    value = {"every cutoff": 4 if op is not embed else 2}.get(name, 3)
    expected = op(**options(value))
    for same in (np.int64(value), np.int8(value), np.uint16(value), Index(value), np.array(value)):
        assert torch.equal(op(**options(same)), expected)


@pytest.mark.parametrize(("op", "options", "name"), INTEGERS, ids=IDS)
@pytest.mark.parametrize(
    "value",
    [True, np.True_, 1.0, np.float64(1), "1", torch.tensor(1), np.array([1.5, 2])],
    ids=repr,
)
def test_what_is_no_integer_is_a_type_error(op, options, name, value):
    with pytest.raises(TypeError, match=f"{name} must be an integer, got "):
        op(**options(value))


@pytest.mark.parametrize(("op", "options", "name"), INTEGERS, ids=IDS)
@pytest.mark.parametrize("value", [TOO_LARGE, 2**100, np.uint64(TOO_LARGE)], ids=repr)
def test_an_integer_beyond_64_bits_is_named(op, options, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a 64-bit integer, got {int(value)}"):
        op(**options(value))


def test_a_number_too_long_to_print_is_named():
    x = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="offset must be a 64-bit integer, got an integer of"):
        rel_shift(x, offset=10**5000)


@pytest.mark.parametrize("op", [nll, loss])
def test_the_largest_integers_are_no_targets(op):
    expected = op(ignore_index=-100)
    for ignored in (TOO_LARGE - 1, -TOO_LARGE):
        assert torch.equal(op(ignore_index=ignored), expected)


@pytest.mark.parametrize(("op", "name"), NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_every_kind_of_number_is_the_same(op, name):
    expected = op(**{name: 0.25})
    for same in (np.float64(0.25), np.float32(0.25), np.float16(0.25), Fraction(1, 4)):
        torch.manual_seed(0)
        result = op(**{name: same})
        if name != "dropout_p":
            assert torch.equal(result, expected)


@pytest.mark.parametrize(("op", "name"), NUMBERS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize(
    "value", [NAN, INF, -INF, np.float32("nan"), 10**400], ids=lambda x: str(x)[:5]
)
def test_a_number_that_is_not_finite_is_named(op, name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite, got "):
        op(**{name: value})


@pytest.mark.parametrize(("op", "name"), NUMBERS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("value", [True, "1", None, torch.tensor(0.5), 1j], ids=repr)
def test_what_is_no_number_is_a_type_error(op, name, value):
    if value is None and name in ("scale", "top_p") and op is not embed:
        pytest.skip("None stands for the default")
    with pytest.raises(TypeError, match=f"{name} must be a number, got "):
        op(**{name: value})


def test_integers_of_numpy_under_the_compiler():
    torch.compiler.reset()
    compiled = torch.compile(lambda n: shift(offset=n), backend="eager")
    assert torch.equal(compiled(np.int64(1)), shift(offset=1))


def test_a_traced_call_serves_other_lengths():
    def attend_and_shift(x):
        return rel_attention(x, x, x, x, backend="reference"), rel_shift(x, backend="reference")

    traced = torch.jit.trace(attend_and_shift, torch.randn(1, 2, 5, 4))
    longer = torch.randn(1, 2, 8, 4)
    for a, b in zip(traced(longer), attend_and_shift(longer), strict=True):
        torch.testing.assert_close(a, b)
