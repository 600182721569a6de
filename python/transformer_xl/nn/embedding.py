"""Adaptive word embedding: frequent words wide, rare words narrow, all projected to d_model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from txl_kernels import adaptive_embedding
from txl_kernels.ops.checks import check_int


class AdaptiveEmbedding(nn.Module):
    """tokens to √d_proj · table_k[token] projection_kᵀ, k the bin of the token.

    With div_val = 1 there is one table of width d_embed, projected only if d_embed ≠ d_proj. With
    div_val > 1 bin k is d_embed // div_val**k wide and projected, by `proj_same_dim` also where
    its width is d_proj.

    Args:
        vocab_size: number of tokens.
        d_embed, d_proj: width of the first bin and of the output.
        cutoffs: first token of every bin but the first.
        div_val: by what each next bin is narrower.
        sparse: give the tables sparse gradients, as `nn.Embedding` does; not where a softmax is
            tied to them, whose own are dense.
        backend: "auto", or the implementation that must run.

    State: `emb_layers.k.weight` [V_k, d_k], `emb_projs.k` [d_proj, d_k].
    Source: Baevski and Auli 2019, section 3, as the Transformer-XL code has it.
    """

    def __init__(
        self,
        vocab_size: int,
        d_embed: int,
        d_proj: int,
        cutoffs: tuple[int, ...] = (),
        div_val: int = 1,
        *,
        proj_same_dim: bool = True,
        sparse: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        vocab_size, d_embed, d_proj, div_val = checked_sizes(
            op, vocab_size=vocab_size, d_embed=d_embed, d_proj=d_proj, div_val=div_val
        )
        cutoffs = checked_cutoffs(op, cutoffs)
        self.cutoffs = cutoffs if div_val > 1 else ()
        self.scale = d_proj**0.5
        self.sparse = sparse
        self.backend = backend
        self.emb_layers = nn.ModuleList()
        self.emb_projs = nn.ParameterList()
        ends = (0, *self.cutoffs, vocab_size)
        for k in range(len(ends) - 1):
            width = d_embed // div_val**k
            self.emb_layers.append(nn.Embedding(ends[k + 1] - ends[k], width))
            if has_projection(width, d_proj, div_val, proj_same_dim):
                projection = torch.randn(d_proj, width) * width**-0.5
                self.emb_projs.append(nn.Parameter(projection))
            else:
                self.emb_projs.append(None)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 tokens […] to embeddings […, d_proj]; IndexError for a token out of range."""
        return adaptive_embedding(
            tokens,
            [layer.get_parameter("weight") for layer in self.emb_layers],
            list(self.emb_projs),
            cutoffs=self.cutoffs,
            scale=self.scale,
            sparse=self.sparse,
            backend=self.backend,
        )


def checked_sizes(op: str, **sizes: int) -> Iterator[int]:
    """The sizes as Python integers of at least 1; TypeError and ValueError name a wrong one."""
    return (check_int(op, name, size, at_least=1) for name, size in sizes.items())


def checked_cutoffs(op: str, cutoffs: Iterable[int]) -> tuple[int, ...]:
    """The cutoffs as Python integers; TypeError and ValueError where one is none."""
    return tuple(check_int(op, "every cutoff", cutoff) for cutoff in cutoffs)


def has_projection(width: int, d_proj: int, div_val: int, proj_same_dim: bool) -> bool:
    """Whether a bin of `width` is projected to `d_proj`: always with bins, unless equal and so
    asked; in a single table only where the widths differ."""
    return width != d_proj or (div_val > 1 and proj_same_dim)
