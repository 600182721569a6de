"""ProjectedAdaptiveLogSoftmax of Hugging Face's TransfoXL and of the original code, on the kernels.

Their parameters have our names. The cluster of tail k is head column cutoffs[0] + k in Hugging
Face's and in ours; the original reads its columns from the last one back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transformer_xl.nn.adaptive_softmax import AdaptiveSoftmax


class ProjectedAdaptiveLogSoftmax(AdaptiveSoftmax):
    """What stands as `crit` in Hugging Face's TransfoXL: same constructor, state dict and calls.

    Losses are always in token order, whatever `keep_order` says: theirs are grouped by cluster
    unless it is True. `model.crit = ProjectedAdaptiveLogSoftmax.from_module(model.crit)` puts it
    into a model, ties and all.

    Args:
        n_token, d_embed, d_proj, cutoffs, div_val, keep_order: as theirs.
        backend: "auto", or the implementation that must run.
    """

    def __init__(
        self,
        n_token: int,
        d_embed: int,
        d_proj: int,
        cutoffs: Sequence[int],
        div_val: int = 1,
        keep_order: bool = True,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(n_token, d_embed, d_proj, tuple(cutoffs), div_val, backend=backend)
        self.keep_order = keep_order

    @classmethod
    def from_module(cls, module: nn.Module, **options: Any) -> ProjectedAdaptiveLogSoftmax:
        """The same computation on the very parameters of Hugging Face's module."""
        sizes: dict[str, Any] = {
            "n_token": module.n_token,
            "d_embed": module.d_embed,
            "d_proj": module.d_proj,
            "cutoffs": module.cutoffs[:-1],  # type: ignore[index]
            "div_val": module.div_val,
        }
        with torch.device("meta"):
            made = cls(**sizes, **options)
        for name in ("out_layers", "out_projs", "cluster_weight", "cluster_bias"):
            if hasattr(made, name):
                setattr(made, name, getattr(module, name))
        return made.train(module.training)

    def forward(  # type: ignore[override]  # Hugging Face's call
        self, hidden: Tensor, labels: Tensor | None = None, keep_order: bool = True
    ) -> Tensor:
        """Losses of the labels shifted by one, or all log-probabilities.

        Args:
            hidden: […, T, d_proj].
            labels: int64 […, T], the tokens themselves: each is scored given those before it, -100
                is not; None gives log-probabilities.
            keep_order: without effect.

        Returns:
            Nats of every label but the first of each row, flattened in token order; or [N, V].
        """
        if labels is None:
            return self.log_prob(hidden.flatten(0, -2))
        hidden, target = hidden[..., :-1, :], labels[..., 1:]
        return super().forward(hidden, target.contiguous(), reduction="none").flatten()


def from_hugging_face(
    state_dict: Mapping[str, Tensor],
    cutoffs: Sequence[int],
    div_val: int = 1,
    *,
    backend: str = "auto",
    prefix: str = "crit.",
) -> AdaptiveSoftmax:
    """`AdaptiveSoftmax` from Hugging Face's TransfoXL, with copies of its parameters.

    Args:
        state_dict: of the whole model, or of its softmax alone.
        cutoffs, div_val: as in its configuration.
        backend: "auto", or the implementation that must run.
        prefix: what the softmax's names begin with in the whole model.

    Raises:
        ValueError: no such softmax in it.
        RuntimeError: its shapes are those of other cutoffs or another div_val.
    """
    own = {k.removeprefix(prefix): x for k, x in state_dict.items() if k.startswith(prefix)}
    own = own or dict(state_dict)
    if "out_layers.0.weight" not in own:
        raise ValueError(
            f"state_dict: expected {prefix}out_layers.0.weight and more, got {', '.join(own)}"
        )
    first = own["out_layers.0.weight"]
    vocab_size = sum(x.shape[0] for k, x in own.items() if k.endswith(".bias"))
    d_embed = first.shape[1]
    d_proj = own["out_projs.0"].shape[0] if "out_projs.0" in own else d_embed
    softmax = AdaptiveSoftmax(
        vocab_size, d_embed, d_proj, tuple(cutoffs), div_val, backend=backend
    ).to(first)
    softmax.load_state_dict(own)
    return softmax


def from_original(
    state_dict: Mapping[str, Tensor],
    cutoffs: Sequence[int],
    div_val: int = 1,
    *,
    backend: str = "auto",
    prefix: str = "crit.",
) -> AdaptiveSoftmax:
    """`AdaptiveSoftmax` from the original PyTorch code, whose cluster k is column -k of the head.

    Args, Raises: as `from_hugging_face`.
    """
    turned = {
        name: x.flip(0) if name.endswith(("cluster_weight", "cluster_bias")) else x
        for name, x in state_dict.items()
    }
    return from_hugging_face(turned, cutoffs, div_val, backend=backend, prefix=prefix)
