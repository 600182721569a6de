"""Named cases of `rel_attention`: shapes and options that every backend is tested with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RelAttentionCase:
    """Shapes and options of one call; the tensors follow from them and a seed.

    `options` are arguments of `rel_attention` that are not tensors. `q_start`, `key_start` and
    `key_lens` are lists, the last two also with a list per query; `mask` and `bias` are shapes of
    random tensors. With `transposed` the 4-D tensors are stored as [B, T, H, D]. With
    `lse_gradient` lse has a gradient too.
    """

    name: str
    B: int = 2
    H: int = 3
    Hk: int | None = None  # H
    Tq: int = 17
    Tm: int = 5
    Ts: int | None = None  # Tq
    D: int = 8
    Dv: int | None = None  # D
    Dp: int | None = None  # gives q_pos
    R: int | None = None  # Tk
    r_batch: bool = False
    r_heads: bool = True
    biases: bool = True
    transposed: bool = False
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    q_start: list[int] | None = None
    key_start: list[int] | list[list[int]] | None = None
    key_lens: list[int] | list[list[int]] | None = None
    lse_gradient: bool = False
    spread: float = 1.0  # standard deviation of every floating tensor
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-B{self.B}H{self.H}Tq{self.Tq}Tm{self.Tm}D{self.D}"

    @property
    def uses(self) -> list[str]:
        """For `resolve`: the arguments that not every backend supports."""
        used = [] if self.bias is None else ["bias"]
        if self.options.get("dead_rows") == "uniform":
            used.append("dead_rows='uniform'")
        if self.options.get("dropout_p", 0) > 0:
            used.append("dropout_p")
        return used

    def inputs(
        self, dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The floating tensors, which require gradients, and the others.

        They are the same in every dtype up to rounding.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            tensor = self.spread * torch.randn(
                shape, generator=generator, dtype=torch.float64, device="cpu"
            )
            if self.transposed and len(shape) == 4:
                tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
            return tensor.to(device, dtype).requires_grad_()

        B, H, Tq, Tm, D = self.B, self.H, self.Tq, self.Tm, self.D
        Hk, Ts, Dv, Dp = self.Hk or H, self.Ts or Tq, self.Dv or D, self.Dp or D
        Tk = Tm + Ts
        floats = {
            "q": normal(B, H, Tq, D),
            "k": normal(B, Hk, Ts, D),
            "v": normal(B, Hk, Ts, Dv),
            "r": normal(B if self.r_batch else 1, H if self.r_heads else 1, self.R or Tk, Dp),
        }
        if Tm:
            floats |= {"mem_k": normal(B, Hk, Tm, D), "mem_v": normal(B, Hk, Tm, Dv)}
        if self.biases:
            floats |= {"r_w_bias": normal(H, D), "r_r_bias": normal(H, Dp)}
        if self.Dp is not None:
            floats["q_pos"] = normal(B, H, Tq, Dp)
        if self.bias is not None:
            floats["bias"] = normal(*self.bias)
        others = {}
        for name in ("q_start", "key_start", "key_lens"):
            positions = getattr(self, name)
            if positions is not None:
                others[name] = torch.tensor(positions, device=device)
        if self.mask is not None:
            drawn = torch.rand(self.mask, generator=generator, device="cpu")
            others["mask"] = (drawn > 0.3).to(device)
        if "dropout_p" in self.options:
            others["dropout_seed"] = torch.tensor(self.seed - 2**40 - 7, device=device)
        return floats, others

    def dout(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """A gradient for the output: [B, H, Tq, Dv]."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.B, self.H, self.Tq, self.Dv or self.D)
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    def dlse(self, dtype: torch.dtype, device: str = "cpu") -> Tensor | None:
        """A gradient for lse, [B, H, Tq]."""
        if not self.lse_gradient:
            return None
        generator = torch.Generator().manual_seed(self.seed + 2)
        drawn = torch.randn(self.B, self.H, self.Tq, generator=generator, device="cpu")
        return drawn.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def unordered_ranges(B: int, Tq: int, Tk: int) -> dict[str, Any]:
    """Ranges of keys per query that neither grow nor shrink; some are empty."""
    starts = [[(7 * i * i + 5 * b) % Tk - 2 for i in range(Tq)] for b in range(B)]
    lengths = [[(11 * i + 3 * b) % (Tk // 2 + 2) for i in range(Tq)] for b in range(B)]
    ends = [
        [x + n for x, n in zip(*rows, strict=True)] for rows in zip(starts, lengths, strict=True)
    ]
    return {"key_start": starts, "key_lens": ends}


def _cases() -> tuple[RelAttentionCase, ...]:
    Case = RelAttentionCase
    causal = {"causal": True}
    return (
        Case("plain", Tm=0, D=64, biases=False),
        Case("transformer_xl", Tq=33, Tm=40, D=64, options=causal),
        Case("conformer", B=1, Tq=70, Tm=0, D=36, R=139, key_lens=[61]),
        Case("xlnet", Tm=0, R=18, r_batch=True, options={"offset": 17}),
        Case("one_query", Tq=1, Tm=30, options=causal),
        Case("one_key", Tq=1, Tm=0, options=causal),
        Case("no_memory", Tm=0, options=causal),
        Case("long_memory", Tq=5, Tm=150, options=causal),
        Case("one_head", B=1, H=1, D=50, options=causal),
        Case("more_keys_than_queries", Tq=9, Ts=21),
        Case("fewer_keys_than_queries", Tq=23, Ts=3, Tm=0, options=causal),
        Case("long", B=1, H=2, Tq=200, Tm=333, D=32, options=causal),
        Case("head_1", D=1, options=causal),
        Case("head_41", D=41, options=causal),
        Case("head_50", D=50),
        Case("head_160", D=160, options=causal),
        Case("head_192_values_40", D=192, Dv=40),
        Case("values_wider", D=16, Dv=70, options=causal),
        Case("head_256", B=1, D=256, options=causal),
        Case("r_shared_by_heads", r_heads=False, options=causal),
        Case("r_per_row", r_batch=True, options=causal),
        Case("r_per_row_shared_by_heads", r_batch=True, r_heads=False),
        Case("transposed", transposed=True, D=33, options=causal),
        Case("clamp", Tq=20, Tm=11, R=8, options={"causal": True, "offset": -4, "clamp": True}),
        Case("clamp_both_sides", Tm=0, R=9, options={"offset": 4, "clamp": True}),
        Case("short_r", R=6, options={"offset": 3}),
        Case("far_offset", options={"offset": 500}),
        Case("negative_offset", options={"offset": -20}),
        Case("far_clamp", R=3, options={"offset": -900, "clamp": True}),
        Case("window", Tq=40, Tm=30, options={"window": (7, 3)}),
        Case("window_left", Tq=40, Tm=30, options={"causal": True, "window": (30, None)}),
        Case("window_right", Tq=40, Tm=30, options={"window": (None, 0)}),
        Case("window_self", options={"window": (0, 0)}),
        Case("chunk", Tq=40, Tm=8, options={"chunk": (8, 2)}),
        Case("chunk_phase", Tq=40, Tm=13, options={"chunk": (7, 1, 3)}),
        Case("chunk_negative_phase", Tq=40, Tm=13, options={"chunk": (7, 0, -45), "causal": True}),
        Case("key_start", key_start=[0, 9], options=causal),
        Case("key_lens", key_lens=[22, 3]),
        Case("wild_lengths", B=4, key_start=[-5, 2**40, 0, 3], key_lens=[2**50, 5, -(2**40), 9]),
        Case("mask", mask=(2, 3, 17, 22)),
        Case("mask_broadcast", mask=(2, 1, 1, 22), options=causal),
        Case("mask_2d", mask=(17, 22)),
        Case("dead_rows", Tm=0, Tq=20, key_start=[8, 20], options={"window": (3, 0)}),
        Case(
            "dead_uniform",
            Tm=4,
            key_start=[8, 21],
            options={"causal": True, "dead_rows": "uniform"},
        ),
        Case("softcap", options={"causal": True, "softcap": 5.0}),
        Case("scale", options={"causal": True, "scale": 0.3}),
        Case("bias", bias=(1, 3, 17, 22)),
        Case("bias_full", bias=(2, 3, 17, 22), options=causal),
        Case("q_pos", Dp=5, options=causal),
        Case("q_pos_wider", Dp=70, r_heads=False, options={"pos_scale": -0.2}),
        Case("pos_scale", lse_gradient=True, options={"pos_scale": 0.9, "scale": 0.0}),
        Case("pos_scale_0", Dp=3, options={"pos_scale": 0.0, "scale": -0.4, "causal": True}),
        Case("groups", H=6, Hk=2, lse_gradient=True, options=causal),
        Case("one_key_head", B=1, H=4, Hk=1, Tq=40, Tm=0, D=16, transposed=True),
        Case("q_start", B=4, Tq=20, Tm=30, q_start=[0, 25, -30, 60], options=causal),
        Case(
            "q_start_far",
            B=4,
            R=9,
            q_start=[2**40, -(2**63), 7, -9],
            lse_gradient=True,
            options={"offset": 4, "clamp": True, "window": (2**62, 5)},
        ),
        Case("q_start_chunk", Tq=40, q_start=[3, 30], options={"chunk": (7, 1, 3), "causal": True}),
        Case("ranges", Tq=40, Tm=30, **unordered_ranges(2, 40, 70), lse_gradient=True),
        Case(
            "ranges_mixed", Tm=9, key_start=[0, 4], key_lens=unordered_ranges(2, 17, 26)["key_lens"]
        ),
        Case(
            "packed",
            B=1,
            Tq=70,
            Tm=4,
            key_start=[[0] * 20 + [24] * 33 + [57] * 17],
            key_lens=[[24] * 20 + [57] * 33 + [74] * 17],
            options=causal,
        ),
        Case(
            "inkling",
            B=1,
            H=2,
            Hk=1,
            Tq=100,
            Tm=60,
            D=32,
            Dp=4,
            R=24,
            r_heads=False,
            biases=False,
            key_start=[70],
            lse_gradient=True,
            options={"causal": True, "offset": -37, "pos_scale": 1.0},
        ),
        Case("dropout", Tq=30, options={"causal": True, "dropout_p": 0.25}),
        Case("dropout_most", Tq=9, Tm=0, options={"dropout_p": 0.9}),
        Case(
            "everything",
            B=3,
            H=2,
            Tq=37,
            Tm=50,
            D=24,
            R=30,
            r_heads=False,
            transposed=True,
            mask=(3, 1, 37, 87),
            key_start=[0, 13, 70],
            key_lens=[87, 80, 60],
            options={
                "causal": True,
                "offset": 12,
                "clamp": True,
                "window": (40, None),
                "chunk": (16, 3, 5),
                "softcap": 8.0,
                "scale": 0.2,
                "dropout_p": 0.1,
            },
        ),
        Case(
            "everything_else",
            B=3,
            H=2,
            Hk=1,
            Tq=37,
            Tm=50,
            D=24,
            Dv=20,
            Dp=9,
            R=30,
            transposed=True,
            q_start=[50, 20, -3],
            **unordered_ranges(3, 37, 87),
            lse_gradient=True,
            options={
                "offset": 3,
                "window": (40, 9),
                "softcap": 8.0,
                "scale": 0.2,
                "pos_scale": -0.3,
                "dropout_p": 0.1,
            },
        ),
    )


REL_ATTENTION_CASES = _cases()
