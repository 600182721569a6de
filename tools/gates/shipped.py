"""The calls that launch every shipped Triton kernel: all configurations, dtypes and flags."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tools.gates.checks import SHARED_LIMIT
from txl_kernels._rel_attention_call import (
    N_DIFFERENTIABLE,
    UNLIMITED,
    Numbers,
    OptionalTensors,
    RelAttentionCall,
    Rules,
)
from txl_kernels.backends.triton import (
    adaptive_embedding,
    adaptive_softmax,
    launch_table,
    launching,
    rel_attention,
    rel_attention_bwd,
    rel_shift,
)
from txl_kernels.backends.triton.launching import Launch

_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32
_INKLING: dict[str, Any] = {"B": 1, "H": 64, "Hk": 8, "Tm": 0, "D": 128, "Dp": 16, "biases": False}
_SLIDING: dict[str, Any] = {**_INKLING, "R": 512, "rules": {"offset": 511, "window_left": 511}}
# Most keys are further away than the first row of r.
_GLOBAL: dict[str, Any] = {**_INKLING, "Tq": 8192, "R": 1024, "rules": {"offset": 1023}}
_CACHE: dict[str, Any] = {**_GLOBAL, "B": 32, "Tq": 1, "Tm": 8191, "backward": False}
_DECODE: dict[str, Any] = {"B": 32, "Tq": 1, "Tm": 3799, "backward": False}
_ALL_KEYS = {"window_right": UNLIMITED}
_CONFORMER: dict[str, Any] = {"B": 1, "H": 8, "Tq": 7500, "Tm": 0, "R": 14_999, "rules": _ALL_KEYS}
_MASK: dict[str, Any] = {"tensors": ("mask",), "R": 6143, "rules": _ALL_KEYS}
_WT103_BASE: dict[str, Any] = {"d": 410, "div_val": 1}

# Calls of `attention`: a name, whether it is a common case, and the arguments that differ.
_ATTENTION: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    # All rows of the launch table.
    ("train_d64", True, {}),
    ("train_d128", True, {"D": 128}),
    ("head_256", False, {"D": 256}),
    ("train_d64", False, {"dtype": _F16}),
    ("train_d64", True, {"dtype": _F32}),
    ("train_d128", False, {"D": 128, "dtype": _F32}),
    ("head_256", False, {"D": 256, "dtype": _F32}),
    ("head_32", False, {"D": 32}),
    ("wt103_base", False, {"B": 22, "H": 10, "Tq": 150, "Tm": 150, "D": 41}),
    ("head_192_values_40", False, {"D": 192, "Dv": 40}),
    ("parakeet_10min", True, {**_CONFORMER, "tensors": ("key_lens",)}),
    ("inkling_global", True, _GLOBAL),
    ("inkling_sliding", True, _SLIDING),
    ("enwik8_large_eval", True, {"B": 1, "Tq": 128, "Tm": 3800, "D": 128, "backward": False}),
    ("one_query_d64", True, _DECODE),
    ("one_query_d128", False, {**_DECODE, "D": 128}),
    ("one_query_d256", False, {**_DECODE, "D": 256}),
    # All flags that change the code.
    ("no_memory", False, {"Tm": 0}),
    ("inkling_packed", False, {**_GLOBAL, "tensors": ("ranges",)}),
    ("inkling_cache", False, {**_CACHE, "tensors": ("q_start",)}),
    ("mask", False, _MASK),
    ("padding", False, {"tensors": ("key_start", "key_lens")}),
    ("dropout", True, {"numbers": {"dropout_p": 0.1}}),
    ("dropout_d128", False, {"numbers": {"dropout_p": 0.1}, "D": 128}),
    ("dropout_d256", False, {"numbers": {"dropout_p": 0.1}, "D": 256}),
    ("mask_d128", False, {**_MASK, "D": 128}),
    ("mask_and_dropout", False, {"tensors": ("mask",), "numbers": {"dropout_p": 0.1}}),
    ("clamp", False, {"rules": {"clamp": 1, "offset": 1000}}),
    ("window", False, {"rules": {"window_left": 1000}}),
    ("chunk", False, {"rules": {**_ALL_KEYS, "chunk_size": 256, "chunk_left": 2}}),
    ("softcap", False, {"numbers": {"softcap": 30.0}}),
    ("deterministic", False, {"deterministic": True}),
)
# The same for `_adaptive`, with the op.
_ADAPTIVE: tuple[tuple[str, str, bool, dict[str, Any]], ...] = (
    *(
        (op, "wt103_large", dtype == _BF16 and op != "adaptive_nll", {"dtype": dtype})
        for op in ("adaptive_loss", "adaptive_nll", "adaptive_embedding")
        for dtype in (_BF16, _F16, _F32)
    ),
    ("adaptive_loss", "no_biases", False, {"biases": False}),
    ("adaptive_nll", "wt103_base", False, _WT103_BASE),
    ("adaptive_nll", "wt103_base", False, {**_WT103_BASE, "dtype": _F32}),
)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an op.

    Attributes:
        name: op, dtype and configuration, such as "rel_attention/bfloat16/train_d64".
        headline: whether it is a common case, which CI compiles too.
        run: makes the call on tensors of the device "meta", forward and backward.
    """

    name: str
    headline: bool
    run: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A launch.

    Attributes:
        name: of the first call and the kernel.
        launch: for one architecture.
        calls: all calls with a launch that compiles to the same code.
    """

    name: str
    launch: Launch
    calls: list[Call]


def shipped_calls() -> list[Call]:
    """All calls."""
    found = []

    def ship(op: str, name: str, headline: bool, run: Callable[..., None], /, **call: Any) -> None:
        dtype = str(call.setdefault("dtype", _BF16)).removeprefix("torch.")
        found.append(Call(f"{op}/{dtype}/{name}", headline, functools.partial(run, **call)))

    for name, headline, call in _ATTENTION:
        ship("rel_attention", name, headline, attention, **call)
    for dtype in (_BF16, _F32):
        ship("rel_shift", "train", dtype == _BF16, _shift, dtype=dtype)
    for op, name, headline, call in _ADAPTIVE:
        ship(op, name, headline, _adaptive, op=op, **call)
    return found


def shipped_launches(calls: Sequence[Call], arch: int) -> list[Shipped]:
    """The launches of the calls on sm_`arch`; of those that compile to the same code, the first."""
    found: dict[str, Shipped] = {}
    names: collections.Counter[str] = collections.Counter()
    for call in calls:
        with recording(arch) as recorded:
            call.run()
        for launch in recorded:
            code = launching.kernel_hash(launch)
            if code not in found:
                kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
                name = f"{call.name}/{kernel}"
                names[name] += 1
                suffix = f"#{names[name]}" if names[name] > 1 else ""
                found[code] = Shipped(name + suffix, launch, [])
            found[code].calls.append(call)
    return list(found.values())


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Within it launches are recorded, with the limits of a device of this architecture."""
    limits = divmod(arch, 10), SHARED_LIMIT[arch]
    with (
        mock.patch.object(launch_table, "device_limits", return_value=limits),
        mock.patch.object(torch, "addmm", _addmm_without_storage),
        launching.recording(GPUTarget("cuda", arch, 32)) as recorded,
    ):
        yield recorded


