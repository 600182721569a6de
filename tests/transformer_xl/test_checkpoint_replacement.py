"""Checkpoints behind symbolic links, and checkpoints that are replaced while they are read."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_xl import checkpoint, checkpoint_files
from transformer_xl.checkpoint import CheckpointError, open_checkpoint
from transformer_xl.config import DataConfig, ModelConfig, RunConfig
from transformer_xl.data.vocabularies import ByteVocabulary

CONFIG = RunConfig(model=ModelConfig(vocab_size=5), data=DataConfig(name="text"))


def save(directory: Path, step: int) -> None:
    """A checkpoint in which every number is the step."""
    model = nn.Linear(4, 4, bias=False)
    nn.init.constant_(model.weight, step)
    checkpoint.save(
        directory,
        model=model,
        config=CONFIG,
        state={"step": step},
        vocabulary=ByteVocabulary(),
        optimizer=torch.optim.SGD(model.parameters()),
        rank_tensors={"step": torch.tensor(step)},
    )


def steps(path: Path) -> set[float]:
    """The steps of the parts of a checkpoint."""
    found = open_checkpoint(path)
    model = nn.Linear(4, 4, bias=False)
    found.load_model(model)
    return {found.step, model.weight[0, 0].item(), found.rank_tensors(0, 1)["step"].item()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("exists", [True, False], ids=["folder", "dangling"])
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_saving_replaces_what_a_link_names(run: Path, exists: bool, relative: bool) -> None:
    target = run.parent / "disk" / "target"
    if exists:
        target.mkdir(parents=True)
    (run / "last").symlink_to("../disk/target" if relative else target)
    for step in (1, 2, 3):
        save(run / "last", step)
        assert (run / "last").is_symlink()
        assert steps(run) == steps(run / "last") == steps(target) == {step}
    assert [path.name for path in run.iterdir()] == ["last"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_save_through_a_link_that_was_killed_is_found_and_tidied(run: Path) -> None:
    target = run.parent / "disk" / "target"
    (run / "last").symlink_to(target)
    save(run / "last", 1)
    target.rename(target.with_name("target.previous"))  # where a kill leaves it
    target.with_name("target.new").mkdir()
    assert steps(run) == {1}
    checkpoint.tidy(run / "last")
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert steps(run) == {1}


def test_a_failed_save_through_a_link_keeps_the_last_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "last").symlink_to(run.parent / "target")
    save(run / "last", 1)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_files, "flush", full)
        with pytest.raises(CheckpointError, match="No space left on device; the last checkpoint"):
            save(run / "last", 2)
    assert steps(run) == {1}
    assert not (run.parent / "target.new").exists()


def test_the_run_of_a_checkpoint_is_the_folder_that_holds_the_link(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "last").symlink_to(run.parent / "target")
    save(run / "last", 1)
    for path in (run, run / "last"):
        assert open_checkpoint(path).run == run
    (run.parent / "target").rename(run.parent / "target.previous")
    assert open_checkpoint(run / "last").run == run
    save(run / "best", 1)
    monkeypatch.chdir(run / "best")
    for path in (".", "..", "../best"):
        assert open_checkpoint(Path(path)).run.resolve() == run


def test_a_copy_is_the_same_checkpoint(run: Path) -> None:
    save(run / "best", 3)
    source = open_checkpoint(run / "best")
    (run.parent / "link").symlink_to(run.parent / "target")
    for place in ("copied", "link"):
        source.copy(run.parent / place)
        assert steps(run.parent / place) == {3}
        assert open_checkpoint(run.parent / place).state == source.state


def test_an_open_checkpoint_is_of_one_step_whatever_happens_to_it(run: Path) -> None:
    save(run / "last", 1)
    found = open_checkpoint(run)
    save(run / "last", 2)
    shutil.rmtree(run)
    model = nn.Linear(4, 4, bias=False)
    found.load_model(model)
    assert model.weight[0, 0] == found.step == found.rank_tensors(0, 1)["step"] == 1
    assert len(found.vocabulary) == 256


def test_a_file_that_is_not_needed_may_be_damaged(run: Path) -> None:
    save(run / "last", 1)
    (run / "last" / "rank-0.safetensors").write_bytes(b"\xff" * 64)
    found = open_checkpoint(run)
    found.load_model(nn.Linear(4, 4, bias=False))
    with pytest.raises(CheckpointError, match=r"rank-0\.safetensors is damaged"):
        found.rank_tensors(0, 1)


def test_opening_meets_a_replacement_at_any_moment(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One save happens after each of the steps of opening."""

    def then_save(step: Callable[..., object]) -> Callable[..., object]:
        pending = [2]

        def wrapped(*arguments: Path) -> object:
            found = step(*arguments)
            if pending:
                save(run / "last", pending.pop())
            return found

        return wrapped

    for name in ("_found", "read_state", "open_tensors"):
        save(run / "last", 1)
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, name, then_save(getattr(checkpoint, name)))
            assert steps(run) == {2}


def test_a_checkpoint_can_be_read_while_a_run_replaces_it(run: Path) -> None:
    save(run / "last", 1)
    stop = threading.Event()

    def replace() -> None:
        step = 1
        while not stop.is_set():
            step += 1
            save(run / "last", step)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        found = [steps(path) for _ in range(60) for path in (run, run / "last")]
    finally:
        stop.set()
        writer.join()
    assert all(len(parts) == 1 for parts in found)
    assert len({step for parts in found for step in parts}) > 1
