"""What `generate` prints: prompts of every vocabulary, checks first, unfinished characters."""

from __future__ import annotations

import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from transformer_xl import training
from transformer_xl.cli import generate as command
from transformer_xl.cli.app import app
from transformer_xl.cli.generate import decoded
from transformer_xl.cli.loading import LoadedModel
from transformer_xl.config import RunConfig, override
from transformer_xl.data.vocabularies import (
    ByteVocabulary,
    CharVocabulary,
    Vocabulary,
    WordVocabulary,
)
from transformer_xl.model import TransformerXL

Generate = Callable[..., Result]
TEXT8 = CharVocabulary([" ", *string.ascii_lowercase])
ENWIK8 = ByteVocabulary(bytes(set(range(256)) - {10}), b"\n")
LM1B = WordVocabulary(["<S>", "<UNK>", "a"])
WORDS = WordVocabulary(["<eos>", "<unk>", "a", "b"])


@pytest.fixture
def generate(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Generate:
    """The command with an untrained model of a vocabulary; 5 tokens from one seed."""

    def run(vocabulary: Vocabulary, *arguments: str) -> Result:
        torch.manual_seed(0)
        config = override(tiny_config, {"model.vocab_size": len(vocabulary)})
        model = TransformerXL(config.model).eval()
        loaded = LoadedModel(model, vocabulary, config, torch.device("cpu"))
        monkeypatch.setattr(LoadedModel, "open", lambda path, device: loaded)
        fixed = ["generate", "run", "--length", "5", "--seed", "1"]
        return CliRunner().invoke(app, [*fixed, *arguments])

    return run


@pytest.mark.parametrize(
    ("vocabulary", "start"),
    [
        (TEXT8, " "),
        (ENWIK8, " "),
        (LM1B, ""),
        (WORDS, "\n"),
        (ByteVocabulary(), "\n"),
        (CharVocabulary(["<unk>", *"ACGT"]), "A"),
    ],
    ids=["text8", "enwik8", "lm1b", "words", "bytes", "dna"],
)
def test_every_vocabulary_has_a_default_prompt(
    generate: Generate, vocabulary: Vocabulary, start: str
) -> None:
    result = generate(vocabulary)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(start)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "nan"), "temperature: expected a finite number, got nan"),
        (("--temperature", "inf"), "temperature: expected a finite number, got inf"),
        (("--temperature", "-1"), "temperature: expected 0 or more"),
        (("--top-k", "0"), "top_k: expected None or at least 1"),
        (("--top-p", "nan"), "top_p: expected None or a probability"),
        (("--length", "-1"), "n_tokens: expected 0 or more"),
        (("--mem-len", "-1"), "mem_len: expected 0 or more"),
        (("--seed", str(1 << 64)), "seed: expected an integer in"),
        (("--prompt", "a\nZebra"), "prompt: character 'Z' is not in the vocabulary of 27"),
        (("--prompt", ""), "prompt: expected at least one token"),
    ],
)
def test_nothing_is_printed_before_everything_is_checked(
    generate: Generate, arguments: tuple[str, ...], message: str
) -> None:
    vocabulary = CharVocabulary([*string.ascii_lowercase, "\n"])
    result = generate(vocabulary, "--prompt", "text", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("temperature", ["1e-9", "1e-40", "1e-300"])
def test_a_tiny_temperature_is_greedy(generate: Generate, temperature: str) -> None:
    greedy = generate(WORDS, "--temperature", "0").stdout
    cold = generate(WORDS, "--temperature", temperature, "--top-p", "0.9")
    assert cold.exit_code == 0, cold.output
    assert cold.stdout == greedy


def test_unknown_words_of_a_prompt_are_listed_once(generate: Generate) -> None:
    result = generate(WORDS, "--prompt", "gnu a\rzebra b gnu")
    assert result.exit_code == 0
    assert result.stdout.startswith("gnu a\rzebra b gnu")
    assert result.stderr == "unknown words of the prompt, read as <unk>: 'gnu', 'zebra'\n"
    assert generate(WORDS, "--prompt", "a b <unk>").stderr == ""


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"abc\xe2\x98", "abc\ufffd"),
        (b"abc\xff", "abc\ufffd"),
        ("abc☃".encode(), "abc☃"),
        ("abc\ufffd".encode(), "abc\ufffd"),
        (b"\xe2", "\ufffd"),
        (b"", ""),
        ("é".encode() * 70 + b"\xf0\x9f\x99", "é" * 70 + "\ufffd"),
    ],
)
def test_a_character_that_is_not_finished_at_the_end_is_shown(data: bytes, shown: str) -> None:
    assert "".join(decoded(ByteVocabulary(), [10], list(data))) == shown


def test_the_end_of_the_text_is_printed(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixed(*_: object, **__: object) -> Iterator[torch.Tensor]:
        return iter(torch.tensor([[97], [0xE2], [0x98]]))

    monkeypatch.setattr(command.generation, "generate", fixed)
    assert generate(ByteVocabulary(), "--prompt", "☃").stdout == "☃a\ufffd\n"


def piped(arguments: list[str], reader: str) -> tuple[int, str]:
    """Status and stderr of the command whose output goes into `reader`."""
    words = [sys.executable, "-m", "transformer_xl.cli", *arguments]
    line = " ".join(map(str, words)) + " | " + reader + "; echo ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]), done.stderr


@pytest.mark.slow
def test_a_closed_pipe_ends_the_command_silently(tiny_config: RunConfig, tmp_path: Path) -> None:
    training.train(override(tiny_config, {"train.max_step": 1}), tmp_path / "run")
    run = str(tmp_path / "run")
    endless = ["generate", run, "--length", "100000"]
    assert piped(endless, "head -c 20 > /dev/null") == (0, "")
    assert piped(["evaluate", run], "exec 0<&-; sleep 0.1") == (0, "")


def test_broken_pipes_are_no_error(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Iterator[str]:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(command, "decoded", broken)
    result = generate(WORDS)
    assert result.exit_code == 0
    assert "pipe" not in result.stderr
