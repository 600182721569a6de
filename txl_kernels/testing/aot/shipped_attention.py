"""Calls of `rel_attention` and `rel_shift` that stand for all that is shipped."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from txl_kernels.testing.aot.gates import Gate, row_shuffles
from txl_kernels.testing.aot.record import Launch
from txl_kernels.testing.aot.shipped import Call, Kernel
from txl_kernels.testing.asked import ASKED

_BACKEND = "txl_kernels.backends.triton"
_HOPPER_HEAD_SIZES = (64, 128)
_SHORT = 16  # queries, up to which the launcher takes lower tiles


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
    def n_keys(self) -> int:
        return self.Tm + self.Tq

    @property
    def pairs(self) -> int:
        """(query, key) pairs that the causal mask allows, over all rows and heads."""
        per_head = self.Tq * self.n_keys - (self.Tq * (self.Tq - 1) // 2 if self.causal else 0)
        return self.B * self.H * per_head

    @property
    def least_bytes(self) -> int:
        """Of the keys, the values and r, each once."""
        width = self.D + (self.Dv or self.D)
        elements = self.H * self.n_keys * (self.B * width + self.D)
        return elements * self.dtype.itemsize

    def tiles(self, block_q: int, block_k: int) -> float:
        """Tiles with an allowed pair, over all rows and heads."""
        n = 0
        for begin in range(0, self.Tq, block_q):
            last = min(begin + block_q, self.Tq) - 1
            n += math.ceil(
                min(last + self.Tm + 1, self.n_keys) / block_k
                if self.causal
                else self.n_keys / block_k
            )
        return float(self.B * self.H * n)

    def run(self) -> None:
        """Forward, and backward where asked for, on tensors without storage."""
        forward, backward = self.passes_on("meta")
        if self.backward:
            backward()
        else:
            forward()

    def passes_on(self, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """The Triton launchers' forward and backward, bound to random tensors; backward alone
        launches forward's kernels once, when this is called."""
        arguments = self._arguments(device)
        forward = functools.partial(_launcher("rel_attention_fwd"), **arguments)
        if not self.backward:
            return forward, forward
        out, lse = forward()
        names = ("q", "k", "v", "r", "r_w_bias", "r_r_bias", "mem_k", "mem_v", "q_pos", "bias")
        backward = functools.partial(
            _launcher("rel_attention_bwd"),
            dout=torch.randn_like(out),
            **arguments,
            out=out,
            lse=lse,
            needs_grad=[arguments[name] is not None for name in names],
        )
        return forward, lambda: _deterministically(self.deterministic, backward)

    def _arguments(self, device: str) -> dict[str, Any]:
        """By the operator's names: normal numbers, except that no key is masked away."""
        B, H, Tq, Tm, Tk, D = self.B, self.H, self.Tq, self.Tm, self.n_keys, self.D
        Dv = self.Dv or D
        R = Tk + Tq - 1 if self.both_sides else Tk
        floats = functools.partial(torch.randn, dtype=self.dtype, device=device)
        given = {
            "key_start": torch.zeros(B, dtype=torch.int64, device=device),
            "key_lens": torch.full((B,), Tk, dtype=torch.int64, device=device),
            "mask": torch.ones(B, H, Tq, Tk, dtype=torch.bool, device=device),
        }
        seed = torch.zeros((), dtype=torch.int64, device=device)
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
            "dropout_seed": seed if "dropout_p" in options else None,
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
            **options,
        }

    def kernels(self) -> dict[str, Kernel]:
        """What it may launch."""

        def passes(launch: Launch) -> float:
            return self.tiles(launch.constexprs["BLOCK_Q"], launch.constexprs["BLOCK_K"])

        backward = Kernel(_backward_gate, passes, part="backward")
        return {
            "_rel_attention_fwd_kernel": Kernel(_forward_gate, passes, part="forward"),
            "_rel_attention_bwd_rows_kernel": Kernel(_no_products, part="backward"),
            "_rel_attention_bwd_dkdv_kernel": backward,
            "_rel_attention_bwd_dqdr_kernel": backward,
        }


# One token behind a long memory, a batch of them.
DECODE = Attention(B=32, Tq=1, Tm=3799, backward=False)


