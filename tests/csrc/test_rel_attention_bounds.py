"""The native kernels read and write inside their tensors, whatever the arguments are."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

from txl_kernels import rel_attention, rel_attention_with_lse
from txl_kernels._rel_attention_call import Numbers, OptionalTensors, RelAttentionCall, Rules
from txl_kernels.backends import native

PAGE = mmap.PAGESIZE

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that ends where the next page may not be read."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE) + 1
    region = mmap.mmap(-1, pages * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    fence = ctypes.c_void_p(address + (pages - 1) * PAGE)
    assert libc.mprotect(fence, PAGE, mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0
    offset = (pages - 1) * PAGE - size
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


WILD = [-(2**63), -(2**31) - 1, -70, 0, 30, 601, 2**31, 2**63 - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("D", [1, 41, 64])
@pytest.mark.parametrize("lengths", [(1, 30), (17, 5), (70, 603)], ids=["1+30", "17+5", "70+603"])
def test_nothing_is_read_after_the_tensors(lengths, D, dtype):
    Tq, Tm = lengths
    sizes = {"q": Tq, "k": Tq, "v": Tq, "mem_k": Tm, "mem_v": Tm, "r": Tq + Tm}
    inputs = {
        name: fenced(torch.randn(1, 1, T, D).to(dtype)).requires_grad_()
        for name, T in sizes.items()
    }
    wild = torch.tensor([2**40])
    out = rel_attention(**inputs, causal=True, key_lens=wild, backend="native")
    grads = torch.autograd.grad(
        out, list(inputs.values()), fenced(torch.randn(out.shape).to(dtype))
    )
    assert all(grad.isfinite().all() for grad in (out, *grads))


@pytest.mark.parametrize("ranges", ["row", "query"])
@pytest.mark.parametrize("Tq", [1, 17, 200])
def test_wild_positions_and_ranges_stay_inside_the_tensors(Tq, ranges):
    B, Hk, H, Tm, D, Dp = len(WILD), 2, 4, 401, 8, 3
    shapes = {
        "q": (B, H, Tq, D),
        "q_pos": (B, H, Tq, Dp),
        "k": (B, Hk, Tq, D),
        "v": (B, Hk, Tq, D),
        "mem_k": (B, Hk, Tm, D),
        "mem_v": (B, Hk, Tm, D),
        "r": (1, 1, 37, Dp),
    }
    inputs = {name: fenced(torch.randn(shape)).requires_grad_() for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(Tq)

    def drawn(*shape):
        return fenced(torch.tensor(WILD)[torch.randint(0, B, shape, generator=generator)])

    shape = (B,) if ranges == "row" else (B, Tq)
    for options in ({"causal": True}, {"window": (40, 7)}, {"chunk": (16, 2, 5)}):
        for more in ({}, {"clamp": True, "offset": -7}, {"offset": 2**62}, {"offset": -(2**62)}):
            out, lse = rel_attention_with_lse(
                **inputs,
                **options,
                **more,
                q_start=fenced(torch.tensor(WILD)),
                key_start=drawn(*shape),
                key_lens=drawn(*shape),
                backend="native",
            )
            grads = torch.autograd.grad([out, lse], list(inputs.values()), [out, lse * 0])
            assert all(grad.isfinite().all() for grad in (out, *grads))


def test_the_gradient_of_the_lse_of_a_row_without_keys_is_ignored():
    inputs = {name: torch.randn(1, 1, 5, 4, requires_grad=True) for name in ("q", "k", "v", "r")}
    out, lse = rel_attention_with_lse(
        **inputs, key_lens=torch.tensor([[5, 0, 3, 0, 5]]), backend="native"
    )
    assert lse.isinf().tolist() == [[[False, True, False, True, False]]]
    dlse = torch.where(lse.isinf(), float("nan"), 1.0)
    grads = torch.autograd.grad([out, lse], list(inputs.values()), [out, dlse])
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][0, 0, [1, 3]].eq(0).all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("k", (2, 2, 9, 8)),
        ("v", (2, 3, 8, 8)),
        ("r", (2, 2, 9, 8)),
        ("r", (1, 3, 9, 7)),
        ("q_pos", (2, 3, 8, 8)),
        ("r_r_bias", (3, 7)),
        ("mem_v", (2, 3, 6, 8)),
        ("key_start", (3,)),
        ("key_lens", (2, 8)),
        ("q_start", (2, 9)),
    ],
)
def test_a_direct_call_with_wrong_shapes_is_an_error(name, shape):
    tensors = {
        **{x: torch.randn(2, 3, 9, 8) for x in ("q", "k", "v", "mem_k", "mem_v")},
        "r": torch.randn(1, 3, 9, 8),
    }
    is_integer = name in ("key_start", "key_lens", "q_start")
    tensors[name] = torch.zeros(shape, dtype=torch.int64) if is_integer else torch.zeros(shape)
    q, k, v, r = (tensors.pop(x) for x in "qkvr")
    numbers = Numbers(scale=0.3, pos_scale=0.3)
    call = RelAttentionCall(q, k, v, r, OptionalTensors(**tensors), Rules(offset=8), numbers)
    with pytest.raises((ValueError, TypeError), match="rel_attention: "):
        torch.ops.txl_native.rel_attention_fwd(*call.arguments())


def test_padding_after_the_key_lengths_is_never_read():
    inputs = {name: torch.randn(2, 2, 40, 16) for name in ("q", "k", "v")}
    r, lengths = torch.randn(1, 2, 79, 16), torch.tensor([40, 21])
    due = rel_attention(**inputs, r=r, key_lens=lengths, backend="native")
    for name in ("k", "v"):
        inputs[name][1, :, 21:] = float("nan")
    assert torch.equal(rel_attention(**inputs, r=r, key_lens=lengths, backend="native"), due)
