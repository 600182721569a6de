"""Any op, on its operator's arguments: references, gradients, comparison by the error budget.

The arguments have the order of the schema of `torch.ops.txl_native.<op>_fwd`; those of
`adaptive_log_prob` and `adaptive_topk` are the arguments of `adaptive_nll`. Arguments of
`rel_attention` may end with a bias or None, and whether rows without keys are uniform: the
reference alone supports these. Gradients are compared for the tensors that require them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from txl_kernels._namespaces import TRITON
from txl_kernels._register_adaptive import is_present
from txl_kernels._rel_attention_call import UNLIMITED, RelAttentionCall
from txl_kernels.backends.reference import adaptive_embedding as embedding
from txl_kernels.backends.reference import adaptive_softmax as softmax
from txl_kernels.backends.reference import few_row_linear as linear
from txl_kernels.backends.reference import rel_attention as attention
from txl_kernels.backends.reference import rel_shift as shift
from txl_kernels.ops.adaptive_embedding import adaptive_embedding
from txl_kernels.ops.adaptive_softmax import (
    adaptive_log_prob,
    adaptive_loss,
    adaptive_nll,
    adaptive_topk,
)
from txl_kernels.ops.few_row_linear import few_row_linear
from txl_kernels.ops.rel_attention import rel_attention_with_lse
from txl_kernels.ops.rel_shift import rel_shift
from txl_kernels.testing.budget import check_budget
from txl_kernels.torch_private import argument_names, tree_leaves, tree_map_only

TOP = 40  # tokens of `adaptive_topk`
_SUMS = ("dr", "dr_w_bias", "dr_r_bias", "dbias")
Run = Callable[[list[Any]], Any]


def named(op: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """The arguments by name; tensors of a list each by a name of its own."""
    found: dict[str, Any] = {}
    if op == "rel_attention":
        call, bias, dead_uniform = attention_call(arguments)
        found |= {
            **dict(zip("qkvr", call[:4], strict=True)),
            **call.optional._asdict(),
            "bias": bias,
        }
        found |= {**call.rules._asdict(), **call.numbers._asdict()}
        return found | {"dead_uniform": dead_uniform}
    op = "adaptive_nll" if op in ("adaptive_log_prob", "adaptive_topk") else op
    operator = getattr(TRITON, f"{op}_fwd").default
    for name, value in zip(argument_names(operator), arguments, strict=False):
        if isinstance(value, list):
            found |= {f"{name}[{n}]": part for n, part in enumerate(value)}
        else:
            found[name] = value
    return found


def attention_call(arguments: Sequence[Any]) -> tuple[RelAttentionCall, Tensor | None, bool]:
    """The call of `rel_attention`, its bias, and whether rows without keys are uniform."""
    bias, dead_uniform = arguments[7:] or (None, False)
    return RelAttentionCall.of_arguments(*arguments[:7]), bias, dead_uniform


def call(op: str, backend: str, arguments: Sequence[Any]) -> Any:
    """The result of the public op."""
    if op == "rel_attention":
        return _call_attention(backend, arguments)
    if op == "rel_shift":
        x, n_keys, offset = arguments
        return rel_shift(x, n_keys=n_keys, offset=offset, backend=backend)
    if op == "few_row_linear":
        return few_row_linear(*arguments[:3], weight_scale=arguments[3], backend=backend)
    if op == "adaptive_embedding":
        tokens, tables, projections, scale, sparse = arguments
        cutoffs = _cutoffs([len(table) for table in tables])
        given = [x if is_present(x) else None for x in projections]
        return adaptive_embedding(
            tokens, tables, given, cutoffs, scale, sparse=sparse, backend=backend
        )
    hidden, target, flat, ignore_index, *flags = arguments
    (head_proj, head_weight, head_bias), *tails = clusters(flat)
    head: dict[str, Any] = {"head_bias": head_bias, "head_proj": head_proj, "backend": backend}
    sizes = [len(head_weight) - len(tails), *(len(tail.weight) for tail in tails)]
    head["cutoffs"] = _cutoffs(sizes)
    if op == "adaptive_log_prob":
        return adaptive_log_prob(hidden, head_weight, tails, **head)
    if op == "adaptive_topk":
        return adaptive_topk(hidden, head_weight, tails, TOP, **head)[0]
    head["ignore_index"] = ignore_index
    if op == "adaptive_nll":
        return adaptive_nll(hidden, target, head_weight, tails, **head)
    reduction = "mean" if flags[0] else "sum"
    return adaptive_loss(hidden, target, head_weight, tails, **head, reduction=reduction)


def _call_attention(backend: str, arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
    given, bias, dead_uniform = attention_call(arguments)
    rules = given.rules
    options: dict[str, Any] = given.optional._asdict() | given.numbers._asdict()
    options["dead_rows"] = "uniform" if dead_uniform else "zero"
    options |= {"bias": bias, "offset": rules.offset, "clamp": bool(rules.clamp)}
    sides = (rules.window_left, rules.window_right)
    options["window"] = tuple(None if side == UNLIMITED else side for side in sides)
    options["chunk"] = rules[4:] if rules.chunk_size else None
    q, k, v, r = given[:4]
    return rel_attention_with_lse(q, k, v, r, **options, backend=backend)


def reference(op: str, arguments: Sequence[Any], dtype: torch.dtype | None = None) -> Any:
    """The result of the specification, computed in `dtype` (None: in its usual one)."""
    if op == "rel_attention":
        attended, bias, dead_uniform = attention_call(arguments)
        own: dict[str, Any] = {"bias": bias, "dead_uniform": dead_uniform}
        return attention.rel_attention(attended, **own, compute_dtype=dtype)
    if op == "rel_shift":
        return shift.rel_shift(*arguments)
    if op == "few_row_linear":
        x, weight, bias, scale = arguments
        return linear.few_row_linear(x, weight, bias, scale, compute_dtype=dtype)
    if op == "adaptive_embedding":
        tokens, tables, projections, scale, _sparse = arguments
        given = [x if is_present(x) else None for x in projections]
        return embedding.embed(tokens, tables, given, scale, compute_dtype=dtype)
    hidden, target, flat, ignore_index, *flags = arguments
    head, *tails = clusters(flat)
    if op in ("adaptive_log_prob", "adaptive_topk"):
        log_probs = softmax.log_prob(hidden, head, tails, compute_dtype=dtype)
        return log_probs if op == "adaptive_log_prob" else log_probs.topk(TOP)[0]
    nll = softmax.nll(hidden, target, head, tails, ignore_index, compute_dtype=dtype)
    if op == "adaptive_nll":
        return nll
    return softmax.reduced(nll, target, ignore_index, "mean" if flags[0] else "sum")


def clusters(flat: Sequence[Tensor]) -> list[softmax.Cluster]:
    """The clusters of a flat list of projections, weights and biases."""
    parts: list[Any] = [x if is_present(x) else None for x in flat]
    return [softmax.Cluster(*parts[n : n + 3]) for n in range(0, len(parts), 3)]


def _cutoffs(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:n]) for n in range(1, len(sizes))]


def leaves(op: str, arguments: Sequence[Any]) -> dict[str, Tensor]:
    """The tensors that require gradients, by name."""
    return {
        name: x
        for name, x in named(op, arguments).items()
        if isinstance(x, Tensor) and x.requires_grad
    }


def results(
    op: str,
    arguments: list[Any],
    run: Run,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
) -> dict[str, Tensor]:
    """Outputs of one run and, with the gradients of the outputs, those of the leaves."""
    returned = run(arguments)
    outputs = (returned,) if isinstance(returned, Tensor) else returned[:2]
    if op != "rel_attention":
        outputs = outputs[:1]  # the others are for backward
    found = dict(zip(("out", "lse"), outputs, strict=False))
    if dout is not None:
        given = leaves(op, arguments)
        used = [(x, dx) for x, dx in zip(outputs, (dout, dlse), strict=False) if dx is not None]
        grads = torch.autograd.grad(
            [x for x, _ in used], list(given.values()), [dx.to(x.dtype) for x, dx in used]
        )
        found |= {f"d{name}": grad for name, grad in zip(given, grads, strict=True)}
    return {name: (x.to_dense() if x.is_sparse else x).detach() for name, x in found.items()}


def random_like(out: Tensor) -> Tensor:
    """A random gradient of `out`."""
    generator = torch.Generator(out.device).manual_seed(5)
    drawn = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32)
    return drawn.to(out.dtype)


def repeated(
    label: str,
    op: str,
    arguments: list[Any],
    run: Run,
    douts: Sequence[Tensor | None],
    *,
    dlse: Tensor | None = None,
    unordered: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The results of the first of several runs, one for each of `douts`, which are equal.

    Args:
        dlse: the gradient of the second output.
        unordered: gradients that are not compared.

    Raises:
        AssertionError: two runs differ in a bit.
    """
    first, *others = (results(op, arguments, run, dout, dlse) for dout in douts)
    for other in others:
        for name, x in other.items():
            same = name in unordered or torch.equal(_bits(x), _bits(first[name]))
            assert same, f"{label}: two runs differ in the bits of {name}"
    return first


