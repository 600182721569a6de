"""`adaptive_embedding`: frequent tokens in wide tables, rare ones in narrow, projected ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast as cast_type

import torch
from torch import Tensor

from txl_kernels.backends import choose, operators
from txl_kernels.backends.reference import adaptive_embedding as reference
from txl_kernels.ops.adaptive_checks import check_cutoffs, check_tokens
from txl_kernels.ops.autocast import autocast_dtype, cast, outside_autocast
from txl_kernels.ops.checks import (
    FLOATING,
    check_dtype,
    check_flag,
    check_given,
    check_number,
    check_shape,
    check_tensor,
    needs_grad,
)
from txl_kernels.transforms import inside_transform

OP = "adaptive_embedding"


def adaptive_embedding(
    tokens: Tensor,
    tables: Sequence[Tensor],
    projections: Sequence[Tensor | None],
    cutoffs: Sequence[int] = (),
    scale: float = 1.0,
    *,
    sparse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Looks each token up in its cluster's table and projects it: scale · projection_k · row.

    Args:
        tokens: int64 [...], in [0, V).
        tables: per cluster [V_k, d_k]; float32, bfloat16, float16 or float64.
        projections: per cluster [d, d_k], in `nn.Linear`'s orientation, or None where d_k = d.
        cutoffs: first token of each cluster but the first; () for a single table.
        scale: factor of the result; √d_model in Transformer-XL.
        sparse: give the tables sparse gradients, which hold the rows that tokens index, for
            `torch.optim.SparseAdam` and the like; neither under `torch.compile` nor inside the
            transforms of `torch.func`.
        backend: "auto", "reference", "native" or "triton"; a named one runs or raises.

    Returns:
        [..., d] in the tables' dtype.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range.
        IndexError: a token out of range, on the CPU; elsewhere (and on the reference under
            `torch.compile`) the device asserts.
        BackendUnavailableError: the named backend is missing.

    Precision: sums in float32 (float64 for float64); bfloat16 and float16 products where the
    backend has them. A second derivative raises, except on the reference.

    Source: Baevski and Auli, "Adaptive input representations", ICLR 2019.
    """
    check_tensor(OP, "tokens", tokens)
    check_dtype(OP, "tokens", tokens, (torch.int64,))
    if len(tables) < 1 or len(projections) != len(tables):
        raise ValueError(
            f"{OP}: tables and projections must be as many, at least one each, got "
            f"{len(tables)} and {len(projections)}"
        )
    lower = autocast_dtype(tokens.device)
    tables = [cast(table, lower) for table in tables]
    projections = [cast(projection, lower) for projection in projections]
    n_tokens = _check_tables(tokens, tables, projections, cutoffs)
    scale = check_number(OP, "scale", scale)
    check_flag(OP, "sparse", sparse)
    if sparse and (torch.compiler.is_compiling() or inside_transform("vmap", "grad", "jvp")):
        raise ValueError(
            f"{OP}: sparse gradients exist in eager mode only, neither under torch.compile nor "
            "inside the transforms of torch.func; got sparse=True"
        )
    absent = tables[0].new_empty(0)
    given = [absent if projection is None else projection for projection in projections]
    chosen = choose(
        OP,
        tokens,
        *tables,
        arguments=lambda: (tokens, tables, given, scale, sparse),
        backend=backend,
        dtype=tables[0].dtype,
        Tq=tokens.numel(),
        needs_grad=needs_grad(*tables, *projections),
    )
    with outside_autocast(tokens.device):
        if chosen == "reference":
            check_tokens(OP, "tokens", tokens, n_tokens)
            return reference.embed(tokens, tables, projections, scale, sparse)
        embedded = operators(chosen).adaptive_embedding_fwd(tokens, tables, given, scale, sparse)
        return cast_type(Tensor, embedded)


def _check_tables(
    tokens: Tensor,
    tables: Sequence[Tensor],
    projections: Sequence[Tensor | None],
    cutoffs: Sequence[int],
) -> int:
    """Returns V."""
    check_tensor(OP, "tables[0]", tables[0])
    check_dtype(OP, "tables[0]", tables[0], FLOATING)
    width: int | str = "d"
    for k, (table, projection) in enumerate(zip(tables, projections, strict=True)):
        names = f"tables[{k}]", f"projections[{k}]"
        check_tensor(OP, names[0], table)
        given = dict(zip(names, (table, projection), strict=True))
        check_given(OP, given, (tables[0].dtype,), tokens.device)
        if projection is None:
            check_shape(OP, names[0], table, (f"V_{k}", width))
            width = table.shape[1]
        else:
            check_shape(OP, names[0], table, (f"V_{k}", f"d_{k}"))
            check_shape(OP, names[1], projection, (width, table.shape[1]))
            width = projection.shape[0]
    sizes = [table.shape[0] for table in tables]
    check_cutoffs(OP, cutoffs, sizes)
    return sum(sizes)
