"""The file formats that the project reads, by the name that `make fuzz` prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.fuzz.oracle import Format
from tools.fuzz.runs import Checkpoints, Configurations, Logs, Records, TrainerStates, Windows
from tools.fuzz.texts import Archives, Texts, TokenFiles, Tokenizers, Vocabularies

FORMATS: dict[str, Callable[[Path], Format]] = {
    each.name: each
    for each in (
        TokenFiles,
        Checkpoints,
        TrainerStates,
        Vocabularies,
        Tokenizers,
        Configurations,
        Archives,
        Texts,
        Logs,
        Records,
        Windows,
    )
}