def _bits(x: Tensor) -> Tensor:
    dtypes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(dtypes[x.element_size()])


def compared(
    op: str,
    arguments: list[Any],
    actual: Mapping[str, Tensor],
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor], dict[str, Any]]]:
    """For each result its name, and the arguments of `check_budget` but for the name."""
    tensors = (x for x in tree_leaves(arguments) if isinstance(x, Tensor))
    dtype = next(x.dtype for x in tensors if x.is_floating_point())
    exact = tree_map_only(Tensor, _as_double, arguments)
    ref64 = results(op, exact, lambda x: reference(op, x, torch.float64), dout, dlse)
    eager = results(op, arguments, lambda x: reference(op, x, dtype), dout, dlse)
    magnitudes = {} if dout is None else _magnitudes(op, arguments, dout, dlse)
    for name, x in actual.items():
        options: dict[str, Any] = {"dtype": dtype, "magnitude": magnitudes.get(name)}
        options["is_sum"] = name in magnitudes and (name in _SUMS or op.startswith("adaptive"))
        yield name, (x, ref64[name], eager[name]), options


def check_results(
    label: str,
    op: str,
    arguments: list[Any],
    actual: Mapping[str, Tensor],
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
) -> None:
    """Asserts that all results are within the error budget.

    Args:
        label: for messages.
        actual: from `results`, with the same `dout` and `dlse`.
    """
    for name, tensors, options in compared(op, arguments, actual, dout, dlse):
        check_budget(f"{label}: {name}", *tensors, **options)


