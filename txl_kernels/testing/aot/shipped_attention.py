"""Calls of `rel_attention` and `rel_shift` that stand for all that is shipped."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from txl_kernels.testing.aot.gates import Gate, row_shuffles
from txl_kernels.testing.aot.record import Launch
from txl_kernels.testing.aot.shipped import Call, Kernel

_BACKEND = "txl_kernels.backends.triton"
_HOPPER_HEAD_SIZES = (64, 128)


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
    both_sides: bool = False  # r with a row for each distance to both sides, as Conformer's
    tensors: tuple[str, ...] = ()  # of key_start, key_lens, mask
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    deterministic: bool = False

    @property
    def Tk(self) -> int:
        return self.Tm + self.Tq

    @property
    def pairs(self) -> int:
        """(query, key) pairs that the causal mask allows, over all rows and heads."""
        per_head = self.Tq * self.Tk - (self.Tq * (self.Tq - 1) // 2 if self.causal else 0)
        return self.B * self.H * per_head

    def tiles(self, block_q: int, block_k: int) -> float:
        """Tiles with an allowed pair, over all rows and heads."""
        n = 0
        for begin in range(0, self.Tq, block_q):
            last = min(begin + block_q, self.Tq) - 1
            n += math.ceil(
                min(last + self.Tm + 1, self.Tk) / block_k if self.causal else self.Tk / block_k
            )
        return float(self.B * self.H * n)

    def tensor_bytes(self) -> int:
        """Of q, k, v, mem_k, mem_v, r and out."""
        rows = self.B * self.H * (2 * self.Tq + 2 * self.Tk) + self.H * self.Tk
        return rows * self.D * self.dtype.itemsize

    def run(self) -> None:
        """Forward, and backward where asked for."""
        arguments = self._arguments()
        launcher = importlib.import_module(f"{_BACKEND}.rel_attention")
        out, lse = launcher.rel_attention_fwd(**arguments)
        if self.backward:
            before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(self.deterministic)
            try:
                self._backward(arguments, out, lse)
            finally:
                torch.use_deterministic_algorithms(before)

    def _backward(self, arguments: dict[str, Any], out: Tensor, lse: Tensor) -> None:
        names = ("q", "k", "v", "r", "r_w_bias", "r_r_bias", "mem_k", "mem_v", "q_pos", "bias")
        launcher = importlib.import_module(f"{_BACKEND}.rel_attention_bwd")
        launcher.rel_attention_bwd(
            dout=torch.empty_like(out),
            **arguments,
            out=out,
            lse=lse,
            needs_grad=[arguments[name] is not None for name in names],
        )

    def _arguments(self) -> dict[str, Any]:
        """By the operator's names."""
        B, H, Tq, Tm, Tk, D = self.B, self.H, self.Tq, self.Tm, self.Tk, self.D
        Dv = self.Dv or D
        R = Tk + Tq - 1 if self.both_sides else Tk
        made = functools.partial(torch.empty, device="meta")
        floats = functools.partial(made, dtype=self.dtype)
        given = {
            "key_start": made(B, dtype=torch.int64),
            "key_lens": made(B, dtype=torch.int64),
            "mask": made(B, H, Tq, Tk, dtype=torch.bool),
        }
        options = dict(self.options)
        return {
            "q": floats(B, H, Tq, D),
            "k": floats(B, H, Tq, D),
            "v": floats(B, H, Tq, Dv),
            "r": floats(1, H, R, D),
            "r_w_bias": floats(H, D),
            "r_r_bias": floats(H, D),
            "mem_k": floats(B, H, Tm, D) if Tm else None,
            "mem_v": floats(B, H, Tm, Dv) if Tm else None,
            "q_pos": None,
            **{name: given[name] if name in self.tensors else None for name in given},
            "bias": None,
            "dropout_seed": made((), dtype=torch.int64) if "dropout_p" in options else None,
            "offset": Tq - 1,
            "clamp": False,
            "causal": self.causal,
            "window_left": None,
            "window_right": None,
            "chunk": (),
            "scale": D**-0.5,
            "softcap": 0.0,
            "dropout_p": 0.0,
            "dead_uniform": False,
            **options,
        }

    def kernels(self) -> dict[str, Kernel]:
        """What it may launch."""

        def passes(launch: Launch) -> float:
            return self.tiles(launch.constexprs["BLOCK_Q"], launch.constexprs["BLOCK_K"])

        # Backward reads what forward reads and writes, dout too, and writes a gradient for each.
        return {
            "_rel_attention_fwd_kernel": Kernel(_forward_gate, passes, self.tensor_bytes()),
        }


def calls() -> list[Call]:
    """Each configuration of the tables, and at one of them each flag that changes the code."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in (64, 128):
            in_ci = dtype == torch.bfloat16 or (dtype == torch.float32 and D == 64)
            found.append(_call(f"train_d{D}", Attention(D=D, dtype=dtype), in_ci=in_ci))
    return found


def _call(what: str, attention: Attention, *, in_ci: bool = False) -> Call:
    dtype = str(attention.dtype).removeprefix("torch.")
    flop = {"forward": 6.0 * attention.D * attention.pairs}
    if attention.backward:
        flop["backward"] = 16.0 * attention.D * attention.pairs
    return Call(f"rel_attention/{dtype}/{what}", attention.run, attention.kernels(), in_ci, flop)


def _is_16_bit(launch: Launch) -> bool:
    return launch.signature["p_q"] != "*fp32"


def _forward_gate(launch: Launch) -> Gate:
    constexprs = launch.constexprs
    shuffles = row_shuffles(constexprs["BLOCK_Q"], launch.options.num_warps)
    if not _is_16_bit(launch):
        return Gate("none", shuffles=32)
    hopper = constexprs["D"] in _HOPPER_HEAD_SIZES
    return Gate("hopper" if hopper else "tensor", shuffles)
