"""`banded_attention`: exact causal attention in which only near keys have a row of the table.

Near pairs are those at a distance below R: `rel_attention` with a window computes them. For all
other pairs the scores have no position term (with `clamp` a constant per query), and an attention
without positions computes them.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from txl_kernels._derivatives import without_derivative
from txl_kernels._rel_attention_call import (
    Numbers,
    OptionalTensors,
    Options,
    RelAttentionCall,
    Rules,
)
from txl_kernels.backends.reference import rel_attention as reference
from txl_kernels.errors import BackendUnavailableError
from txl_kernels.ops import autocast, flash_attention
from txl_kernels.ops.checks import check_flag, check_shape, check_tensor
from txl_kernels.ops.rel_attention import rel_attention
from txl_kernels.ops.rel_attention_calls import Prepared, backward, forward, prepare
from txl_kernels.transforms import inside_transform

OP = "banded_attention"

Far = tuple[flash_attention.Forward, flash_attention.Backward]


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    *,
    r_w_bias: Tensor | None = None,
    r_r_bias: Tensor | None = None,
    q_pos: Tensor | None = None,
    pos_scale: float | None = None,
    scale: float | None = None,
    clamp: bool = False,
    far: Far | None = None,
    backend: str = "auto",
    **others: NoReturn,
) -> Tensor:
    """Causal self-attention with a table of R rows for the distances 0 … R-1.

        score[b,h,i,j] = scale · (q_i + r_w_bias)·k_j + pos_scale · (qp_i + r_r_bias)·r[m],   j ≤ i
        out_i = Σ_j softmax_j(score)_ij · v_j,   m = R - 1 - (i - j),   qp = q_pos or q

    It is equal to `rel_attention(…, offset=R-1, causal=True, clamp=clamp)`, but calls its kernels
    for the pairs at a distance below R only. `far` computes the others without positions: causal
    attention of the queries from R on to the first T-R keys. Both results are merged as by
    `merge_attention`. `banded_is_faster` decides for which shapes the modules call it.

    Args:
        q: [B, H, T, D]; float32, bfloat16, float16 or float64. Any strides, as all tensors here.
        k, v: [B, Hk, T, D] and [B, Hk, T, Dv], q's dtype; H a multiple of Hk.
        r: [1 or B, 1 or H, R, Dp], q's dtype: row m is the distance R-1-m.
        r_w_bias, r_r_bias: [H, D] and [H, Dp], float32 or q's dtype. The sum of q and r_w_bias is
            rounded to q's dtype for `far`.
        q_pos: [B, H, T, Dp]: a query of its own for the position term; by default q, and Dp = D.
        pos_scale: finite, default `scale`.
        scale: finite, default 1/√D.
        clamp: False: pairs at a distance of R or more have no position term. True: they have that
            of row 0.
        far: a pair of functions, `forward(q, k, v, scale) -> (out, lse)` and
            `backward(dout, q, k, v, out, lse, scale) -> (dq, dk, dv)`: causal attention of T-R
            queries and keys, with the shapes of q, k, v, out and lse here. lse is the natural
            logarithm of the softmax's denominator, float32 (float64 for float64). `backward`
            receives out and lse of all keys and must use these, as the backward passes of
            FlashAttention and cuDNN do: probabilities are exp(score - lse). The default calls
            torch's flash attention, on CPUs in every dtype, on CUDA in bfloat16 and float16.
        backend: of `rel_attention`. On the reference, without `far`, the dense formula runs.

    Returns:
        out [B, H, T, Dv] in q's dtype.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, device, range or type; torch has no
            flash attention for this dtype and device; another argument of `rel_attention`, such as
            a memory, dropout or a softcap, is given.
        BackendUnavailableError: the named backend is missing or does not support an argument; the
            call is inside a transform of `torch.func`.

    Precision: both parts sum in float32 (float64 for float64), and so does the merging. A second
    derivative raises, except on the reference without `far`.

    Source: the merging, Milakov and Gimelshein 2018; the backward pass of a part from the merged
    lse, Liu et al., "Ring Attention with Blockwise Transformers", ICLR 2024, appendix A.
    """
    _refuse(others)
    check_flag(OP, "clamp", clamp)
    _check_pair(far)
    check_tensor(OP, "q", q)
    check_tensor(OP, "k", k)
    check_tensor(OP, "r", r)
    check_shape(OP, "q", q, ("B", "H", "T", "D"))
    T = q.shape[2]
    check_shape(OP, "k", k, (q.shape[0], "Hk", T, q.shape[3]))
    check_shape(OP, "r", r, (q.shape[0], q.shape[1], "R", "Dp"), or_one=(0, 1))
    R = r.shape[2]
    near = Options(
        offset=R - 1,
        causal=True,
        window=(R - 1, None),
        scale=scale,
        pos_scale=pos_scale,
        backend=backend,
    )
    prepared = prepare(OP, q, k, v, r, OptionalTensors(r_w_bias, r_r_bias, q_pos=q_pos), None, near)
    call = prepared.call
    if prepared.backend == "reference" and far is None:
        rules = Rules(R - 1, clamp=int(clamp), window_right=0)
        return forward(prepared._replace(call=call._replace(rules=rules)))[0]
    if T <= R:
        return forward(prepared)[0]
    if inside_transform("grad", "jvp", "vmap"):
        raise BackendUnavailableError(
            f'{OP}: it runs inside no transform of torch.func: pass backend="reference"'
        )
    far_pair = _flash(call.q) if far is None else far
    settings = _Settings(prepared.backend, clamp, call.rules, call.numbers, *far_pair)
    optional = call.optional
    tensors = (*call[:4], optional.r_w_bias, optional.r_r_bias, optional.q_pos)
    with autocast.outside_autocast(q.device):
        out: Tensor = _Banded.apply(settings, *tensors)  # type: ignore[no-untyped-call]
    return out


def banded_is_faster(T: int, R: int, D: int, Dp: int, device: torch.device) -> bool:
    """Whether `banded_attention` is expected to be faster than one call of `rel_attention`.

    Args:
        T: queries and keys.
        R: rows of the table.
        D, Dp: head sizes of the content and of the position term.
        device: of the tensors.
    """
    # CPU (AMD Zen 4; R 1,024; T 8,192 and 16,384; forward and backward): one call of rel_attention
    # takes 0.78 to 0.86 of the time, since this kernel is faster than ATen's flash attention
    # there. No GPU has been measured. So nothing switches to it.
    del T, R, D, Dp, device
    return False


class _Settings(NamedTuple):
    """The arguments of a call that are not tensors."""

    backend: str
    clamp: bool
    rules: Rules
    numbers: Numbers
    far_forward: flash_attention.Forward
    far_backward: flash_attention.Backward


class _Banded(torch.autograd.Function):
    """Both parts. Each part's backward gets the merged out and lse.

    The probabilities of a part are then exp(score - lse), those of the whole attention, and
    dS = P · (dout·v - dout·out) is the gradient of the whole attention, too: no part needs a
    gradient of its own lse.
    """

    @staticmethod
    def forward(ctx: Any, settings: _Settings, *tensors: Tensor | None) -> Tensor:
        call = _near_call(settings, tensors)
        R, numbers = call.r.shape[2], settings.numbers
        out, lse = forward(Prepared(settings.backend, call, bias=None, dead_uniform=False))
        far_out, far_lse = settings.far_forward(*_far_tensors(call), numbers.scale)
        _check_far(far_out, far_lse, out[:, :, R:], lse[:, :, R:])
        far_lse = far_lse.to(lse.dtype)
        if settings.clamp:
            far_lse = far_lse + _constant(call)
        near_out, near_lse = out[:, :, R:], lse[:, :, R:]
        share = torch.sigmoid(far_lse - near_lse)[..., None]  # of the far keys in the softmax
        near_out.copy_(torch.lerp(near_out.to(lse.dtype), far_out.to(lse.dtype), share))
        near_lse.copy_(torch.logaddexp(near_lse, far_lse))
        ctx.settings = settings
        kept = (far_out, share) if settings.clamp else (None, None)
        ctx.save_for_backward(*tensors, out, lse, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse, far_out, share = ctx.saved_tensors
        call, settings = _near_call(ctx.settings, tensors), ctx.settings
        if dout.stride(-1) != 1:
            dout = dout.contiguous()
        needs = ctx.needs_input_grad[1:]  # q, k, v, r, r_w_bias, r_r_bias, q_pos
        with torch.no_grad(), autocast.outside_autocast(dout.device):
            grads = _near_gradients(settings.backend, dout, call, out, lse, needs)
            far_lse = lse[:, :, call.r.shape[2] :]
            if settings.clamp:
                far_lse = far_lse - _constant(call)
                _add_gradients_of_constant(grads, call, dout, out, far_out, share)
            if any(needs[:3]) or needs[4]:
                _add_far_gradients(grads, settings, call, dout, out, far_lse)
        return (None, *without_derivative(OP, grads, tensors))


def _near_call(settings: _Settings, tensors: Any) -> RelAttentionCall:
    q, k, v, r, r_w_bias, r_r_bias, q_pos = tensors
    optional = OptionalTensors(r_w_bias, r_r_bias, q_pos=q_pos)
    return RelAttentionCall(q, k, v, r, optional, settings.rules, settings.numbers)


def _far_tensors(call: RelAttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Queries with their bias, keys and values of the pairs at a distance of R or more."""
    R = call.r.shape[2]
    n = call.q.shape[2] - R
    q, r_w_bias = call.q[:, :, R:], call.optional.r_w_bias
    if r_w_bias is not None:
        q = (q + r_w_bias[:, None]).to(q.dtype)
    return q, call.k[:, :, :n], call.v[:, :, :n]


