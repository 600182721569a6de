"""The log-probability of every token of a text, each document of it alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from transformer_xl import evaluation
from transformer_xl.data import Vocabulary
from transformer_xl.data.text import decode_whole
from transformer_xl.data.vocabularies import UnknownSymbolError
from transformer_xl.evaluation import Lengths, reading
from transformer_xl.key_value_window import empty_memory
from transformer_xl.model import TransformerXL

NOT_SCORED = -100


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a document.

    Args:
        text: the part of the document that it covers; U+FFFD for a part of a character.
        id: its number in the vocabulary.
        start, stop: where this part is, in bytes of the document.
        logprob: natural logarithm of its probability after all tokens before it; None for the
            first token of a document if the vocabulary has no `<eos>`.
    """

    text: str
    id: int
    start: int
    stop: int
    logprob: float | None


@dataclasses.dataclass(frozen=True)
class ScoredDocument:
    """A document and its tokens.

    Args:
        name: of its file, with the number of the line if each line is a document.
        data: its bytes, as read.
        n_unknown: symbols that the vocabulary does not have; each is scored as `<unk>`, which is
            more probable than the symbol itself.
        n_dropped: bytes without a token, which a vocabulary of bytes leaves out.
    """

    name: str
    data: bytes
    tokens: tuple[ScoredToken, ...]
    n_unknown: int
    n_dropped: int = 0

    @property
    def n_tokens(self) -> int:
        """Number of tokens with a log-probability."""
        return sum(token.logprob is not None for token in self.tokens)

    @property
    def nats(self) -> float:
        """Minus the sum of the log-probabilities."""
        return -math.fsum(token.logprob for token in self.tokens if token.logprob is not None)

    def as_dict(self) -> dict[str, Any]:
        """The document for JSON."""
        tokens = [
            {"text": token.text, "id": token.id, "start": token.start, "logprob": token.logprob}
            for token in self.tokens
        ]
        return {"name": self.name, **Totals().plus(self).as_dict(), "tokens": tokens}


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over documents, and the scores that follow from them."""

    n_documents: int = 0
    n_bytes: int = 0
    n_tokens: int = 0
    n_unknown: int = 0
    n_dropped: int = 0
    nats: float = 0.0

    def plus(self, document: ScoredDocument) -> Totals:
        """The sums with one more document."""
        return Totals(
            self.n_documents + 1,
            self.n_bytes + len(document.data),
            self.n_tokens + document.n_tokens,
            self.n_unknown + document.n_unknown,
            self.n_dropped + document.n_dropped,
            self.nats + document.nats,
        )

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / n_bytes; a lower bound if `is_bound`."""
        return self.nats / math.log(2) / self.n_bytes

    @property
    def is_bound(self) -> bool:
        """Whether the bits per byte are a lower bound: not every symbol was scored as it is."""
        return self.n_unknown > 0 or self.n_dropped > 0

    @property
    def ppl(self) -> float | None:
        """Perplexity of the scored tokens; None if there are none."""
        return math.exp(min(self.nats / self.n_tokens, 700.0)) if self.n_tokens else None

    def as_dict(self) -> dict[str, Any]:
        """The sums of one document, or of several, for JSON."""
        sums = dataclasses.asdict(self)
        del sums["n_documents"]
        return sums | {"bits_per_byte": self.bits_per_byte, "ppl": self.ppl}


