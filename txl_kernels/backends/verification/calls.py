"""Descriptions of operator calls: the kernels that a call compiles depend on nothing else.

A description holds the arguments in the order of the operator's schema, with a `Spec` for each
tensor. From it follow the key under which a verdict is kept, tensors without memory on which
launches are recorded, and a problem of a few tiles with the same specialisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from txl_kernels._rel_attention_call import AXES, RelAttentionCall, is_absent
from txl_kernels.torch_private import tree_leaves, unwrapped

# Queries and keys of a problem: several tiles of every launch configuration, the last one partial.
# With few queries as many keys as the kernels for decoding split between several programs.
_LONG, _FEW_QUERIES, _LONG_FOR_FEW = 144, 16, 1040
_FEW_TOKENS = 48
# Values of the sizes that a tracer leaves open: multiples of 16 and others, many and few.
_SYMBOL_VALUES = (64, 65, 16, 5)
_AXES = ("BHTD", "BGSD", "BGSV", "BHRP")  # of q, k, v, r, as in `_rel_attention_call.AXES`


class Spec(NamedTuple):
    """A tensor without its values; `offset` is in elements, from an address aligned to 16 bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    requested: bool  # whether its gradient is


class Description(NamedTuple):
    """One call of an operator of `torch.ops.txl_<backend>`."""

    op: str
    backend: str
    arguments: tuple[Any, ...]
    deterministic: bool

    @property
    def label(self) -> str:
        """The op, the direction and the dtype, for records and messages."""
        spec = next(iter(x for x in specs(self.arguments) if x.dtype.is_floating_point))
        return f"{self.op}/{self.backend}/{str(spec.dtype).removeprefix('torch.')}"

    @property
    def needs_backward(self) -> bool:
        return any(spec.requested for spec in specs(self.arguments))


def descriptions(
    op: str, backend: str, arguments: Sequence[Any], grad: bool
) -> Iterator[Description]:
    """The description of an eager call; of a call with open sizes one for each kind of sizes.

    Args: as `describe`.
    """
    tensors = [x for x in tree_leaves(list(arguments)) if isinstance(x, Tensor)]
    if not any(isinstance(size, torch.SymInt) for x in tensors for size in x.shape):
        yield describe(op, backend, arguments, grad)
        return
    few_only = backend == "native" and tensors[0].device.type == "cuda"
    values = (n for n in _SYMBOL_VALUES if n <= _FEW_QUERIES or not few_only)
    found = (describe(op, backend, arguments, grad, n) for n in values)
    possible = [call for call in found if all(min(x.shape, default=0) >= 0 for x in specs(call))]
    yield from possible or [describe(op, backend, arguments, grad)]


def describe(
    op: str, backend: str, arguments: Sequence[Any], grad: bool, symbol: int | None = None
) -> Description:
    """The description of a call.

    Args:
        arguments: in the order of the operator's schema.
        grad: whether gradients of the tensors that require them are requested.
        symbol: the value of every symbolic size, where torch traces with sizes left open; None:
            that of the traced call.
    """

    def number(value: Any) -> Any:
        if not isinstance(value, (torch.SymInt, torch.SymFloat)):
            return value
        if symbol is None:
            return value.node.hint
        expression = value.node.expr
        number = expression.subs(dict.fromkeys(expression.free_symbols, symbol))
        return int(number) if isinstance(value, torch.SymInt) else float(number)

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            memory, size = unwrapped(value), value.dtype.itemsize
            if type(memory) in (Tensor, torch.nn.Parameter):
                offset = memory.data_ptr() % 16 // size
            else:
                offset = number(value.storage_offset()) * size % 16 // size
            shape, strides = (tuple(map(number, x)) for x in (value.shape, value.stride()))
            return Spec(value.dtype, shape, strides, offset, grad and memory.requires_grad)
        if isinstance(value, (list, tuple)):
            return tuple(described(part) for part in value)
        return number(value)

    deterministic = torch.are_deterministic_algorithms_enabled()
    return Description(op, backend, described(tuple(arguments)), deterministic)


