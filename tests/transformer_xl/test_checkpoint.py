"""Checkpoints: what is written is what is read, and nothing else is ever read."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from transformer_xl import checkpoint, checkpoint_files
from transformer_xl.checkpoint import CheckpointError, open_checkpoint
from transformer_xl.config import ModelConfig, RunConfig, override
from transformer_xl.data.vocabularies import ByteVocabulary
from transformer_xl.model import TransformerXL


def trained(config: RunConfig) -> tuple[TransformerXL, torch.optim.Adam]:
    model = TransformerXL(config.model)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    tokens = torch.randint(0, 256, (2, 5))
    model(tokens, targets=tokens).loss.backward()
    optimizer.step()
    return model, optimizer


def write(directory: Path, config: RunConfig, step: int = 7) -> tuple[nn.Module, torch.optim.Adam]:
    model, optimizer = trained(config)
    checkpoint.save(
        directory,
        model=model,
        config=config,
        state={"step": step, "note": "kept"},
        vocabulary=ByteVocabulary(),
        optimizer=optimizer,
        rank_tensors={"memory": torch.arange(3)},
    )
    return model, optimizer


@pytest.fixture
def saved(tmp_path: Path, tiny_config: RunConfig) -> Path:
    write(tmp_path / "last", tiny_config)
    return tmp_path / "last"


def test_round_trip(tmp_path: Path, tiny_config: RunConfig) -> None:
    model, optimizer = write(tmp_path / "last", tiny_config)
    found = open_checkpoint(tmp_path / "last")
    assert (found.step, found.state["note"], found.config) == (7, "kept", tiny_config)
    other, other_optimizer = trained(tiny_config)
    found.load_model(other)
    found.load_optimizer(other, other_optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    ours, theirs = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for i, entries in ours.items():
        for key, tensor in entries.items():
            assert torch.equal(theirs[i][key], tensor), (i, key)
    assert torch.equal(found.rank_tensors(0, 1)["memory"], torch.arange(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last"]


def test_tied_tensors_are_written_once_and_stay_tied(saved: Path, tiny_config: RunConfig) -> None:
    aliases = json.loads((saved / "state.json").read_text())["aliases"]
    assert aliases == {"crit.out_layers.0.weight": "word_emb.emb_layers.0.weight"}
    assert not set(aliases) & set(load_file(saved / "model.safetensors"))
    model = TransformerXL(tiny_config.model)
    open_checkpoint(saved).load_model(model)
    assert model.crit.out_layers[0].weight is model.word_emb.emb_layers[0].weight


def test_untied_model_has_no_aliases(tmp_path: Path, tiny_config: RunConfig) -> None:
    untied = dataclasses.replace(tiny_config.model, tie_weight=False)
    write(tmp_path / "last", dataclasses.replace(tiny_config, model=untied))
    assert open_checkpoint(tmp_path / "last").state["aliases"] == {}


def test_a_sampled_softmax_comes_back(tmp_path: Path, tiny_config: RunConfig) -> None:
    config = override(tiny_config, {"model.sample_softmax": "40"})
    model, _ = write(tmp_path / "last", config)
    found = open_checkpoint(tmp_path / "last")
    assert found.config == config
    other = TransformerXL(found.config.model).eval()
    found.load_model(other)
    tokens = torch.randint(0, 256, (2, 5))
    assert torch.equal(
        other(tokens, targets=tokens).loss, model.eval()(tokens, targets=tokens).loss
    )


def test_a_run_stands_for_its_last_checkpoint(saved: Path) -> None:
    assert open_checkpoint(saved.parent).path == saved


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


@pytest.mark.parametrize("damage", [truncate, scramble, Path.unlink])
def test_damaged_weights(
    saved: Path, tiny_config: RunConfig, damage: Callable[[Path], None]
) -> None:
    damage(saved / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"damaged.*model\.safetensors|model\.safetensors.*damaged"
    ):
        open_checkpoint(saved).load_model(TransformerXL(tiny_config.model))


def test_damaged_state(saved: Path) -> None:
    truncate(saved / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        open_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "another"}, "of another format; expected 'transformer-xl checkpoint'"),
        ({"format_version": 99}, "has format version 99; this package reads 1"),
        ({"step": None}, "damaged: it has no 'step'"),
    ],
)
def test_other_formats(saved: Path, change: dict[str, object], message: str) -> None:
    state = json.loads((saved / "state.json").read_text()) | change
    state = {key: value for key, value in state.items() if value is not None}
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(saved)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; expected a checkpoint directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"it has no state\.json"):
        open_checkpoint(tmp_path)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def torch_save(path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, path)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious()))


@pytest.mark.parametrize("write_pickle", [torch_save, plain_pickle])
@pytest.mark.parametrize("place", ["file", "folder", "weights"])
def test_pickles_are_refused_and_never_loaded(
    saved: Path,
    tiny_config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    write_pickle: Callable[[Path], None],
    place: str,
) -> None:
    monkeypatch.chdir(saved.parent)
    paths = {"file": Path("model.pt"), "folder": Path("run/model.pt")}
    path = paths.get(place, saved / "model.safetensors")
    path.parent.mkdir(exist_ok=True)
    write_pickle(path)
    with pytest.raises(CheckpointError, match="is a pickle, which is never loaded here"):
        open_checkpoint({"file": path, "folder": Path("run")}.get(place, saved)).load_model(
            TransformerXL(tiny_config.model)
        )
    assert not Path("unpickled").exists()


def test_a_header_as_long_as_a_pickles_mark_is_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    for padding in range(400, 700):  # header lengths around 0x0280, a pickle's first two bytes
        save_file({"weight": torch.zeros(1)}, path, {"padding": "x" * padding})
        checkpoint_files.refuse_pickle(path)
        if path.read_bytes()[:2] == b"\x80\x02":
            return
    pytest.fail("no header length began like a pickle")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_inner": 48}, r"CoreNet\.0\.weight is \[32, 16\] there, \[48, 16\] here"),
        ({"n_layer": 3}, "it has no 'layers.2"),
        ({"n_layer": 1}, "'layers.1.* is not in this one"),
    ],
)
def test_another_model(
    saved: Path, tiny_config: RunConfig, change: dict[str, int], message: str
) -> None:
    other = dataclasses.replace(tiny_config.model, **change)
    with pytest.raises(CheckpointError, match=f"is of another model: .*{message}"):
        open_checkpoint(saved).load_model(TransformerXL(other))


def test_another_configuration_is_named(saved: Path) -> None:
    other = ModelConfig(vocab_size=256)
    with pytest.raises(CheckpointError, match="n_layer 2 there, 12 here"):
        checkpoint.check_model(open_checkpoint(saved), other)


def test_another_number_of_processes(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="written by 1 processes and is resumed by 2"):
        open_checkpoint(saved).rank_tensors(1, 2)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "rank-0.safetensors"])
def test_full_disk_keeps_the_last_checkpoint(
    saved: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    flush = checkpoint_files.flush

    def full(path: Path) -> None:
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    for module in (checkpoint, checkpoint_files):
        monkeypatch.setattr(module, "flush", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; the last.*last, stays"):
        write(saved, tiny_config, step=8)
    assert open_checkpoint(saved).step == 7
    assert [path.name for path in saved.parent.iterdir()] == ["last"]


def test_a_real_limit_on_file_sizes_keeps_the_last_checkpoint(
    saved: Path, tiny_config: RunConfig
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            write(saved, tiny_config, step=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert open_checkpoint(saved).step == 7


# Saves step 2 over step 1 in a child that is killed at its n-th file operation, for every n.
KILL_AT_EVERY_MOMENT = """
import os, signal, sys
from pathlib import Path
import torch
from transformer_xl import checkpoint
from transformer_xl.config import DataConfig, ModelConfig, RunConfig
from transformer_xl.data.vocabularies import ByteVocabulary

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.listdir", "os.scandir"}
torch.set_num_threads(1)
directory = Path(sys.argv[1]) / "last"
config = RunConfig(model=ModelConfig(vocab_size=5), data=DataConfig(name="text"))
model = torch.nn.Linear(64, 64, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=1)

def save(step):
    with torch.no_grad():
        model.weight.fill_(step)
    checkpoint.save(directory, model=model, config=config, state={"step": step},
        vocabulary=ByteVocabulary(), optimizer=optimizer, rank_tensors={"at": torch.tensor(step)})

def child(moment):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in OPERATIONS:
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    save(2)
    os._exit(0)

steps = []
for moment in range(1, 200):
    save(1)
    pid = os.fork()
    if pid == 0:
        child(moment)
    survived = os.waitpid(pid, 0)[1] == 0
    found = checkpoint.open_checkpoint(directory)
    found.load_model(model)
    assert (model.weight == found.step).all() and found.rank_tensors(0, 1)["at"] == found.step
    checkpoint.tidy(directory)
    assert checkpoint.open_checkpoint(directory).step == found.step
    assert [path.name for path in directory.parent.iterdir()] == ["last"]
    steps.append(found.step)
    if survived:
        break
assert survived and set(steps) == {1, 2} and steps == sorted(steps), steps
print(len(steps))
"""


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILL_AT_EVERY_MOMENT, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15