def score_documents(
    model: TransformerXL,
    vocabulary: Vocabulary,
    documents: Sequence[tuple[str, bytes]],
    lengths: Lengths,
    *,
    tgt_len: int,
    cache_dtype: torch.dtype | None = None,
) -> Iterator[ScoredDocument]:
    """Score documents, given as names and bytes, side by side; each begins with an empty memory.

    The first token of a document is scored after `<eos>` if the vocabulary has it. Runs under the
    caller's autocast. Other arguments are those of `log_probs`.

    Raises:
        ValueError: a document without tokens, or with unknown symbols that the vocabulary has no
            `<unk>` for; the message has the document's name.
    """
    before = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
    is_text = vocabulary.kind != "byte"
    texts = [decode_whole(name, data, is_text=is_text) for name, data in documents]
    encoded = [
        _encoded(vocabulary, name, text) for (name, _), text in zip(documents, texts, strict=True)
    ]
    rows = [[*before, *ids] for ids, _ in encoded]
    found = log_probs(model, rows, lengths, tgt_len=tgt_len, cache_dtype=cache_dtype)
    for (name, data), text, (ids, n_unknown), scores in zip(
        documents, texts, encoded, found, strict=True
    ):
        padded = scores if before else [None, *scores]
        spans = vocabulary.spans(text).tolist()
        tokens = (
            ScoredToken(data[start:stop].decode("utf-8", "replace"), token, start, stop, logprob)
            for (start, stop), token, logprob in zip(spans, ids, padded, strict=True)
        )
        n_dropped = 0 if is_text else len(data) - len(ids)
        yield ScoredDocument(name, data, tuple(tokens), n_unknown, n_dropped)


def protocol(
    model: TransformerXL,
    vocabulary: Vocabulary,
    lengths: Lengths,
    *,
    tgt_len: int,
    cache_dtype: torch.dtype | None = None,
) -> str:
    """One sentence with everything that the scores depend on beside the model and the text."""
    first = "is not scored" if vocabulary.eos_id is None else "is scored after <eos>"
    parts = [
        "every document starts with an empty memory",
        f"its first token {first}",
        *lengths.described(tgt_len),
        *evaluation.numerics(model, cache_dtype=cache_dtype),
    ]
    return ", ".join(parts)


def log_probs(
    model: TransformerXL,
    rows: Sequence[Sequence[int]],
    lengths: Lengths,
    *,
    tgt_len: int,
    cache_dtype: torch.dtype | None = None,
) -> list[list[float]]:
    """The log-probability, in nats, of every token of each row but the first.

    Args:
        rows: token ids, one or more in each row; rows may have different lengths.
        lengths: of the model while it reads.
        tgt_len: tokens read at a time.
        cache_dtype: of the cached keys and values; None: as `KeyValueWindow.empty` chooses it.
    """
    device = next(model.parameters()).device
    longest = max(map(len, rows))
    padded = torch.full((len(rows), longest), NOT_SCORED, device=device)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, device=device)
    tokens, targets = padded[:, :-1].clamp(min=0), padded[:, 1:]
    memory, parts = None, [torch.empty(len(rows), 0)]
    for begin in range(0, longest - 1, tgt_len):
        segment = slice(begin, begin + tgt_len)
        with reading(model, lengths):
            if memory is None:
                memory = empty_memory(model, len(rows), cache_dtype=cache_dtype)
            output = model(tokens[:, segment], memory, targets[:, segment], reduction="none")
        memory = output.memory
        parts.append(_finite(-output.loss.float().cpu(), targets[:, segment].cpu()))
    found: list[list[float]] = torch.cat(parts, dim=1).tolist()
    return [scores[: len(row) - 1] for scores, row in zip(found, rows, strict=True)]


def _finite(scores: Tensor, targets: Tensor) -> Tensor:
    """The same scores; FloatingPointError for one that is NaN or an infinity."""
    if not bool((scores.isfinite() | (targets < 0)).all()):
        raise FloatingPointError("the model computes log-probabilities that are not finite")
    return scores


def _encoded(vocabulary: Vocabulary, name: str, text: str) -> tuple[list[int], int]:
    """Token ids of a document, and the number of its unknown symbols."""
    ids, n_unknown = vocabulary.lookup(text)
    if n_unknown and vocabulary.unknown_id is None:
        try:
            vocabulary.encode(text)
        except UnknownSymbolError as error:
            raise ValueError(f"{name}: {error}") from error
    if len(ids) == 0:
        raise ValueError(f"{name}: expected at least one token, found none")
    return ids.tolist(), n_unknown
