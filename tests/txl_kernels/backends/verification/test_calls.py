"""A short problem launches the kernels of the call that it comes from, and so do equal keys."""

from __future__ import annotations

import random

import pytest
import torch

from txl_kernels._rel_attention_call import (
    UNLIMITED,
    Numbers,
    OptionalTensors,
    RelAttentionCall,
    Rules,
)
from txl_kernels.backends import triton as package
from txl_kernels.backends.verification import calls, kernels

pytest.importorskip("triton", exc_type=ImportError)
launch_table = pytest.importorskip("txl_kernels.backends.triton.launch_table", exc_type=ImportError)
launching = pytest.importorskip("txl_kernels.backends.triton.launching", exc_type=ImportError)
if package.interprets():
    pytest.skip("a process interprets or compiles", allow_module_level=True)

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _sm_90(monkeypatch):
    from triton.backends.compiler import GPUTarget

    monkeypatch.setattr(launching, "current_target", lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(launch_table, "device_limits", lambda _: ((9, 0), 232448))
    yield
    torch.use_deterministic_algorithms(False)


def tensor(*shape, dtype=torch.bfloat16, grad=True, order=(0, 1, 2, 3)):
    if len(shape) == 4 and order != (0, 1, 2, 3):
        x = torch.empty([shape[axis] for axis in order], dtype=dtype, device="meta")
        x = x.permute([order.index(axis) for axis in range(4)])
    else:
        x = torch.empty(shape, dtype=dtype, device="meta")
    return x.requires_grad_(grad)


def found(call, limit=None):
    return {key for part in kernels.hashes(call, DEVICE, limit) for key in part}


def check_short_problem(call):
    needed = found(call)
    assert needed
    covering = next(p for p, limit in calls.problems(call) if needed <= found(p, limit))
    assert covering is not call, call


def random_attention(rng):
    B, H, D = rng.choice([1, 2, 7]), rng.choice([1, 3, 16, 40]), rng.choice([64, 128, 41, 36, 8])
    Tq, Tm = rng.choice([1, 3, 16, 17, 500, 1024]), rng.choice([0, 5, 512])
    Ts, Dv = rng.choice([Tq, 700]), rng.choice([D, D, 24])
    order, grad = rng.choice([(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)]), rng.random() < 0.6
    kind = {"dtype": rng.choice([torch.bfloat16, torch.float32]), "grad": grad}
    Tk, laid_out = Tm + Ts, {**kind, "order": order}
    R = rng.choice([Tk, Tk + Tq - 1, 400])
    Hk, Dp = H // rng.choice([n for n in (1, 1, 5, 8) if H % n == 0]), rng.choice([None, 16, 9])
    q, k, v = (tensor(B, *s, **laid_out) for s in ((H, Tq, D), (Hk, Ts, D), (Hk, Ts, Dv)))
    r = tensor(rng.choice([1, B]), H, R, Dp or D, **kind)
    mask = torch.empty(B, 1, 1, Tk, dtype=torch.bool, device="meta").expand(B, H, Tq, Tk)
    ends = [torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((B,), (B, Tq))]
    optional = OptionalTensors(
        *(rng.choice([None, tensor(H, size, **kind)]) for size in (D, Dp or D)),
        *(tensor(B, Hk, Tm, n, **laid_out) if Tm else None for n in (D, Dv)),
        q_pos=Dp and tensor(B, H, Tq, Dp, **laid_out),
        q_start=rng.choice([None, None, ends[0]]),
        key_start=rng.choice([None, None, *ends]),
        mask=rng.choice([None, mask]),
    )
    chunk, clamp = rng.choice([(0, 0, 0), (64, 1, 9)]), int(rng.random() < 0.3)
    rules = Rules(Tq - 1, clamp, UNLIMITED, 0, *chunk)
    numbers = Numbers(0.1, rng.choice([0.1, -0.3]), rng.choice([0.0, 5.0]))
    torch.use_deterministic_algorithms(rng.random() < 0.3)
    arguments = RelAttentionCall(q, k, v, r, optional, rules, numbers).arguments()
    return calls.describe("rel_attention", "triton", arguments, grad)


def test_short_problems_of_rel_attention_launch_the_same_kernels():
    rng = random.Random(14)
    for _ in range(25):
        check_short_problem(random_attention(rng))


def test_calls_of_equal_keys_launch_the_same_kernels():
    rng, seen = random.Random(1), {}
    for _ in range(10):
        call = random_attention(rng)
        longer = list(call.arguments)
        for n in (1, 2):  # 32 more keys, of the same alignment
            spec = longer[n]
            shape = (*spec.shape[:2], spec.shape[2] + 32, spec.shape[3])
            longer[n] = calls._resized(spec._replace(shape=shape), shape)
        for one in (call, call._replace(arguments=tuple(longer))):
            torch.use_deterministic_algorithms(one.deterministic)
            assert seen.setdefault(calls.key(one), found(one)) == found(one)
    assert len(seen) <= 20


@pytest.mark.parametrize("op", ["adaptive_nll", "adaptive_loss"])
@pytest.mark.parametrize(("N", "c0"), [(8192, 20000), (5000, 50000), (40000, 3001), (3, 204)])
def test_short_problems_of_the_adaptive_softmax_launch_the_same_kernels(op, N, c0):
    head = tensor(512, 1024), tensor(c0 + 2, 512), tensor(c0 + 2)
    first = tensor(64, 1024), tensor(40000, 64), tensor(40000)
    second = tensor(16, 1024), tensor(7735, 16), tensor(0)
    target = torch.empty(N, dtype=torch.int64, device="meta")
    arguments = (tensor(N, 1024), target, [*head, *first, *second], -100)
    if op == "adaptive_loss":
        arguments += (True, [True] * 9 + [False])
    call = calls.describe(op, "triton", arguments, True)
    if N > 100:
        check_short_problem(call)
    else:
        assert calls.problems(call).__next__()[0] == call


@pytest.mark.parametrize("shape", [(8192,), (8, 515), (1,)], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_short_problems_of_the_embedding_launch_the_same_kernels(shape, sparse):
    tokens = torch.empty(shape, dtype=torch.int64, device="meta")
    tables, projections = [tensor(20000, 1024), tensor(40000, 64)], [tensor(0), tensor(1024, 64)]
    arguments = (tokens, tables, projections, 1.0, sparse)
    check_short_problem(calls.describe("adaptive_embedding", "triton", arguments, True))


@pytest.mark.parametrize("shape", [(8, 16, 512, 1023), (3, 5, 100, 300), (512, 1024)], ids=str)
def test_short_problems_of_the_shift_launch_the_same_kernels(shape):
    for x in (tensor(*shape), tensor(*shape[:-2], shape[-1], shape[-2]).mT):
        arguments = (x, shape[-1] - 3, shape[-2] - 1)
        check_short_problem(calls.describe("rel_shift", "triton", arguments, True))


def test_a_description_needs_no_memory_and_keeps_alignment():
    x = torch.empty(1000, dtype=torch.bfloat16)[3:].view(-1)[:960].view(1, 2, 30, 16)
    (spec,) = calls.describe("rel_shift", "triton", (x,), False).arguments
    assert spec == calls.Spec(x.dtype, (1, 2, 30, 16), (960, 480, 16, 1), 3, False)
    assert kernels.empty(spec).data_ptr() % 16 == 6
