"""Files of a `KeyValueWindow`: the same window after loading, or one clear error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transformer_xl.checkpoint_files import CheckpointError
from transformer_xl.config import ModelConfig
from transformer_xl.key_value_window import KeyValueWindow
from transformer_xl.model import TransformerXL
from transformer_xl.window_file import weights_checksum

SMALL = ModelConfig(
    vocab_size=40, n_layer=2, d_model=12, n_head=2, d_head=5, d_inner=16, mem_len=7, init_std=0.3
)
Header = dict[str, str]
Tensors = dict[str, torch.Tensor]


def built(seed: int = 0, **options: Any) -> TransformerXL:
    torch.manual_seed(seed)
    return TransformerXL(dataclasses.replace(SMALL, **options)).eval()


@torch.no_grad()
def read(model: TransformerXL, window: KeyValueWindow, *lengths: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = window.batch_size
    hidden = [
        model(torch.randint(40, (rows, length), generator=generator), window).hidden
        for length in lengths
    ]
    return torch.cat(hidden, dim=1)


def saved(path: Path, model: TransformerXL, **options: Any) -> KeyValueWindow:
    window = KeyValueWindow.empty(model, 3, **options)
    read(model, window, 4, 2, 9, seed=1)
    window.reset(torch.tensor([False, True, False]))
    read(model, window, 1, seed=2)
    window.save(path)
    return window


@pytest.mark.parametrize("first_memory", ["empty", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_window_continues(tmp_path: Path, first_memory: str, dtype: torch.dtype) -> None:
    model = built(first_memory=first_memory)
    path = tmp_path / "a.window"
    window = saved(path, model, dtype=dtype, slack=9)
    loaded = KeyValueWindow.load(path, model)
    assert loaded.dtype == dtype
    for each in (window, loaded):
        each.crop(torch.tensor([1, 0, 1]))
    found, expected = (read(model, each, 1, 3, 12, 1, seed=3) for each in (loaded, window))
    torch.testing.assert_close(found, expected)
    assert [file.name for file in tmp_path.iterdir()] == ["a.window"]


def test_another_process_has_the_same_model(tmp_path: Path) -> None:
    window = saved(tmp_path / "w", built())
    model = built(dropout=0.5, mem_len=20)
    model.set_lengths(mem_len=7)
    loaded = KeyValueWindow.load(str(tmp_path / "w"), model)
    torch.testing.assert_close(
        read(model, loaded, 5, seed=4), read(window._guard.model, window, 5, seed=4)
    )


def test_a_window_of_no_tokens(tmp_path: Path) -> None:
    model = built()
    KeyValueWindow.empty(model, 2).save(tmp_path / "w")
    loaded = KeyValueWindow.load(tmp_path / "w", model)
    expected = read(model, KeyValueWindow.empty(model, 2), 5, seed=4)
    torch.testing.assert_close(read(model, loaded, 5, seed=4), expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: built(d_head=6), "w is of another model: d_head 5 there, 6 here"),
        (lambda: built(seed=1), "w was computed with other weights of this model"),
        (lambda: built(mem_len=8), "w is a window of other lengths: .*7.* there, .*8.* here"),
        (lambda: built(clamp_len=3), "w is a window of other lengths"),
        (lambda: built(same_length=True), "w is a window of other lengths"),
        (lambda: built().double(), "w was computed with other weights"),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, model: Callable[[], TransformerXL], message: str
) -> None:
    saved(tmp_path / "w", built())
    with pytest.raises(CheckpointError, match=message):
        KeyValueWindow.load(tmp_path / "w", model())


def edited(path: Path, edit: Callable[[Tensors, dict[str, Any]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        heading = json.loads(file.metadata()["window"])
    tensors = load_file(path)
    edit(tensors, heading)
    save_file(tensors, path, {"window": json.dumps(heading)})


def drop_a_layer(tensors: Tensors, heading: dict[str, Any]) -> None:
    del tensors["layer.1"]


def shorten_a_layer(tensors: Tensors, heading: dict[str, Any]) -> None:
    tensors["layer.1"] = tensors["layer.1"][:, :, 1:].contiguous()


def change_a_dtype(tensors: Tensors, heading: dict[str, Any]) -> None:
    tensors["layer.1"] = tensors["layer.1"].double()


def make_integers(tensors: Tensors, heading: dict[str, Any]) -> None:
    tensors |= {f"layer.{n}": tensors[f"layer.{n}"].long() for n in range(2)}


def end_outside(tensors: Tensors, heading: dict[str, Any]) -> None:
    tensors["position"][0] = 10_000


def start_after_end(tensors: Tensors, heading: dict[str, Any]) -> None:
    tensors["start"][0] = tensors["position"][0] + 1


def flatten_positions(tensors: Tensors, heading: dict[str, Any]) -> None:
    tensors["position"] = tensors["position"][0]


def add_a_dimension(tensors: Tensors, heading: dict[str, Any]) -> None:
    tensors |= {name: tensors[name][:, None] for name in ("position", "start")}


def drop_a_row(tensors: Tensors, heading: dict[str, Any]) -> None:
    tensors |= {name: tensors[name][1:] for name in ("position", "start")}


def need_dropped_keys(tensors: Tensors, heading: dict[str, Any]) -> None:
    tensors["position"][0], tensors["start"][0] = 3, -4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop_a_layer, "is damaged: its tensors are"),
        (shorten_a_layer, "is damaged: its tensors have the shapes"),
        (flatten_positions, "is damaged: its tensors have the shapes"),
        (add_a_dimension, "is damaged: its tensors have the shapes"),
        (drop_a_row, "is damaged: its tensors have the shapes"),
        (need_dropped_keys, "is damaged: its rows end outside of its keys"),
        (change_a_dtype, "is damaged: its tensors have the wrong dtypes"),
        (make_integers, "is damaged: its tensors have the wrong dtypes"),
        (end_outside, "is damaged: its rows end outside of its keys"),
        (start_after_end, "is damaged: its rows end outside of its keys"),
        (lambda _, heading: heading.update(format="another"), "is of another format"),
        (lambda _, heading: heading.update(format_version=2), "format version 2; .* reads 1"),
        (lambda _, heading: heading.update(config=3), "is damaged: its configuration"),
        (lambda _, heading: heading.pop("config"), "is damaged: its configuration"),
        (lambda _, heading: heading.pop("lengths"), "is a window of other lengths: None there"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, edit: Callable[[Tensors, dict[str, Any]], None], message: str
) -> None:
    model = built()
    saved(tmp_path / "w", model)
    edited(tmp_path / "w", edit)
    with pytest.raises(CheckpointError, match=message):
        KeyValueWindow.load(tmp_path / "w", model)


def test_a_row_without_its_memory_of_zeros_is_refused(tmp_path: Path) -> None:
    model = built(first_memory="zeros")
    saved(tmp_path / "w", model)

    def start_late(tensors: Tensors, heading: dict[str, Any]) -> None:
        tensors["start"][1] = tensors["position"][1] - 6

    edited(tmp_path / "w", start_late)
    with pytest.raises(CheckpointError, match="is damaged: its rows end outside of its keys"):
        KeyValueWindow.load(tmp_path / "w", model)


def test_other_files_are_refused(tmp_path: Path) -> None:
    model = built()
    path = tmp_path / "w"
    with pytest.raises(CheckpointError, match=r"w cannot be read: .*No such file"):
        KeyValueWindow.load(path, model)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="w is of another format"):
        KeyValueWindow.load(path, model)
    save_file({"x": torch.ones(2)}, path, {"window": "{"})
    with pytest.raises(CheckpointError, match="w is damaged: it is not JSON"):
        KeyValueWindow.load(path, model)
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="w is a pickle"):
        KeyValueWindow.load(path, model)
    saved(path, model)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="w is damaged"):
        KeyValueWindow.load(path, model)


def test_a_failed_save_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built()
    window = saved(tmp_path / "w", model)
    before = (tmp_path / "w").read_bytes()
    with pytest.raises(CheckpointError, match=r"window not saved: .*No such file"):
        window.save(tmp_path / "absent" / "w")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"window not saved: .*Is a directory"):
        window.save(tmp_path / "folder")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=r"window not saved: .*No space left"):
        window.save(tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "w"]


def test_a_window_of_changed_weights_is_not_saved(tmp_path: Path) -> None:
    model = built()
    window = KeyValueWindow.empty(model, 1)
    with torch.no_grad():
        model.layers[0].dec_attn.r_net.weight.mul_(2)
    with pytest.raises(ValueError, match="weights of the model have changed"):
        window.save(tmp_path / "w")
    assert not list(tmp_path.iterdir())


def test_the_checksum_depends_on_every_weight() -> None:
    model = built()
    found = {weights_checksum(model)}
    assert weights_checksum(built()) in found
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        found.add(weights_checksum(model))
    assert len(found) == 1 + len(list(model.parameters()))
    assert len({weights_checksum(built().to(dtype)) for dtype in (torch.half, torch.bfloat16)}) == 2
