"""Log-probabilities of the tokens of documents."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from transformer_xl.cli.score_views import described
from transformer_xl.config import RunConfig
from transformer_xl.data import Vocabulary
from transformer_xl.data.vocabularies import ByteVocabulary, CharVocabulary, WordVocabulary
from transformer_xl.evaluation import Lengths, evaluate
from transformer_xl.model import TransformerXL
from transformer_xl.scoring import ScoredDocument, Totals, log_probs, protocol, score_documents

LENGTHS = Lengths(mem_len=12, same_length=True)
TEXT = b"The memory of a segment is what the next one reads."


@pytest.fixture
def model(tiny_config: RunConfig) -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(tiny_config.model)


def scored(
    model: TransformerXL, vocabulary: Vocabulary, *texts: bytes, tgt_len: int = 8
) -> list[ScoredDocument]:
    documents = [(f"text {i}", text) for i, text in enumerate(texts)]
    return list(score_documents(model, vocabulary, documents, LENGTHS, tgt_len=tgt_len))


def test_the_mean_is_the_loss_of_evaluation(model: TransformerXL) -> None:
    tokens = np.frombuffer(TEXT, dtype=np.uint8)
    expected = evaluate(
        model, tokens, batch_size=1, tgt_len=8, mem_len=12, clamp_len=-1, same_length=True
    )
    (found,) = scored(model, ByteVocabulary(), TEXT)
    assert found.n_tokens == expected.n_tokens == len(TEXT) - 1
    assert found.nats / found.n_tokens == pytest.approx(expected.loss, rel=1e-5)


def test_each_log_probability_is_that_of_one_pass(model: TransformerXL) -> None:
    (found,) = log_probs(model, [list(TEXT)], Lengths(mem_len=100), tgt_len=5)
    model.eval()
    ids = torch.tensor([list(TEXT)])
    with torch.no_grad():
        every = model.log_probs(model(ids[:, :-1]).hidden)[0]
    expected = every.gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


def test_documents_side_by_side_are_scored_as_alone(model: TransformerXL) -> None:
    texts = (TEXT, b"x", TEXT[:20], b"Another text, of another length, at another place.")
    for together, text in zip(scored(model, ByteVocabulary(), *texts), texts, strict=True):
        (alone,) = scored(model, ByteVocabulary(), text)
        assert together.data == text
        for ours, theirs in zip(together.tokens, alone.tokens, strict=True):
            assert (ours.logprob is None) == (theirs.logprob is None)
            assert ours.logprob is None or math.isclose(ours.logprob, theirs.logprob, rel_tol=1e-4)


def test_without_eos_the_first_token_is_not_scored(model: TransformerXL) -> None:
    (found,) = scored(model, ByteVocabulary(), b"a")
    assert [token.logprob for token in found.tokens] == [None]
    assert (found.n_tokens, found.nats) == (0, 0.0)
    assert found.as_dict()["ppl"] is None
    assert "is not scored" in protocol(model, ByteVocabulary(), LENGTHS, tgt_len=8)


def test_with_eos_the_first_token_is_scored_after_it(model: TransformerXL) -> None:
    vocabulary = WordVocabulary(["one", "<eos>", "two", "<unk>"])
    (found,) = scored(model, vocabulary, b"two one\n")
    (expected,) = log_probs(model, [[1, 2, 0, 1]], LENGTHS, tgt_len=8)
    assert [token.logprob for token in found.tokens] == pytest.approx(expected)
    assert [token.text for token in found.tokens] == ["two", "one", "\n"]
    assert "is scored after <eos>" in protocol(model, vocabulary, LENGTHS, tgt_len=8)


def test_the_protocol_mentions_hidden_states(model: TransformerXL) -> None:
    note = ", hidden states projected again for each segment (attn_type 2)"
    found = protocol(model, ByteVocabulary(), LENGTHS, tgt_len=8)
    object.__setattr__(model.config, "attn_type", 2)  # no config accepts it yet
    assert protocol(model, ByteVocabulary(), LENGTHS, tgt_len=8) == found + note


def test_unknown_words_are_counted_and_keep_their_text(model: TransformerXL) -> None:
    vocabulary = WordVocabulary(["<eos>", "<unk>", "two"])
    (found,) = scored(model, vocabulary, "two naïve ☃".encode())
    assert found.n_unknown == 2
    assert [(token.text, token.id, token.start) for token in found.tokens] == [
        ("two", 2, 0),
        ("naïve", 1, 4),
        ("☃", 1, 11),
    ]


def test_bits_per_byte_count_every_byte_that_was_read(model: TransformerXL) -> None:
    (found,) = scored(model, ByteVocabulary(), TEXT)
    figures = found.as_dict()
    assert figures["n_bytes"] == len(TEXT)
    assert figures["bits_per_byte"] == pytest.approx(found.nats / math.log(2) / len(TEXT))
    assert figures["ppl"] == pytest.approx(math.exp(found.nats / found.n_tokens))
    total = Totals().plus(found).plus(found)
    assert (total.n_documents, total.n_bytes, total.nats) == (2, 2 * len(TEXT), 2 * found.nats)
    assert total.bits_per_byte == pytest.approx(figures["bits_per_byte"])


def test_dropped_bytes_make_a_lower_bound(model: TransformerXL) -> None:
    without_ends = ByteVocabulary(bytes(set(range(256)) - {10}), b"\n")
    (found,) = scored(model, without_ends, b"two\nlines\n")
    assert (found.n_dropped, len(found.tokens), found.as_dict()["n_bytes"]) == (2, 8, 10)
    total = Totals().plus(found)
    assert total.is_bound
    assert dict(described(total))["bits per byte"].startswith(">= ")
    assert dict(described(total))["bytes"] == "10, 2 without a token"
    (whole,) = scored(model, ByteVocabulary(), b"two\nlines\n")
    assert not Totals().plus(whole).is_bound
    assert not dict(described(Totals().plus(whole)))["bits per byte"].startswith(">")


@pytest.mark.parametrize(
    ("vocabulary", "text", "message"),
    [
        (ByteVocabulary(), b"", "text 0: expected at least one token, found none"),
        (WordVocabulary(["<eos>"]), b" \t ", "text 0: expected at least one token, found none"),
        (WordVocabulary(["<eos>"]), b"word", "text 0: word 'word' is not in the vocabulary"),
        (CharVocabulary(["a", "\xff"]), b"a\xff", "text 0: expected UTF-8 text, found byte 0xff"),
    ],
)
def test_bad_texts_are_named(
    model: TransformerXL, vocabulary: Vocabulary, text: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scored(model, vocabulary, text)


def test_a_model_that_is_not_finite_is_refused(model: TransformerXL) -> None:
    with torch.no_grad():
        next(model.layers.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        scored(model, ByteVocabulary(), TEXT)
