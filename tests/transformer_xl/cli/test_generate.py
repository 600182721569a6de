"""`transformer-xl generate`: prompts, samples, stops, bans, JSON, statistics, interruptions."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from transformer_xl.cli import generate_run, generate_texts
from transformer_xl.data.vocabularies import ByteVocabulary, CharVocabulary, WordVocabulary
from transformer_xl.generation import Drawn, draw

Generate = Callable[..., Result]
WORDS = WordVocabulary(["<eos>", "<unk>", "a", "b", ",", "@-@"])
LETTERS = CharVocabulary([*"abcdefgh \n"])


def succeed(result: Result) -> str:
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def as_json(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed(result))
    return found


def test_texts_are_printed_in_order_with_their_names(generate: Generate) -> None:
    arguments = ("--prompt", "ab", "--prompt", "c", "--samples", "2")
    shown = succeed(generate(LETTERS, *arguments))
    texts = as_json(generate(LETTERS, *arguments, "--json"))["texts"]
    assert [(text["name"], text["sample"]) for text in texts] == [
        *(("prompt 1", 0), ("prompt 1", 1), ("prompt 2", 0), ("prompt 2", 1)),
    ]
    assert shown == "".join(
        f"=== {text['name']}, sample {text['sample'] + 1} ===\n{text['prompt']}{text['text']}\n"
        for text in texts
    )


def test_texts_do_not_depend_on_the_batch_size(generate: Generate) -> None:
    arguments = [f"--prompt={text}" for text in ("ab", "cdefgh" * 9, "d", "e", "f")]
    together = succeed(generate(LETTERS, *arguments, "--length", 30))
    for size in (1, 2):
        apart = generate(LETTERS, *arguments, "--length", 30, "--batch-size", size)
        assert succeed(apart) == together


def test_prompt_files_are_read_as_they_are(generate: Generate, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfab\ncd\r\nef")
    letters = CharVocabulary([*LETTERS.symbols, "\r"])
    (whole,) = as_json(generate(letters, "--prompt-file", path, "--json"))["texts"]
    assert (whole["name"], whole["prompt"]) == (str(path), "ab\ncd\r\nef")
    lines = as_json(generate(letters, "--prompt-file", path, "--lines", "--json"))["texts"]
    assert [(text["name"], text["prompt"]) for text in lines] == [
        *((f"{path}:1", "ab"), (f"{path}:2", "cd"), (f"{path}:3", "ef")),
    ]


@pytest.mark.parametrize(
    ("data", "lines", "message"),
    [
        (b"", False, "p.txt: expected at least one token, got none"),
        (b"", True, "expected a prompt in the files, got none"),
        (b"ab\n\ncd\n", True, "p.txt:2: expected at least one token, got none"),
        (b"ab\xff", False, "p.txt: expected UTF-8 text, found byte 0xff at offset 2"),
        (b"ab\nZ", True, "p.txt:2: character 'Z' is not in the vocabulary"),
    ],
)
def test_prompt_files_with_errors_are_named(
    generate: Generate, tmp_path: Path, data: bytes, lines: bool, message: str
) -> None:
    (tmp_path / "p.txt").write_bytes(data)
    flag = ["--lines"] if lines else []
    result = generate(LETTERS, "--prompt-file", tmp_path / "p.txt", *flag)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr.replace("\n", "")


def test_bytes_that_are_no_text_are_a_prompt_of_bytes(generate: Generate, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"a\xffb")
    shown = succeed(generate(ByteVocabulary(), "--prompt-file", tmp_path / "p"))
    assert shown.startswith("a\ufffdb")


def test_a_text_ends_before_a_stop_string(generate: Generate) -> None:
    (free,) = as_json(generate(LETTERS, "--length", 60, "--json"))["texts"]
    stop = free["text"][20:23]
    at = free["text"].index(stop)
    arguments = ("--length", 60, "--stop", stop, "--stop", "never there")
    (text,) = as_json(generate(LETTERS, *arguments, "--json"))["texts"]
    assert (text["text"], text["ending"]) == (free["text"][:at], "stop")
    assert "".join(token["text"] for token in text["tokens"]) == free["text"][: at + 3]
    assert succeed(generate(LETTERS, *arguments)) == text["prompt"] + text["text"] + "\n"


def test_a_stop_string_that_is_never_reached_ends_at_the_length(generate: Generate) -> None:
    free = succeed(generate(LETTERS, "--length", 60))
    assert succeed(generate(LETTERS, "--length", 60, "--stop", free[-4:-1] + "zz")) == free
    (text,) = as_json(generate(LETTERS, "--stop", "zz", "--json"))["texts"]
    assert text["ending"] == "length"


def test_other_samples_continue_after_a_stop(generate: Generate) -> None:
    arguments = ("--length", 40, "--samples", 3, "--json")
    free = as_json(generate(LETTERS, *arguments))["texts"]
    stopped = as_json(generate(LETTERS, *arguments, "--stop", "a"))["texts"]
    for ours, theirs in zip(stopped, free, strict=True):
        assert ours["text"] == theirs["text"].partition("a")[0]
    shown = succeed(generate(LETTERS, *arguments[:-1], "--stop", "a"))
    titles = [f"=== prompt, sample {i} ===\n" for i in (1, 2, 3)]
    assert shown == "".join(
        title + text["prompt"] + text["text"] + "\n"
        for title, text in zip(titles, stopped, strict=True)
    )


def test_texts_are_shown_while_they_are_drawn(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning of a stop string is held back, everything else is printed at once."""
    shown = []

    def watched(*args: Any) -> Any:
        for token in LETTERS.encode("abgaha"):
            yield Drawn(torch.tensor([token]), torch.zeros(1))
            shown.append(sys.stdout.buffer.getvalue().decode())  # type: ignore[attr-defined]

    monkeypatch.setattr(generate_texts, "draw", watched)
    generate(LETTERS, "--prompt", "c", "--stop", "ahb", "--length", 6)
    assert shown == ["c", "cab", "cabg", "cabg", "cabg", "cabgah"]


