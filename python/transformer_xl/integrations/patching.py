"""`patch`: one line puts the kernels into a model of another library."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from transformer_xl.integrations import adapter as adapters
from transformer_xl.integrations import lookalikes
from transformer_xl.integrations.adapter import Adapter
from transformer_xl.integrations.families import FAMILIES
from transformer_xl.integrations.report import Entry, Report
from txl_kernels.torch_private import is_compiled_in_place


def patch(target: nn.Module | str, *, force: bool = False) -> Report:
    """Computes the attention of a model, or of all models of a family, by the kernels.

    Parameters, the state dict and signatures do not change. A call that the kernels do not serve
    runs the original code; `report` counts these calls. Patching twice equals patching once.

    Order: `patch` comes before `torch.compile`, DistributedDataParallel, FullyShardedDataParallel
    and `fully_shard`, and before or after `model.to`, a checkpoint and PEFT's adapters.

    Args:
        target: a model, or the name of a family, which patches its classes for all their
            instances, present and future ones.
        force: patch versions of a library that were not checked, too.

    Returns:
        Each module that was patched, or left alone, with the reason.

    Raises:
        ValueError: no module of the model has a known class, the family is unknown, the version
            of the library was not checked, or the model was wrapped or compiled before.
    """
    if isinstance(target, str):
        _patch_classes([adapter for adapter in _family(target) if not adapter.left_alone], force)
        return report(target)
    _check_order("patch", target)
    entries, known = [], list(_known(target))
    if not known:
        raise ValueError(
            f"patch: {type(target).__name__} has no module of a known class; the families are "
            f"{', '.join(FAMILIES)}."
        )
    if not force:
        for adapter in {adapter for _, module, adapter in known if _is_named(module, adapter)}:
            adapter.check_version()
    for name, module, adapter in known:
        reason = _refusal(module, adapter)
        if reason is None and adapters.adapter_of(module, adapter.method) is None:
            module.__class__ = adapters.patched_class(type(module), adapter)
            adapters.patched_modules.add(module)
        entries.append(_entry(name, module, adapter, reason))
    return Report(tuple(entries))


def _patch_classes(family: Iterable[Adapter], force: bool) -> None:
    """All classes of the family, or none where one was not checked or cannot be imported."""
    for adapter in family:
        if not force:
            adapter.check_version()
    for adapter, found in [(adapter, adapter.load()) for adapter in family]:
        if found not in adapters.own_forwards:
            own = adapters.own_forwards[found] = getattr(found, adapter.method)
            refuse = lookalikes.refuse_of_class(adapter, found, own)
            setattr(found, adapter.method, adapters.patched_forward(adapter, own, refuse))


def unpatch(target: nn.Module | str | None = None) -> Report:
    """Gives a model, a family, or with None everything, its own code again.

    Returns:
        The report after it.

    Raises:
        ValueError: the family is unknown, or the model was wrapped or compiled after `patch`.
    """
    if isinstance(target, nn.Module):
        _check_order("unpatch", target)
        modules: Iterable[nn.Module] = target.modules()
    else:
        modules = list(adapters.patched_modules) if target is None else ()
        names = FAMILIES if target is None else (target,)
        methods = {adapter.path: adapter.method for name in names for adapter in _family(name)}
        for found, forward in list(adapters.own_forwards.items()):
            path = adapters.path_of(found)
            if path in methods:
                setattr(found, methods[path], forward)
                del adapters.own_forwards[found]
        for calls in list(adapters.fallbacks.values()):
            for key in [key for key in calls if key[0] in methods]:
                del calls[key]
    for module in modules:
        _unpatch_module(module)
    return report(target)


def report(target: nn.Module | str | None = None) -> Report:
    """The state of a model, of the classes of a family, or with None of everything patched."""
    if isinstance(target, nn.Module):
        known = _known(target)
        return Report(tuple(_entry(*found, _refusal(*found[1:])) for found in known))
    if isinstance(target, str):
        return Report(tuple(_class_entry(adapter) for adapter in _family(target)))
    classes = [_class_entry(adapter) for family in FAMILIES.values() for adapter in family]
    modules = [
        _entry(f"an instance of {adapter.path}", module, adapter, None)
        for module in list(adapters.patched_modules)
        if (adapter := adapters.adapter_of(module)) is not None
    ]
    return Report(tuple(entry for entry in classes if entry.patched) + tuple(modules))


@contextmanager
def patched(model: nn.Module, *, force: bool = False) -> Iterator[Report]:
    """Patches a model within a `with` block; modules that were patched before stay patched."""
    before = {module for module in model.modules() if adapters.own_class(module) is not None}
    try:
        yield patch(model, force=force)
    finally:
        for module in model.modules():
            if module not in before:
                _unpatch_module(module)


def _unpatch_module(module: nn.Module) -> None:
    own_class = adapters.own_class(module)
    if own_class is not None:
        module.__class__ = own_class
        adapters.patched_modules.discard(module)
        adapters.fallbacks.pop(module, None)


def _family(name: str) -> tuple[Adapter, ...]:
    if name not in FAMILIES:
        raise ValueError(f"expected a model or one of {', '.join(FAMILIES)}, got {name!r}.")
    return FAMILIES[name]


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """The modules whose class, or a base of it, has an adapter, or that have its parameters."""
    by_path = {adapter.path: adapter for family in FAMILIES.values() for adapter in family}
    for name, module in model.named_modules():
        bases = map(adapters.path_of, type(module).__mro__)
        adapter = next((by_path[path] for path in bases if path in by_path), None)
        adapter = adapter or _alike(module, by_path.values())
        if adapter is not None:
            yield name, module, adapter


def _alike(module: nn.Module, known: Iterable[Adapter]) -> Adapter | None:
    """For a class that no adapter names: the one with its parameters that agrees best."""
    current = adapters.adapter_of(module)
    if current is not None:
        return current
    candidates = lookalikes.candidates(module, known)
    if not candidates or "forward" in module.__dict__:
        return next(iter(candidates), None)
    return lookalikes.compare(module, candidates, type(module).forward).adapter


def _is_named(module: nn.Module, adapter: Adapter) -> bool:
    """True for a class that the adapter was written for, not one found by its parameters."""
    return any(adapters.path_of(base) == adapter.path for base in type(module).__mro__)


def _refusal(module: nn.Module, adapter: Adapter) -> str | None:
    """Why a module of a known class is left alone; None where it can be patched, or is."""
    if adapter.method in module.__dict__:
        return f"another library has replaced its {adapter.method} (accelerate's hooks do so)"
    own = getattr(type(module), adapter.method)
    if adapters.adapter_of(module, adapter.method) is not None:
        reason: str | None = own.refuse(module)
        return reason
    if _is_named(module, adapter):
        known = next(b for b in type(module).__mro__ if adapters.path_of(b) == adapter.path)
        if own is not vars(known)[adapter.method]:
            return f"its class has another {adapter.method} than {known.__qualname__}"
        # A derived class may have other functions that its forward calls.
        if type(module) is known or adapter.lookalike is None:
            replaced = lookalikes.replaced(type(module), known, adapter.method)
            return adapter.left_alone or replaced or adapter.refuse(module)
    return lookalikes.compare(module, [adapter], own).reason


# torch's classes that keep the code or the parameters that they find, and how users make them.
_MUST_COME_LATER = {
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FSDP",
    "FSDPModule": "fully_shard",
    "OptimizedModule": "torch.compile",
}


def _check_order(function: str, model: nn.Module) -> None:
    """Raises ValueError where a wrapper or a compiled program has the present code already."""
    for module in model.modules():
        bases = [b.__qualname__ for b in type(module).__mro__ if b.__module__.startswith("torch.")]
        later = next((_MUST_COME_LATER[base] for base in bases if base in _MUST_COME_LATER), None)
        if is_compiled_in_place(module):
            later = "torch.compile"
        if later is not None:
            raise ValueError(
                f"{function}: expected a model before {later}, got one after it; call {function} "
                f"first and {later} afterwards."
            )


def _entry(name: str, module: nn.Module, adapter: Adapter, reason: str | None) -> Entry:
    counted = adapters.counted(module, adapter) + adapters.counted(type(module), adapter)
    is_patched = reason is None and adapters.adapter_of(module, adapter.method) is not None
    if not is_patched and reason is None:
        reason = "not patched"
    class_name = type(module).__name__
    return Entry(name, class_name, adapter.family, is_patched, reason or "", dict(counted))


def _class_entry(adapter: Adapter) -> Entry:
    name = re.sub(r".*\.", "", adapter.path)
    found = [c for c in adapters.own_forwards if adapters.path_of(c) == adapter.path]
    counted: Counter[str] = Counter()
    for module in list(adapters.fallbacks) if found else ():
        counted += adapters.counted(module, adapter)
    reason = "" if found else adapter.left_alone or "not patched"
    return Entry(adapter.path, name, adapter.family, bool(found), reason, dict(counted))