def _as_double(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def _magnitudes(
    op: str, arguments: Sequence[Any], dout: Tensor, dlse: Tensor | None
) -> dict[str, float]:
    """The largest product of magnitudes that enters each gradient, by name of the gradient."""
    if op == "rel_attention":
        return _attention_magnitudes(attention_call(arguments)[0], dout, dlse)
    given, largest = leaves(op, arguments), _largest(dout)
    if op != "rel_shift":
        largest *= max(1.0, *map(_largest, given.values()))
    if op == "adaptive_embedding":
        largest *= abs(arguments[3])
    elif op == "adaptive_loss" and arguments[4]:
        largest /= max(int((arguments[1] != arguments[3]).sum()), 1)
    return {f"d{name}": largest for name in given}


def _attention_magnitudes(
    call: RelAttentionCall, dout: Tensor, dlse: Tensor | None
) -> dict[str, float]:
    optional, numbers = call.optional, call.numbers
    kept, scale, pos_scale = 1.0 - numbers.dropout_p, abs(numbers.scale), abs(numbers.pos_scale)
    given = [x.detach().double() for x in (optional.mem_v, call.v) if x is not None]
    values = torch.cat(given, dim=2)
    values = values.repeat_interleave(dout.shape[1] // values.shape[1], dim=1)
    dP = _largest(dout.double() @ values.mT) / kept + _largest(dlse)
    content_query = _largest(call.q) + _largest(optional.r_w_bias)
    position_query = call.q if optional.q_pos is None else optional.q_pos
    positions = _largest(position_query) + _largest(optional.r_r_bias)
    keys, rows = max(_largest(call.k), _largest(optional.mem_k)), _largest(call.r)
    dq = scale * keys if optional.q_pos is not None else max(scale * keys, pos_scale * rows)
    found = dict.fromkeys(("dk", "dmem_k"), scale * dP * content_query)
    found |= dict.fromkeys(("dv", "dmem_v"), _largest(dout) / kept)
    found |= dict.fromkeys(("dq_pos", "dr_r_bias"), pos_scale * dP * rows)
    return found | {
        "dq": dP * dq,
        "dr": pos_scale * dP * positions,
        "dr_w_bias": scale * dP * keys,
        "dbias": dP,
    }


def _largest(x: Tensor | None) -> float:
    return float(x.detach().abs().max()) if x is not None and x.numel() > 0 else 0.0
