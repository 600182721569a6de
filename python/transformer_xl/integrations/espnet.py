"""ESPnet's `RelPositionMultiHeadedAttention`, FunASR's copy of it, and functions for other copies.

    score_ij = ((q_i + pos_bias_u)·k_j + (q_i + pos_bias_v)·r[j - i + Tq - 1]) / √d_k

The table has 2Tk - 1 rows, from distance Tk - 1 (keys to the left) down to -(Tk - 1). With
`zero_triu` the position term is 0 for keys to the right, so their rows are left out. A mask
[B, 1, Tk] or [B, Tq, Tk] is nonzero for keys that a query attends to.

A served call sets `self.attn`, the probabilities that the classes keep for plots, to None. With a
forward hook, which may read them, a call runs the original code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from transformer_xl.integrations.adapter import Adapter, Lookalike, Versions, always, left_alone
from transformer_xl.integrations.hugging_face import ranges_of_padding
from transformer_xl.integrations.position_tables import project
from txl_kernels import rel_attention
from txl_kernels.torch_private import changes, forward_hooks
from txl_kernels.transforms import is_unreadable

_LEGACY = "its relative shift wraps around (rel_pos_type legacy), which the kernels do not compute"


def attention(
    module: Any,
    query: Tensor,  # [B, Tq, d_model]
    key: Tensor,  # [B, Tk, d_model]
    value: Tensor,  # [B, Tk, d_model]
    pos_emb: Tensor,  # [1 or B, 2Tk - 1, d_model]
    mask: Tensor | None = None,  # [1 or B, 1 or Tq, Tk], nonzero = attend
) -> Tensor:
    """`forward` of the attention of ESPnet and FunASR."""
    q, k, v = module.forward_qkv(query, key, value)  # each [B, H, T, d_k]
    out = attend(module, q, k, v, pos_emb, which_keys(mask, len(query)))
    return module.linear_out(out)  # type: ignore[no-any-return]


def attend(
    module: Any,
    q: Tensor,  # [B, H, Tq, d_k]
    k: Tensor,  # [B, H, Tk, d_k]
    v: Tensor,  # [B, H, Tk, d_k]
    pos_emb: Tensor,  # [1 or B, 2Tk - 1, d_model]
    keys: dict[str, Any],
    *,
    dropout: nn.Dropout | None = None,
) -> Tensor:
    """[B, Tq, d_model]: the results of all heads, before the last linear layer.

    Args:
        keys: arguments from `which_keys`.
        dropout: of the probabilities; default `module.dropout`.
    """
    if getattr(module, "zero_triu", False):
        pos_emb = pos_emb[:, : k.shape[2]]
    dropout = module.dropout if dropout is None else dropout
    out = rel_attention(
        q,
        k,
        v,
        project(module.linear_pos, pos_emb, q.shape[1]),
        **biases(module, q),
        dropout_p=dropout.p if dropout.training else 0.0,
        **keys,
    )
    if hasattr(module, "attn"):
        module.attn = None
    return out.transpose(1, 2).flatten(2)


def biases(module: Any, q: Tensor) -> dict[str, Any]:
    """The arguments of `rel_attention` that turn q into the queries of both terms.

    ESPnet2's `simplified_attention_score` has no biases, and its position term, one number for each
    head and distance, does not depend on the query.
    """
    if hasattr(module, "pos_bias_u"):
        return {"r_w_bias": module.pos_bias_u, "r_r_bias": module.pos_bias_v}
    return {"q_pos": q.new_ones(1).expand(*q.shape[:3], 1)}


def which_keys(mask: Tensor | None, n_rows: int, *, marks_padding: bool = False) -> dict[str, Any]:
    """The arguments of `rel_attention` for a mask.

    Args:
        mask: [1 or B, Tk] or [1 or B, 1 or Tq, Tk].
        n_rows: B.
        marks_padding: the mask is nonzero for keys that are masked out, not for the others.
    """
    if mask is None:
        return {}
    ranges = None
    if (mask.dim() == 2 or mask.shape[1] == 1) and not is_unreadable(mask):
        ranges = _ranges(mask, marks_padding)
    if ranges is not None:
        start, end = ranges.expand(2, n_rows)
        return {"key_start": start, "key_lens": end}
    keep = mask == 0 if marks_padding else mask != 0
    return {"mask": keep.view(len(mask), 1, -1, mask.shape[-1])}


# The ranges of each mask that is in use. A model gives the same one to all its layers, and on a GPU
# the host waits each time that ranges are computed.
_known_ranges: Any = WeakTensorKeyDictionary()


def _ranges(mask: Tensor, marks_padding: bool) -> Tensor | None:
    """[2, 1 or B]: key_start and key_lens of a mask without queries; None: not one range."""
    if mask.is_inference():  # torch does not count its changes
        return _new_ranges(mask, marks_padding)
    version = changes(mask), marks_padding
    known = _known_ranges.get(mask)
    if known is None or known[0] != version:
        with torch.inference_mode(False):  # a later call may need gradients
            known = _known_ranges[mask] = version, _new_ranges(mask, marks_padding)
    ranges: Tensor | None = known[1]
    return ranges


def _new_ranges(mask: Tensor, marks_padding: bool) -> Tensor | None:
    rows = mask.flatten(1)  # [1 or B, Tk]
    return ranges_of_padding(rows == 0 if marks_padding else rows)


def unserved_mask(mask: Any) -> str | None:
    """Why a call with this mask must run the original code, or None."""
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 3):
        return None
    return "the mask is no tensor of three dimensions"


def unserved_hook(module: Any) -> str | None:
    """Why a call of a module with forward hooks must run the original code, or None."""
    if hasattr(module, "attn") and forward_hooks(module):
        return "a hook may read the attention weights"
    return None


def unserved_table(Tq: int, Tk: int, R: int) -> str | None:
    """Why a call with a table of R rows must run the original code, or None."""
    if Tq > Tk:
        return "there are more queries than keys"
    if 2 * Tk - 1 != R:
        return "the position table does not have 2 Tk - 1 rows"
    return None


def _unserved(
    module: Any, query: Tensor, key: Tensor, value: Tensor, pos_emb: Tensor, mask: Any = None
) -> str | None:
    Tq, Tk, R = query.shape[1], key.shape[1], pos_emb.shape[1]
    return unserved_hook(module) or unserved_table(Tq, Tk, R) or unserved_mask(mask)


def example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a small call, to compare a class with this adapter."""
    T, d_model = 7, module.linear_pos.in_features
    x = torch.randn(2, T, d_model)
    mask = torch.arange(T) < torch.tensor([[[T]], [[5]]])
    return (x, x, x, torch.randn(1, 2 * T - 1, d_model), mask), {}


