"""What `generate` prints: prompts of every vocabulary, checks first, ends of texts, pipes."""

from __future__ import annotations

import json
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor

from transformer_xl import training
from transformer_xl.cli import generate_texts
from transformer_xl.cli.generate_output import Stream
from transformer_xl.config import RunConfig, override
from transformer_xl.data.vocabularies import (
    ByteVocabulary,
    CharVocabulary,
    Vocabulary,
    WordVocabulary,
)
from transformer_xl.generation import Drawn
from transformer_xl.reader import Reader

Generate = Callable[..., Result]
TEXT8 = CharVocabulary([" ", *string.ascii_lowercase])
ENWIK8 = ByteVocabulary(bytes(set(range(256)) - {10}), b"\n")
LM1B = WordVocabulary(["<S>", "<UNK>", "a"])
WORDS = WordVocabulary(["<eos>", "<unk>", "a", "b"])


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
        (("--min-p", "1.5"), "min_p: expected None or a probability"),
        (("--repetition-penalty", "0"), "repetition_penalty: expected a finite number above 0"),
        (("--length", "-1"), "--length: expected 0 or more"),
        (("--samples", "0"), "--samples: expected 1 or more"),
        (("--batch-size", "0"), "--batch-size: expected 1 or more"),
        (("--stop", ""), "--stop: expected a text, got an empty one"),
        (("--stop-token", "Z"), "--stop-token: character 'Z' is not in the vocabulary"),
        (("--stop-token", ""), "--stop-token: expected the text of one token, or id:N, got ''"),
        (("--ban", "ab"), "--ban: expected the text of one token, or id:N, got 'ab' with 2 tokens"),
        (("--ban", "id:27"), "--ban: expected a token from id:0 to id:26, got id:27"),
        (tuple(f"--ban=id:{i}" for i in range(27)), "banned: expected at most 26 tokens, got all"),
        (("--lines",), "--lines: expected a --prompt-file"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt"),
        (("--interactive",), "--interactive: expected no prompts"),
        (("--protocol", "paper"), "--protocol paper: expected no prompts"),
        (("data.path=x",), "expected FIELD=VALUE with --protocol only, got 'data.path=x'"),
        (("--mem-len", "-1"), "mem_len: expected 0 or more"),
        (("--seed", str(1 << 64)), "--seed: expected an integer in"),
        (("--prompt", "a\nZebra"), "prompt 2: character 'Z' is not in the vocabulary of 27"),
        (("--prompt", ""), "prompt 2: expected at least one token"),
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


def test_the_end_of_the_text_is_printed(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixed(*_: object) -> Iterator[Drawn]:
        return (Drawn(torch.tensor([token]), torch.zeros(1)) for token in (97, 0xE2, 0x98))

    monkeypatch.setattr(generate_texts, "draw", fixed)
    assert generate(ByteVocabulary(), "--prompt", "☃").stdout == "☃a\ufffd\n"


def test_names_of_files_that_are_not_utf_8_are_shown(generate: Generate, tmp_path: Path) -> None:
    strange = tmp_path / "na\udcffme.txt"
    strange.write_text("a b", encoding="utf-8")
    found = json.loads(generate(WORDS, "--prompt-file", strange, "--json").stdout)
    assert found["texts"][0]["name"].endswith("na\ufffdme.txt")


def test_the_largest_memory_is_reported(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reader, "n_bytes", property(lambda reader: 7 * reader.n_steps))
    monkeypatch.setattr(Reader, "n_steps", 1, raising=False)
    step = Reader.step

    def counted(reader: Any, tokens: Tensor) -> Tensor:
        reader.n_steps += 1
        return step(reader, tokens)

    monkeypatch.setattr(Reader, "step", counted)
    found = json.loads(generate(WORDS, "--stats", "--json").stdout)
    assert found["stats"]["n_bytes"] == 7 * 5


def test_nothing_is_read_or_printed_for_length_0(generate: Generate) -> None:
    shown = generate(WORDS, "--prompt", "a b", "--length", 0, "--stats")
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert "prompts: 0 tokens in" in shown.stderr
    (text,) = json.loads(generate(WORDS, "--length", 0, "--json").stdout)["texts"]
    assert (text["text"], text["tokens"], text["ending"]) == ("", [], "length")


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
    def broken(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(Stream, "update", broken)
    result = generate(WORDS)
    assert result.exit_code == 0
    assert "pipe" not in result.stderr
