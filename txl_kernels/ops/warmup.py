"""`warmup`: compiles kernels before the first call whose time matters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from txl_kernels.ops.checks import check_int
from txl_kernels.ops.rel_attention import rel_attention


def warmup(shapes: Iterable[Mapping[str, Any]], *, device: torch.device | str = "cuda") -> None:
    """Runs `rel_attention` once per shape on zeros, so that no later call of its kind compiles.

    Triton compiles a kernel at its first call, in seconds: too late inside a timed run or during
    the capture of a CUDA graph. A kernel depends on the dtype, the head size, whether there are
    more than 16 queries, which optional arguments are given, and whether strides are multiples of
    16 elements; not on lengths, batch size or numbers. The zeros are contiguous.

    Args:
        shapes: one mapping per kind of call, with
            B, H, Tq, D: sizes; Ts (default Tq), Tm (default 0), Dv (default D), R (default Tk);
            dtype: default torch.bfloat16; gradients: whether to run backward too, default True;
            biases, key_start, key_lens, mask: whether such tensors are given; biases by default;
            any option of `rel_attention` that is not a tensor, such as causal or dropout_p.
        device: device of the later calls.

    Raises:
        TypeError: a size is missing or not an integer, or an option is unknown.
        ValueError: a size is out of range.

    >>> warmup([{"B": 8, "H": 16, "Tq": 512, "Tm": 512, "D": 64, "causal": True}])
    """
    for shape in shapes:
        _run(torch.device(device), **shape)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _run(
    device: torch.device,
    *,
    B: int,
    H: int,
    Tq: int,
    D: int,
    Ts: int | None = None,
    Tm: int = 0,
    Dv: int | None = None,
    R: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    gradients: bool = True,
    biases: bool = True,
    key_start: bool = False,
    key_lens: bool = False,
    mask: bool = False,
    **options: Any,
) -> None:
    sizes = {"B": B, "H": H, "Tq": Tq, "D": D, "Ts": Tq if Ts is None else Ts, "Tm": Tm}
    B, H, Tq, D, Ts, Tm = (
        check_int("warmup", name, size, at_least=0) for name, size in sizes.items()
    )
    Tk = Tm + Ts
    Dv = D if Dv is None else check_int("warmup", "Dv", Dv, at_least=1)
    R = Tk if R is None else check_int("warmup", "R", R, at_least=1)

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device, requires_grad=gradients)

    call: dict[str, Any] = {
        "q": zeros(B, H, Tq, D),
        "k": zeros(B, H, Ts, D),
        "v": zeros(B, H, Ts, Dv),
    }
    call["r"] = zeros(1, H, R, D)
    if Tm:
        call |= {"mem_k": zeros(B, H, Tm, D), "mem_v": zeros(B, H, Tm, Dv)}
    if biases:
        call |= {"r_w_bias": zeros(H, D), "r_r_bias": zeros(H, D)}
    leaves = list(call.values())
    for name, given in (("key_start", key_start), ("key_lens", key_lens)):
        if given:
            call[name] = torch.full((B,), Tk, dtype=torch.int64, device=device)
    if mask:
        call["mask"] = torch.ones(B, 1, Tq, Tk, dtype=torch.bool, device=device)
    out = rel_attention(**call, **options)
    if gradients:
        torch.autograd.grad(out, leaves, out.detach())
