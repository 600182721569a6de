"""`rel_attention`: attention over [memory; segment] with Transformer-XL relative positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from txl_kernels._rel_attention_call import OptionalTensors, Options
from txl_kernels.ops import rel_attention_plans
from txl_kernels.ops.rel_attention_calls import forward, prepare


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
    pos_scale: float | None = None,
    q_start: Tensor | None = None,
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
    backend: str = "auto",
) -> Tensor:
    """Attention whose scores are content plus relative position, over memory and segment.

        p = i + Tk - Tq,  or  i + q_start[b]           position of query i among the keys
        m = j - p + (Tk - Tq) + offset                 its row of r for key j
        score[b,h,i,j] = scale · (q_i + r_w_bias)·k_j + pos_scale · (qp_i + r_r_bias)·r[m]
                         + bias[b,h,i,j],              qp = q_pos or q
        out_i = Σ_j dropout(softmax_j(mask(softcap(score))))_ij · v_j

    Key j is counted over [memory; segment], Tk = Tm + Ts. Query head h reads the keys and values
    of key head h // (H // Hk). Without q_start, m = j - i + offset. No int64 is too large for a
    distance, a chunk or an offset: sys.maxsize means no limit. Head sizes are at most 256 on all
    backends but the reference.

    Args:
        q: [B, H, Tq, D]; float32, bfloat16, float16 or float64. Any strides, as all tensors here.
        k, v: [B, Hk, Ts, D] and [B, Hk, Ts, Dv], q's dtype. H is a multiple of Hk.
        r: [1 or B, 1 or H, R, Dp], q's dtype: projected position keys, in any order of rows.
            Dp = D without q_pos.
        r_w_bias, r_r_bias: [H, D] and [H, Dp], float32 or q's dtype: the paper's u and v.
        mem_k, mem_v: [B, Hk, Tm, D] and [B, Hk, Tm, Dv]: keys and values before k, v.
        q_pos: [B, H, Tq, Dp], q's dtype: a separate query for the position term.
        pos_scale: factor of the position term, also without q_pos; finite, default scale.
        q_start: int32 or int64 [B], on q's device: the position of each row's first query. Any
            value is valid, also outside [0, Tk); beyond ±2³¹ it acts as ±2³¹. The host never
            reads it.
        offset: row of r for key j = i without q_start; default Tq - 1, which makes row m the
            distance p - j = Tk - 1 - m. If row m is distance d0 - m, offset = d0 - (Tk - Tq).
        clamp: False: rows outside [0, R) contribute 0. True: m is clamped into [0, R); needs
            an explicit offset.
        causal: j ≤ p.
        window: (left, right), distances in tokens: p - left ≤ j ≤ p + right; None: no limit.
        chunk: (size, left) or (size, left, phase), in tokens, chunks, tokens:
            0 ≤ ⌊(p + phase)/size⌋ - ⌊(j + phase)/size⌋ ≤ left.
        key_start, key_lens: int32 or int64, each [B] or [B, Tq], on q's device: row b, or query i
            of row b, attends to keys key_start ≤ j < key_lens. Any value is valid, and ranges of
            adjacent queries may be in any order; kernels skip most keys where both ends grow with
            the query. The host never reads them. `packed_ranges` computes them for documents.
        mask: bool, broadcastable to [B, H, Tq, Tk], True = attend. All conditions must allow a key.
        bias: float32 or q's dtype, broadcastable to [B, H, Tq, Tk]; added to the scaled score. On
            the reference only: elsewhere a bias of low rank can be expressed by more columns of q
            and k, and one of distances by r.
        scale: factor of the content term; finite, 0 or negative too, default 1/√D.
        softcap: softcap · tanh(score / softcap) before masking; finite, 0 = off.
        dropout_p: in [0, 1), on the probabilities, whenever above 0.
        dropout_seed: int64 tensor of one element; by default drawn from torch's generator of q's
            device. One seed gives one mask, on every backend and device (`testing.dropout_keep`).
        dead_rows: a query that attends to no key: "zero" gives output and gradients 0, "uniform",
            on the reference only, the mean of v over all Tk keys.
        backend: "auto", "reference", "native" or "triton"; a named one runs or raises. "auto" warns
            where it has to use the reference and the scores need more than 256 MiB, or where the
            kernels are not built.

    Returns:
        out [B, H, Tq, Dv] in q's dtype. `rel_attention_with_lse` also returns the log-sum-exp.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, device, range or type.
        BackendUnavailableError: the named backend is missing or does not support an argument.

    Masked content: keys and values outside key_start <= j < key_lens given as [B] may hold
    anything, NaN and infinity included. They change neither out, lse nor any gradient, and their
    own gradients are 0 (exception: dead_rows="uniform", which averages all values). A key or value
    that only another rule excludes, or a range given as [B, Tq], must be finite, as in
    `scaled_dot_product_attention`: NaN or infinity there may reach queries that do not attend to
    it.

    Precision: scores, softmax and sums in float32 (float64 for float64). Under autocast q, k, v,
    r, mem_k, mem_v and q_pos are cast, the biases are not. Gradients exist for all floating
    tensors; dk and dv are summed over the query heads of a key head, dr over the dimensions along
    which r is broadcast. A second derivative raises, except on the reference.

    Source: Dai et al., "Transformer-XL", ACL 2019, section 3.3.
    """
    tensors = (
        *(q, k, v, r, r_w_bias, r_r_bias, mem_k, mem_v, q_pos, q_start, key_start, key_lens),
        *(mask, dropout_seed),
    )
    numbers = (scale, pos_scale, softcap, dropout_p)
    options = (offset, clamp, causal, window, chunk, *numbers, dead_rows, backend)
    return _attend(tensors, bias, options)[0]


def rel_attention_with_lse(
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
    pos_scale: float | None = None,
    q_start: Tensor | None = None,
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `rel_attention`, with the same arguments, but returns (out, lse).

    lse [B, H, Tq] is the natural logarithm of the softmax's denominator before dropout, float32
    (float64 for float64), and -inf where a query attends to no key. It is differentiable; its
    gradient is ignored where it is -inf. `merge_attention` and `with_sink` combine such results.
    """
    tensors = (
        *(q, k, v, r, r_w_bias, r_r_bias, mem_k, mem_v, q_pos, q_start, key_start, key_lens),
        *(mask, dropout_seed),
    )
    numbers = (scale, pos_scale, softcap, dropout_p)
    options = (offset, clamp, causal, window, chunk, *numbers, dead_rows, backend)
    return _attend(tensors, bias, options)


def _attend(
    tensors: tuple[Any, ...], bias: Tensor | None, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Runs a call by the plan of an equal one, or prepares it: q, k, v, r, …, fields of Options."""
    key = rel_attention_plans.key(tensors, bias, options)
    plan = rel_attention_plans.get(key)
    if plan is None:
        q, k, v, r, *optional = tensors
        given = (OptionalTensors(*optional), bias, Options(*options))
        prepared = prepare("rel_attention", q, k, v, r, *given)
        plan = rel_attention_plans.add(key, prepared)
        if plan is None:
            return forward(prepared)
    # The first call, too: gradient checkpointing requires that an equal call saves equal tensors.
    return plan.run(tensors)
