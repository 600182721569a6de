"""Philox4x32-10 against the published vectors, and the dropout mask against its definition."""

from __future__ import annotations

import pytest
import torch

from txl_kernels.backends.reference.philox import philox4x32
from txl_kernels.testing import dropout_keep

# Random123 1.14, examples/kat_vectors: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def _words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "due"), KNOWN)
def test_known_answers(counter, key, due):
    assert philox4x32(_words(counter), _words(key)) == _words(due)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_mask_is_the_contract_word_by_word(seed):
    B, H, Tq, Tk, p = 2, 3, 4, 7, 0.4
    keep = dropout_keep(torch.tensor(seed), p, (B, H, Tq, Tk))
    key = _as_words(seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    for b, h, i, j in [(0, 0, 0, 0), (0, 0, 0, 6), (1, 2, 3, 5), (1, 0, 2, 4), (0, 2, 1, 3)]:
        drawn = philox4x32(_as_words(j // 4, i, b * H + h, 0), key)[j % 4]
        assert bool(keep[b, h, i, j]) == (int(drawn) >= int(p * 2**32))


def _as_words(*words):
    return tuple(torch.tensor(word) for word in words)


def test_keeps_the_right_share():
    kept = dropout_keep(torch.tensor(3), 0.3, (2, 4, 100, 125)).double().mean()
    assert abs(kept - 0.7) < 0.006  # four standard deviations of 100,000 draws


def test_p_0_keeps_all():
    assert dropout_keep(torch.tensor(3), 0.0, (1, 1, 50, 50)).all()
