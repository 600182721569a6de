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

from benchmarks.cases import PeerUnavailableError

VERSION = "3.0.0"
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
    """The module of ConformerEncoder; needs nemo-toolkit, omegaconf, hydra-core and wrapt.

    Raises:
        PeerUnavailableError: this environment has no nemo-toolkit.
    """
    if importlib.util.find_spec("nemo") is None:
        raise PeerUnavailableError(
            f"this environment has no nemo-toolkit {VERSION}: make bench-dropins-env"
        )
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