def specs(value: Any) -> Iterator[Spec]:
    """All tensors of a description, in order."""
    if isinstance(value, Spec):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from specs(part)


def replaced(value: Any, make: Callable[[Spec], Any]) -> Any:
    """The arguments with another object for each tensor."""
    if isinstance(value, Spec):
        return make(value)
    return [replaced(part, make) for part in value] if isinstance(value, tuple) else value


def key(call: Description) -> tuple[Any, ...]:
    """Equal for two calls that compile the same kernels.

    A kernel of `rel_attention` or `rel_shift` is specialised by which sizes are 1, by which
    strides are 1 or multiples of 16, and by head sizes, but not by lengths: decoding with ever
    more keys has at most 16 keys here. The adaptive kernels are specialised by every size.
    """
    if call.op not in ("rel_attention", "rel_shift"):
        return call
    parts: list[Any] = [call.op, call.backend, call.deterministic]
    is_attention = call.op == "rel_attention"
    for spec in specs(call.arguments):
        has_width = is_attention and spec.dtype.is_floating_point  # the last size is a head size
        parts += spec.dtype, spec.offset, spec.requested, spec.shape[-1:] if has_width else None
        for size, stride in zip(spec.shape, spec.strides, strict=True):
            parts.append((size == 1, size % 16, stride == 1, stride % 16, stride == 0))
    if not is_attention:
        return (*parts, *map(_is_large, call.arguments[1:]))
    given = RelAttentionCall.of_arguments(*call.arguments)
    rules, (_, H, Tq, D) = given.rules, given.q.shape
    parts += rules.clamp, rules.chunk_size, rules.chunk_left, *given.numbers
    parts += map(_is_large, (rules.offset, rules.window_left, rules.window_right))
    parts += H // given.k.shape[1] if given.k.shape[1] else 0, min(Tq, _FEW_QUERIES + 1)
    if call.backend == "triton":
        from txl_kernels.backends.triton.rel_attention_call import has_far_keys

        parts.append(has_far_keys(given, _n_keys(given)))
    if call.deterministic and D % 16:
        # The number of copies of dr, which follows from all sizes, is in their strides.
        parts.append(tuple(spec.shape for spec in specs(call.arguments)))
    return tuple(parts)


def _n_keys(given: RelAttentionCall) -> int:
    """Tk."""
    mem_k = given.optional.mem_k
    return given.k.shape[2] + (0 if mem_k is None else mem_k.shape[2])


def _is_large(length: int) -> bool:
    """Whether a length needs a 64-bit integer: lengths count by their type only."""
    return abs(length) >> 31 != 0


def problems(call: Description) -> Iterator[tuple[Description, int | None]]:
    """Problems that may compile the same kernels, the shortest first, the call itself last.

    With each: the limit of the logits that `adaptive_softmax` holds at a time, None for its own.
    """
    if call.op == "rel_attention":
        yield call._replace(arguments=_short_attention(call.arguments)), None
    elif call.op == "rel_shift":
        yield call._replace(arguments=_short_shift(call.arguments)), None
    else:
        N, (short, n) = _n_tokens(call.arguments), _short_tokens(call)
        yield short, None
        if n < N and call.backend == "triton" and call.op != "adaptive_embedding":
            from txl_kernels.backends.triton.adaptive_softmax_head import MAX_LOGITS

            yield short, MAX_LOGITS // N * n
    yield call, None


def _shortened(n: int, limit: int) -> int:
    """At most `limit` + 15, and the same as n modulo 16, as alignment depends on that."""
    return n if n < limit + 16 else limit + n % 16


def _resized(spec: Spec, shape: Sequence[int]) -> Spec:
    """A tensor of another shape, whose strides have the same order and the same remainders."""
    strides, extent = list(spec.strides), 1
    for axis in sorted(range(len(shape)), key=lambda axis: spec.strides[axis]):
        old = spec.strides[axis]
        if old <= 1 or spec.shape[axis] == 1:
            stride = old if old <= 1 else min(old, 16 + old % 16)
        else:
            stride = max(extent, 2)
            stride += (old - stride) % 16
        strides[axis] = stride
        if shape[axis] > 1:
            extent = max(extent, (shape[axis] - 1) * stride + extent)
    return spec._replace(shape=tuple(shape), strides=tuple(strides))


