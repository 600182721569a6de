"""A bias that is a product of few columns per query and key needs no `bias`: the columns extend the
head. XLNet's segments are such a bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from txl_kernels import rel_attention

B, H, T, M, D, N_SEGMENTS = 2, 3, 11, 4, 8, 3


def xlnet() -> dict[str, Tensor]:
    """Leaves of one call of XLNet's attention, with the embeddings of equal and other segments."""
    torch.manual_seed(0)
    shapes = {
        "q": (B, H, T, D),
        "k": (B, H, T, D),
        "v": (B, H, T, D),
        "r": (1, H, M + 2 * T, D),
        "r_w_bias": (H, D),
        "r_r_bias": (H, D),
        "mem_k": (B, H, M, D),
        "mem_v": (B, H, M, D),
        "r_s_bias": (H, D),
        "seg_embed": (2, H, D),  # equal, different
    }
    return {
        name: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }


def segment_scores(x: dict[str, Tensor]) -> Tensor:
    """Products of each query with the embeddings of equal and different segments: [B, H, T, 2]."""
    return torch.einsum("bhid,shd->bhis", x["q"] + x["r_s_bias"][:, None], x["seg_embed"])


def by_bias(x: dict[str, Tensor], segment: Tensor) -> Tensor:
    """`bias` has the score of each pair of query and key: [B, H, T, M+T]."""
    differs = segment[:, M:, None] != segment[:, None]  # [B, T, M+T]
    index = differs.long()[:, None].expand(-1, H, -1, -1)
    bias = D**-0.5 * segment_scores(x).gather(-1, index)
    given = {name: x[name] for name in x if name not in ("r_s_bias", "seg_embed")}
    return rel_attention(**given, offset=T, bias=bias, backend="reference")


def by_columns(x: dict[str, Tensor], segment: Tensor, backend: str) -> Tensor:
    """Queries have one more column per segment, with the score of a key of that segment; a key has
    a 1 in the column of its own segment."""
    is_own = torch.nn.functional.one_hot(segment, N_SEGMENTS).double()  # [B, M+T, S]
    equal, different = segment_scores(x).unsqueeze(-2).unbind(-1)  # [B, H, T, 1] each
    columns = torch.where(is_own[:, None, M:].bool(), equal, different)  # [B, H, T, S]
    of_memory, of_segment = is_own[:, None].expand(-1, H, -1, -1).split([M, T], dim=2)
    return rel_attention(
        torch.cat([x["q"], columns], dim=-1),
        torch.cat([x["k"], of_segment], dim=-1),
        x["v"],
        x["r"],
        r_w_bias=torch.cat([x["r_w_bias"], x["q"].new_zeros(H, N_SEGMENTS)], dim=-1),
        r_r_bias=x["r_r_bias"],
        mem_k=torch.cat([x["mem_k"], of_memory], dim=-1),
        mem_v=x["mem_v"],
        q_pos=x["q"],
        offset=T,
        scale=D**-0.5,
        backend=backend,
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_segments_of_xlnet_are_columns_of_the_head(backend):
    segment = torch.randint(0, N_SEGMENTS, (B, M + T), generator=torch.Generator().manual_seed(1))
    x = xlnet()
    weights = torch.linspace(-1, 1, B * H * T * D, dtype=torch.float64).view(B, H, T, D)
    results = []
    for out in (by_bias(x, segment), by_columns(x, segment, backend)):
        results.append([out.detach(), *torch.autograd.grad(out, list(x.values()), weights)])
    for name, expected, actual in zip(("out", *x), *results, strict=True):
        error = float((actual - expected).norm() / expected.norm())
        assert error < 1e-13, f"{name}: {error}"
