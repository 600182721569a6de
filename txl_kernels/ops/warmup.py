"""`warmup` and `verify`: compile and test kernels before a timed run, a capture or an export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from txl_kernels._rel_attention_call import AXES
from txl_kernels.backends import verification
from txl_kernels.ops.adaptive_embedding import adaptive_embedding
from txl_kernels.ops.adaptive_softmax import adaptive_loss, adaptive_nll
from txl_kernels.ops.checks import check_int
from txl_kernels.ops.rel_attention import rel_attention
from txl_kernels.ops.rel_shift import rel_shift
from txl_kernels.torch_private import FakeTensorMode


def warmup(shapes: Iterable[Mapping[str, Any]], *, device: torch.device | str = "cuda") -> None:
    """Runs each call once on zeros, so that no later call of its kind compiles or tests a kernel.

    Triton compiles a kernel at its first call, in seconds: too late inside a timed run or during
    the capture of a CUDA graph. A kernel of `rel_attention` depends on the dtype, the head size,
    whether there are more than 16 queries, which optional arguments are given, and whether strides
    are multiples of 16 elements; not on lengths, batch size or numbers. The kernels of the adaptive
    ops depend on all sizes. The zeros are contiguous. On CUDA `verify` tests the kernels first.

    Args:
        shapes: one mapping per kind of call, with
            op: default "rel_attention"; "rel_shift", "adaptive_nll", "adaptive_loss" or
            "adaptive_embedding";
            dtype: default torch.bfloat16; gradients: whether to run backward too, default True;
            for `rel_attention` B, H, Tq, D: sizes; Hk (default H), Ts (default Tq), Tm (default 0),
            Dv (default D), R (default Tk), and Dp, which gives q_pos; biases, key_start, key_lens,
            q_start, mask: whether such tensors are given, biases by default; "per query" for
            key_start and key_lens means [B, Tq];
            for `rel_shift` shape: that of x;
            for the adaptive ops N: tokens; d: width of hidden or of the result; sizes: tokens of
            each cluster, the head first; widths (default d for all): row widths of the clusters,
            which have a projection where they differ from d; bias (default True, not for
            `adaptive_embedding`);
            any option of the op that is not a tensor, such as causal or dropout_p.
        device: device of the later calls.

    Raises:
        TypeError: a size is missing or not an integer, or an option is unknown.
        ValueError: a size is out of range, or no such op.

    >>> warmup([{"B": 8, "H": 16, "Tq": 512, "Tm": 512, "D": 64, "causal": True}])
    """
    shapes = list(shapes)
    device = torch.device(device)
    if device.type == "cuda":
        verify(shapes, device=device)
    for shape in shapes:
        _run(device, **shape)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def verify(shapes: Iterable[Mapping[str, Any]], *, device: torch.device | str) -> list[str]:
    """Tests exactly the GPU kernels that these calls launch, where they have no record yet.

    "auto" does so at a first call; during the capture of a CUDA graph and under `torch.export` it
    cannot. Allocates tensors of a few tiles only. Kernels that pass are recorded in the user's
    cache folder, `$XDG_CACHE_HOME/transformer-xl`. A step that builds an image may set
    XDG_CACHE_HOME to `<sys.prefix>/share`: records there are read too, and never written.

    Args:
        shapes: as for `warmup`; `device` as well. On a CPU there is nothing to test.

    Returns:
        The errors of the kernels that failed, of which "auto" has warned; an empty list where all
        passed.

    Raises:
        TypeError, ValueError: as `warmup`.
        BackendUnavailableError: a kernel failed in a distributed program, or a CUDA graph is
            being captured and kernels have no record.

    >>> verify([{"B": 8, "H": 16, "Tq": 512, "D": 64}], device="cuda")
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type not in verification.DEVICE_TYPES:
        return []
    with verification.collected() as failures, FakeTensorMode():
        for shape in shapes:
            if shape.get("backend", "auto") == "auto":  # a named backend is not tested
                with contextlib.suppress(verification.Examined):
                    _run(device, **shape)
    return list(dict.fromkeys(failures))


def _run(
    device: torch.device,
    *,
    op: str = "rel_attention",
    dtype: torch.dtype = torch.bfloat16,
    gradients: bool = True,
    **shape: Any,
) -> None:
    """Runs one call on zeros, and its backward pass if `gradients` is true."""
    if op not in _CALLS:
        raise ValueError(f"warmup: op must be one of {', '.join(_CALLS)}; got {op!r}")
    leaves: list[Tensor] = []

    def zeros(*sizes: int) -> Tensor:
        leaves.append(torch.zeros(sizes, dtype=dtype, device=device, requires_grad=gradients))
        return leaves[-1]

    with torch.set_grad_enabled(gradients):
        out = _CALLS[op](zeros, device, **shape)
        if gradients:
            torch.autograd.grad(out, leaves, out.detach())