def _position_queries(call: RelAttentionCall) -> Tensor:
    """qp + r_r_bias of the queries that have far keys: [B, H, T-R, Dp], not below float32."""
    optional = call.optional
    queries = (call.q if optional.q_pos is None else optional.q_pos)[:, :, call.r.shape[2] :]
    queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
    return queries if optional.r_r_bias is None else queries + optional.r_r_bias[:, None]


def _constant(call: RelAttentionCall) -> Tensor:
    """The position term of all far keys of a query, that of row 0: [B, H, T-R]."""
    queries = _position_queries(call)
    return call.numbers.pos_scale * (queries @ call.r[:, :, 0, :, None].to(queries.dtype))[..., 0]


def _near_gradients(
    backend: str, dout: Tensor, call: RelAttentionCall, out: Tensor, lse: Tensor, needs: Any
) -> list[Tensor | None]:
    """Gradients of q, k, v, r, r_w_bias, r_r_bias, q_pos from the near keys; None: not needed."""
    needs_grad = [*needs[:6], False, False, needs[6]]
    if backend == "reference":
        return _reference_gradients(dout, call, out, lse, needs_grad)
    found = backward(backend, dout, None, call, out, lse, needs_grad)
    grads = [grad if needed else None for grad, needed in zip(found, needs_grad, strict=True)]
    return [*grads[:6], grads[8]]