def test_a_text_ends_before_a_stop_token(generate: Generate) -> None:
    (free,) = as_json(generate(LETTERS, "--length", 60, "--json"))["texts"]
    for value in ("c", "id:2"):
        result = generate(LETTERS, "--length", 60, "--stop-token", value, "--json")
        (text,) = as_json(result)["texts"]
        assert (text["text"], text["ending"]) == (free["text"].partition("c")[0], "stop_token")
        assert text["tokens"][-1]["id"] == 2


def test_banned_tokens_are_texts_or_numbers(generate: Generate) -> None:
    banned = ("--ban", "<unk>", "--ban", "id:2", "--ban", "\n", "--ban", ",")
    (text,) = as_json(generate(WORDS, "--length", 50, *banned, "--json"))["texts"]
    assert {token["id"] for token in text["tokens"]} == {3, 5}


def test_json_has_tokens_with_their_log_probabilities(generate: Generate) -> None:
    found = as_json(generate(WORDS, "--prompt", "a", "--top-k", 1, "--json", "--stats"))
    (text,) = found["texts"]
    assert (found["seed"], found["sampling"]["top_k"], text["ending"]) == (1, 1, "length")
    assert len(text["tokens"]) == 5
    for token in text["tokens"]:
        # The model is untrained: all six tokens have nearly the same probability.
        assert token["logprob"] == pytest.approx(-math.log(6), abs=0.5)
    assert found["stats"]["n_drawn"] == 5
    assert found["stats"]["n_bytes"] > 0
    assert "stats" not in as_json(generate(WORDS, "--json"))


def test_a_seed_that_is_printed_gives_the_text_again(generate: Generate) -> None:
    seed = str(1 << 60)
    first = as_json(generate(LETTERS, "--seed", seed, "--json"))
    assert as_json(generate(LETTERS, "--seed", first["seed"], "--json")) == first


def test_statistics_are_printed_on_request(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = generate(WORDS, "--prompt", "a b", "--stats").stderr
    for part in ("prompts: 2 tokens in", "texts: 5 tokens in", "tokens/s", "memory:", "MiB"):
        assert part in shown
    assert generate(WORDS).stderr == ""
    monkeypatch.setattr(generate_run, "LARGE_BYTES", 1000)
    assert generate(WORDS).stderr.startswith("memory: ")


def test_detokenized_text(generate: Generate) -> None:
    arguments = ("--prompt", "a @-@ b , a", "--length", 30)
    (plain,) = as_json(generate(WORDS, *arguments, "--json"))["texts"]
    (text,) = as_json(generate(WORDS, *arguments, "--detokenize", "--json"))["texts"]
    assert text["prompt"] == "a-b, a"
    assert "@-@" in plain["text"]
    assert "@" not in text["text"]
    assert text["tokens"] == plain["tokens"]
    shown = succeed(generate(WORDS, *arguments, "--detokenize"))
    assert shown == text["prompt"] + text["text"] + "\n"


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGINT])
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
def test_an_interruption_ends_with_the_text_so_far(
    generate: Generate,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    flags: tuple[str, ...],
) -> None:
    arguments = ("--length", 100_000, "--samples", 2, *flags)
    expected = as_json(generate(LETTERS, "--length", 4, "--samples", 2, "--json"))["texts"]

    def interrupted(*args: Any) -> Any:
        for i, step in enumerate(draw(*args)):
            if i == 3:
                signal.raise_signal(number)
            yield step

    monkeypatch.setattr(generate_texts, "draw", interrupted)
    result = generate(LETTERS, *arguments)
    assert result.exit_code == 130
    assert result.stderr.strip() == "stopped by SIGINT"
    if flags:
        found = json.loads(result.stdout)["texts"]
        assert [text["text"] for text in found] == [text["text"] for text in expected]
        assert {text["ending"] for text in found} == {"interrupted"}
    else:
        assert all(text["text"] in result.stdout for text in expected)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", [signal.SIGINT])
def test_an_interruption_while_the_prompt_is_read(
    generate: Generate, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def interrupted(*_: object) -> torch.Tensor:
        signal.raise_signal(number)
        pytest.fail("reading went on")

    monkeypatch.setattr(generate_texts, "read_prompts", interrupted)
    result = generate(LETTERS, "--prompt", "abc")
    assert (result.exit_code, result.stdout) == (130, "abc\n")
