"""Checks that a backend of `rel_attention` is within the error budget, with its gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from txl_kernels._rel_attention_call import OptionalTensors, Options, RelAttentionCall, Rules
from txl_kernels.ops.rel_attention_checks import checked_numbers, checked_rules
from txl_kernels.testing.comparison import call, check_results, repeated, results
from txl_kernels.testing.rel_attention_cases import RelAttentionCase

OP = "rel_attention"


def check_rel_attention(
    case: RelAttentionCase,
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    last_queries: int | None = None,
    runs: int = 1,
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Asserts that output, lse and every gradient of a backend are within the error budget.

    Args:
        last_queries: only this many queries get a gradient and are compared, so that the scores of
            the references stay small; the case must have no mask, no bias, no `q_pos`, `q_start`
            or ranges per query, and no gradient of lse.
        runs: the backend runs so many times and must return the same bits each time.
        within: a context for the backend's runs; the references run outside.
    """
    arguments = attention_arguments(case, *case.inputs(dtype, device))
    dout, dlse = case.dout(dtype, device), case.dlse(dtype, device)
    n_skipped = case.Tq - min(last_queries or case.Tq, case.Tq)
    dout[:, :, :n_skipped] = 0.0
    label = f"{case} {backend} {dtype}"
    with within():
        actual = repeated(
            label, OP, arguments, lambda x: call(OP, backend, x), [dout] * runs, dlse=dlse
        )
    assert actual["out"].dtype == dtype
    if n_skipped:
        assert not actual["dq"][:, :, :n_skipped].any(), f"{case}: dq of a query without gradient"
        for name in ("out", "lse", "dq"):
            actual[name] = actual[name][:, :, n_skipped:]
        arguments[0] = arguments[0].detach()[:, :, n_skipped:].requires_grad_()
        rules = Rules(*arguments[5])
        arguments[5] = list(rules._replace(offset=rules.offset - n_skipped))
        dout = dout[:, :, n_skipped:]
    check_results(label, OP, arguments, actual, dout, dlse)


def check_rel_attention_output(
    case: RelAttentionCase,
    dtype: torch.dtype,
    run: Callable[..., tuple[Tensor, Tensor]],
    device: str = "cpu",
) -> None:
    """Asserts that a forward pass, `run(**inputs, **options)`, is within the error budget."""
    floats, others = case.inputs(dtype, device)
    floats = {name: tensor.detach() for name, tensor in floats.items()}
    arguments = attention_arguments(case, floats, others)
    actual = results(OP, arguments, lambda _: run(**floats, **others, **case.options))
    assert actual["out"].dtype == dtype
    check_results(f"{case} {dtype}", OP, arguments, actual)


def attention_arguments(
    case: RelAttentionCase, floats: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> list[Any]:
    """The operator's arguments for a case and its inputs, and the reference's own if it has any."""
    options = Options(**case.options)
    tensors: dict[str, Any] = {**floats, **others}
    bias, dead_uniform = tensors.pop("bias", None), options.dead_rows == "uniform"
    q, k, v, r = (tensors.pop(name) for name in "qkvr")
    rules, numbers = checked_rules(OP, q, options), checked_numbers(OP, q, options)
    if "mask" in tensors:
        tensors["mask"] = tensors["mask"].expand(*q.shape[:3], case.Tm + k.shape[2])
    given = RelAttentionCall(q, k, v, r, OptionalTensors(**tensors), rules, numbers)
    return [*given.arguments(), *([bias, dead_uniform] if bias is not None or dead_uniform else [])]
