"""Checks that a backend of `rel_attention` is within the error budget, with its gradients."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from txl_kernels.backends.reference import rel_attention as reference
from txl_kernels.ops.rel_attention import rel_attention
from txl_kernels.testing.budget import check_budget
from txl_kernels.testing.rel_attention_cases import RelAttentionCase

SUMS = ("r", "r_w_bias", "r_r_bias", "bias")


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
            the references stay small; the case must have no mask and no bias.
        runs: the backend runs so many times and must return the same bits each time.
        within: a context for the backend's runs; the references run outside.
    """
    floats, others = case.inputs(dtype, device)
    options = {**others, **case.options, "return_lse": True}
    dout = case.dout(dtype, device)
    n_skipped = case.Tq - min(last_queries or case.Tq, case.Tq)
    dout[:, :, :n_skipped] = 0.0

    def call(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        given: dict[str, Any] = {**inputs, **options, "backend": backend}
        out, lse = rel_attention(**given)
        return out, lse

    with within():
        actual = _with_gradients(call, floats, dout)
        for _ in range(runs - 1):
            for name, tensor in _with_gradients(call, floats, dout).items():
                same = torch.equal(tensor, actual[name])
                assert same, f"{case} {backend} {dtype}: {name} has other bits in a second run"
    if n_skipped:
        assert not actual["dq"][:, :, :n_skipped].any(), f"{case}: dq of a query without gradient"
        for name in ("out", "lse", "dq"):
            actual[name] = actual[name][:, :, n_skipped:]
        offset = case.options.get("offset", case.Tq - 1) - n_skipped
        case = dataclasses.replace(case, options={**case.options, "offset": offset})
        options["offset"] = offset
        floats["q"], dout = floats["q"][:, :, n_skipped:], dout[:, :, n_skipped:]
    plain = _with_gradients(lambda inputs: eager(inputs, others, case.options), floats, dout)
    ref64 = _with_gradients(
        lambda inputs: rel_attention(**inputs, **options, backend="reference"),
        {name: tensor.double() for name, tensor in floats.items()},
        dout.double(),
    )
    assert actual["out"].dtype == dtype
    magnitudes = gradient_magnitudes(floats, dout, case.options)
    for name in ref64:
        check_budget(
            f"{case} {backend} {dtype}: {name}",
            actual[name],
            ref64[name],
            plain[name],
            dtype=dtype,
            magnitude=magnitudes.get(name),
            is_sum=name.removeprefix("d") in SUMS,
        )


def check_rel_attention_output(
    case: RelAttentionCase,
    dtype: torch.dtype,
    run: Callable[..., tuple[Tensor, Tensor]],
    device: str = "cpu",
) -> None:
    """Asserts that a forward pass, `run(**inputs, **options)`, is within the error budget."""
    floats, others = case.inputs(dtype, device)
    floats = {name: tensor.detach() for name, tensor in floats.items()}
    actual = run(**floats, **others, **case.options)
    plain = eager(floats, others, case.options)
    call: dict[str, Any] = {name: tensor.double() for name, tensor in floats.items()}
    call |= {**others, **case.options, "return_lse": True, "backend": "reference"}
    ref64 = rel_attention(**call)
    assert actual[0].dtype == dtype
    for name, result, exact, rounded in zip(("out", "lse"), actual, ref64, plain, strict=True):
        check_budget(f"{case} {dtype}: {name}", result, exact, rounded, dtype=dtype)


def _with_gradients(
    run: Callable[[dict[str, Any]], tuple[Tensor, Tensor]],
    floats: dict[str, Tensor],
    dout: Tensor,
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in floats.items()}
    out, lse = run(leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out, "lse": lse, **named}


def eager(
    inputs: dict[str, Tensor], others: dict[str, Tensor], options: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The reference with every intermediate rounded to the inputs' dtype."""
    call: dict[str, Any] = {"offset": inputs["q"].shape[2] - 1, **inputs, **others, **options}
    call["window_left"], call["window_right"] = call.pop("window", (None, None))
    call["chunk"] = (*call.pop("chunk", ()), 0)[:3] if "chunk" in call else ()
    call["dead_uniform"] = call.pop("dead_rows", "zero") == "uniform"
    call.setdefault("scale", inputs["q"].shape[3] ** -0.5)
    return reference.rel_attention(**call, compute_dtype=inputs["q"].dtype)


def gradient_magnitudes(
    floats: Mapping[str, Tensor], dout: Tensor, options: Mapping[str, Any]
) -> dict[str, float]:
    """The largest product of magnitudes that each gradient contains, by gradient.

    Args:
        floats: the floating tensors of a call by name.
        dout: [B, H, Tq, Dv], the gradient of the output.
        options: may hold the call's `scale` and `dropout_p`.
    """

    def largest(*names: str) -> float:
        given = [floats[name] for name in names if name in floats]
        return max((float(tensor.detach().abs().max()) for tensor in given), default=0.0)

    kept = 1.0 - options.get("dropout_p", 0.0)
    scale = abs(options.get("scale", floats["q"].shape[3] ** -0.5))
    values = [floats[name].detach().double() for name in ("mem_v", "v") if name in floats]
    dP = float((dout.double() @ torch.cat(values, dim=2).mT).abs().max()) / kept
    content_query = largest("q") + largest("r_w_bias")
    position_query = largest("q_pos" if "q_pos" in floats else "q") + largest("r_r_bias")
    keys = largest("k", "mem_k")
    dv = float(dout.abs().max()) / kept
    return {
        "dq": scale * dP * (keys if "q_pos" in floats else max(keys, largest("r"))),
        "dq_pos": scale * dP * largest("r"),
        "dk": scale * dP * content_query,
        "dmem_k": scale * dP * content_query,
        "dv": dv,
        "dmem_v": dv,
        "dr": scale * dP * position_query,
        "dr_w_bias": scale * dP * keys,
        "dr_r_bias": scale * dP * largest("r"),
        "dbias": dP,
    }