def _addmm_without_storage(
    x: Tensor, a: Tensor, b: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """A product with the same shape: torch 2.11 refuses `out_dtype` of a sum on meta tensors."""
    return torch.mm(a, b, **({} if out_dtype is None else {"out_dtype": out_dtype}), out=out)


def attention(
    *,
    dtype: torch.dtype = _BF16,
    B: int = 8,
    H: int = 16,
    Tq: int = 2048,
    Tm: int = 2048,
    D: int = 64,
    Dv: int | None = None,
    Hk: int | None = None,
    Dp: int | None = None,
    R: int | None = None,
    biases: bool = True,
    tensors: Sequence[str] = (),
    backward: bool = True,
    deterministic: bool = False,
    rules: Mapping[str, int] = types.MappingProxyType({}),
    numbers: Mapping[str, float] = types.MappingProxyType({}),
) -> None:
    """`rel_attention` on tensors of the device "meta", forward and backward.

    `tensors` are names among q_start, key_start, key_lens and mask, and "ranges", which makes
    key_start and key_lens ranges per query. Dp is the width of a position query, None: there is
    none. Causal unless `rules` differ.
    """
    Tk, Dv, Hk = Tm + Tq, Dv or D, Hk or H
    made = functools.partial(torch.empty, dtype=dtype, device="meta")
    integers = functools.partial(torch.empty, dtype=torch.int64, device="meta")
    floats: dict[str, tuple[int, ...]] = {"q": (B, H, Tq, D), "k": (B, Hk, Tq, D)}
    floats |= {"v": (B, Hk, Tq, Dv), "r": (1, H, R or Tk, Dp or D)}
    floats |= {"r_w_bias": (H, D), "r_r_bias": (H, Dp or D)} if biases else {}
    floats |= {"mem_k": (B, Hk, Tm, D), "mem_v": (B, Hk, Tm, Dv)} if Tm else {}
    floats |= {"q_pos": (B, H, Tq, Dp)} if Dp else {}
    given = {name: made(shape) for name, shape in floats.items()}
    given |= {name: integers(B) for name in tensors if name not in ("mask", "ranges")}
    if "ranges" in tensors:
        given |= {name: integers(B, Tq) for name in ("key_start", "key_lens")}
    if "mask" in tensors:
        given["mask"] = integers(B, H, Tq, Tk, dtype=torch.bool)
    if numbers.get("dropout_p"):
        given["dropout_seed"] = integers(())
    q, k, v, r = (given.pop(name) for name in "qkvr")
    all_rules: dict[str, int] = {"offset": Tq - 1, "window_right": 0, **rules}
    all_numbers: dict[str, float] = {"scale": D**-0.5, "pos_scale": D**-0.5, **numbers}
    call = RelAttentionCall(
        q, k, v, r, OptionalTensors(**given), Rules(**all_rules), Numbers(**all_numbers)
    )
    arguments = call.arguments()
    out, lse = rel_attention.rel_attention_fwd(*arguments)
    if backward:
        inputs = (*call[:4], *call.optional)[:N_DIFFERENTIABLE]
        needs_grad = [tensor is not None for tensor in inputs]
        enabled = "are_deterministic_algorithms_enabled"
        with mock.patch.object(torch, enabled, return_value=deterministic):
            given_backward: tuple[Any, ...] = (out, lse, *arguments, out, lse, needs_grad)
            rel_attention_bwd.rel_attention_bwd(*given_backward)


def _shift(*, dtype: torch.dtype) -> None:
    """`rel_shift` of the position scores of eight heads."""
    x = torch.empty(8, 2048, 4096, dtype=dtype, device="meta")
    rel_shift.rel_shift_bwd(rel_shift.rel_shift_fwd(x, 4096, 2047), 4096, 2047)


def _adaptive(
    *, op: str, dtype: torch.dtype, d: int = 1024, div_val: int = 4, biases: bool = True
) -> None:
    """An adaptive op on 8,192 tokens of width d, with WikiText-103's clusters.

    The head of the softmax has no projection, as if d_embed is d_model.
    """
    made = functools.partial(torch.empty, dtype=dtype, device="meta")
    tokens = torch.empty(8192, dtype=torch.int64, device="meta")
    sizes = [end - begin for begin, end in pairwise((0, 20_000, 40_000, 200_000, 267_735))]
    widths = [d // div_val**k for k in range(len(sizes))]
    if op == "adaptive_embedding":
        tables = [made(size, width) for size, width in zip(sizes, widths, strict=True)]
        arguments = (tokens, tables, [made(d, width) for width in widths], 32.0, False)
        dout = adaptive_embedding.adaptive_embedding_fwd(*arguments)
        adaptive_embedding.adaptive_embedding_bwd(dout, *arguments, [True] * 2 * len(sizes))
        return
    n_head = sizes[0] + len(sizes) - 1
    clusters = [made(0), made(n_head, d), made(n_head if biases else 0)]
    for size, width in zip(sizes[1:], widths[1:], strict=True):
        clusters += [made(width, d), made(size, width), made(size if biases else 0)]
    call, needs_grad = (made(8192, d), tokens, clusters, -100), [True] * (1 + len(clusters))
    if op == "adaptive_loss":
        loss, grads = adaptive_softmax.adaptive_loss_fwd(*call, True, needs_grad)
        adaptive_softmax.adaptive_loss_bwd(loss, grads)
    else:
        nll, lse = adaptive_softmax.adaptive_nll_fwd(*call)
        adaptive_softmax.adaptive_nll_bwd(nll, *call, lse, needs_grad)