def _reference_gradients(
    dout: Tensor, call: RelAttentionCall, out: Tensor, lse: Tensor, needs_grad: list[bool]
) -> list[Tensor | None]:
    """The same by differentiating the reference, whose share of the merged result is
    exp(near_lse - lse): out changes with near_out by share, with near_lse by
    share · (near_out - out)."""
    given = zip((*call[:4], *call.optional[:5]), needs_grad, strict=True)
    leaves: list[Any] = [
        None if x is None else x.detach().requires_grad_(needed) for x, needed in given
    ]
    q, k, v, r, *optional = leaves
    with torch.enable_grad():
        near = call._replace(q=q, k=k, v=v, r=r, optional=OptionalTensors(*optional))
        near_out, near_lse = reference.rel_attention(near)
    share = (near_lse.detach() - lse).exp()[..., None]
    wide = dout.to(lse.dtype)
    dlse = (share * wide * (near_out.detach().to(lse.dtype) - out)).sum(-1)
    inputs = [x for x, needed in zip(leaves, needs_grad, strict=True) if needed]
    douts = ((share * wide).to(out.dtype), dlse)
    found = iter(torch.autograd.grad((near_out, near_lse), inputs, douts))
    grads = [next(found) if needed else None for needed in needs_grad]
    return [*grads[:6], grads[8]]