# Some have the same parameters with other arguments or masks: the classes of espnet_transducer.py,
# cosyvoice.py and fairseq.py, NeMo's, Hugging Face's Wav2Vec2-Conformer, WeNet's without a shift.
PARAMETERS = frozenset(
    ["pos_bias_u", "pos_bias_v"]
    + [f"linear_{name}.weight" for name in ("q", "k", "v", "out", "pos")]
)
VERSIONS = ((202511,), (202511,))
FUNASR_VERSIONS = ((1, 4), (1, 4))

_LOOKALIKE = Lookalike(PARAMETERS, example)


def _adapters(family: str, versions: Versions, module: str, *others: str) -> tuple[Adapter, ...]:
    """Those of the latest class in all Python modules, and of the legacy class in the first."""
    latest = (f"{path}.RelPositionMultiHeadedAttention" for path in (module, *others))
    return (
        *(
            Adapter(family, x, versions, always(attention), _unserved, lookalike=_LOOKALIKE)
            for x in latest
        ),
        left_alone(family, f"{module}.LegacyRelPositionMultiHeadedAttention", versions, _LEGACY),
    )


ADAPTERS = _adapters("espnet", VERSIONS, "espnet.nets.pytorch_backend.transformer.attention")
FUNASR_ADAPTERS = _adapters(
    "funasr",
    FUNASR_VERSIONS,
    "funasr.models.transformer.attention",
    "funasr.models.sond.attention",
)
