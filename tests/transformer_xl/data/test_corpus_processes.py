"""Several processes that open one corpus: one encodes, the others wait, the dead leave nothing."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from transformer_xl.data import Corpus, corpus, encoding
from transformer_xl.data.files import locked

Opened = Callable[..., Corpus]


@pytest.fixture
def text(split_files: Callable[..., Path]) -> Path:
    return split_files("{}.txt", "one two\n" * 9, "three\n", "four\n")


def killed_while_encoding(open_it: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `open_it` in a process that is killed after it wrote the train split."""
    write = encoding.TokenFile.write

    def last(*arguments: object) -> None:
        write(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(encoding.TokenFile, "write", last)
        open_it()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_the_others_wait_and_read_what_one_encodes(
    opened: Opened, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, begun, go_on = [], threading.Event(), threading.Event()
    encode = encoding.encode

    def slow(*arguments: object) -> object:
        encoded.append(arguments)
        begun.set()
        assert go_on.wait(60)
        return encode(*arguments)

    monkeypatch.setattr(corpus, "encode", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(opened, "text", text)
        assert begun.wait(60)
        others = [pool.submit(opened, "text", text) for _ in range(2)]
        assert not any(other.done() for other in others)
        go_on.set()
        folders = {future.result(60).folder for future in (first, *others)}
    assert len(encoded) == 1
    (folder,) = folders
    assert list(folder.parent.iterdir()) == [folder]


def test_folders_of_dead_processes_are_removed(
    opened: Opened, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, folders = tmp_path / "cache", set()
    for tokenizer in ("char", "byte"):  # of another corpus, then of the same
        killed_while_encoding(lambda: opened("text", text), monkeypatch)
        assert [path for path in cache.iterdir() if path.is_dir() and path not in folders]
        found = opened("text", text, tokenizer=tokenizer)
        folders.add(found.folder)
        assert set(cache.iterdir()) == folders
    assert bytes(found.split("test")) == b"four\n"


def test_the_folder_of_a_living_process_stays(opened: Opened, text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    unfinished = cache / f".text-other-{'0' * encoding.UNIQUE}"
    unfinished.mkdir(parents=True)
    with ThreadPoolExecutor() as pool, locked(encoding.lock_file(cache / "text-other")):
        pool.submit(opened, "text", text).result(60)
        assert unfinished.exists()
    opened("text", text, tokenizer="char")
    assert not unfinished.exists()


def test_an_encoded_corpus_in_a_folder_that_cannot_be_written_is_read(
    opened: Opened, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened("text", text)
    monkeypatch.setattr(corpus, "locked", lambda _: pytest.fail("a lock file is written"))
    assert opened("text", text).fingerprint == first.fingerprint
