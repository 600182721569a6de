"""Hugging Face's Parakeet: whole encoders, one Conformer block, and the attention between its
projections."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.cases import OURS, PeerUnavailableError
from benchmarks.cases.dropins import HF, DropInCase, patched_if, some_rows, without_gradients
from benchmarks.peers import exported, parakeet
from benchmarks.peers.parakeet import EncoderShape

ONNX, OPENVINO = "onnxruntime", "openvino"
# Ours in other forms: compiled, with the convolutions' channels last, with float32 weights.
COMPILED, CHANNELS_LAST, FLOAT32 = "compiled", "channels-last", "ours-float32"

CHECKED_SECONDS = 30  # of audio, compared with the unpatched class in float64
# The largest allowed relative error by Frobenius norm; "int8" also quantises activations.
GATE = {"float32": 1e-5, "bfloat16": 5e-2, "int8": 1e-1}
PEERS = {
    "float32": (HF, ONNX, OPENVINO),
    "bfloat16": (HF, OPENVINO),
    "int8": (ONNX, OPENVINO),
}
YARDSTICKS = {
    "float32": (COMPILED,),
    "bfloat16": (FLOAT32, COMPILED),
    "int8": (FLOAT32, COMPILED),
}
BLOCK, CORE = "block", "core"


@dataclasses.dataclass(frozen=True)
class EncoderCase(DropInCase):
    """A whole encoder without gradients. Ours is patched, with weights of one precision.

    Attributes:
        precision: "float32", "bfloat16" (weights and activations), or "int8": torchao's int8
            weights and dynamically quantised activations in all linear layers.
        with_channels_last: also compare with subsampling convolutions in that memory format.
    """

    shape: EncoderShape
    precision: str = "float32"
    with_channels_last: bool = False

    @property
    def name(self) -> str:
        return f"dropin/{self.shape.name}/{self.precision}/{self.direction}"

    @property
    def peers(self) -> tuple[str, ...]:  # type: ignore[override]
        return PEERS[self.precision]

    @property
    def yardsticks(self) -> tuple[str, ...]:  # type: ignore[override]
        channels_last = (CHANNELS_LAST,) if self.with_channels_last else ()
        return (*YARDSTICKS[self.precision], *channels_last)

    @property
    def in_process(self) -> tuple[str, ...]:  # type: ignore[override]
        return (OURS, *self.peers)

    def run(self, name: str) -> Callable[[], Tensor]:
        if name == ONNX:
            return exported.onnx_runtime(self.shape, self.precision)
        if name == OPENVINO:
            return exported.openvino(self.shape, self.precision)
        model = patched_if(name != HF, parakeet.encoder(self.shape))
        features = parakeet.features(self.shape)
        if self.precision == "bfloat16" and name != FLOAT32:
            model, features = parakeet.converted(model, torch.bfloat16), features.bfloat16()
        if self.precision == "int8" and name != FLOAT32:
            quantise(model)
        if name == CHANNELS_LAST:  # in a copy: `to` changes the parameters themselves
            convolutions = copy.deepcopy(model.subsampling)
            model.subsampling = convolutions.to(memory_format=torch.channels_last)
        if name == COMPILED:
            model = _compiled(model)
        return without_gradients(lambda: model(features).last_hidden_state)

    def n_bytes(self, name: str) -> int:
        if name in (ONNX, OPENVINO):
            return exported.n_bytes(self.shape)
        n_byte = 2 if self.precision == "bfloat16" else 4
        converted = {"float32": 0, "bfloat16": 2, "int8": 1}[self.precision]
        weights = self.shape.n_weight * (4 + converted)
        hidden = 4 * self.shape.n_frame * self.shape.d_inner * n_byte
        if name == HF:
            largest = max(self.shape.score_bytes, self.shape.subsampling_bytes)
            return weights + hidden + largest * n_byte // 4
        return weights + hidden + (self.shape.subsampling_bytes if name == COMPILED else 0)

    def check_result(self, name: str) -> None:
        """Ours: short audio against float64, and at full length some queries of the attention.

        The others are compared with ours in float32 at full length.
        """
        gate = GATE[self.precision]
        if name == OURS:
            short = dataclasses.replace(self, shape=self.shape.cut(CHECKED_SECONDS))
            self.compare(name, short.run(name)(), _reference(short.shape), gate)
            PartCase(shape=self.shape, part=CORE).check(OURS)
        elif name != FLOAT32:  # which is ours of another case
            self.compare(name, self.run(name)(), _ours(self.shape).double(), gate)

    def tiny(self) -> EncoderCase:
        return dataclasses.replace(self, shape=self.shape.tiny())


@dataclasses.dataclass(frozen=True)
class PartCase(DropInCase):
    """One Conformer block ("block"), or an attention without its projections ("core")."""

    shape: EncoderShape
    part: str

    @property
    def name(self) -> str:
        return f"dropin/{self.shape.name}/float32/{self.direction}"

    @property
    def flop(self) -> int | None:  # type: ignore[override]
        """Of the core: three products for each query and key."""
        return 6 * self.shape.d_model * self.shape.n_frame**2 if self.part == CORE else None

    def run(self, name: str) -> Callable[[], Tensor]:
        if self.part == CORE:
            core, x = parakeet.core(self.shape, parakeet.core_inputs(self.shape))
            patched_if(name == OURS, core)
            return without_gradients(lambda: core(x, x)[0])
        block, x, positions = self._block()
        patched_if(name == OURS, block)
        return without_gradients(lambda: block(x, position_embeddings=positions))

    def n_bytes(self, name: str) -> int:
        inputs = 4 * self.shape.n_frame * (8 * self.shape.d_model + 2 * self.shape.d_inner)
        weights = 0 if self.part == CORE else 2 * 4 * self.shape.n_weight
        return inputs + weights + (self.shape.score_bytes if name == HF else 0)

    def check_result(self, name: str) -> None:
        """The core: some queries by their formula. The block: the unpatched class in float64."""
        actual = self.run(name)()
        if self.part == CORE:
            rows = some_rows(self.shape.n_frame)
            expected = parakeet.core_rows(parakeet.core_inputs(self.shape), rows)
            self.compare(name, actual[0, rows], expected, GATE["float32"])
        else:
            self.compare(name, actual, _block_reference(self), GATE["float32"])

    def tiny(self) -> PartCase:
        return dataclasses.replace(self, shape=self.shape.tiny())

    def _block(self) -> tuple[Any, Tensor, Tensor]:
        """A block, an input and the position table."""
        encoder = parakeet.encoder(dataclasses.replace(self.shape, n_layer=1))
        x = parakeet.core_inputs(self.shape).q
        return encoder.layers[0], x, encoder.encode_positions(x)


def quantise(model: nn.Module) -> None:
    """Replace the weights of the linear layers by torchao's int8 weights.

    The projection of the position table stays: patched models keep its result.

    Raises:
        PeerUnavailableError: this environment has no torchao.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        raise PeerUnavailableError(
            "this environment has no torchao: make bench-dropins-env"
        ) from None

    def is_chosen(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and not path.endswith("relative_k_proj")

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=is_chosen)


