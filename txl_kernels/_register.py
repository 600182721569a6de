"""Schema, fake and autograd of every custom op, once for all namespaces that implement it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from txl_kernels import _register_adaptive
from txl_kernels._derivatives import refuse_second_derivative, register_autograd, register_vmap

# `chunk` holds size, left and phase; a size of 0 means no chunks.
REL_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor r, "
    "Tensor? r_w_bias, Tensor? r_r_bias, Tensor? mem_k, Tensor? mem_v, Tensor? q_pos, "
    "Tensor? key_start, Tensor? key_lens, Tensor? mask, Tensor? bias, Tensor? dropout_seed, "
    "SymInt offset, bool clamp, bool causal, SymInt? window_left, SymInt? window_right, "
    "SymInt[] chunk, float scale, float softcap, float dropout_p, bool dead_uniform"
)
_N_REL_ATTENTION_TENSORS = 14
_REL_ATTENTION_GRADS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12)  # q … q_pos and bias, in fwd's positions


def register(namespace: str) -> None:
    """Registers the ops under `torch.ops.<namespace>`; a backend adds kernels to them."""
    _register_rel_attention(namespace)
    _register_rel_shift(namespace)
    _register_adaptive.register(namespace)


def _register_rel_attention(namespace: str) -> None:
    fwd, bwd = f"{namespace}::rel_attention_fwd", f"{namespace}::rel_attention_bwd"
    grads = ", ".join(["Tensor"] * len(_REL_ATTENTION_GRADS))
    torch.library.define(fwd, f"({REL_ATTENTION}) -> (Tensor out, Tensor lse)")
    torch.library.define(
        bwd,
        f"(Tensor dout, {REL_ATTENTION}, Tensor out, Tensor lse, bool[] needs_grad) -> ({grads})",
    )

    def fake_fwd(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        B, H, Tq, _D = q.shape
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_empty(B, H, Tq, v.shape[3]), q.new_empty(B, H, Tq, dtype=lse_dtype)

    def fake_bwd(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
        needs_grad = args[-1]
        inputs = [args[position] for position in _REL_ATTENTION_GRADS]
        return tuple(
            x.new_empty(x.shape) if needed else dout.new_empty(0)
            for x, needed in zip(inputs, needs_grad, strict=True)
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        out, lse = output
        ctx.save_for_backward(*inputs[:_N_REL_ATTENTION_TENSORS], out, lse)
        ctx.options = inputs[_N_REL_ATTENTION_TENSORS:]
        ctx.mark_non_differentiable(lse)

    def backward(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        needs_grad = [ctx.needs_input_grad[position] for position in _REL_ATTENTION_GRADS]
        if dout.stride(-1) != 1:
            dout = dout.contiguous()
        operator = getattr(torch.ops, namespace).rel_attention_bwd
        grads = operator(dout, *tensors, *ctx.options, out, lse, needs_grad)
        result: list[Tensor | None] = [None] * (len(tensors) + len(ctx.options))
        for position, grad, needed in zip(_REL_ATTENTION_GRADS, grads, needs_grad, strict=True):
            result[position] = grad if needed else None
        return tuple(result)

    torch.library.register_fake(fwd, fake_fwd)
    torch.library.register_fake(bwd, fake_bwd)
    register_autograd(fwd, backward, setup_context)
    refuse_second_derivative(bwd)
    register_vmap(fwd)
    register_vmap(bwd)


def _register_rel_shift(namespace: str) -> None:
    fwd, bwd = f"{namespace}::rel_shift_fwd", f"{namespace}::rel_shift_bwd"
    torch.library.define(fwd, "(Tensor x, SymInt n_keys, SymInt offset) -> Tensor")
    torch.library.define(bwd, "(Tensor dout, SymInt n_rows, SymInt offset) -> Tensor")

    def fake(x: Tensor, n_columns: int, _offset: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], n_columns)

    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        x, _n_keys, ctx.offset = inputs
        ctx.n_rows = x.shape[-1]

    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        operator = getattr(torch.ops, namespace).rel_shift_bwd
        return operator(dout, ctx.n_rows, ctx.offset), None, None

    torch.library.register_fake(fwd, fake)
    torch.library.register_fake(bwd, fake)
    register_autograd(fwd, backward, setup_context)
    refuse_second_derivative(bwd)
    register_vmap(fwd)
    register_vmap(bwd)
