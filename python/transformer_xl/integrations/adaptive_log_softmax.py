"""`torch.nn.AdaptiveLogSoftmaxWithLoss` on the kernels, and fairseq's AdaptiveSoftmax as one.

Both have a head without projection and, per cluster, a projection and a layer without biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.adaptive import _ASMoutput

from transformer_xl.nn.adaptive_softmax import Options, Reduction, Tail
from txl_kernels import adaptive_log_prob, adaptive_loss, adaptive_nll, adaptive_topk
from txl_kernels.ops.checks import check_int


class AdaptiveLogSoftmaxWithLoss(nn.AdaptiveLogSoftmaxWithLoss):
    """torch's module, in place: same constructor, state dict and outputs; no `nonzero`.

    Works under `torch.compile(fullgraph=True)`, autocast and DDP (a cluster without targets gets a
    zero gradient). Outputs of 16-bit inputs are float32. `loss` alone is the cheaper way to train:
    its gradients take three products per weight instead of four.

    Args:
        in_features, n_classes, cutoffs, div_value, head_bias, device, dtype: as torch's.
        ignore_index: a target that is not scored: output 0, no gradient, not in the mean.
        reduction: of the loss over the scored targets: "mean", "sum", or "none" for [N].
        backend: "auto", or the implementation that must run.

    State: `head.weight`, `head.bias`, `tail.k.0.weight`, `tail.k.1.weight`.
    Source: Grave et al., "Efficient softmax approximation for GPUs", ICML 2017.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        cutoffs: Sequence[int],
        div_value: float = 4.0,
        head_bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: str = "auto",
    ) -> None:
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}")
        super().__init__(in_features, n_classes, cutoffs, div_value, head_bias, device, dtype)
        self.ignore_index = check_int(type(self).__name__, "ignore_index", ignore_index)
        self.reduction, self.backend = reduction, backend

    @classmethod
    def from_module(
        cls, module: nn.AdaptiveLogSoftmaxWithLoss, **options: Any
    ) -> AdaptiveLogSoftmaxWithLoss:
        """The same computation on the very parameters of `module`; options: the keyword-only ones
        of the constructor."""
        made = cls(
            module.in_features,
            module.n_classes,
            module.cutoffs[:-1],
            module.div_value,
            module.head_bias,
            device="meta",
            **options,
        )
        made.head, made.tail = module.head, module.tail
        return made.train(module.training)

    def forward(self, input_: Tensor, target_: Tensor) -> _ASMoutput:
        """log p of each target, and their loss.

        Args:
            input_: [N, in_features], or [in_features] of one token.
            target_: int64 [N], or [] of one token.

        Returns:
            `output`: log p [N] or [], 0 where ignored; `loss`: in nats, reduced.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
            IndexError: a target out of range (on the CPU; a device assert on CUDA).
        """
        rows, scored = _batched(input_, target_)
        head, tails, options = self._clusters()
        nll = adaptive_nll(rows, scored, head, tails, **options, ignore_index=self.ignore_index)
        loss = nll.view_as(target_)
        output = -loss
        if self.reduction != "none":
            loss = nll.sum()
        if self.reduction == "mean":
            loss = loss / (scored != self.ignore_index).sum().clamp(min=1)
        return _ASMoutput(output, loss)

    def loss(self, input_: Tensor, target_: Tensor) -> Tensor:
        """`forward(…).loss` alone, for training: gradients are formed with it where the backend
        can."""
        rows, scored = _batched(input_, target_)
        head, tails, options = self._clusters()
        ignored = self.ignore_index
        if self.reduction == "none":
            nll = adaptive_nll(rows, scored, head, tails, **options, ignore_index=ignored)
            return nll.view_as(target_)
        return adaptive_loss(
            rows, scored, head, tails, **options, ignore_index=ignored, reduction=self.reduction
        )

    def log_prob(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """log p of all classes: [N, n_classes]."""
        head, tails, options = self._clusters()
        return adaptive_log_prob(input, head, tails, **options)

    def predict(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """The likeliest class of each row, int64 [N]; holds no [N, n_classes]."""
        head, tails, options = self._clusters()
        return adaptive_topk(input, head, tails, 1, **options)[1][:, 0]

    def _clusters(self) -> tuple[Tensor, list[Tail], Options]:
        """Head weight, tails and the rest as the functions of `txl_kernels` take them."""
        tails: list[Tail] = [
            (projection.get_parameter("weight"), layer.get_parameter("weight"), None)
            for projection, layer in ((tail[0], tail[-1]) for tail in self.tail)  # type: ignore[index]
        ]
        options: Options = {
            "cutoffs": tuple(self.cutoffs[:-1]),
            "head_bias": self.head.bias,
            "head_proj": None,
            "backend": self.backend,
        }
        return self.head.weight, tails, options


def from_fairseq(
    state_dict: Mapping[str, Tensor],
    *,
    tie_proj: bool | None = None,
    **options: Any,
) -> AdaptiveLogSoftmaxWithLoss:
    """fairseq's AdaptiveSoftmax from its state dict (`….adaptive_softmax.` cut off its names).

    Everything but dropout, which fairseq has before the head and inside each tail: equal in
    evaluation. Where the head is tied to an adaptive input that is narrower than the hidden
    states, its words are projected and its clusters are not; the product of projection and
    weight then becomes the head's weight. Padding is fairseq's `ignore_index`.

    Args:
        tie_proj: whether the tails' projections are those of the adaptive input, which lie
            transposed; seen from their shapes unless one is square.
        options: the keyword-only ones of `AdaptiveLogSoftmaxWithLoss`.

    Raises:
        ValueError: a state of another class, or of fairseq before 2018, whose clusters took the
            columns of words; a square projection and no `tie_proj`.
    """
    if "version" not in state_dict or "tail.0.0.weight" not in state_dict:
        raise ValueError(
            "fairseq: expected an AdaptiveSoftmax's `version`, `head.…` and `tail.k.…` (a state "
            f"without version is refused by fairseq too), got {', '.join(sorted(state_dict))}"
        )
    head = _fairseq_head(state_dict)
    tails, k = [], 0
    while f"tail.{k}.2.weight" in state_dict:
        weight = state_dict[f"tail.{k}.2.weight"]
        projection = state_dict[f"tail.{k}.0.weight"]
        tails.append((_oriented(projection, head.shape[1], weight.shape[1], tie_proj), weight))
        k += 1

    ends = [head.shape[0] - len(tails)]
    for _, weight in tails:
        ends.append(ends[-1] + weight.shape[0])
    made = AdaptiveLogSoftmaxWithLoss(
        head.shape[1], ends[-1], ends[:-1], div_value=1.0, device="meta", **options
    )
    made.head = _linear(head)
    layers = (nn.Sequential(_linear(projection), _linear(weight)) for projection, weight in tails)
    made.tail = nn.ModuleList(layers)
    return made


def _fairseq_head(state_dict: Mapping[str, Tensor]) -> Tensor:
    """[c0 + n_tails, d]."""
    if "head.weight" in state_dict:
        return state_dict["head.weight"]
    words = state_dict.get("head.word_proj.weight")
    if words is None:
        words = state_dict["head.word_proj.1.weight"] @ state_dict["head.word_proj.0.weight"]
    return torch.cat([words, state_dict["head.class_proj.weight"]])


def _oriented(projection: Tensor, d: int, width: int, tie_proj: bool | None) -> Tensor:
    """[width, d], from that or, of an adaptive input, its transpose."""
    if width == d and tie_proj is None:
        raise ValueError(f"fairseq: tie_proj must be given, as a projection is {d} x {d}")
    transposed = tie_proj if width == d else tuple(projection.shape) == (d, width)
    return projection.t() if transposed else projection


def _linear(weight: Tensor) -> nn.Linear:
    """A layer of its own with a copy of this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    return layer


def _batched(input_: Tensor, target_: Tensor) -> tuple[Tensor, Tensor]:
    """[N, d] and [N], N = 1 for a single token.

    Raises:
        ValueError: neither of the two.
    """
    if target_.dim() not in (0, 1) or input_.dim() != target_.dim() + 1:
        raise ValueError(
            "input, target: expected [N, d] and [N], or [d] and [], got "
            f"{list(input_.shape)} and {list(target_.shape)}"
        )
    return (input_, target_) if target_.dim() else (input_[None], target_[None])
