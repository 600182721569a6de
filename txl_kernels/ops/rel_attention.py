"""`rel_attention`: attention over [memory; segment] with Transformer-XL relative positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from txl_kernels.backends import choose, operators
from txl_kernels.backends.reference import rel_attention as reference
from txl_kernels.ops import autocast
from txl_kernels.ops.checks import check_tensor, fixed_if_traced, needs_grad
from txl_kernels.ops.rel_attention_checks import (
    check_keys,
    check_tensors,
    checked_dropout,
    checked_options,
)

NO_CHUNK = (0, 0, 0)  # for the operators: AOTInductor would turn an empty list into None


def rel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    *,
    r_w_bias: Tensor | None = None,
    r_r_bias: Tensor | None = None,
    mem_k: Tensor | None = None,
    mem_v: Tensor | None = None,
    q_pos: Tensor | None = None,
    offset: int | None = None,
    clamp: bool = False,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    chunk: tuple[int, int] | tuple[int, int, int] | None = None,
    key_start: Tensor | None = None,
    key_lens: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    dead_rows: str = "zero",
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention whose scores are content plus relative position, over memory and segment.

        score[b,h,i,j] = scale · ((q_i + r_w_bias)·k_j + (q_i + r_r_bias)·r[m]) + bias[b,h,i,j]
        out_i = Σ_j dropout(softmax_j(mask(softcap(score))))_ij · v_j,   m = j - i + offset

    Key j is counted over [memory; segment], Tk = Tm + Ts; query i is at position p = i + Tk - Tq.
    No int64 is too large for a distance, a chunk or an offset: sys.maxsize means no limit.

    Args:
        q: [B, H, Tq, D]; float32, bfloat16, float16 or float64. Any strides, as all tensors here.
        k, v: [B, H, Ts, D] and [B, H, Ts, Dv], q's dtype.
        r: [1 or B, 1 or H, R, D], q's dtype: projected position keys, in any order of rows.
        r_w_bias, r_r_bias: [H, D], float32 or q's dtype: the paper's u and v.
        mem_k, mem_v: [B, H, Tm, D] and [B, H, Tm, Dv]: keys and values before k, v.
        q_pos: [B, H, Tq, Dp]: a query of its own for the position term; r is then [..., R, Dp],
            r_r_bias [H, Dp].
        offset: row of r for j = i; default Tq - 1, which makes row m the distance Tk - 1 - m.
        clamp: False: rows outside [0, R) contribute 0. True: m is clamped into [0, R); needs
            an explicit offset.
        causal: j ≤ p.
        window: (left, right), distances in tokens: p - left ≤ j ≤ p + right; None: no limit.
        chunk: (size, left) or (size, left, phase), in tokens, chunks, tokens:
            0 ≤ ⌊(p + phase)/size⌋ - ⌊(j + phase)/size⌋ ≤ left.
        key_start, key_lens: int32 or int64 [B]: row b attends to keys
            key_start[b] ≤ j < key_lens[b]. Any value is valid; the host never reads them.
        mask: bool, broadcastable to [B, H, Tq, Tk], True = attend. All conditions must allow a key.
        bias: float32 or q's dtype, broadcastable to [B, H, Tq, Tk]; added to the scaled score.
        scale: finite, default 1/√D.
        softcap: softcap · tanh(score / softcap) before masking; finite, 0 = off.
        dropout_p: in [0, 1), on the probabilities, whenever above 0.
        dropout_seed: int64 tensor of one element; by default drawn from torch's generator of q's
            device. One seed gives one mask, on every backend and device (`testing.dropout_keep`).
        dead_rows: a query that attends to no key: "zero" gives output and gradients 0, "uniform"
            the mean of v over all Tk keys.
        return_lse: also return lse.
        backend: "auto", "reference", "native" or "triton"; a named one runs or raises. "auto" warns
            where it has to use the reference and the scores need more than 256 MiB, or where the
            kernels are not built.

    Returns:
        out [B, H, Tq, Dv] in q's dtype; with `return_lse` the pair (out, lse): lse [B, H, Tq] is
        the natural logarithm of the softmax's denominator before dropout, -inf where a query
        attends to no key, float32 (float64 for float64), without gradient.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, device, range or type.
        BackendUnavailableError: the named backend is missing or does not support an argument.

    Masked content: keys and values outside key_start <= j < key_lens may hold anything, NaN and
    infinity included. They change neither out, lse nor any gradient, and their own gradients are 0
    (exception: dead_rows="uniform", which averages all values). A key or value that only causal,
    window, chunk or mask excludes must be finite, as in `scaled_dot_product_attention`: NaN or
    infinity there may reach queries that do not attend to it.

    Precision: scores, softmax and sums in float32 (float64 for float64). Under autocast q, k, v,
    r, mem_k, mem_v and q_pos are cast, the biases are not. A second derivative raises, except on
    the reference.

    Source: Dai et al., "Transformer-XL", ACL 2019, section 3.3.
    """
    check_tensor("rel_attention", "q", q)
    lower = autocast.autocast_dtype(q.device)
    q, k, v, r, mem_k, mem_v, q_pos = (
        autocast.cast(tensor, lower) for tensor in (q, k, v, r, mem_k, mem_v, q_pos)
    )
    Tk = check_tensors(q, k, v, r, r_w_bias, r_r_bias, mem_k, mem_v, q_pos)
    check_keys(q, Tk, key_start, key_lens, mask, bias)
    options = checked_options(q, offset, clamp, causal, window, chunk, scale, softcap, dead_rows)
    dropout_p = checked_dropout(q, dropout_p, dropout_seed)
    uses = [name for name, tensor in (("q_pos", q_pos), ("bias", bias)) if tensor is not None]
    if dead_rows == "uniform":
        uses.append("dead_rows='uniform'")
    if dropout_p > 0:
        uses.append("dropout_p")

    def arguments() -> tuple[Any, ...]:
        """In the order of the operator's schema; the seed is drawn after the choice."""
        tensors = (q, k, v, r, r_w_bias, r_r_bias, mem_k, mem_v, q_pos, key_start, key_lens)
        full_mask = None if mask is None else mask.expand(*q.shape[:3], Tk)
        seed = q.new_empty((), dtype=torch.int64) if dropout_p > 0 else None
        *numbers, dead_uniform = {**options, "chunk": options["chunk"] or NO_CHUNK}.values()
        return (*tensors, full_mask, bias, seed, *numbers, dropout_p, dead_uniform)

    chosen = choose(
        "rel_attention",
        q,
        arguments=arguments,
        n_scores=q.shape[0] * q.shape[1] * q.shape[2] * Tk,
        backend=backend,
        dtype=q.dtype,
        Tq=q.shape[2],
        D=q.shape[3],
        Dv=v.shape[3],
        needs_grad=needs_grad(q, k, v, r, r_w_bias, r_r_bias, mem_k, mem_v, q_pos, bias),
        uses=uses,
    )
    if dropout_p > 0 and dropout_seed is None:
        dropout_seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=q.device)
    call: dict[str, Any] = {
        "r_w_bias": r_w_bias,
        "r_r_bias": r_r_bias,
        "mem_k": mem_k,
        "mem_v": mem_v,
        "q_pos": q_pos,
        "key_start": key_start,
        "key_lens": key_lens,
        "mask": mask,
        "bias": bias,
        "dropout_seed": dropout_seed,
        "dropout_p": dropout_p,
        **options,
    }
    with autocast.outside_autocast(q.device):
        if chosen == "reference":
            out, lse = reference.rel_attention(q, k, v, r, **call)
        else:
            out, lse = _kernel(chosen, q, k, v, r, Tk, **call)
    return (out, lse) if return_lse else out


def _kernel(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    Tk: int,
    *,
    mask: Tensor | None,
    chunk: tuple[int, ...],
    **call: Any,
) -> Any:
    """A backend's kernel, which reads rows of any stride whose last dimension is contiguous."""
    q, k, v, r = (_contiguous_rows(tensor) for tensor in (q, k, v, r))
    for name in ("mem_k", "mem_v"):
        if call[name] is not None:
            call[name] = _contiguous_rows(call[name])
    if mask is not None:
        mask = mask.expand(*q.shape[:3], Tk)
    for name in ("offset", "window_left", "window_right"):
        call[name] = fixed_if_traced(call[name])
    chunk = tuple(fixed_if_traced(number) for number in chunk)
    operator = operators(backend).rel_attention_fwd
    return operator(q, k, v, r, mask=mask, chunk=chunk or NO_CHUNK, **call)


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
