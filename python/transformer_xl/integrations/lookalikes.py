"""Classes that have the parameters of an adapter's class: which adapter computes the same, if any.

Several libraries have the same parameters and other masks, arguments or formulas. The own forward
of such a module is therefore compared with each adapter that it may fit, once, on a small random
input that has masked keys.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from transformer_xl.integrations import adapter as adapters
from transformer_xl.integrations.adapter import Adapter, Forward

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


# The comparisons so far, one for each module.
_compared: WeakKeyDictionary[nn.Module, Comparison] = WeakKeyDictionary()


def candidates(module: nn.Module, known: Iterable[Adapter]) -> list[Adapter]:
    """The adapters whose classes have the parameters of this module."""
    names = {name for name, _ in module.named_parameters()}
    names = {name for name in names if not name.endswith(".bias")}
    return [a for a in known if a.lookalike is not None and a.lookalike.parameters == names]


def compare(module: nn.Module, with_adapters: list[Adapter]) -> Comparison:
    """The comparison with the first adapter that agrees, else the closest; made once."""
    if module not in _compared:
        _compared[module] = _closest(module, with_adapters)
    return _compared[module]


def _closest(module: nn.Module, with_adapters: list[Adapter]) -> Comparison:
    own = type(module).forward
    names, found = _arguments(own), []
    for adapter in with_adapters:
        # Every call of the module's own forward must mean the same to the adapter.
        if _arguments(adapter.build(own))[: len(names)] == names:
            found.append(_compare(module, adapter))
            if found[-1].reason is None:
                break
    if not found:
        why = f"{_alike(with_adapters[0])} has other arguments ({', '.join(names)})"
        return Comparison(with_adapters[0], float("inf"), why)
    return min(found, key=lambda comparison: comparison.difference)


def _arguments(forward: Forward) -> list[str]:
    """The names of those that may be given by position, without the module itself."""
    parameters = inspect.signature(forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds][1:]


def _alike(adapter: Adapter) -> str:
    return f"it has the parameters of {adapter.path}, but"


def _compare(module: nn.Module, adapter: Adapter) -> Comparison:
    """Calls the forward of a copy of the module, in float32 on the CPU, and the adapter's."""
    state, difference = torch.random.get_rng_state(), float("inf")
    try:
        own = _copied(module).to("cpu", torch.float32).eval()
        why = adapter.refuse(own)
        if why is None:
            difference = _difference(own, adapter)
            if not difference <= _TOLERANCE:
                why = f"another result (difference {difference:.1e})"
    except Exception as error:  # other attributes, other shapes, …
        why = f"a call failed: {error}"
    finally:
        torch.random.set_rng_state(state)
    return Comparison(adapter, difference, None if why is None else f"{_alike(adapter)} {why}")


def _copied(module: nn.Module) -> nn.Module:
    """A copy; results of earlier calls that modules keep, such as probabilities, are detached."""
    kept = (x for part in module.modules() for x in vars(part).values() if isinstance(x, Tensor))
    return copy.deepcopy(module, {id(x): x.detach() for x in kept if not x.is_leaf})


@torch.no_grad()
def _difference(own: nn.Module, adapter: Adapter) -> float:
    """|adapter's - own| / |own|; every parameter of `own` gets random values."""
    assert adapter.lookalike is not None
    torch.manual_seed(0)
    for parameter in own.parameters():
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    args, kwargs = adapter.lookalike.example(own)
    forward = type(own).forward
    expected = forward(own, *args, **kwargs)
    actual = adapters.patched_forward(adapter, forward)(own, *args, **kwargs)
    reasons = adapters.fallbacks.pop(own, None)
    if reasons:
        raise ValueError(f"the call is not served ({', '.join(reasons)})")
    actual, expected = ((x if isinstance(x, tuple) else (x,)) for x in (actual, expected))
    if len(actual) != len(expected):
        raise ValueError(f"{len(expected)} results instead of {len(actual)}")
    pairs = zip(actual, expected, strict=True)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs if x is not None)
