"""Imports the encoders of an installed nemo-toolkit without the packages that it would need for
training, data and text, such as lightning, lhotse and librosa."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Imported by the files below, not used by the encoders.
ABSENT = ("einops", "lhotse", "librosa", "lightning", "onnx", "sentencepiece")
# Packages whose own __init__ imports the models, data sets and losses of NeMo.
BARE = (
    "nemo.core",
    "nemo.core.classes",
    "nemo.core.classes.modelPT",
    "nemo.core.connectors",
    "nemo.collections.asr",
    "nemo.collections.asr.models",
    "nemo.collections.asr.models.configs",
    "nemo.collections.asr.modules",
    "nemo.collections.asr.modules.transformer",
    "nemo.collections.asr.parts.mixins",
    "nemo.collections.asr.parts.utils",
    "nemo.collections.audio",
    "nemo.collections.common",
)


class _Names(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder


class Placeholder(metaclass=_Names):
    """Stands for every name of an absent package."""


class _AbsentModule(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        return Placeholder.__getattr__(name)  # type: ignore[no-any-return, attr-defined]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the absent packages; it is the last one, so installed packages are the real ones."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class StreamingConfig:
    """NeMo's CacheAwareStreamingConfig, whose file imports all decoders; the encoder sets it."""


def load() -> Any:
    """The module of ConformerEncoder; needs nemo-toolkit, omegaconf, hydra-core and wrapt."""
    name = "nemo.collections.asr.modules.conformer_encoder"
    if name not in sys.modules:
        importlib.import_module("nemo.utils")
        finder = _Finder()
        sys.meta_path.append(finder)
        try:
            _add_bare_packages()
            importlib.import_module(name)
        finally:
            sys.meta_path.remove(finder)
    return sys.modules[name]


def _add_bare_packages() -> None:
    found = importlib.util.find_spec("nemo")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    for name in BARE:
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
        parent, _, child = name.rpartition(".")
        setattr(importlib.import_module(parent), child, package)
    sys.modules["nemo.collections.asr.models.configs"].CacheAwareStreamingConfig = StreamingConfig
    sys.modules["nemo.core.classes.modelPT"].ModelPT = Placeholder
    common = importlib.import_module("nemo.core.classes.common")
    sys.modules["nemo.core.classes"].typecheck = common.typecheck


SIZES = {
    "feat_in": 16,
    "n_layers": 2,
    "d_model": 24,
    "n_heads": 3,
    "subsampling": "dw_striding",
    "subsampling_factor": 8,
    "subsampling_conv_channels": 6,
    "conv_kernel_size": 5,
    "ff_expansion_factor": 2,
    "pos_emb_max_len": 64,
}
CAUSAL = {
    "causal_downsampling": True,
    "conv_context_size": "causal",
    "conv_norm_type": "layer_norm",
}
RIGHT_CONTEXT = {"att_context_style": "chunked_limited_with_rc", "conv_context_style": "dcc"}
LOCAL = {"self_attention_model": "rel_pos_local_attn"}


def _chunked(left: int, right: int) -> dict[str, Any]:
    return {"att_context_style": "chunked_limited", "att_context_size": [left, right], **CAUSAL}


def _local(left: int, right: int) -> dict[str, Any]:
    return {**LOCAL, "att_context_size": [left, right]}


# Arguments of ConformerEncoder; `default` is the context that a user sets afterwards.
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full-sdpa": {"use_pytorch_sdpa": True},
    "full-tied_biases": {"untie_biases": False},
    "full-reduction": {"reduction": "pooling", "reduction_position": 0, "reduction_factor": 2},
    "window": {"att_context_size": [4, 2]},
    "window-causal": {"att_context_size": [-1, 0], **CAUSAL},
    "window-sdpa": {"att_context_size": [4, 2], "use_pytorch_sdpa": True},
    "chunked": _chunked(6, 2),
    "chunked-all_left": _chunked(-1, 2),
    "chunked-one_frame": _chunked(4, 0),
    "right_context-full": {**RIGHT_CONTEXT},
    "right_context": {**RIGHT_CONTEXT, "default": [4, 3, 2]},
    "right_context-long": {**RIGHT_CONTEXT, "default": [3, 2, 40]},
    "local": _local(4, 4),
    "local-left": _local(5, 1),
    "local-more_left": _local(5, 3),
    "local-right": _local(1, 4),
    "local-more_right": _local(3, 4),
    "local-causal": {**_local(6, 0), **CAUSAL},
}


def build(name: str, seed: int = 0, **options: Any) -> Any:
    """The encoder of a case in eval mode; all weights are random and large enough to matter."""
    sizes = {**SIZES, **CASES[name], **options}
    default = sizes.pop("default", None)
    torch.manual_seed(seed)
    encoder = load().ConformerEncoder(**sizes).eval()
    if default is not None:
        encoder.set_default_att_context_size(default)
    return with_random_weights(encoder)


def with_random_weights(module: Any) -> Any:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return module


def features(lengths: list[int]) -> dict[str, Tensor]:
    """Eight mel frames for each frame of the encoder."""
    n_mel = torch.tensor(lengths) * 8
    generator = torch.Generator().manual_seed(1)
    signal = torch.randn(len(lengths), 16, int(n_mel.max()), generator=generator)
    return {"audio_signal": signal, "length": n_mel}


def results(encoder: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of all frames, of padding too, and the gradients of all parameters from them."""
    out, lengths = encoder(**inputs)
    encoder.zero_grad()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = {f"d{n}": p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "lengths": lengths.float(), **grads}


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """|actual - expected| / |expected|; of gradients of almost 0 relative to the largest one."""
    assert actual.keys() == expected.keys()
    largest = max(float(x.norm()) for x in expected.values())
    return {
        name: float((actual[name] - x).norm())
        / (float(x.norm()) + (0.0 if name == "out" else 1e-2 * largest))
        for name, x in expected.items()
    }


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], error: float) -> None:
    for name, found in errors(actual, expected).items():
        assert found <= error, f"{name}: {found}"