def _add_far_gradients(
    grads: list[Tensor | None],
    settings: _Settings,
    call: RelAttentionCall,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Adds the gradients of content scores and values of the far keys, in place.

    Args:
        lse: [B, H, T-R], such that the probabilities of far keys are exp(content score - lse).
    """
    R, scale = call.r.shape[2], call.numbers.scale
    q, k, v = _far_tensors(call)
    dq, dk, dv = settings.far_backward(
        dout[:, :, R:], q, k, v, out[:, :, R:], lse.contiguous(), scale
    )
    n = k.shape[2]
    if grads[0] is not None:
        grads[0][:, :, R:] += dq
    if grads[1] is not None:
        grads[1][:, :, :n] += dk
    if grads[2] is not None:
        grads[2][:, :, :n] += dv
    if grads[4] is not None:
        grads[4] += dq.sum((0, 2), dtype=lse.dtype)


def _add_gradients_of_constant(
    grads: list[Tensor | None],
    call: RelAttentionCall,
    dout: Tensor,
    out: Tensor,
    far_out: Tensor,
    share: Tensor,
) -> None:
    """Adds the gradients of row 0's position term, which all far keys of a query share, in place.

    The sum of dS over the far keys is share · (dout·far_out - dout·out).
    """
    R, work = call.r.shape[2], share.dtype
    dout, out = dout[:, :, R:].to(work), out[:, :, R:].to(work)
    dconstant = share * (dout * (far_out.to(work) - out)).sum(-1, keepdim=True)  # [B, H, T-R, 1]
    dconstant = call.numbers.pos_scale * dconstant
    dqueries = dconstant * call.r[:, :, :1].to(work)  # [B, H, T-R, Dp]
    position = 0 if call.optional.q_pos is None else 6
    if (dq := grads[position]) is not None:
        dq[:, :, R:] += dqueries
    if (dr := grads[3]) is not None:
        drow = dconstant.mT @ _position_queries(call)  # [B, H, 1, Dp]
        dr[:, :, :1] += drow.sum_to_size(dr[:, :, :1].shape)
    if (dbias := grads[5]) is not None:
        dbias += dqueries.sum((0, 2))


def _check_pair(far: object) -> None:
    """Raises TypeError unless far is None or a pair of functions."""
    is_pair = isinstance(far, (tuple, list)) and len(far) == 2 and all(map(callable, far))
    if far is not None and not is_pair:
        raise TypeError(f"{OP}: far must be a pair of functions (forward, backward), got {far!r}")


def _flash(q: Tensor) -> Far:
    """The default pair. Raises ValueError if torch has no flash attention for such tensors."""
    reason = flash_attention.unsupported_reason(q.device, q.dtype)
    if reason is not None:
        raise ValueError(f"{OP}: {reason}: pass far=(forward, backward)")
    return flash_attention.forward, flash_attention.backward


def _check_far(out: Tensor, lse: Tensor, near_out: Tensor, near_lse: Tensor) -> None:
    """Raises ValueError unless far's results have the shapes of the near ones."""
    for name, result, expected in (("out", out, near_out), ("lse", lse, near_lse)):
        if result.shape != expected.shape:
            raise ValueError(
                f"{OP}: far's forward must return {name} of shape {list(expected.shape)}, got "
                f"{list(result.shape)}"
            )


def _refuse(others: dict[str, Any]) -> None:
    """Raises for keyword arguments that the op does not have."""
    for name in others:
        if name in inspect.signature(rel_attention).parameters:
            raise ValueError(f"{OP}: {name} is not supported; rel_attention has it")
        raise TypeError(f"{OP}() got an unexpected keyword argument {name!r}")
