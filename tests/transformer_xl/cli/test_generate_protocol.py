"""`generate --protocol paper`: context, text and reference of the test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from transformer_xl import evaluation
from transformer_xl.checkpoint import open_checkpoint
from transformer_xl.cli.app import app
from transformer_xl.config import RunConfig, override
from transformer_xl.data import open_corpus
from transformer_xl.data.corpus import Corpus
from transformer_xl.detokenization import detokenize
from transformer_xl.generation import generate
from transformer_xl.model import TransformerXL
from transformer_xl.sampling import Sampling
from transformer_xl.training import Trainer, join_processes


@pytest.fixture
def config(tiny_config: RunConfig, tmp_path: Path) -> RunConfig:
    """A run on words with WikiText's signs between them; its test split has 900 words."""
    words = 'the cat @-@ like dog , which ( it said ) was " small " .\n'
    for split, n in (("train", 100), ("valid", 20), ("test", 60)):
        (tmp_path / f"{split}.txt").write_text(words * n, encoding="utf-8")
    changes = {"data.path": str(tmp_path), "data.tokenizer": "word", "model.vocab_size": "20"}
    config = override(tiny_config, {**changes, "data.cache_dir": str(tmp_path / "cache")})
    n_words = len(open_corpus(config.data).vocab)
    return override(config, {"model.vocab_size": n_words})


@pytest.fixture
def saved(config: RunConfig, tmp_path: Path) -> Path:
    Trainer(config, open_corpus(config.data), join_processes()).save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def corpus(config: RunConfig) -> Corpus:
    return open_corpus(config.data)


def run(*arguments: object) -> Result:
    words = ["generate", *map(str, arguments), "--protocol", "paper"]
    return CliRunner().invoke(app, words)


def found(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def test_three_prompts_of_512_tokens_with_their_references(
    saved: Path, config: RunConfig, corpus: Corpus
) -> None:
    values = found(saved, "--length", 40, "--seed", 7)
    test, decode = corpus.split("test"), corpus.vocab.decode
    assert len(values["texts"]) == len(values["references"]) == 3
    model = TransformerXL(config.model)
    open_checkpoint(saved).load_model(model)
    starts = [int(text["name"].split()[-1].replace(",", "")) for text in values["texts"]]
    assert len(set(starts)) == 3
    prompts = torch.tensor([test[at : at + 512].tolist() for at in starts])
    drawn = generate(model, prompts, 40, sampling=Sampling(top_k=40), seed=7)
    tokens = torch.stack(list(drawn), dim=1).tolist()
    rows = zip(starts, values["texts"], values["references"], tokens, strict=True)
    for at, text, reference, ids in rows:
        assert text["prompt"] == detokenize(decode(test[at : at + 512]))
        assert reference == detokenize(decode(test[at + 512 : at + 552]))
        assert [token["id"] for token in text["tokens"]] == ids
    assert found(saved, "--length", 40, "--seed", 8)["references"] != values["references"]


def test_everything_is_printed_with_the_protocol(saved: Path) -> None:
    values = found(saved, "--length", 30, "--seed", 7)
    result = run(saved, "--length", 30, "--seed", 7, "--stats")
    assert result.exit_code == 0, result.output
    first, *_ = shown = result.stdout.splitlines()
    assert first == f"protocol: {values['protocol']}"
    for part in ("3 prompts of 512 tokens", "seed 7", "30 tokens each", "top-40", "mem_len 12"):
        assert part in first
    for name in ("--- context ---", "--- generated ---", "--- reference ---"):
        assert shown.count(name) == 3
    assert 'cat-like dog, which (it said) was "small".' in result.stdout
    assert "texts: 90 tokens in" in result.stderr


def test_the_protocol_mentions_hidden_states(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = ", hidden states projected again for each segment (a reason)"
    protocol = found(saved, "--length", 1, "--seed", 7)["protocol"]
    monkeypatch.setattr(evaluation, "unsupported_reason", lambda model: "a reason")
    assert found(saved, "--length", 1, "--seed", 7)["protocol"] == protocol + note


def test_the_default_length_needs_a_longer_split(saved: Path) -> None:
    result = run(saved, "--seed", 7)
    assert result.exit_code == 2
    assert "expected at least 1,512 tokens" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "option",
    [
        ("--prompt", "the"),
        ("--temperature", "0.5"),
        ("--top-k", "40"),
        ("--ban", "the"),
        ("--stop", "the"),
        ("--samples", "2"),
        ("--interactive",),
        ("--batch-size", "16"),
        ("--detokenize",),
    ],
)
def test_the_protocol_defines_prompts_and_sampling(saved: Path, option: tuple[str, ...]) -> None:
    result = run(saved, *option)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--protocol paper: expected no prompts" in " ".join(result.stderr.split())


def test_a_protocol_without_texts_is_refused(saved: Path) -> None:
    result = run(saved, "--length", 0)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--length: expected 1 or more with --protocol paper" in " ".join(result.stderr.split())


def test_other_data_can_be_named(saved: Path, config: RunConfig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "valid", "test"):
        (other / f"{split}.txt").write_text("dog cat the\n" * 300, encoding="utf-8")
    values = found(saved, f"data.path={other}", "--length", 5)
    assert values["references"][0].replace("\n", " ").split()[0] in ("dog", "cat", "the")
