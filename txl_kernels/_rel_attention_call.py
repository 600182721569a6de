"""The arguments of the `rel_attention` operators, grouped into four tensors and three lists.

The public function normalises its options once into these groups; the C++ bindings and the
Triton launchers receive them unchanged. The three lists have fixed lengths: an absent
tensor is a 1-D tensor of size 0 (AOTInductor would pass an empty list as None). Symbols are those
of `docs/mathematics.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

# A window without a limit on one side.
UNLIMITED = 2**63 - 1


class OptionalTensors(NamedTuple):
    """The tensors that a call may omit. Those up to `q_pos` have gradients."""

    r_w_bias: Tensor | None = None  # [H, D]
    r_r_bias: Tensor | None = None  # [H, Dp]
    mem_k: Tensor | None = None  # [B, Hk, Tm, D]
    mem_v: Tensor | None = None  # [B, Hk, Tm, Dv]
    q_pos: Tensor | None = None  # [B, H, Tq, Dp]
    q_start: Tensor | None = None  # int32 or int64 [B]
    key_start: Tensor | None = None  # int32 or int64 [B] or [B, Tq]
    key_lens: Tensor | None = None  # the same
    mask: Tensor | None = None  # bool [B, H, Tq, Tk], possibly expanded
    dropout_seed: Tensor | None = None  # int64, one element


# The axes of each optional tensor: G is Hk, V is Dv, P is Dp, M is Tm, T is Tq, K is Tk. Ranges of
# keys are [B] or [B, Tq]; the seed has no axis.
AXES: dict[str, str] = dict(
    zip(
        OptionalTensors._fields,
        ("HD", "HP", "BGMD", "BGMV", "BHTP", "B", "BT", "BT", "BHTK", ""),
        strict=True,
    )
)


class Options(NamedTuple):
    """The arguments of the public function that are not tensors, as the caller gives them."""

    offset: int | None = None
    clamp: bool = False
    causal: bool = False
    window: Sequence[int | None] | None = None
    chunk: Sequence[int] | None = None
    scale: float | None = None
    pos_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    dead_rows: str = "zero"
    backend: str = "auto"


class Rules(NamedTuple):
    """The integers that decide which keys a query attends to, and which row of `r` a key uses."""

    offset: int  # row of r for j = i without q_start
    clamp: int = 0  # 1: rows outside [0, R) are clamped into it
    window_left: int = UNLIMITED  # tokens, >= 0
    window_right: int = UNLIMITED  # tokens, >= 0; causal attention has 0
    chunk_size: int = 0  # tokens; 0: no chunks
    chunk_left: int = 0  # chunks
    chunk_phase: int = 0  # tokens


class Numbers(NamedTuple):
    """The factors and the probability."""

    scale: float
    pos_scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0


N_DIFFERENTIABLE = 4 + OptionalTensors._fields.index("q_pos") + 1  # q, k, v, r, r_w_bias … q_pos


class RelAttentionCall(NamedTuple):
    """One call. Field by field it is the operator's argument list, in the operator's order."""

    q: Tensor  # [B, H, Tq, D]
    k: Tensor  # [B, Hk, Ts, D]
    v: Tensor  # [B, Hk, Ts, Dv]
    r: Tensor  # [1 or B, 1 or H, R, Dp]
    optional: OptionalTensors
    rules: Rules
    numbers: Numbers

    def arguments(self) -> tuple[Any, ...]:
        """The operator's arguments."""
        absent = self.q.new_empty(0)
        optional = [absent if x is None else x for x in self.optional]
        return (*self[:4], optional, list(self.rules), list(self.numbers))

    @classmethod
    def of_arguments(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        r: Tensor,
        optional: Sequence[Tensor],
        rules: Sequence[int],
        numbers: Sequence[float],
    ) -> RelAttentionCall:
        """The call that has these operator's arguments."""
        given = (None if is_absent(x) else x for x in optional)
        return cls(q, k, v, r, OptionalTensors(*given), Rules(*rules), Numbers(*numbers))


def is_absent(tensor: Tensor) -> bool:
    """Whether an operator's argument stands for a tensor that was not given."""
    return len(tensor.shape) == 1 and tensor.shape[0] == 0


def output_gradients(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of out and lse as the backward operator receives them, from autograd's."""
    if dout is None:
        dout = out.new_zeros(out.shape[-1]).expand_as(out)
    elif dout.stride(-1) != 1:
        dout = dout.contiguous()
    return dout, lse.new_empty(0) if dlse is None else dlse
