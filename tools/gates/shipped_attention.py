"""Shipped calls of `rel_attention` and `rel_shift`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tools.gates.shipped import Call
from txl_kernels.backends.triton import rel_attention, rel_attention_bwd, rel_shift


@dataclasses.dataclass(frozen=True)
class Attention:
    """Sizes and options of a call of `rel_attention`."""

    B: int = 8
    H: int = 16
    Tq: int = 2048
    Tm: int = 2048
    D: int = 64
    Dv: int | None = None
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    backward: bool = True
    both_sides: bool = False  # r has a row for each distance to both sides, as Conformer's
    tensors: tuple[str, ...] = ()  # of key_start, key_lens, mask
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    deterministic: bool = False

    def run(self) -> None:
        """Forward and, if it is trained, backward, on tensors without storage."""
        arguments = self._arguments()
        out, lse = rel_attention.rel_attention_fwd(**arguments)
        if not self.backward:
            return
        names = ("q", "k", "v", "r", "r_w_bias", "r_r_bias", "mem_k", "mem_v", "q_pos", "bias")
        needs_grad = [arguments[name] is not None for name in names]
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.deterministic)
        try:
            rel_attention_bwd.rel_attention_bwd(
                dout=out, **arguments, out=out, lse=lse, needs_grad=needs_grad
            )
        finally:
            torch.use_deterministic_algorithms(before)

    def _arguments(self) -> dict[str, Any]:
        """By the operator's names."""
        B, H, Tq, Tm, D = self.B, self.H, self.Tq, self.Tm, self.D
        Tk, Dv = Tm + Tq, self.Dv or D
        R = Tk + Tq - 1 if self.both_sides else Tk
        made = functools.partial(torch.empty, dtype=self.dtype, device="meta")
        integers = functools.partial(torch.empty, dtype=torch.int64, device="meta")

        def optional(name: str, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor | None:
            return integers(shape, dtype=dtype) if name in self.tensors else None

        return {
            "q": made(B, H, Tq, D),
            "k": made(B, H, Tq, D),
            "v": made(B, H, Tq, Dv),
            "r": made(1, H, R, D),
            "r_w_bias": made(H, D),
            "r_r_bias": made(H, D),
            "mem_k": made(B, H, Tm, D) if Tm else None,
            "mem_v": made(B, H, Tm, Dv) if Tm else None,
            "q_pos": None,
            "key_start": optional("key_start", B),
            "key_lens": optional("key_lens", B),
            "mask": optional("mask", B, H, Tq, Tk, dtype=torch.bool),
            "bias": None,
            "dropout_seed": integers(()) if "dropout_p" in self.options else None,
            "offset": Tq - 1,
            "clamp": False,
            "causal": self.causal,
            "window_left": None,
            "window_right": None,
            "chunk": (0, 0, 0),
            "scale": D**-0.5,
            "softcap": 0.0,
            "dropout_p": 0.0,
            "dead_uniform": False,
            **self.options,
        }


def calls() -> list[Call]:
    """Each row of the launch table, and at one of them each flag that changes the code."""
    fp16, fp32 = torch.float16, torch.float32
    wide = Attention(D=128)
    found = [
        _call("train_d64", Attention(), headline=True),
        _call("train_d128", wide, headline=True),
        _call("head_256", Attention(D=256)),
        _call("train_d64", Attention(dtype=fp16)),
        _call("train_d64", Attention(dtype=fp32), headline=True),
        _call("train_d128", Attention(D=128, dtype=fp32)),
        _call("head_256", Attention(D=256, dtype=fp32)),
        _call("head_32", Attention(D=32)),
        _call("wt103_base", Attention(B=22, H=10, Tq=150, Tm=150, D=41)),
        _call("head_192_values_40", Attention(D=192, Dv=40)),
        _call(
            "parakeet_10min",
            Attention(1, 8, 7500, 0, causal=False, both_sides=True, tensors=("key_lens",)),
            headline=True,
        ),
        _call("inkling_global", dataclasses.replace(wide, B=1, H=64, Tm=0), headline=True),
        _call(
            "inkling_sliding",
            dataclasses.replace(wide, B=1, H=64, Tm=0, options={"window_left": 511}),
            headline=True,
        ),
        _call("enwik8_large_eval", Attention(1, 8, 128, 3800, 128, backward=False), headline=True),
    ]
    for D in (64, 128, 256):
        few = Attention(B=32, Tq=1, Tm=3799, D=D, backward=False)
        found.append(_call(f"one_query_d{D}", few, headline=D == 64))
    flags: dict[str, dict[str, Any]] = {
        "no_memory": {"Tm": 0},
        "mask": {"tensors": ("mask",), "causal": False},
        "padding": {"tensors": ("key_start", "key_lens")},
        "dropout": {"options": {"dropout_p": 0.1}},
        "mask_and_dropout": {"tensors": ("mask",), "options": {"dropout_p": 0.1}},
        "clamp": {"options": {"clamp": True, "offset": 1000}},
        "window": {"options": {"window_left": 1000}},
        "chunk": {"options": {"chunk": (256, 2, 0)}, "causal": False},
        "softcap": {"options": {"softcap": 30.0}},
        "deterministic": {"deterministic": True},
    }
    for flag, changed in flags.items():
        found.append(_call(flag, Attention(**changed), headline=flag == "dropout"))
    found.append(_call("dropout_d128", dataclasses.replace(wide, options={"dropout_p": 0.1})))
    for dtype in (torch.bfloat16, fp32):
        run = functools.partial(_shift, dtype)
        found.append(Call(f"rel_shift/{_name(dtype)}/train", run, dtype == torch.bfloat16))
    return found


def _call(configuration: str, attention: Attention, headline: bool = False) -> Call:
    name = f"rel_attention/{_name(attention.dtype)}/{configuration}"
    return Call(name, attention.run, headline)


def _shift(dtype: torch.dtype) -> None:
    """`rel_shift`, forward and backward, of the position scores of eight heads."""
    x = torch.empty(8, 2048, 4096, dtype=dtype, device="meta")
    rel_shift.rel_shift_bwd(rel_shift.rel_shift_fwd(x, 4096, 2047), 4096, 2047)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
