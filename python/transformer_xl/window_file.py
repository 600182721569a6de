"""The file of a `KeyValueWindow`: safetensors, with the configuration of its model, a checksum of
the weights and the lengths of the window as JSON in the header.

    layer.N   for each layer [B, 2 · n_head, n, d_head], keys before values
    position  int64 [B], the number of places in use
    start     int64 [B], the first token of each row; negative: it was dropped
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from transformer_xl.checkpoint_files import (
    CheckpointError,
    flush,
    open_tensors,
    read_tensors,
    unfinished,
    write_tensors,
)
from transformer_xl.config import ADJUSTABLE, INITIAL, ModelConfig
from transformer_xl.config_fields import differences, section_from_dict, to_dict
from transformer_xl.data.files import expanded, linked, parse_json, to_json
from transformer_xl.messages import shortened
from transformer_xl.model_guard import ModelGuard
from transformer_xl.nn.layer_weights import dense
from transformer_xl.nn.tensor_names import untied
from transformer_xl.nn.window_buffers import WindowBuffers
from txl_kernels.torch_private import tree_leaves

FORMAT = "transformer-xl window"
FORMAT_VERSION = 1
HEADING = "window"  # the entry of the header


class Saved(NamedTuple):
    """The arguments of `WindowBuffers.load`."""

    kv: list[Tensor]
    position: Tensor
    start: Tensor


def write(path: Path, buffers: WindowBuffers, guard: ModelGuard) -> None:
    """Write the file under another name and rename it; CheckpointError if that fails."""
    path = linked(expanded(path))
    heading = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": to_dict(guard.model.config),
        "weights": weights_checksum(guard.model),
        "lengths": guard.lengths,
    }
    tensors = {f"layer.{n}": kv[:, :, : buffers.end] for n, kv in enumerate(buffers.kv)}
    tensors |= {"position": buffers.position, "start": buffers.start}
    new = unfinished(path)
    try:
        write_tensors(new, tensors, {HEADING: to_json(heading)})
        new.replace(path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise CheckpointError(f"window not saved: {error}") from error


def read(path: Path, guard: ModelGuard) -> Saved:
    """The content of a file that was written for this model, with these lengths.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is of another model, of other
            weights or of other lengths.
    """
    path = expanded(path)
    file = open_tensors(path)
    if isinstance(file, CheckpointError):
        raise file
    metadata: dict[str, str] | None = file.metadata()  # type: ignore[no-untyped-call]
    _check_heading(path, _heading(path, metadata), guard)
    tensors = read_tensors(path, file)
    config = guard.model.config
    _check_tensors(path, tensors, config)
    kv = [tensors[f"layer.{n}"] for n in range(config.n_layer)]
    saved = Saved(kv, tensors["position"], tensors["start"])
    _check_rows(path, saved, guard)
    return saved


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of all weights, in hexadecimal."""
    digest = hashlib.sha256()
    state: dict[str, Tensor] = {}
    for name, entry in model.state_dict().items():  # some quantised layers have tuples of tensors
        leaves = [leaf for leaf in tree_leaves(entry) if isinstance(leaf, Tensor)]
        state |= {f"{name}|{i}": dense(name, leaf.detach()) for i, leaf in enumerate(leaves)}
    tensors, _ = untied(state)
    for name, tensor in sorted(tensors.items()):
        plain = (tensor.dequantize() if tensor.is_quantized else tensor).cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _heading(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        heading = parse_json((metadata or {}).get(HEADING, "null"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(heading, dict) or heading.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of another format; expected {FORMAT!r}")
    if (version := heading.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {shortened(version)}; this package reads {FORMAT_VERSION}"
        )
    return heading


def _check_heading(path: Path, heading: Mapping[str, Any], guard: ModelGuard) -> None:
    """Raises CheckpointError unless the file is of this model, its weights and lengths."""
    try:
        saved = section_from_dict(ModelConfig, heading.get("config") or {}, "config")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its configuration: {error}") from error
    ignored = ADJUSTABLE | INITIAL
    differing = [
        f"{name} {theirs} there, {ours} here"
        for name, (theirs, ours) in differences(saved, guard.model.config).items()
        if name not in ignored
    ]
    if differing:
        raise CheckpointError(f"{path} is of another model: {'; '.join(differing)}")
    if (found := heading.get("lengths")) != guard.lengths:
        raise CheckpointError(
            f"{path} is a window of other lengths: {shortened(found)} there, {guard.lengths} here; "
            "call set_lengths first"
        )
    if heading.get("weights") != weights_checksum(guard.model):
        raise CheckpointError(f"{path} was computed with other weights of this model")


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raises CheckpointError unless names, shapes and types are those of a window."""
    names = {f"layer.{n}" for n in range(config.n_layer)}
    if tensors.keys() != names | {"position", "start"}:
        raise CheckpointError(f"{path} is damaged: its tensors are {shortened(sorted(tensors))}")
    position, start = tensors["position"], tensors["start"]
    first = tensors["layer.0"]
    B, n = (first.shape[0], first.shape[2]) if first.dim() == 4 else (0, 0)
    expected: dict[str, tuple[int, ...]] = {"position": (B,), "start": (B,)}
    expected |= dict.fromkeys(names, (B, 2 * config.n_head, n, config.d_head))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        raise CheckpointError(f"{path} is damaged: its tensors have the shapes {shortened(shapes)}")
    kinds = {tensors[name].dtype for name in names}
    integers = position.dtype == start.dtype == torch.int64
    if len(kinds) > 1 or not first.is_floating_point() or not integers:
        raise CheckpointError(f"{path} is damaged: its tensors have the wrong dtypes")


def _check_rows(path: Path, saved: Saved, guard: ModelGuard) -> None:
    """Raises CheckpointError unless each row has all keys that its next token attends to."""
    position, start, mem_len = saved.position, saved.start, guard.lengths["mem_len"]
    least = mem_len if guard.model.config.first_memory == "zeros" else 0
    first_key = torch.maximum(start, position - mem_len)
    within = (position >= 0) & (position <= saved.kv[0].shape[2])
    if not bool((within & (position - start >= least) & (first_key >= 0)).all()):
        raise CheckpointError(f"{path} is damaged: its rows end outside of its keys")