def calls() -> list[Call]:
    """Each configuration of the tables, and at one of them each flag that changes the code."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found: list[Call] = []

    def ship(what: str, attention: Attention, **options: bool) -> None:
        found.append(call(what, attention, "forward", **options))
        if attention.backward:
            found.append(call(what, attention, "backward", **options))

    for D in (64, 128):
        train = Attention(D=D)
        ship(f"train_d{D}", train, in_ci=True, modelled=True)
        single = dataclasses.replace(train, dtype=fp32)
        ship(f"train_d{D}", single, in_ci=D == 64, modelled=True)
    for dtype in (bf16, fp32):
        ship("head_256", Attention(D=256, dtype=dtype))
    ship("train_d64", Attention(dtype=fp16))  # float16 differs in opcodes alone
    ship("head_32", Attention(D=32))
    wt103_base = Attention(B=22, H=10, Tq=150, Tm=150, D=41)
    ship("head_41", wt103_base, modelled=True)
    ship("head_192_values_40", Attention(D=192, Dv=40))
    conformer = Attention(B=1, H=8, Tq=7500, Tm=0, causal=False, both_sides=True)
    conformer = dataclasses.replace(conformer, tensors=("key_lens",))
    ship("parakeet_10min", conformer, modelled=True)
    enwik8 = Attention(B=1, H=8, Tq=128, Tm=3800, D=128, backward=False)
    ship("enwik8_large_eval", enwik8, modelled=True)
    ship("one_query", DECODE, modelled=True)
    flags: dict[str, dict[str, Any]] = {
        "no_memory": {"Tm": 0},
        "mask": {"tensors": ("mask",), "causal": False},
        "padding": {"tensors": ("key_start", "key_lens")},
        "dropout": {"options": {"dropout_p": 0.1}},
        "clamp": {"options": {"clamp": True, "offset": 1000}},
        "window": {"options": {"window_left": 1000}},
        "chunk": {"options": {"chunk": (256, 2, 0)}, "causal": False},
        "softcap": {"options": {"softcap": 30.0}},
        "deterministic": {"deterministic": True},
    }
    for name, changed in flags.items():
        ship(name, Attention(**changed), in_ci=name in ("dropout", "clamp"))
    return [*found, *(_shift(dtype) for dtype in (bf16, fp32))]


def _shift(dtype: torch.dtype) -> Call:
    """`rel_shift`, forward and backward, of the position scores of eight heads."""
    module = f"{_BACKEND}.rel_shift"

    def run() -> None:
        shift = importlib.import_module(module)
        x = torch.empty(8, 2048, 4096, dtype=dtype, device="meta")
        shift.rel_shift_bwd(shift.rel_shift_fwd(x, 4096, 2047), 4096, 2047)

    name = f"rel_shift/{str(dtype).removeprefix('torch.')}/train"
    kernels = {"_rel_shift_kernel": Kernel(_no_products)}
    return Call(name, run, kernels, in_ci=dtype == torch.bfloat16)


def _launcher(operator: str) -> Callable[..., Any]:
    """The function that the operator runs; its module is imported at a first use."""
    module = "rel_attention" if operator.endswith("fwd") else "rel_attention_bwd"
    launcher: Callable[..., Any] = getattr(
        importlib.import_module(f"{_BACKEND}.{module}"), operator
    )
    return launcher


def _deterministically(wanted: bool, run: Callable[[], Any]) -> Any:
    """`run()` under `torch.use_deterministic_algorithms(wanted)`."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        return run()
    finally:
        torch.use_deterministic_algorithms(before)


def call(
    what: str, attention: Attention, part: str, *, in_ci: bool = False, modelled: bool = False
) -> Call:
    """Forward, or the kernels of backward."""
    forward = part == "forward"
    sizes = dataclasses.replace(attention, backward=not forward)
    dtype = str(attention.dtype).removeprefix("torch.")
    kernels = sizes.kernels()
    case = f"{what}/{part}"
    return Call(
        f"rel_attention/{dtype}/{what}/{part}",
        sizes.run,
        kernels,
        in_ci,
        modelled,
        only=tuple(name for name, kernel in kernels.items() if kernel.part == part),
        flop={part: (6.0 if forward else 16.0) * attention.D * attention.pairs},
        least_bytes=attention.least_bytes if attention.Tq == 1 else 0,
        asked={part: ASKED[case]} if dtype == "bfloat16" and case in ASKED else {},
    )


def _is_16_bit(launch: Launch) -> bool:
    return launch.signature["p_k"] != "*fp32"


def _forward_gate(launch: Launch, arch: int) -> Gate:
    constexprs = launch.constexprs
    has_seed, has_mask = (launch.signature[name] != "constexpr" for name in ("p_seed", "p_mask"))
    shuffles = row_shuffles(constexprs["BLOCK_Q"], launch.options.num_warps, arch)
    shuffles += 8 * has_mask  # which is loaded in another layout than the products'
    if not _is_16_bit(launch):
        return Gate("none", shuffles=32)
    # Tiles for few queries are lower than HGMMA's 64 rows, and so are some with a number for each
    # pair (dropout, a dense mask), which wants registers.
    plain = not has_seed and not has_mask and launch.values["Tq"] > _SHORT
    hopper = plain and constexprs["D"] in _HOPPER_HEAD_SIZES
    return Gate("hopper" if hopper else "tensor", shuffles)


def _backward_gate(launch: Launch, arch: int) -> Gate:
    """Its loop reduces nothing along rows: probabilities come from lse.

    What else is exchanged between lanes: without HGMMA, which reads right operands from shared
    memory, two tiles of products that are right operands of the next ones, a pair of numbers at a
    time, and a dense mask, which is loaded in another layout; with it, once, a warp's own number.
    """
    if not _is_16_bit(launch):
        return Gate("none", shuffles=32)
    constexprs = launch.constexprs
    if arch >= 90:
        return Gate("tensor", shuffles=1)
    has_mask = launch.signature["p_mask"] != "constexpr"
    operands = max(constexprs["BLOCK_Q"] * constexprs["BLOCK_K"] // 128, 4)
    return Gate("tensor", shuffles=operands + 8 * has_mask)


def _no_products(_launch: Launch, _arch: int) -> Gate:
    return Gate("no products", shuffles=None)
