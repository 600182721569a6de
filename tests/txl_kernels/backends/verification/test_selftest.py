"""The self-test finds planted faults in every op, and leaves the caller's state as it was."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from txl_kernels import (
    BackendUnavailableError,
    adaptive_embedding,
    adaptive_loss,
    adaptive_nll,
    backends,
    rel_attention,
    rel_shift,
    verify,
)
from txl_kernels.backends import verification
from txl_kernels.backends.verification import kernels, selftest

F32 = {"dtype": torch.float32}
SHAPES = {
    "rel_attention": {"B": 3, "H": 2, "Tq": 170, "Tm": 9, "D": 12, "causal": True},
    "rel_shift": {"shape": (2, 40, 60)},
    "adaptive_nll": {"N": 70, "d": 12, "sizes": (20, 40), "widths": (12, 3)},
    "adaptive_loss": {"N": 70, "d": 12, "sizes": (20, 40), "widths": (12, 3)},
    "adaptive_embedding": {"N": 70, "d": 12, "sizes": (20, 40), "widths": (12, 3)},
}


def x(*shape, **options):
    return torch.randn(shape or (2, 20, 30), **options)


def as_tuple(found):
    return (found,) if isinstance(found, torch.Tensor) else found


def one_bit(out, count=itertools.count()):  # noqa: B008
    out.view(-1)[0] += 2.0**-22 * (next(count) % 2)
    return out


FAULTS = {
    "wrong": (lambda out: out + 0.01, "over the budget"),
    "one wrong element": (lambda out: out.index_fill(-1, torch.tensor([7]), 3.0), "over the"),
    "not a number": (lambda out: out * float("nan"), "nan"),
    "different bits": (one_bit, "two runs differ in the bits"),
}


@pytest.mark.parametrize("op", SHAPES)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
def test_correct_kernels_pass(device, op, gradients):
    options = {"key_lens": True, "mask": True, "dropout_p": 0.2} if op == "rel_attention" else {}
    shape = {"op": op, **SHAPES[op], **F32, "gradients": gradients, **options}
    assert verify([shape], device="cpu") == []
    assert device == [f"{op}/native/float32" + "+backward" * gradients]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", SHAPES)
def test_correct_16_bit_kernels_pass(device, op, dtype):
    assert verify([{"op": op, **SHAPES[op], "dtype": dtype}], device="cpu") == []
    assert len(device) == 1


@pytest.mark.parametrize("op", SHAPES)
def test_a_wrong_forward_pass_of_every_op_is_found(device, plant, op):
    def wrong(*arguments):
        out, *rest = as_tuple(selftest.reference(op, arguments))
        out = out + 0.05
        if op == "rel_attention":
            return out, rest[0]
        rest = {"adaptive_nll": (out.new_zeros(2, 2, len(out.view(-1))),), "adaptive_loss": ([],)}
        return (out, *rest[op]) if op in rest else out

    plant(f"{op}_fwd", wrong)
    shape = {"op": op, **SHAPES[op], **F32, "gradients": False}
    with pytest.warns(RuntimeWarning, match="failed their self-test on NVIDIA Mock 1"):
        (failure,) = verify([shape], device="cpu")
    assert "over the budget" in failure


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", FAULTS)
def test_every_kind_of_fault_warns_once_and_the_next_backend_runs(
    device, plant_in_shift, direction, kind
):
    fault, words = FAULTS[kind]
    plant_in_shift(direction, fault)
    given = x(requires_grad=True)
    with pytest.warns(RuntimeWarning) as caught:
        out = rel_shift(given)
    (message,) = [str(w.message) for w in caught]
    assert message.startswith("rel_shift: the native kernels failed their self-test on NVIDIA")
    assert words in message
    assert message.endswith("the next backend is used instead")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = rel_shift(given)
    assert len(device) == 1
    expected = rel_shift(given, backend="reference")
    assert torch.equal(out, expected)
    assert torch.equal(again, expected)


def test_a_fault_in_backward_alone_does_not_concern_inference(device, plant):
    plant("rel_attention_bwd", lambda dout, dlse, q, k, v, r, optional, *rest: [
        torch.zeros_like(t) if n else dout.new_empty(0)
        for t, n in zip((q, k, v, r, *optional[:5]), rest[-1], strict=True)
    ])  # fmt: skip
    q = x(2, 3, 20, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rel_attention(q, q, q, q[:1])
    with pytest.warns(RuntimeWarning, match="dq: error"):
        rel_attention(q.requires_grad_(), q, q, q[:1])
    assert device == ["rel_attention/native/float32", "rel_attention/native/float32+backward"]


def test_a_kernel_that_raises_is_not_used(device, plant):
    def fail(*_):
        raise RuntimeError("out of resource: shared memory")

    plant("rel_shift_fwd", fail)
    with pytest.warns(RuntimeWarning, match="RuntimeError: out of resource: shared memory"):
        rel_shift(x())


def test_the_next_backend_is_tested_too(device, monkeypatch):
    monkeypatch.setitem(backends._AUTO, "cpu", ("triton", "native"))
    monkeypatch.setattr(backends.triton, "unavailable_reason", lambda *_: None)
    with pytest.warns(RuntimeWarning, match="the triton kernels failed their self-test"):
        out = rel_shift(given := x())
    assert device == ["rel_shift/native/float32"]
    assert torch.equal(out, rel_shift(given, backend="reference"))


def test_the_reference_runs_only_where_its_scores_are_small(device, plant, monkeypatch):
    plant("rel_attention_fwd", lambda q, *_: (q * float("nan"), q[..., 0].contiguous()))
    q = x(1, 2, 30, 8)
    with pytest.warns(RuntimeWarning, match="nan"):
        rel_attention(q, q, q, q)
    monkeypatch.setattr(backends, "MANY_BYTES", 2 * 30 * 30 * 4 - 1)
    with pytest.raises(BackendUnavailableError, match=r"MiB of scores, because the native kernels"):
        rel_attention(q, q, q, q)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failed_test_raises_in_a_distributed_program(device, plant_in_shift, monkeypatch, when):
    plant_in_shift("forward", FAULTS["wrong"][0])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    if when == "before":  # the first call comes before the other processes are known
        with pytest.warns(RuntimeWarning, match="over the budget"):
            rel_shift(x())
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match="all processes must use the same"):
            rel_shift(x())
    assert len(device) == 1


def test_a_kernel_that_failed_is_not_tested_again_for_another_call(
    device, plant_in_shift, monkeypatch
):
    plant_in_shift("forward", FAULTS["wrong"][0])
    monkeypatch.setattr(kernels, "hashes", lambda *_: ({"one kernel": ""}, {}))
    with pytest.warns(RuntimeWarning, match="over the budget"):
        rel_shift(x())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rel_shift(x(2, 21, 30))
    assert len(device) == 1


def test_another_alignment_is_another_call(device):
    memory = x(601)
    for start in (0, 1, 0, 1):
        rel_shift(memory[start : start + 600].view(20, 30))
    assert len(device) == 2


def test_a_backend_requested_by_name_is_not_tested(device, plant_in_shift):
    plant_in_shift("forward", FAULTS["wrong"][0])
    given = x()
    assert torch.equal(
        rel_shift(given, backend="native"), rel_shift(given, backend="reference") + 0.01
    )
    assert device == []


def test_one_test_per_specialisation(device):
    q = x(2, 3, 160, 16)
    for n in (160, 144, 32):  # lengths do not count
        rel_attention(q, q[:, :, :n], q[:, :, :n], q[:1])
        rel_attention(q, q[:, :, :n], q[:, :, :n], q[:1], offset=n)
    assert len(device) == 1
    for call in ({"softcap": 1.0}, {"clamp": True, "offset": 1}, {"mem_k": q, "mem_v": q}):
        rel_attention(q, q, q, q[:1], **call)
    rel_attention(q[..., :8], q[..., :8], q, q[:1, ..., :8])
    rel_attention(q[:, :, :7], q, q, q[:1])
    rel_attention(q.double(), q.double(), q.double(), q[:1].double())
    assert len(device) == 7
    tables = [x(20, 8), x(30, 8)]
    for n in (5, 5, 6):  # the adaptive kernels are specialised by every size
        adaptive_embedding(torch.zeros(n, dtype=torch.int64), tables, [None, None], [20])
    assert len(device) == 9


def test_the_caller_s_state_stays(device):
    weight = x(20, 8, requires_grad=True)
    hidden, target = x(7, 8), torch.arange(7)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.device("meta"):
            adaptive_nll(hidden, target, weight, [], cutoffs=[])
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_grad_enabled()
            assert torch.get_default_device().type == "meta"
            assert torch.get_default_dtype() == torch.float64
        with torch.inference_mode():
            adaptive_loss(hidden, target, weight, [], cutoffs=[])
        adaptive_loss(hidden, target, weight, [], cutoffs=[])
    finally:
        torch.set_default_dtype(before)
    assert len(device) == 3
    assert torch.equal(torch.rand(3), expected)
    assert weight.grad is None
    assert not torch.are_deterministic_algorithms_enabled()


def test_inside_vmap_the_elements_are_tested(device):
    q = x(4, 1, 2, 20, 8)
    torch.vmap(lambda q: rel_attention(q, q, q, q))(q)
    torch.vmap(lambda q: rel_attention(q, q, q, q))(q.requires_grad_())
    assert device == ["rel_attention/native/float32", "rel_attention/native/float32+backward"]


def test_a_triton_that_was_not_checked_is_named_once(monkeypatch):
    triton = pytest.importorskip("triton", exc_type=ImportError)
    monkeypatch.setattr(triton, "__version__", "4.1.0")
    backends.triton.unchecked_version.cache_clear()
    verification._warn_of_unchecked_version.cache_clear()
    with pytest.warns(RuntimeWarning, match="Triton 4.1.0 was not checked with these kernels"):
        verification._warn_of_unchecked_version("triton")
    backends.triton.unchecked_version.cache_clear()
