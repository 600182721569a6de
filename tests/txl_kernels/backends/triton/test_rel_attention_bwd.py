"""What only the Triton backward of rel_attention must hold, in Triton's interpreter."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from txl_kernels import rel_attention
from txl_kernels.testing import REL_ATTENTION_CASES, RelAttentionCase, check_rel_attention

pytestmark = pytest.mark.interpreted

BY_NAME = {case.name: case for case in REL_ATTENTION_CASES}
CAUSAL = {"causal": True}
# Tables of r for all, per head, per batch row and for each; with tiles that share rows of them.
SHARED = RelAttentionCase("shared", H=2, Hk=1, Tq=37, Tm=9, R=20, options={**CAUSAL, "offset": 11})
CLAMPED = replace(SHARED, name="clamped", Dp=5, R=7, options={"offset": 4, "clamp": True})
TABLES = [
    replace(case, name=f"{case.name}-batch{batch:d}-heads{heads:d}", r_batch=batch, r_heads=heads)
    for case in (SHARED, CLAMPED)
    for batch, heads in itertools.product((False, True), repeat=2)
]


@pytest.fixture(autouse=True)
def _needs_the_interpreter(require_backend):
    require_backend("rel_attention", "triton", needs_grad=True)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(case: RelAttentionCase, wanted: list[str] | None = None, **changes: torch.Tensor):
    """Gradients by name of the wanted inputs, or of all."""
    floats, others = case.inputs(torch.float32)
    floats = {**floats, **changes}
    leaves = {
        name: tensor.detach().requires_grad_(wanted is None or name in wanted)
        for name, tensor in floats.items()
    }
    out = rel_attention(**leaves, **others, **case.options, backend="triton")
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(out, list(asked.values()), case.dout(torch.float32))
    return dict(zip(asked, grads, strict=True))


@pytest.mark.parametrize(
    ("case", "programs"),
    list(zip(TABLES, (1, 5, 1000, 1, 5, 1000, 5, 1), strict=True)),
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode_is_within_the_budget_at_any_split(case, programs, monkeypatch):
    from txl_kernels.backends.triton import rel_attention_bwd as backward

    monkeypatch.setattr(backward, "_SPLIT_PROGRAMS", programs)
    check_rel_attention(case, "triton", torch.float32)


@pytest.fixture
def last_program_first(monkeypatch):
    """A switch: from then on the interpreter runs programs in the opposite order.

    It runs one after the other, so their order is what a GPU leaves open.
    """

    def switch():
        from triton.runtime.interpreter import interpreter_builder as builder

        set_index = builder.set_grid_idx
        monkeypatch.setattr(
            builder, "set_grid_idx", lambda x, y, z: set_index(builder.grid_dim[0] - 1 - x, y, z)
        )

    return switch


@pytest.mark.parametrize("case", [TABLES[0], TABLES[4], TABLES[7]], ids=lambda case: case.name)
@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode_gives_the_same_bits_in_any_order(case, last_program_first):
    first = gradients(case)
    last_program_first()
    again = gradients(case)
    for name, grad in first.items():
        assert torch.equal(grad, again[name]), name


def test_by_default_only_dr_depends_on_the_order(last_program_first):
    first = gradients(TABLES[0])
    last_program_first()
    again = gradients(TABLES[0])
    assert {name for name, grad in first.items() if not torch.equal(grad, again[name])} == {"r"}


def test_wanted_gradients_do_not_depend_on_which_others_are_wanted():
    case = RelAttentionCase("wanted", B=1, H=2, Tq=18, Tm=21, options=CAUSAL)
    due = gradients(case)
    groups = (["q"], ["r"], ["k"], ["v"], ["mem_k"], ["mem_v"], ["r_w_bias"], ["r_r_bias"])
    for wanted in (*groups, ["q", "k", "v"], ["k", "mem_v"], ["r", "r_w_bias"]):
        for name, grad in gradients(case, wanted).items():
            assert torch.equal(grad, due[name]), (wanted, name)


def test_no_kernel_runs_for_gradients_that_nobody_wants(monkeypatch):
    from txl_kernels.backends.triton import rel_attention_bwd as backward

    case = RelAttentionCase("wanted", B=1, H=1, Tq=5, Tm=4, options=CAUSAL)
    monkeypatch.setattr(backward, "_rel_attention_bwd_dqdr_kernel", None)
    gradients(case, ["k", "v"])
    monkeypatch.undo()
    monkeypatch.setattr(backward, "_rel_attention_bwd_dkdv_kernel", None)
    gradients(case, ["q", "r", "r_w_bias", "r_r_bias"])


def test_a_memory_that_takes_no_gradient_is_left_out(monkeypatch):
    from txl_kernels.backends.triton import rel_attention_bwd as backward

    programs = []
    kernel = backward._rel_attention_bwd_dkdv_kernel

    class Counted:
        def __getitem__(self, grid):
            programs.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(backward, "_rel_attention_bwd_dkdv_kernel", Counted())
    case = RelAttentionCase("memory", B=1, H=1, Tq=16, Tm=33, options=CAUSAL)
    gradients(case, ["k", "v"])
    gradients(case, ["mem_k"])
    gradients(case)
    assert programs == [1, 3, 4]


def test_padding_behind_the_key_lengths_is_not_read():
    case = RelAttentionCase("padding", B=2, H=1, Tq=20, Tm=0, key_lens=[20, 9])
    floats, _ = case.inputs(torch.float32)
    due = gradients(case)
    changes = {name: floats[name].detach().clone() for name in ("k", "v")}
    for padded in changes.values():
        padded[1, :, 9:] = torch.nan
    actual = gradients(case, **changes)
    for name, grad in due.items():
        assert torch.equal(grad, actual[name]), name
    assert not actual["k"][1, :, 9:].any()
    assert not actual["v"][1, :, 9:].any()


def test_strided_output_gradients():
    case = RelAttentionCase("strided", B=2, H=2, Tq=18, Tm=0, D=8)
    floats, _ = case.inputs(torch.float32)
    leaves = list(floats.values())
    out = rel_attention(**floats, backend="triton")
    by_time = torch.randn(2, 18, 2, 8).transpose(1, 2)
    for dout in (by_time, torch.ones(()).expand(out.shape), torch.randn(18, 1).expand(out.shape)):
        actual = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        due = torch.autograd.grad(out, leaves, dout.clone().contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(actual, due, strict=True))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("determinism", [False, True])
def test_no_tensor_of_queries_times_keys_is_made(determinism):
    torch.use_deterministic_algorithms(determinism)
    try:
        case = RelAttentionCase(
            "lean", B=1, H=1, Tq=256, Tm=0, R=8, D=4, options={"window": (2, 2)}
        )
        with LargestTensor() as largest:
            gradients(case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert 0 < largest.numel < 256 * 256 / 4
