"""Drawing the next token: penalties, bans, temperature and truncations of the distribution.

Definitions and their order are those of Hugging Face's transformers: repetition penalty, banned
tokens, temperature, top-k, top-p, min-p. Every row draws with a random number of its own.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from transformer_xl.messages import require

SEEDS = range(-(1 << 63), 1 << 64)  # as torch.Generator accepts them
FIRST_TOKENS = 512  # the most probable ones, among which the smallest set is first looked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from the log-probabilities of all tokens.

    Args:
        temperature: divides the log-probabilities; 0 selects the most probable token.
        top_k: keep the k most probable tokens, and those that are as probable as the last of them.
        top_p: keep the smallest set of tokens whose probabilities sum to at least p, in (0, 1].
        min_p: keep the tokens that are at least p times as probable as the most probable one, in
            [0, 1].
        repetition_penalty: multiplies the log-probability of each token that the prompt or the
            text so far has; above 0, 1 changes nothing.
        banned: tokens that are never drawn.

    Raises:
        ValueError: a number outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        temperature, penalty = self.temperature, self.repetition_penalty
        require("temperature", temperature, math.isfinite(temperature), "a finite number")
        require("temperature", temperature, temperature >= 0, "0 or more")
        require("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "None or at least 1")
        p, expected = self.top_p, "None or a probability in (0, 1]"
        require("top_p", p, p is None or 0 < p <= 1, expected)
        p, expected = self.min_p, "None or a probability in [0, 1]"
        require("min_p", p, p is None or 0 <= p <= 1, expected)
        is_number = math.isfinite(penalty) and penalty > 0
        require("repetition_penalty", penalty, is_number, "a finite number above 0")

    def check(self, n_tokens: int) -> None:
        """Raise ValueError for a banned token that is not among `n_tokens`, or if none is left."""
        if not all(0 <= token < n_tokens for token in self.banned):
            raise ValueError(
                f"banned: expected tokens in [0, {n_tokens:,}), got {list(self.banned)}"
            )
        if len(set(self.banned)) == n_tokens:
            raise ValueError(f"banned: expected at most {n_tokens - 1:,} tokens, got all")

    def scores(self, log_probs: Tensor, seen: Tensor | None = None) -> Tensor:
        """The log-probabilities after penalty and bans, before temperature and truncations.

        Args:
            log_probs: [B, V].
            seen: bool [B, V], True for the tokens of a row's prompt and text so far; needed with a
                penalty.

        Raises:
            ValueError: a banned token that is not in the vocabulary, or no token that is left.
        """
        n_tokens = log_probs.shape[1]
        if self.repetition_penalty != 1.0:
            if seen is None:
                raise ValueError("seen: expected the tokens so far, for repetition_penalty")
            log_probs = torch.where(seen, log_probs * self.repetition_penalty, log_probs)
        self.check(n_tokens)
        if self.banned:
            banned = torch.tensor(self.banned, device=log_probs.device)
            log_probs = log_probs.index_fill(1, banned, -math.inf)
        return log_probs

    def probabilities(self, scores: Tensor) -> Tensor:
        """float64 [B, V], from the result of `scores`; zero for tokens that are not kept."""
        weights = self._weights(scores)
        return weights / weights.sum(1, keepdim=True)

    def _weights(self, scores: Tensor) -> Tensor:
        """`probabilities` times a positive factor of each row; the largest weight is 1.

        `draw` needs no more: with a large vocabulary the division by the sum is slow.
        """
        scores = scores.double()
        if self.temperature == 0.0:
            best = scores.argmax(1, keepdim=True)
            return torch.zeros_like(scores).scatter_(1, best, 1.0)
        # Subtracting the maximum first keeps the quotient finite for every temperature.
        scores = scores - scores.amax(1, keepdim=True)
        if self.temperature != 1.0:
            scores = scores / self.temperature
        if self.top_k is not None:
            k = min(self.top_k, scores.shape[1])
            least = scores.topk(k, dim=1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p is not None and self.top_p < 1.0:
            scores = _nucleus(scores, self.top_p)
        if self.min_p is not None:
            probs = scores.softmax(1)
            dropped = probs < self.min_p * probs.amax(1, keepdim=True)
            scores = scores.masked_fill(dropped, -math.inf)
        return scores.exp()  # the largest score is 0

    def draw(self, log_probs: Tensor, uniform: Tensor, seen: Tensor | None = None) -> Tensor:
        """Draw one token for each row: int64 [B].

        Args:
            log_probs: [B, V].
            uniform: float64 [B], one random number in [0, 1) for each row.
            seen: as for `scores`.

        Raises:
            ValueError: log-probabilities with NaN, or without a finite one, also after penalty and
                bans.
        """
        best = log_probs.amax(1)  # NaN if the row has one
        if not bool(best.isfinite().all()):
            raise ValueError("log_probs: expected finite numbers, got NaN or no finite one")
        scores = self.scores(log_probs, seen)
        if scores is not log_probs and not bool(scores.amax(1).isfinite().all()):
            raise ValueError(
                "banned, repetition_penalty: expected a finite log-probability of a token that is "
                "left, got none"
            )
        if self.temperature == 0.0:
            return scores.argmax(1)
        tokens = None
        if self.top_k is not None and self.top_k < scores.shape[1]:
            scores, tokens = _candidates(scores, self.top_k)
        cumulated = self._weights(scores).cumsum(1)
        # The first token whose sum exceeds the number; its own probability is therefore not 0.
        threshold = uniform[:, None].to(cumulated) * cumulated[:, -1:]
        found = torch.searchsorted(cumulated, threshold, right=True)
        return (found if tokens is None else tokens.gather(1, found))[:, 0]


class RowGenerators:
    """A random-number generator for each row: its numbers do not depend on the other rows.

    Args:
        seed: of all rows together; row i uses (seed, i). None draws one from the system.
        n_row: number of rows.
        first_row: number of the first of them, where a batch is a part of all rows.

    Raises:
        ValueError: a seed outside [-2^63, 2^64).
    """

    def __init__(self, seed: int | None, n_row: int, first_row: int = 0) -> None:
        if seed is None:
            seed = new_seed()
        require("seed", seed, seed in SEEDS, "an integer in [-2^63, 2^64)")
        self.generators = [
            torch.Generator().manual_seed(_row_seed(seed, first_row + row)) for row in range(n_row)
        ]

    def uniform(self) -> Tensor:
        """float64 [n_row] in [0, 1), the next number of each row."""
        drawn = [
            torch.rand((), dtype=torch.float64, device="cpu", generator=each)
            for each in self.generators
        ]
        return torch.stack(drawn)


def new_seed() -> int:
    """A seed from the system."""
    return torch.Generator().seed()


def _row_seed(seed: int, row: int) -> int:
    sequence = np.random.SeedSequence(seed % (1 << 64), spawn_key=(row,))
    return int(sequence.generate_state(1, np.uint64)[0])


def _candidates(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The scores and numbers of at least all tokens that `top_k` = k keeps, of each row equally
    many: without the others, everything that follows costs much less.

    They are in the order of their numbers, so equal scores of a row are in the same order whatever
    the other rows are.
    """
    least = scores.topk(k, dim=1).values[:, -1:]
    tokens = scores.topk(int((scores >= least).sum(1).max()), dim=1).indices.sort(1).values
    return scores.gather(1, tokens), tokens


def _nucleus(scores: Tensor, p: float) -> Tensor:
    """The scores, -inf outside the smallest set whose probabilities sum to at least p.

    Of tokens that are equally probable the first ones are in the set.
    """
    probs, k, V = scores.softmax(1), FIRST_TOKENS, scores.shape[1]
    while True:  # few tokens have most of the mass, and sorting all of them is slow
        ordered = probs.topk(min(k, V), dim=1).values
        before = ordered.cumsum(1) - ordered  # mass of the more probable tokens
        if k >= V or bool((before[:, -1] >= p).all()):
            break
        k *= 8
    n_kept = (before < p).sum(1, keepdim=True).clamp(min=1)
    least = ordered.gather(1, n_kept - 1)
    above, equal = probs > least, probs == least
    kept = above | (equal & (equal.cumsum(1) <= n_kept - above.sum(1, keepdim=True)))
    return scores.masked_fill(~kept, -math.inf)
