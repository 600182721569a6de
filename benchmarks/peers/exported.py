"""Hugging Face's Parakeet encoder in ONNX Runtime and OpenVINO, exported for one length of audio.

The length is fixed, so that both can compute the position tables in advance. Exported files stay
in `build/benchmarks`, because every process that measures memory needs them again.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import room
from benchmarks.cases import PeerUnavailableError
from benchmarks.peers import parakeet
from benchmarks.peers.parakeet import EncoderShape

FOLDER = Path(__file__).parents[2] / "build" / "benchmarks"
Run = Callable[[], Tensor]


def onnx_runtime(shape: EncoderShape, precision: str) -> Run:
    """A run of the encoder in ONNX Runtime.

    Args:
        precision: "float32", or "int8": dynamic quantisation by ONNX Runtime's own tool.
    """
    runtime = _import("onnxruntime")
    path = _int8_file(shape) if precision == "int8" else _float32_file(shape)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: parakeet.features(shape).numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def openvino(shape: EncoderShape, precision: str) -> Run:
    """A run of the encoder in OpenVINO.

    Args:
        precision: "float32", "bfloat16", or "int8": weights compressed by NNCF; OpenVINO then
            chooses the type of the activations.
    """
    library = _import("openvino")
    model = library.Core().read_model(_float32_file(shape))
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if precision == "int8":
        nncf = _import("nncf")
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    else:
        types = {"float32": library.Type.f32, "bfloat16": library.Type.bf16}
        options["INFERENCE_PRECISION_HINT"] = types[precision]
    request = library.compile_model(model, "CPU", options).create_infer_request()
    features = parakeet.features(shape).numpy()

    def run() -> Tensor:
        request.infer([features], share_inputs=True)
        return torch.from_numpy(request.get_output_tensor().data)

    return run


def n_bytes(shape: EncoderShape) -> int:
    """An estimate of the peak: the graph, the packed weights, the largest float32 tensors."""
    return 3 * 4 * shape.n_weight + max(shape.score_bytes, shape.subsampling_bytes)


class _Output(nn.Module):
    """The encoder as a function of a tensor that returns one."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.encoder(features).last_hidden_state
        return out


def _float32_file(shape: EncoderShape) -> Path:
    for needed in ("onnx", "onnxscript"):
        _import(needed)

    def write(path: Path) -> None:
        room.require(n_bytes(shape))
        module, inputs = _Output(parakeet.encoder(shape)).eval(), (parakeet.features(shape),)
        with torch.no_grad():
            torch.onnx.export(module, inputs, path, dynamo=True, external_data=True, verbose=False)

    return _kept(f"{_stem(shape)}-float32", write)


def _int8_file(shape: EncoderShape) -> Path:
    source = _float32_file(shape)

    def write(path: Path) -> None:
        room.require(n_bytes(shape))
        quantization = _import("onnxruntime.quantization")
        quantization.quantize_dynamic(
            source,
            path,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=True,
        )

    return _kept(f"{_stem(shape)}-int8", write)


def _stem(shape: EncoderShape) -> str:
    """All that determines the file: the weights follow from the sizes."""
    sizes = (value for name, value in dataclasses.asdict(shape).items() if name != "name")
    versions = (_import("transformers").__version__, _import("onnxscript").__version__)
    return "-".join(map(str, ("parakeet", *sizes, *versions, torch.__version__)))


def _kept(stem: str, write: Callable[[Path], None]) -> Path:
    """The file of a folder named `stem`, which `write` makes, given its path, if it is absent."""
    folder = FOLDER / stem
    if not folder.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=FOLDER))
        try:
            write(unfinished / "encoder.onnx")
            unfinished.replace(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder / "encoder.onnx"


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PeerUnavailableError(
            f"this environment has no {name} ({error}): make bench-dropins-env"
        ) from None