def _compiled(model: Any) -> Any:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise PeerUnavailableError("torch.compile needs a C++ compiler, and there is none")
    torch.compiler.reset()
    return torch.compile(model, dynamic=False)


@functools.lru_cache(maxsize=1)
def _reference(shape: EncoderShape) -> Tensor:
    return parakeet.reference(shape)


@functools.lru_cache(maxsize=1)
def _ours(shape: EncoderShape) -> Tensor:
    return EncoderCase(shape=shape).run(OURS)()


@functools.lru_cache(maxsize=1)
def _block_reference(case: PartCase) -> Tensor:
    block, x, positions = case._block()
    block = copy.deepcopy(block).double()
    with torch.no_grad():
        out: Tensor = block(x.double(), position_embeddings=positions.double())
    return out


LENGTHS = {"30s": 30, "2min": 120, "5min": 300, "10min": 600, "20min": 1200}  # in seconds
_SMALL = {"d_model": 512, "d_inner": 2048}


def parakeet_cases() -> list[DropInCase]:
    """Two layers at every length, all 24 where a run takes less than a minute, and their parts.

    bfloat16 only on processors that multiply it.
    """
    features = machine.processor().features
    is_bfloat16 = bool({"avx512_bf16", "amx_bf16"} & set(features))
    precisions = ("float32", "int8", *(["bfloat16"] if is_bfloat16 else []))
    shapes = [
        *(EncoderShape(name=f"parakeet_encoder_{x}", seconds=LENGTHS[x]) for x in LENGTHS),
        *(all_layers(length) for length in ("2min", "5min")),
    ]
    small = [
        EncoderShape(name=f"parakeet_small_{x}", seconds=LENGTHS[x], **_SMALL)
        for x in ("2min", "5min")
    ]
    parts = [
        PartCase(EncoderShape(name=f"parakeet_{part}_5min", seconds=LENGTHS["5min"]), part)
        for part in (CORE, BLOCK)
    ]
    encoders = [EncoderCase(shape, precision) for shape in shapes for precision in precisions]
    return [*parts, *encoders, *(EncoderCase(x, with_channels_last=True) for x in small)]


def all_layers(length: str) -> EncoderShape:
    """The encoder of NVIDIA's Parakeet with 0.6 billion parameters."""
    return EncoderShape(name=f"parakeet_24_layers_{length}", seconds=LENGTHS[length], n_layer=24)
