"""Writing text: draw the next token of each row, feed it back, carry the memory along."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from transformer_xl.messages import require
from transformer_xl.model import TransformerXL
from transformer_xl.reader import Reader
from transformer_xl.sampling import RowGenerators, Sampling

FINISHED = -1  # the token of a row that has ended
PLAIN = Sampling()


class Drawn(NamedTuple):
    """One step: `tokens` int64 [B], and their `log_probs` [B] in nats under the model, before
    penalties, bans, temperature and truncations. A finished row has -1 and NaN."""

    tokens: Tensor
    log_probs: Tensor


Finished = Callable[[Tensor], Tensor]


@overload
def generate(
    model: TransformerXL,
    prompts: Tensor | Sequence[Tensor],
    n_tokens: int,
    *,
    lengths: Sequence[int] | None = ...,
    n_samples: int = ...,
    sampling: Sampling = ...,
    seed: int | None = ...,
    stop_tokens: Collection[int] = ...,
    finished: Finished | None = ...,
    segment_len: int = ...,
    cached: bool = ...,
    cache_dtype: torch.dtype | None = ...,
    log_probs: Literal[False] = ...,
) -> Iterator[Tensor]: ...


@overload
def generate(
    model: TransformerXL,
    prompts: Tensor | Sequence[Tensor],
    n_tokens: int,
    *,
    lengths: Sequence[int] | None = ...,
    n_samples: int = ...,
    sampling: Sampling = ...,
    seed: int | None = ...,
    stop_tokens: Collection[int] = ...,
    finished: Finished | None = ...,
    segment_len: int = ...,
    cached: bool = ...,
    cache_dtype: torch.dtype | None = ...,
    log_probs: Literal[True],
) -> Iterator[Drawn]: ...


def generate(
    model: TransformerXL,
    prompts: Tensor | Sequence[Tensor],
    n_tokens: int,
    *,
    lengths: Sequence[int] | None = None,
    n_samples: int = 1,
    sampling: Sampling = PLAIN,
    seed: int | None = None,
    stop_tokens: Collection[int] = (),
    finished: Finished | None = None,
    segment_len: int = 512,
    cached: bool = True,
    cache_dtype: torch.dtype | None = None,
    log_probs: bool = False,
) -> Iterator[Tensor] | Iterator[Drawn]:
    """Continue each prompt by `n_tokens`, each yielded as soon as it is drawn.

    A prompt is read once, in segments, then every token alone with the memory of the tokens before
    it; under `same_length` that gives the probabilities of one long pass. Row b of the result is
    sample b % n_samples of prompt b // n_samples. It draws from a generator of its own, seeded from
    (seed, b), so its text does not depend on the other rows, up to rounding. The weights and the
    lengths of the model must stay as they are until the last token.

    Args:
        model: the language model.
        prompts: int64 [P, T], or P tensors int64 [T_p], T_p ≥ 1, on the model's device.
        n_tokens: the most tokens to draw for each row, 0 or more.
        lengths: how many tokens of each row of a tensor [P, T] belong to its prompt, from 1 to T;
            the tokens after them are ignored. None: all.
        n_samples: texts for each prompt.
        sampling: how a token is drawn. The repetition penalty counts the tokens of the prompt.
        seed: the same seed writes the same text; None: one from the system.
        stop_tokens: a row is finished after one of these.
        finished: called with the tokens [B] of each step; returns bool [B], True for the rows that
            are finished after them.
        segment_len: tokens of the prompts read at a time.
        cached, cache_dtype: keep keys and values, and their dtype (see `Reader`).
        log_probs: yield the log-probabilities, too.

    Yields:
        int64 [B], B = P · n_samples, the next token of each row, -1 in a finished row; with
        `log_probs` a `Drawn`. Ends early when all rows are finished.

    Raises:
        ValueError: an empty prompt, or a number outside its range; before anything is drawn.
        ValueError: log-probabilities that are not finite, or the weights or the lengths of the
            model changed; from the iterator.
    """
    texts = _checked_prompts(prompts, lengths)
    require("n_tokens", n_tokens, n_tokens >= 0, "0 or more")
    require("n_samples", n_samples, n_samples >= 1, "1 or more")
    require("segment_len", segment_len, segment_len >= 1, "at least 1 token")
    sampling.check(model.config.vocab_size)
    random = RowGenerators(seed, len(texts) * n_samples)

    def drawn() -> Iterator[Drawn]:
        if n_tokens == 0:
            return
        reader = Reader(
            model, len(texts), segment_len=segment_len, cached=cached, cache_dtype=cache_dtype
        )
        hidden = read_prompts(reader, texts, n_samples)
        seen = [text for text in texts for _ in range(n_samples)]
        yield from draw(reader, hidden, n_tokens, sampling, random, seen, stop_tokens, finished)

    return drawn() if log_probs else (step.tokens for step in drawn())


def read_prompts(reader: Reader, texts: Sequence[Tensor], n_samples: int) -> Tensor:
    """Read each prompt once, then keep `n_samples` rows of it: hidden states [B, d_model]."""
    hidden = reader.read(texts)
    if n_samples == 1:
        return hidden
    rows = torch.arange(len(texts), device=hidden.device).repeat_interleave(n_samples)
    reader.select(rows)
    return hidden[rows]


def draw(
    reader: Reader,
    hidden: Tensor,
    n_tokens: int,
    sampling: Sampling,
    random: RowGenerators,
    texts: Sequence[Tensor],
    stop_tokens: Collection[int] = (),
    finished: Finished | None = None,
) -> Iterator[Drawn]:
    """Draw the tokens after the `texts` that `reader` has read.

    The last token that is drawn is not read. `hidden` [B, d_model] is of the last token of each
    text; other arguments as for `generate`.
    """
    B, device = len(hidden), hidden.device
    rows = torch.arange(B, device=device)  # of the texts that are not finished
    seen = None
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=device)
    none_ended = torch.zeros(B, dtype=torch.bool, device=device)
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(B, reader.model.config.vocab_size, dtype=torch.bool, device=device)
        for row, text in zip(seen, texts, strict=True):
            row[text] = True
    for left in range(n_tokens, 0, -1):
        with torch.no_grad():
            log_probs = reader.model.log_probs(hidden)  # [n_rows, V]
            tokens = sampling.draw(log_probs, random.uniform().to(device)[rows], seen)
            scores = log_probs.gather(1, tokens[:, None])[:, 0]
        every = torch.full((B,), FINISHED, device=device).index_copy_(0, rows, tokens)
        every_score = scores.new_full((B,), math.nan).index_copy_(0, rows, scores)
        yield Drawn(every, every_score)
        ended = torch.isin(tokens, stops) if len(stops) else none_ended[: len(tokens)]
        if finished is not None:
            ended = ended | finished(every).to(device)[rows]
        if left == 1 or bool(ended.all()):
            return
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if bool(ended.any()):
            kept = (~ended).nonzero()[:, 0]
            reader.select(kept)
            rows, tokens = rows[kept], tokens[kept]
            seen = None if seen is None else seen[kept]
        hidden = reader.step(tokens)


def _checked_prompts(
    prompts: Tensor | Sequence[Tensor], lengths: Sequence[int] | None
) -> list[Tensor]:
    """The tokens of each prompt, int64 [T_p]."""
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.shape[1] == 0:
            raise ValueError(f"prompts: expected [P, T] with T ≥ 1, got {list(prompts.shape)}")
        P, T = prompts.shape
        given = [T] * P if lengths is None else list(lengths)
        if len(given) != P or not all(1 <= n <= T for n in given):
            raise ValueError(f"lengths: expected {P} numbers from 1 to {T}, got {given}")
        texts = [row[:n] for row, n in zip(prompts, given, strict=True)]
    else:
        require("lengths", lengths, lengths is None, "None beside a list of prompts")
        texts = list(prompts)
    if not texts:
        raise ValueError("prompts: expected at least one, got none")
    for text in texts:
        if text.dim() != 1 or len(text) == 0 or text.dtype != torch.int64:
            found = f"{text.dtype} {list(text.shape)}"
            raise ValueError(f"prompts: expected int64 [T] with T ≥ 1, got {found}")
    return texts
