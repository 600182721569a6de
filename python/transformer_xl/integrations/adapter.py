"""Adapters and patched classes: how a class of another library gets a forward on the kernels.

An adapter belongs to one class. A module is patched by setting its `__class__` to a subclass whose
only difference is `forward`; a class is patched by setting its `forward`. Both use the function
that `patched_forward` returns.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from txl_kernels.transforms import is_exporting_onnx, is_jit_tracing

Forward = Callable[..., Any]
Versions = tuple[tuple[int, ...], tuple[int, ...]]

_TRACED = "it is traced for TorchScript or ONNX"


@dataclass(frozen=True)
class Lookalike:
    """How to recognise and to test other classes that have the parameters of an adapter's class.

    Several adapters may have the same parameters; lookalikes.py finds the one that agrees.

    Args:
        parameters: the names of all parameters, biases of linear layers left out.
        example: returns the positional and keyword arguments of a small call with random input.
    """

    parameters: frozenset[str]
    example: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


def always(forward: Forward) -> Callable[[Forward], Forward]:
    """The `build` of an adapter whose forward does not depend on the class's own."""
    return lambda original: forward


def nothing_to_refuse(module: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Adapter:
    """How one class is computed by the kernels.

    Args:
        family: the name that `patch` accepts.
        path: importable name of the class.
        versions: first and last checked version of the library, both as the first numbers of it:
            (5, 24), or (202511,) for a library that counts by month.
        build: returns the forward of served calls, given the class's own forward.
        unserved: a function with the arguments of forward; returns why the original code must run,
            or None.
        refuse: returns why a module of this class must be left alone, or None.
        lookalike: None where other classes cannot be recognised by their parameters.
        distribution: the name of the library on PyPI if it differs from that of its Python module.
        left_alone: why no module of this class is ever patched; empty for all other adapters.
        method: the method that is replaced; the other fields describe this method.
    """

    family: str
    path: str
    versions: Versions
    build: Callable[[Forward], Forward]
    unserved: Callable[..., str | None]
    refuse: Callable[[Any], str | None] = nothing_to_refuse
    lookalike: Lookalike | None = None
    distribution: str = ""
    left_alone: str = ""
    method: str = "forward"

    @property
    def library(self) -> str:
        """Its name on PyPI."""
        return self.distribution or self.path.partition(".")[0]

    def check_version(self) -> None:
        """Raises ValueError, with one sentence, where the installed version was not checked."""
        first, last = (".".join(map(str, version)) for version in self.versions)
        checked = f"{self.library} {first}" + ("" if first == last else f" to {last}")
        try:
            installed = importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"patch: the family {self.family} needs {checked}, which is not installed."
            ) from None
        numbers = tuple(int(number) for number in re.findall(r"\d+", installed))
        if not self.versions[0] <= numbers[: len(self.versions[0])] <= self.versions[1]:
            raise ValueError(
                f"patch: the family {self.family} was checked with {checked}, got "
                f"{self.library} {installed}; force=True patches it nevertheless."
            )

    def load(self) -> type[nn.Module]:
        """The class, imported."""
        module, _, name = self.path.rpartition(".")
        try:
            loaded: type[nn.Module] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"patch: the family {self.family} could not be imported: {error}."
            ) from error
        return loaded


def is_traced() -> bool:
    """Whether operators are recorded for TorchScript or ONNX.

    Adapters look at values of masks, and a trace would keep what they found for all later calls.
    """
    return is_jit_tracing() or is_exporting_onnx()


def path_of(found: type) -> str:
    """The importable name of a class."""
    return f"{found.__module__}.{found.__qualname__}"


def left_alone(family: str, path: str, versions: Versions, why: str) -> Adapter:
    """An adapter that only recognises a class: `report` returns the reason, nothing is patched."""
    return Adapter(family, path, versions, lambda own: own, lambda *_, **__: why, left_alone=why)


# The calls of each module that ran the original code, by the adapter's path and the reason; the
# calls that are part of compiled programs by the module's class.
fallbacks: WeakKeyDictionary[nn.Module | type[nn.Module], Counter[tuple[str, str]]] = (
    WeakKeyDictionary()
)
# Every module that was patched by its class, copies and unpickled ones included.
patched_modules: WeakSet[nn.Module] = WeakSet()
# The own method of the classes that are patched for all their instances.
own_forwards: dict[type[nn.Module], Forward] = {}

_subclasses: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def patched_forward(
    adapter: Adapter, original: Forward, refuse: Callable[[Any], str | None] | None = None
) -> Forward:
    """A forward with the signature of `original`, which it calls where a call is not served.

    Args:
        refuse: replaces that of the adapter.
    """
    served, unserved = adapter.build(original), adapter.unserved
    refuse = refuse or adapter.refuse

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A class is patched for modules of every configuration.
        reason = _TRACED if is_traced() else refuse(self)
        if reason is None:
            reason = unserved(self, *args, **kwargs)
        if reason is None:
            return served(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            fallbacks.setdefault(self, Counter())[adapter.path, reason] += 1
        return original(self, *args, **kwargs)

    forward.adapter, forward.refuse = adapter, refuse  # type: ignore[attr-defined]
    return forward


def counted(module: nn.Module | type[nn.Module], adapter: Adapter) -> Counter[str]:
    """The calls of a module that ran the original code instead of this adapter, by reason."""
    calls = fallbacks.get(module, Counter())
    return Counter({why: n for (path, why), n in calls.items() if path == adapter.path})


def adapter_of(module: nn.Module, method: str = "") -> Adapter | None:
    """The adapter that computes this module now; None where its own code does.

    Args:
        method: by default the one that is replaced in its class, or `forward`.
    """
    method = method or getattr(type(module), "patched_method", "forward")
    if method in module.__dict__:
        return None
    adapter: Adapter | None = getattr(getattr(type(module), method, None), "adapter", None)
    return adapter


def patched_class(original: type[nn.Module], adapter: Adapter) -> type[nn.Module]:
    """The subclass of `original` whose forward calls the kernels; always the same one.

    It has the name and the module of `original`, since libraries look both up. Pickles and copies
    therefore refer to `original` and `adapter` instead, through `__reduce_ex__`.
    """
    key = original, adapter.path  # modules of one class may agree with different adapters
    if key not in _subclasses:
        forward = own_forwards.get(original, getattr(original, adapter.method))

        def reduce(self: nn.Module, protocol: Any) -> Any:
            reduced: Any = super(made, self).__reduce_ex__(max(2, protocol))
            if type(self) is not made:  # a class that FSDP has derived from this one
                return reduced
            return _restore, (original, adapter.family, adapter.path), *reduced[2:]

        members = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": reduce,
            adapter.method: patched_forward(adapter, forward),
            "own_class": original,
            "patched_method": adapter.method,
        }
        made: type[nn.Module] = type(original.__name__, (original,), members)
        _subclasses[key] = made
    return _subclasses[key]


def own_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a patched module had before; None where its class is not a patched one."""
    return vars(type(module)).get("own_class")


def _restore(original: type[nn.Module], family: str, path: str) -> nn.Module:
    """An empty patched module, to which copying and unpickling add the state."""
    from transformer_xl.integrations.families import FAMILIES  # it imports this module

    adapter = next(a for a in FAMILIES[family] if a.path == path)
    made = patched_class(original, adapter)
    module: nn.Module = made.__new__(made)
    patched_modules.add(module)
    return module
