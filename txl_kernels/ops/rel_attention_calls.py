"""One call of `rel_attention`: check and normalise its arguments, choose a backend, run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from txl_kernels._rel_attention_call import OptionalTensors, Options, RelAttentionCall, Rules
from txl_kernels.backends import choose, operators
from txl_kernels.backends.reference import rel_attention as reference
from txl_kernels.ops import autocast
from txl_kernels.ops.checks import check_choice, check_tensor, fixed_if_traced, needs_grad
from txl_kernels.ops.rel_attention_checks import (
    check_keys,
    check_seed,
    check_tensors,
    checked_numbers,
    checked_rules,
)


class Prepared(NamedTuple):
    """A valid call and the backend that runs it."""

    backend: str
    call: RelAttentionCall
    bias: Tensor | None  # supported by the reference alone, as is the next field
    dead_uniform: bool


def prepare(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    optional: OptionalTensors,
    bias: Tensor | None,
    options: Options,
) -> Prepared:
    """Checks and normalises the arguments of `rel_attention`, and chooses the backend.

    Casts under autocast, copies tensors whose rows are not contiguous, draws the dropout seed.

    Args:
        op: the public function that errors name.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as `rel_attention`.
    """
    check_tensor(op, "q", q)
    lower = autocast.autocast_dtype(q.device)
    q, k, v, r = (autocast.cast(tensor, lower) for tensor in (q, k, v, r))
    mem_k, mem_v, q_pos = (autocast.cast(tensor, lower) for tensor in optional[2:5])
    optional = optional._replace(mem_k=mem_k, mem_v=mem_v, q_pos=q_pos)
    Tk = check_tensors(op, q, k, v, r, optional)
    check_keys(op, q, Tk, optional, bias)
    rules, numbers = checked_rules(op, q, options), checked_numbers(op, q, options)
    check_choice(op, "dead_rows", options.dead_rows, ("zero", "uniform"))
    check_seed(op, q, optional.dropout_seed)
    call = _with_contiguous_rows(RelAttentionCall(q, k, v, r, optional, rules, numbers), Tk)
    chosen = choose(
        "rel_attention",
        q,
        arguments=lambda: _with_seed(call, drawn=False).arguments(),
        n_scores=q.shape[0] * q.shape[1] * q.shape[2] * Tk,
        backend=options.backend,
        dtype=q.dtype,
        Tq=q.shape[2],
        D=q.shape[3],
        Dv=v.shape[3],
        Dp=r.shape[3],
        needs_grad=needs_grad(q, k, v, r, *optional[:5], bias),
        uses=_uses(call, options, bias),
    )
    return Prepared(chosen, _with_seed(call, drawn=True), bias, options.dead_rows == "uniform")


def forward(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Returns out and lse."""
    backend, call, bias, dead_uniform = prepared
    with autocast.outside_autocast(call.q.device):
        if backend == "reference":
            return reference.rel_attention(call, bias=bias, dead_uniform=dead_uniform)
        call = call._replace(rules=Rules(*map(fixed_if_traced, call.rules)))
        out, lse = operators(backend).rel_attention_fwd(*call.arguments())
        return out, lse


def backward(
    backend: str,
    dout: Tensor,
    dlse: Tensor | None,
    call: RelAttentionCall,
    out: Tensor,
    lse: Tensor,
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """The nine gradients of a call of "native" or "triton", in the order of its tensors.

    Args:
        dlse: None if lse has no gradient.
        needs_grad: which gradients are requested; the others are empty.
    """
    if dlse is None:
        dlse = lse.new_empty(0)
    arguments = (*call.arguments(), out, lse, list(needs_grad))
    grads: list[Tensor] = operators(backend).rel_attention_bwd(dout, dlse, *arguments)
    return grads


def _uses(call: RelAttentionCall, options: Options, bias: Tensor | None) -> list[str]:
    """The arguments of a call that not every backend supports, in the words of `resolve`."""
    given = {
        "bias": bias is not None,
        "dead_rows='uniform'": options.dead_rows == "uniform",
        "dropout_p": call.numbers.dropout_p > 0,
    }
    return [name for name, used in given.items() if used]


def _with_contiguous_rows(call: RelAttentionCall, Tk: int) -> RelAttentionCall:
    """Copies tensors whose last dimension is not contiguous, and expands the mask."""
    optional = call.optional
    mem_k, mem_v, q_pos = (None if x is None else _contiguous_rows(x) for x in optional[2:5])
    mask = optional.mask
    if mask is not None:
        mask = mask.expand(*call.q.shape[:3], Tk)
    optional = optional._replace(mem_k=mem_k, mem_v=mem_v, q_pos=q_pos, mask=mask)
    q, k, v, r = map(_contiguous_rows, call[:4])
    return RelAttentionCall(q, k, v, r, optional, call.rules, call.numbers)


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _with_seed(call: RelAttentionCall, *, drawn: bool) -> RelAttentionCall:
    """The call with a seed if it has dropout: a random one, or for descriptions any tensor."""
    if call.numbers.dropout_p == 0:
        return call._replace(optional=call.optional._replace(dropout_seed=None))
    if call.optional.dropout_seed is not None:
        return call
    seed = call.q.new_empty((), dtype=torch.int64)
    if drawn:
        seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=call.q.device)
    return call._replace(optional=call.optional._replace(dropout_seed=seed))
