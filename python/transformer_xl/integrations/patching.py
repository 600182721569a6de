"""`patch`: one line puts the kernels into a model of another library."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from transformer_xl.integrations import adapter as adapters
from transformer_xl.integrations.adapter import Adapter, Lookalike
from transformer_xl.integrations.families import FAMILIES
from transformer_xl.integrations.report import Entry, Report
from txl_kernels.torch_private import is_compiled_in_place

# The largest relative difference between a class found by its parameters and its adapter, float32.
_TOLERANCE = 1e-4
# The result of this comparison, which is made once for each module.
_compared: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


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
        for adapter in _family(target):
            if not force:
                adapter.check_version()
            found = adapter.load()
            if found not in adapters.own_forwards:
                own = getattr(found, adapter.method)
                adapters.own_forwards[found] = own
                setattr(found, adapter.method, adapters.patched_forward(adapter, own))
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
            path = f"{found.__module__}.{found.__qualname__}"
            if path in methods:
                setattr(found, methods[path], forward)
                del adapters.own_forwards[found]
                for module in [m for m in adapters.fallbacks if isinstance(m, found)]:
                    del adapters.fallbacks[module]
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
    """The modules whose class, or a base of it, has an adapter, with their names."""
    by_path = {adapter.path: adapter for family in FAMILIES.values() for adapter in family}
    by_parameters = [a for a in by_path.values() if a.lookalike is not None]
    for name, module in model.named_modules():
        bases = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
        adapter = next((by_path[path] for path in bases if path in by_path), None)
        for candidate in by_parameters if adapter is None else ():
            if isinstance(candidate.lookalike, Lookalike) and _has(module, candidate.lookalike):
                adapter = candidate
        if adapter is not None:
            yield name, module, adapter


def _is_named(module: nn.Module, adapter: Adapter) -> bool:
    """True for a class that the adapter was written for, not one found by its parameters."""
    return any(f"{b.__module__}.{b.__qualname__}" == adapter.path for b in type(module).__mro__)


def _has(module: nn.Module, lookalike: Lookalike) -> bool:
    names = {name for name, _ in module.named_parameters()}
    return {name for name in names if not name.endswith(".bias")} == lookalike.parameters


def _refusal(module: nn.Module, adapter: Adapter) -> str | None:
    """Why a module of a known class is left alone; None where it can be patched, or is."""
    if adapter.method in module.__dict__:
        return f"another library has replaced its {adapter.method} (accelerate's hooks do so)"
    if adapters.adapter_of(module, adapter.method) is not None:
        return None
    if _is_named(module, adapter):
        known = next(b for b in type(module).__mro__ if adapter.path.endswith("." + b.__qualname__))
        if getattr(type(module), adapter.method) is not vars(known)[adapter.method]:
            return f"its class has another {adapter.method} than {known.__qualname__}"
        return adapter.refuse(module)
    if module not in _compared:
        _compared[module] = adapter.refuse(module) or _difference(module, adapter)
    return _compared[module]


def _difference(module: nn.Module, adapter: Adapter) -> str | None:
    """Compares the own forward of a class found by its parameters with the adapter's, once.

    Both run on a copy in float32 on the CPU; None where they agree.
    """
    assert adapter.lookalike is not None
    state = torch.random.get_rng_state()
    try:
        own = copy.deepcopy(module).to("cpu", torch.float32).eval()
        with torch.no_grad():
            torch.manual_seed(0)
            for parameter in own.parameters():
                parameter.normal_(0.0, 0.5)
            args, kwargs = adapter.lookalike.example(own)
            expected = own(*args, **kwargs)
            own.__class__ = adapters.patched_class(type(own), adapter)
            actual = own(*args, **kwargs)
    except Exception as error:  # another signature, other attributes, …
        return f"it has the parameters of {adapter.path}, but a call failed: {error}"
    finally:
        torch.random.set_rng_state(state)
    expected, actual = (x[0] if isinstance(x, tuple) else x for x in (expected, actual))
    if adapters.fallbacks.pop(own, None):
        return f"it has the parameters of {adapter.path}, but its calls are not served"
    if not isinstance(expected, Tensor) or expected.shape != actual.shape:
        return f"it has the parameters of {adapter.path}, but returns something else"
    difference = float((actual - expected).norm() / expected.norm())
    if difference <= _TOLERANCE:
        return None
    return (
        f"it has the parameters of {adapter.path}, but another result (difference {difference:.1e})"
    )


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
    counted = dict(adapters.fallbacks.get(module, Counter()))
    is_patched = adapters.adapter_of(module, adapter.method) is not None
    if not is_patched and reason is None:
        reason = "not patched"
    class_name = type(module).__name__
    return Entry(name, class_name, adapter.family, is_patched, reason or "", counted)


def _class_entry(adapter: Adapter) -> Entry:
    name = re.sub(r".*\.", "", adapter.path)
    found = [c for c in adapters.own_forwards if f"{c.__module__}.{c.__qualname__}" == adapter.path]
    counted: Counter[str] = Counter()
    for module, calls in adapters.fallbacks.items():
        if found and isinstance(module, found[0]):
            counted += calls
    reason = "" if found else "not patched"
    return Entry(adapter.path, name, adapter.family, bool(found), reason, dict(counted))
