"""`torch.nn.AdaptiveLogSoftmaxWithLoss` on the kernels, and fairseq's AdaptiveSoftmax as one.

Both have a head without a projection and, for each cluster, a projection and a layer without bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transformer_xl.nn.adaptive_softmax import Options, Reduction, Tail
from transformer_xl.nn.layer_weights import check_read, weight_and_bias
from txl_kernels import adaptive_log_prob, adaptive_loss, adaptive_nll, adaptive_topk
from txl_kernels.ops.checks import check_int
from txl_kernels.torch_private import ASMoutput


class AdaptiveLogSoftmaxWithLoss(nn.AdaptiveLogSoftmaxWithLoss):
    """A replacement of torch's module: same constructor, state dict and outputs; no `nonzero`.

    Works under `torch.compile(fullgraph=True)`, autocast and DDP (a cluster without targets gets a
    zero gradient). Outputs of 16-bit inputs are float32. Training is cheaper with `loss` than with
    `forward`: its gradients need three products per weight instead of four.

    The kernels read the weights of `head` and `tail` and do not call these layers: weights of
    `torch.nn.utils.prune`, `weight_norm` and parametrisations are computed first, quantised weights
    (torchao) are dequantised outside training; LoRA wrappers must be merged.

    Args:
        in_features, n_classes, cutoffs, div_value, head_bias, device, dtype: as torch's.
        ignore_index: a target that is not scored: output 0, no gradient, not in the mean.
        reduction: of the loss over the scored targets: "mean", "sum", or "none" for [N].
        backend: "auto", or the only implementation that may run.

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
        """The same computation with the parameters of `module`, which are shared, not copied;
        options: the keyword-only ones of the constructor."""
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

    def forward(self, input_: Tensor, target_: Tensor) -> ASMoutput:
        """log p of each target, and their loss.

        Args:
            input_: [N, in_features], or [in_features] of one token.
            target_: int64 [N], or [] of one token.

        Returns:
            `output`: log p [N] or [], 0 where ignored; `loss`: in nats, reduced.

        Raises:
            ValueError, TypeError: wrong shapes or dtypes; a layer that is wrapped, hooked, or
                quantised in training.
            IndexError: a target out of range (on the CPU; a device assert on CUDA).
        """
        rows, scored = _batched(input_, target_)
        head, tails, options = self._clusters(rows)
        nll = adaptive_nll(rows, scored, head, tails, **options, ignore_index=self.ignore_index)
        loss = nll.view_as(target_)
        output = -loss
        if self.reduction != "none":
            loss = nll.sum()
        if self.reduction == "mean":
            loss = loss / (scored != self.ignore_index).sum().clamp(min=1)
        return ASMoutput(output, loss)

    def loss(self, input_: Tensor, target_: Tensor) -> Tensor:
        """`forward(…).loss` alone, for training: most backends compute gradients together with
        it."""
        rows, scored = _batched(input_, target_)
        head, tails, options = self._clusters(rows)
        ignored = self.ignore_index
        if self.reduction == "none":
            nll = adaptive_nll(rows, scored, head, tails, **options, ignore_index=ignored)
            return nll.view_as(target_)
        return adaptive_loss(
            rows, scored, head, tails, **options, ignore_index=ignored, reduction=self.reduction
        )

    def log_prob(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """log p of all classes: [N, n_classes]."""
        head, tails, options = self._clusters(input)
        return adaptive_log_prob(input, head, tails, **options)

    def predict(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """The most probable class of each row, int64 [N]; no [N, n_classes] is stored."""
        head, tails, options = self._clusters(input)
        return adaptive_topk(input, head, tails, 1, **options)[1][:, 0]

    def _clusters(self, hidden: Tensor) -> tuple[Tensor, list[Tail], Options]:
        """Head weight, tails and further arguments of the functions of `txl_kernels`."""
        trained = self.training and hidden.requires_grad
        head, bias = weight_and_bias(self, "head", self.head, trained=trained)
        tails: list[Tail] = []
        for k, tail in enumerate(self.tail):
            check_read(self, f"tail.{k}", tail, nn.Sequential)
            projection, weight = (
                weight_and_bias(self, f"tail.{k}.{n}", layer, trained=trained)[0]
                for n, layer in tail.named_children()
            )
            tails.append((projection, weight, None))
        options: Options = {
            "cutoffs": tuple(self.cutoffs[:-1]),
            "head_bias": bias,
            "head_proj": None,
            "backend": self.backend,
        }
        return head, tails, options


def from_fairseq(
    state_dict: Mapping[str, Tensor],
    *,
    tie_proj: bool | None = None,
    **options: Any,
) -> AdaptiveLogSoftmaxWithLoss:
    """fairseq's AdaptiveSoftmax from its state dict (`….adaptive_softmax.` cut off its names).

    Equal in evaluation; without the dropout that fairseq has before the head and inside each tail.
    If the head is tied to an adaptive input that is narrower than the hidden states, fairseq
    projects its words and not its clusters; the product of projection and weight then becomes the
    head's weight. Padding is fairseq's `ignore_index`.

    Args:
        tie_proj: whether the tails' projections are those of the adaptive input, which are stored
            transposed; None: decided by their shapes, which is impossible if one is square.
        options: the keyword-only ones of `AdaptiveLogSoftmaxWithLoss`.

    Raises:
        ValueError: a state of another class, or of fairseq before 2018, which used columns of
            words for clusters; a square projection without `tie_proj`.
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
    """[width, d], from that shape or from the transpose that an adaptive input has."""
    if width == d and tie_proj is None:
        raise ValueError(f"fairseq: tie_proj must be given, as a projection is {d} x {d}")
    transposed = tie_proj if width == d else tuple(projection.shape) == (d, width)
    return projection.t() if transposed else projection


def _linear(weight: Tensor) -> nn.Linear:
    """A new layer with a copy of this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    return layer


def _batched(input_: Tensor, target_: Tensor) -> tuple[Tensor, Tensor]:
    """[N, d] and [N], N = 1 for a single token.

    Raises:
        ValueError: any other shapes than [N, d] and [N], or [d] and [].
    """
    if target_.dim() not in (0, 1) or input_.dim() != target_.dim() + 1:
        raise ValueError(
            "input, target: expected [N, d] and [N], or [d] and [], got "
            f"{list(input_.shape)} and {list(target_.shape)}"
        )
    return (input_, target_) if target_.dim() else (input_[None], target_[None])
