"""Adaptive word embedding: wide tables for frequent tokens, narrow ones for rare tokens, all
projected to d_model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from transformer_xl.nn.layer_weights import projections_of, weight_and_bias
from txl_kernels import adaptive_embedding
from txl_kernels.ops.checks import check_int


class AdaptiveEmbedding(nn.Module):
    """Maps tokens to √d_proj · table_k[token] projection_kᵀ, where k is the cluster of the token.

    With div_val = 1 there is one table of width d_embed, projected only if d_embed ≠ d_proj. With
    div_val > 1 cluster k is d_embed // div_val**k wide and projected; if its width is d_proj, only
    with `proj_same_dim`.

    The kernels read the weights of `emb_layers` and do not call these layers: weights of
    `torch.nn.utils.prune`, `weight_norm` and parametrisations are computed first, quantised weights
    (torchao) are dequantised outside training; LoRA wrappers must be merged.

    Args:
        vocab_size: number of tokens.
        d_embed, d_proj: width of the first cluster and of the output.
        cutoffs: first token of every cluster but the first.
        div_val: the factor by which each cluster is narrower than the one before.
        sparse: give the tables sparse gradients, as `nn.Embedding` does; not with a softmax tied
            to them, because its gradients are dense.
        backend: "auto", or the only implementation that may run.

    State: `emb_layers.k.weight` [V_k, d_k], `emb_projs.k` [d_proj, d_k].
    Source: Baevski and Auli 2019, section 3, with the projections of the Transformer-XL
    code.
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
        """int64 tokens […] to embeddings […, d_proj].

        Raises:
            IndexError: a token out of range (on the CPU; a device assert on CUDA).
            ValueError: a layer that is wrapped, hooked, or quantised and would be trained.
        """
        layers = enumerate(self.emb_layers)
        tables = [weight_and_bias(self, f"emb_layers.{k}", layer)[0] for k, layer in layers]
        return adaptive_embedding(
            tokens,
            tables,
            projections_of(self, "emb_projs"),
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
    """Whether a cluster of `width` is projected to `d_proj`: if the widths differ or, with
    div_val > 1, if `proj_same_dim`."""
    return width != d_proj or (div_val > 1 and proj_same_dim)
