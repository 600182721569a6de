"""Schema, fake and autograd of every custom op, once for all namespaces that implement it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from txl_kernels import _register_adaptive
from txl_kernels._derivatives import (
    loop_over_batched_gradients,
    refuse_second_derivative,
    register_autograd,
    register_vmap,
)
from txl_kernels._rel_attention_call import N_DIFFERENTIABLE, OptionalTensors, output_gradients
from txl_kernels._schemas import SCHEMAS

_N_OPTIONAL = len(OptionalTensors._fields)
_N_OPTIONAL_GRADS = N_DIFFERENTIABLE - 4


def register(operators: Any) -> None:
    """Registers the ops in a namespace, `torch.ops.<name>`; a backend adds kernels to them."""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{operators.name}::{name}", schema)
    _register_rel_attention(operators)
    _register_rel_shift(operators)
    _register_adaptive.register(operators)
    _register_few_row_linear(operators)


def _register_rel_attention(operators: Any) -> None:
    """Gradients have the order q, k, v, r, then that of the optional tensors."""
    fwd, bwd = f"{operators.name}::rel_attention_fwd", f"{operators.name}::rel_attention_bwd"

    def fake_fwd(q: Tensor, _k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        B, H, Tq, _D = q.shape
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_empty(B, H, Tq, v.shape[3]), q.new_empty(B, H, Tq, dtype=lse_dtype)

    def fake_bwd(dout: Tensor, _dlse: Tensor, *args: Any) -> list[Tensor]:
        q, k, v, r, optional, *_, needs_grad = args
        inputs = (q, k, v, r, *optional[:_N_OPTIONAL_GRADS])
        return [
            x.new_empty(x.shape) if needed else dout.new_empty(0)
            for x, needed in zip(inputs, needs_grad, strict=True)
        ]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, r, optional, ctx.rules, ctx.numbers = inputs
        ctx.save_for_backward(q, k, v, r, *optional, *output)
        ctx.set_materialize_grads(False)  # the gradient of an output without use is None

    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, r, *optional, out, lse = ctx.saved_tensors
        needs_grad = [*ctx.needs_input_grad[:4], *ctx.needs_input_grad[4][:_N_OPTIONAL_GRADS]]
        dout, dlse = output_gradients(dout, dlse, out, lse)
        call = (q, k, v, r, optional, ctx.rules, ctx.numbers)
        grads = operators.rel_attention_bwd(dout, dlse, *call, out, lse, needs_grad)
        result = [g if needed else None for g, needed in zip(grads, needs_grad, strict=True)]
        return *result[:4], [*result[4:], *[None] * (_N_OPTIONAL - _N_OPTIONAL_GRADS)], None, None

    torch.library.register_fake(fwd, fake_fwd)
    torch.library.register_fake(bwd, fake_bwd)
    register_autograd(fwd, backward, setup_context)
    refuse_second_derivative(bwd)
    register_vmap(fwd, operators.rel_attention_fwd)
    register_vmap(bwd, operators.rel_attention_bwd)
    loop_over_batched_gradients(bwd, operators.rel_attention_bwd)


def _register_rel_shift(operators: Any) -> None:
    fwd, bwd = f"{operators.name}::rel_shift_fwd", f"{operators.name}::rel_shift_bwd"

    def fake(x: Tensor, n_columns: int, _offset: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], n_columns)

    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        x, _n_keys, ctx.offset = inputs
        ctx.n_rows = x.shape[-1]

    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        return operators.rel_shift_bwd(dout, ctx.n_rows, ctx.offset), None, None

    torch.library.register_fake(fwd, fake)
    torch.library.register_fake(bwd, fake)
    register_autograd(fwd, backward, setup_context)
    refuse_second_derivative(bwd)
    register_vmap(fwd, operators.rel_shift_fwd)
    register_vmap(bwd, operators.rel_shift_bwd)


def _register_few_row_linear(operators: Any) -> None:
    fwd = f"{operators.name}::few_row_linear_fwd"

    def fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def backward(*_: Any) -> NoReturn:
        raise RuntimeError(
            'few_row_linear: this backend has no gradients; backend="reference" has them'
        )

    torch.library.register_fake(fwd, fake)
    register_autograd(fwd, backward)
    register_vmap(fwd, operators.few_row_linear_fwd)
