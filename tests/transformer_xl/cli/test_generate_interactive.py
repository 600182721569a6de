"""`generate --interactive`: turns, what the memory keeps, errors, a terminal and Ctrl-C in it."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from transformer_xl.cli import generate_texts
from transformer_xl.cli.generate_interactive import Conversation, converse
from transformer_xl.cli.generate_texts import Settings
from transformer_xl.cli.loading import LoadedModel
from transformer_xl.config import RunConfig
from transformer_xl.data import open_corpus
from transformer_xl.data.vocabularies import CharVocabulary, Vocabulary, WordVocabulary
from transformer_xl.generation import draw, generate
from transformer_xl.sampling import Sampling
from transformer_xl.training import Trainer, join_processes
from transformer_xl.training.stopping import Stopped

Load = Callable[[Vocabulary], LoadedModel]
LETTERS = CharVocabulary([*"abcdefgh \n"])
WORDS = WordVocabulary(["<eos>", "<unk>", "a", "b"])
GREEDY = Settings(length=6, sampling=Sampling(temperature=0.0), seed=1)


def continued(loaded: LoadedModel, ids: list[int], n_tokens: int = 6) -> list[int]:
    steps = generate(loaded.model, torch.tensor([ids]), n_tokens, sampling=GREEDY.sampling)
    return [int(token) for token in steps]


def test_the_memory_keeps_all_turns(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """Each turn continues the whole text so far, as if it were one prompt."""
    loaded = load(LETTERS)
    loaded.model.set_lengths(mem_len=200)  # more than everything here
    conversation = Conversation(loaded, GREEDY)
    text: list[int] = []
    for line, read in (("abc", "abc"), ("de", "\nde"), ("", ""), ("f", "\nf")):
        text += LETTERS.encode(read)
        written = continued(loaded, text)
        conversation.turn(line)
        assert capsys.readouterr().out == LETTERS.decode(written) + "\n"
        text += written
        assert conversation.tokens == text


@pytest.mark.parametrize(("vocabulary", "read"), [(LETTERS, "\n"), (WORDS, "\n")])
def test_an_empty_first_line_begins_a_text(load: Load, vocabulary: Vocabulary, read: str) -> None:
    conversation = Conversation(load(vocabulary), GREEDY)
    conversation.turn("")
    assert conversation.tokens[:-6] == vocabulary.encode(read)


def test_turns_without_tokens_print_nothing_and_can_be_continued(
    load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load(LETTERS)
    nothing = Settings(length=0, sampling=GREEDY.sampling, seed=1)
    conversation = Conversation(loaded, nothing)
    conversation.turn("abc")
    conversation.turn("")
    assert conversation.tokens == LETTERS.encode("abc")
    assert capsys.readouterr().out == ""


def test_lines_are_read_until_the_end_of_the_input(generate: Callable[..., Result]) -> None:
    result = generate(LETTERS, "--interactive", "--temperature", 0, typed="abc\nZ\nde\n")
    assert result.exit_code == 0
    first, second, rest = result.stdout.split("\n")
    assert (len(first), len(second), rest) == (5, 5, "")
    assert "prompt: character 'Z' is not in the vocabulary" in result.stderr
    assert generate(LETTERS, "--interactive", typed="").stdout == ""


def test_the_size_of_a_batch_is_refused(generate: Callable[..., Result]) -> None:
    result = generate(LETTERS, "--interactive", "--batch-size", 16, typed="abc\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no --json and no --batch-size" in " ".join(result.stderr.split())


def test_unknown_words_are_reported_and_statistics_printed(
    generate: Callable[..., Result],
) -> None:
    result = generate(WORDS, "--interactive", "--stats", typed="a gnu\nb\n")
    assert "unknown words of the prompt, read as <unk>: 'gnu'" in result.stderr
    assert result.stderr.count("texts: 5 tokens in") == 2
    assert "prompts: 2 tokens in" in result.stderr
    # The last token that was drawn, the end of the line, and the word.
    assert "prompts: 3 tokens in" in result.stderr


def interrupted(number: signal.Signals) -> Callable[..., Iterator[Any]]:
    """`draw`, with this signal before the third token."""

    def drawn(*args: Any) -> Iterator[Any]:
        for i, step in enumerate(draw(*args)):
            if i == 2:
                signal.raise_signal(number)
            yield step

    return drawn


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGINT])
def test_ctrl_c_ends_the_text_and_the_next_turn_continues_it(
    load: Load, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    loaded = load(LETTERS)
    conversation = Conversation(loaded, GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(generate_texts, "draw", interrupted(number))
        conversation.turn("abc")
    text = LETTERS.encode("abc")
    text += continued(loaded, text, 3)
    assert conversation.tokens == text
    conversation.turn("")
    assert conversation.tokens == text + continued(loaded, text)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_the_command_after_the_text_so_far(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    loaded = load(LETTERS)
    lines = iter(["abc"])  # a second line would not be found
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(generate_texts, "draw", interrupted(number))
    with pytest.raises(Stopped) as stopped:
        converse(loaded, GREEDY, with_stats=False)
    assert stopped.value.number == number
    written = continued(loaded, LETTERS.encode("abc"), 3)
    assert capsys.readouterr().out == LETTERS.decode(written) + "\n"


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read_until(self, done: Callable[[str], bool], seconds: float = 120) -> None:
        """Read the output until `done` holds for all of it."""
        end = time.monotonic() + seconds
        while not done(self.shown):
            assert time.monotonic() < end, self.shown
            if select.select([self.master], [], [], 1)[0]:
                self.shown += os.read(self.master, 4096).decode("utf-8", "replace")


@pytest.mark.slow
@pytest.mark.parametrize("is_terminated", [False, True])
def test_a_terminal(tiny_config: RunConfig, tmp_path: Path, is_terminated: bool) -> None:
    Trainer(tiny_config, open_corpus(tiny_config.data), join_processes()).save(tmp_path / "saved")
    words = [sys.executable, "-m", "transformer_xl.cli", "generate", str(tmp_path / "saved")]
    terminal = Terminal([*words, "--interactive", "--length", "1000000", "--ban", "id:62"])
    try:
        terminal.read_until(lambda shown: shown.endswith("> "))
        terminal.type("the \n")
        terminal.read_until(lambda shown: len(shown) > 200)
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.read_until(lambda shown: shown.endswith("\n> "))
        assert terminal.process.poll() is None
        if is_terminated:
            terminal.type("the \n")
            terminal.read_until(lambda shown: len(shown) - shown.rfind("> ") > 200)
            os.kill(terminal.process.pid, signal.SIGTERM)
        else:
            terminal.type("\x04")
        assert terminal.process.wait(60) == (143 if is_terminated else 0)
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