def _rel_attention(
    zeros: Callable[..., Tensor],
    device: torch.device,
    *,
    B: int,
    H: int,
    Tq: int,
    D: int,
    Hk: int | None = None,
    Ts: int | None = None,
    Tm: int = 0,
    Dv: int | None = None,
    Dp: int | None = None,
    R: int | None = None,
    biases: bool = True,
    mask: bool = False,
    **options: Any,
) -> Tensor:
    given = {"Hk": H if Hk is None else Hk, "Ts": Tq if Ts is None else Ts, "Tm": Tm}
    sizes = {
        name: _size(name, size, at_least=0)
        for name, size in {"B": B, "H": H, "Tq": Tq, "D": D, **given}.items()
    }
    sizes |= {
        "Dv": D if Dv is None else _size("Dv", Dv),
        "Dp": D if Dp is None else _size("Dp", Dp),
    }
    Tk = sizes["Tm"] + sizes["Ts"]
    sizes |= {"Tk": Tk, "R": Tk if R is None else _size("R", R)}
    by_letter = {"G": "Hk", "S": "Ts", "M": "Tm", "T": "Tq", "K": "Tk", "V": "Dv", "P": "Dp"}

    def shape(axes: str) -> list[int]:
        return [sizes[by_letter.get(axis, axis)] for axis in axes]

    required = (("q", "BHTD"), ("k", "BGSD"), ("v", "BGSV"))
    call: dict[str, Any] = {name: zeros(*shape(axes)) for name, axes in required}
    call["r"] = zeros(1, *shape("HRP"))
    floats = [*["r_w_bias", "r_r_bias"] * biases, *["mem_k", "mem_v"] * bool(Tm)]
    if Dp is not None:
        floats.append("q_pos")
    for name, axes in AXES.items():
        if name in floats:
            call[name] = zeros(*shape(axes))
        elif axes in ("B", "BT"):
            kind = options.pop(name, None)
            if kind:
                size = shape(axes if kind == "per query" else "B")
                call[name] = torch.full(size, Tk, dtype=torch.int64, device=device)
    if mask:
        call["mask"] = torch.ones(B, 1, Tq, Tk, dtype=torch.bool, device=device)
    out: Tensor = rel_attention(**call, **options)
    return out


def _rel_shift(
    zeros: Callable[..., Tensor], _device: torch.device, *, shape: Sequence[int], **options: Any
) -> Tensor:
    return rel_shift(zeros(*(_size("shape", n) for n in shape)), **options)


def _adaptive_softmax(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(
        zeros: Callable[..., Tensor],
        device: torch.device,
        *,
        N: int,
        d: int,
        sizes: Sequence[int],
        widths: Sequence[int] | None = None,
        bias: bool = True,
        **options: Any,
    ) -> Tensor:
        cutoffs = _cutoffs(sizes)
        target = torch.zeros(_size("N", N, at_least=0), dtype=torch.int64, device=device)
        hidden = zeros(N, d)
        head, *tails = (
            (
                None if width == d else zeros(width, d),
                zeros(size + (len(cutoffs) if k == 0 else 0), width),
                zeros(size + (len(cutoffs) if k == 0 else 0)) if bias else None,
            )
            for k, (size, width) in enumerate(zip(sizes, widths or [d] * len(sizes), strict=True))
        )
        clusters = {"cutoffs": cutoffs, "head_proj": head[0], "head_bias": head[2]}
        return op(hidden, target, head[1], tails, **clusters, **options)

    return run


def _adaptive_embedding(
    zeros: Callable[..., Tensor],
    device: torch.device,
    *,
    N: int,
    d: int,
    sizes: Sequence[int],
    widths: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    widths = widths or [d] * len(sizes)
    tables = [zeros(size, width) for size, width in zip(sizes, widths, strict=True)]
    projections = [None if width == d else zeros(d, width) for width in widths]
    tokens = torch.zeros(_size("N", N, at_least=0), dtype=torch.int64, device=device)
    return adaptive_embedding(tokens, tables, projections, _cutoffs(sizes), **options)


def _size(name: str, size: object, *, at_least: int = 1) -> int:
    return check_int("warmup", name, size, at_least=at_least)


def _cutoffs(sizes: Sequence[int]) -> list[int]:
    """The first token of each cluster but the first."""
    return [sum(_size("sizes", n) for n in sizes[:k]) for k in range(1, len(sizes))]


_CALLS: dict[str, Callable[..., Tensor]] = {
    "rel_attention": _rel_attention,
    "rel_shift": _rel_shift,
    "adaptive_nll": _adaptive_softmax(adaptive_nll),
    "adaptive_loss": _adaptive_softmax(adaptive_loss),
    "adaptive_embedding": _adaptive_embedding,
}