def _short_attention(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    given = RelAttentionCall.of_arguments(*arguments)
    rules = given.rules
    (B, H, Tq, D), (_, Hk, Ts, _), R = given.q.shape, given.k.shape, given.r.shape[2]
    Tk = _n_keys(given)
    Tm = Tk - Ts
    sizes = {"B": min(B, 2), "H": H, "G": Hk, "D": D, "V": given.v.shape[3], "P": given.r.shape[3]}
    if Hk == H:
        sizes["H"] = sizes["G"] = _shortened(H, 16)
    long = _LONG if Tq > _FEW_QUERIES else _LONG_FOR_FEW
    sizes |= {"T": _shortened(Tq, long), "S": _shortened(Ts, long), "M": _shortened(Tm, long)}
    sizes["K"] = sizes["M"] + sizes["S"]
    fewer_keys = Tk - sizes["K"]
    both_sides = Tk + Tq - 1 <= R
    fewer_rows = fewer_keys + (Tq - sizes["T"] if both_sides else 0)
    sizes["R"] = R - fewer_rows if fewer_rows < R else _shortened(R, long)

    def short(spec: Spec, axes: str) -> Spec:
        if not axes or is_absent(spec):  # type: ignore[arg-type]
            return spec
        named = zip(axes, spec.shape, strict=False)
        return _resized(spec, [1 if size == 1 else sizes[axis] for axis, size in named])

    if rules.offset == Tq - 1:
        offset = sizes["T"] - 1
    else:  # keeps the distance of the last row
        moved = rules.offset + (Tk - Tq) - (sizes["K"] - sizes["T"]) - (R - sizes["R"])
        offset = max(-sizes["K"], min(moved, sizes["R"] + sizes["T"]))
    left, right = (
        min(side, sizes["K"] // 3) if side < Tk else side
        for side in (rules.window_left, rules.window_right)
    )
    rules = rules._replace(offset=offset, window_left=left, window_right=right)
    if _LONG < rules.chunk_size < 2**30:
        size = _LONG // 3
        left_chunks, phase = min(rules.chunk_left, 1), rules.chunk_phase % size
        rules = rules._replace(chunk_size=size, chunk_left=left_chunks, chunk_phase=phase)
    tensors = map(short, arguments[:4], _AXES)
    return *tensors, tuple(map(short, arguments[4], AXES.values())), tuple(rules), arguments[6]


def _short_shift(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x, n_keys, offset = arguments
    *lead, Tq, R = x.shape
    rows, columns = _shortened(Tq, 32), _shortened(R, 272)
    shape = (*(min(size, 2) for size in lead), rows, columns)
    keys = max(_shortened(n_keys, 272), 1)
    moved = rows - 1 if offset == Tq - 1 else max(-columns, min(offset, columns))
    return _resized(x, shape), keys, moved


def _n_tokens(arguments: tuple[Any, ...]) -> int:
    """Tokens of an adaptive op: rows of hidden, or elements of tokens."""
    spec = arguments[0]
    return spec.shape[0] if spec.dtype.is_floating_point else torch.Size(spec.shape).numel()


def _short_tokens(call: Description) -> tuple[Description, int]:
    """Vocabulary and widths are compiled into the adaptive kernels and are kept."""
    first, *rest = call.arguments
    n = _shortened(_n_tokens(call.arguments), _FEW_TOKENS)
    if call.op == "adaptive_embedding":
        first = first._replace(shape=(n,), strides=(1,), offset=0)
    else:
        first = _resized(first, (n, first.shape[1]))
        rest[0] = _resized(rest[0], (n,))
    return call._replace(arguments=(first, *rest)), n
