"""Classes that have the parameters of an adapter's class: which adapter computes the same, if any.

Several libraries have the same parameters and other masks, arguments or formulas. The own forward
of such a module is therefore compared with each adapter that it may fit, once, on a small random
input that has masked keys.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from transformer_xl.integrations import adapter as adapters
from transformer_xl.integrations.adapter import Adapter, Forward
from txl_kernels.torch_private import constant_in_traces

# The largest relative difference between a class found by its parameters and its adapter, float32.
_TOLERANCE = 1e-4


class Comparison(NamedTuple):
    """The result for one module.

    Args:
        adapter: the first one that agrees, else the one with the smallest difference.
        difference: |adapter's - own| / |own|; infinite where no results could be compared.
        reason: why the module must be left alone; None where the adapter agrees.
    """

    adapter: Adapter
    difference: float
    reason: str | None


# The comparisons of each module that gave numbers, by its class and the adapter's path.
_compared: WeakKeyDictionary[nn.Module, dict[tuple[type, str], Comparison]] = WeakKeyDictionary()


def candidates(module: nn.Module, known: Iterable[Adapter]) -> list[Adapter]:
    """The adapters whose classes have the parameters of this module."""
    names = {name for name, _ in module.named_parameters()}
    names = {name for name in names if not name.endswith(".bias")}
    return [a for a in known if a.lookalike is not None and a.lookalike.parameters == names]


def compare(module: nn.Module, with_adapters: list[Adapter], own: Forward) -> Comparison:
    """The comparison of `own` with the first adapter that agrees, else the closest."""
    found = []
    for adapter in with_adapters:
        if _accepts(adapter.build(own), own):
            found.append(_compare_once(module, adapter, own))
            if found[-1].reason is None:
                break
    if not found:
        arguments = (str(x.replace(annotation=x.empty)) for x in _arguments(own).values())
        why = f"{_alike(with_adapters[0])} has other arguments ({', '.join(arguments)})"
        return Comparison(with_adapters[0], float("inf"), why)
    return min(found, key=lambda comparison: comparison.difference)


def _accepts(forward: Forward, own: Forward) -> bool:
    """Whether every call of the module's own forward means the same to this one."""
    ours, theirs = _arguments(forward), _arguments(own)
    positional = [name for name, x in theirs.items() if x.kind in _POSITIONAL]
    if [name for name, x in ours.items() if x.kind in _POSITIONAL][: len(positional)] != positional:
        return False
    kinds = {x.kind for x in ours.values()}
    for name, argument in theirs.items():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            accepted = argument.kind in kinds
        elif argument.default is argument.empty:
            accepted = name in ours or argument.VAR_KEYWORD in kinds
        else:
            accepted = name in ours and _are_equal(ours[name].default, argument.default)
        if not accepted:
            return False
    return True


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _are_equal(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.dtype == y.dtype and torch.equal(x, y)
    return type(x) is type(y) and bool(x == y)


def _arguments(forward: Forward) -> dict[str, inspect.Parameter]:
    """All of them, without the module itself."""
    return dict(list(inspect.signature(forward).parameters.items())[1:])


def _alike(adapter: Adapter) -> str:
    return f"it has the parameters of {adapter.path}, but"


def refuse_of_class(
    adapter: Adapter, known: type[nn.Module], own: Forward
) -> Callable[[Any], str | None]:
    """The adapter's `refuse`, and for modules of derived classes also a check of what they inherit.

    A derived class inherits the forward and may have other functions that it calls. Where the
    adapter has an example, each module is compared once.
    """
    reasons: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()

    def refuse(module: Any) -> str | None:
        found = type(module)
        if _is_as_written(found, known):
            return adapter.refuse(module)
        if adapter.lookalike is None:
            return replaced(found, known, adapter.method) or adapter.refuse(module)
        if torch.compiler.is_compiling():
            return _not_compared(found, adapter.path)
        if module in reasons:
            return reasons[module]
        comparison = compare(module, [adapter], own)
        if math.isfinite(comparison.difference):  # else no results were compared
            reasons[module] = comparison.reason
        return comparison.reason

    return refuse


# The compiler runs the next two functions while it traces and keeps their results as constants.


@constant_in_traces
def replaced(found: type, known: type, method: str) -> str | None:
    """Why a derived class is left alone: it replaces a function that `known.method` calls, itself
    or through others; None if it does not."""
    functions = (FunctionType, staticmethod, classmethod)
    names = [method]
    for name in names:  # the functions that each of them calls are added
        function = inspect.unwrap(inspect.getattr_static(known, name))
        for called in function.__code__.co_names:
            inherited = inspect.getattr_static(known, called, None)
            is_own = isinstance(inherited, functions) and not hasattr(nn.Module, called)
            if not is_own or called in names:
                continue
            if inspect.getattr_static(found, called) is not inherited:
                return f"its class has another {called} than {known.__qualname__}"
            names.append(called)
    return None


@constant_in_traces
def _not_compared(found: type[nn.Module], path: str) -> str:
    """The reason while compiling. It is counted once for each call that the compiler traces."""
    why = f"{found.__qualname__} is a derived class, which is not compared while compiling"
    adapters.fallbacks.setdefault(found, Counter())[path, why] += 1
    return why


def _is_as_written(found: type[nn.Module], known: type[nn.Module]) -> bool:
    """True for the class itself and the one that `fully_shard` makes of it."""
    bases = found.__bases__
    return found is known or (bases[0].__name__ == "FSDPModule" and bases[1:] == (known,))


def _compare_once(module: nn.Module, adapter: Adapter, own: Forward) -> Comparison:
    known, key = _compared.setdefault(module, {}), (type(module), adapter.path)
    comparison = known.get(key) or _compare(module, adapter, own)
    if math.isfinite(comparison.difference):  # else no results were compared
        known[key] = comparison
    return comparison


def _compare(module: nn.Module, adapter: Adapter, forward: Forward) -> Comparison:
    """Calls `forward` with a copy of the module, in float32 on the CPU, and the adapter's."""
    difference = float("inf")
    try:
        own = _copied(module).to("cpu", torch.float32).eval()
        why = adapter.refuse(own)
        if why is None:
            difference = _difference(own, adapter, forward)
            if not difference <= _TOLERANCE:
                why = f"another result (difference {difference:.1e})"
    except Exception as error:  # other attributes, other shapes, …
        why = f"a call failed: {error}"
    return Comparison(adapter, difference, None if why is None else f"{_alike(adapter)} {why}")


def _copied(module: nn.Module) -> nn.Module:
    """A copy; results of earlier calls that modules keep, such as probabilities, are detached."""
    kept = (x for part in module.modules() for x in vars(part).values() if isinstance(x, Tensor))
    return copy.deepcopy(module, {id(x): x.detach() for x in kept if not x.is_leaf})


@contextmanager
def _plain_state() -> Iterator[None]:
    """The CPU, float32, neither gradients nor autocast; all is as before afterwards."""
    dtype, numbers = torch.get_default_dtype(), torch.get_rng_state()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
            torch.default_generator.manual_seed(0)  # torch.manual_seed changes GPUs' numbers, too
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(numbers)


@_plain_state()
def _difference(own: nn.Module, adapter: Adapter, forward: Forward) -> float:
    """|adapter's - own| / |own|; every parameter of `own` gets random values."""
    assert adapter.lookalike is not None
    for parameter in own.parameters():
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    args, kwargs = adapter.lookalike.example(own)
    expected = forward(own, *args, **kwargs)
    actual = adapters.patched_forward(adapter, forward)(own, *args, **kwargs)
    reasons = adapters.fallbacks.pop(own, None)
    if reasons:
        raise ValueError(f"the call is not served ({', '.join(why for _, why in reasons)})")
    actual, expected = ((x if isinstance(x, tuple) else (x,)) for x in (actual, expected))
    if len(actual) != len(expected):
        raise ValueError(f"{len(expected)} results instead of {len(actual)}")
    pairs = zip(actual, expected, strict=True)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs if x is not None)
