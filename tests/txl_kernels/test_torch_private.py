"""torch still does what `txl_kernels/torch_private.py` relies on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook

from txl_kernels import torch_private as private

CHECKS: dict[str, Callable[[], None]] = {}


def checks(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers a check for these private names."""

    def register(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return register


@checks("_AutoDispatchBelowAutograd")
def below_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    with private.AutoDispatchBelowAutograd():
        y = x * 3
    assert not y.requires_grad
    assert not y.is_inference()
    assert (x * 3).requires_grad


@checks("_base", "_version")
def views_and_changes_of_tensors() -> None:
    table = torch.zeros(4, 2)
    rows = table[1:3]
    assert private.whole(rows) is table
    assert private.whole(rows[:1]) is table
    assert private.whole(table) is table
    before = private.changes(table)
    rows.add_(1)
    assert private.changes(table) == private.changes(rows) == before + 1


@checks("_compiled_call_impl")
def compiled_modules() -> None:
    module = nn.Linear(2, 2)
    assert not private.is_compiled_in_place(module)
    module.compile(backend="eager")
    assert private.is_compiled_in_place(module)


@checks("_assert_async")
def asserts() -> None:
    private.assert_async(torch.tensor(True), "holds")
    with pytest.raises(RuntimeError, match="does not hold"):
        private.assert_async(torch.tensor(False), "does not hold")


@checks(
    "get_interpreter_stack",
    "get_unwrapped",
    "is_batchedtensor",
    "is_functorch_wrapped_tensor",
    "peek_interpreter_stack",
)
def transforms_are_seen() -> None:
    seen = []

    def record(x: torch.Tensor) -> torch.Tensor:
        inner = private.unwrapped(x)
        seen.append((private.open_transforms(), private.is_batched(x), tuple(inner.shape)))
        assert private.is_changed()
        assert type(inner) is torch.Tensor
        return x.sum()

    torch.vmap(record)(torch.ones(3, 2))
    torch.func.grad(lambda x: torch.vmap(record)(x).sum())(torch.ones(3, 2))
    torch.func.jvp(record, (torch.ones(2),), (torch.ones(2),))
    assert seen == [
        (["vmap"], True, (3, 2)),
        (["grad", "vmap"], True, (3, 2)),
        (["jvp"], False, (2,)),
    ]
    assert private.open_transforms() == []
    assert not private.is_batched(torch.ones(2))
    assert not private.is_changed()


@checks(
    "_add_batch_dim",
    "_remove_batch_dim",
    "_vmapmode_decrement_nesting",
    "_vmapmode_increment_nesting",
    "is_legacy_batchedtensor",
)
def batched_gradients_reach_the_rule() -> None:
    with torch.library._scoped_library("txl_check", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CPU")

        def batched(x: torch.Tensor) -> torch.Tensor:
            assert private.is_batched(x)
            assert private.is_legacy_batched(x)
            level = private.legacy_level()
            assert level == private.legacy_level() == 1
            whole = private.legacy_unbatched(x, level)
            assert whole.shape == (3, 2)
            assert not private.is_legacy_batched(whole)
            return private.legacy_batched(torch.ops.txl_check.twice(whole), level)

        library.impl("twice", batched, "Batched")

        class Identity(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, dout):
                return torch.ops.txl_check.twice(dout)

        x = torch.ones(2, requires_grad=True)
        douts = torch.arange(6.0).view(3, 2)
        (grads,) = torch.autograd.grad(Identity.apply(x), x, douts, is_grads_batched=True)
        assert torch.equal(grads, 2 * douts)


@checks("_is_tracing")
def tracing_is_seen() -> None:
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lambda x: seen.append(private.is_changed()) or x + 1, torch.ones(2))
    assert seen[0]
    assert not private.is_changed()


@checks("_current_level")
def forward_mode_is_seen() -> None:
    assert not private.in_forward_mode()
    with forward_ad.dual_level():
        assert private.in_forward_mode()
        assert private.is_changed()


@checks("FakeTensor", "FakeTensorMode", "_len_torch_dispatch_stack", "detect_fake_mode")
def fake_tensors_have_shapes_alone() -> None:
    with private.FakeTensorMode():
        x = torch.ones(10**6, 10**6)
        assert private.is_changed()
        assert private.is_traced_or_fake([])
    assert isinstance(x, private.FakeTensor)
    assert (x @ x).shape == (10**6, 10**6)
    assert private.is_traced_or_fake([x])
    assert not private.is_changed()
    assert not private.is_traced_or_fake([torch.ones(1)])


@checks("get_proxy_mode")
def make_fx_is_seen() -> None:
    seen = []
    make_fx(lambda x: seen.append(private.is_traced_or_fake([])) or x + 1)(torch.ones(2))
    assert seen == [True]
    assert not private.is_traced_or_fake([])


@checks("tree_leaves", "tree_map", "tree_map_only")
def nested_arguments_are_flattened_in_order() -> None:
    nested = [1, (2.0, None), [3]]
    assert private.tree_leaves(nested) == [1, 2.0, None, 3]
    assert private.tree_map(str, nested) == ["1", ("2.0", "None"), ["3"]]
    assert private.tree_map_only(int, lambda x: -x, nested) == [-1, (2.0, None), [-3]]


@checks("_dispatch_has_kernel_for_dispatch_key", "_dispatch_key_for_device")
def kernels_are_found() -> None:
    with torch.library._scoped_library("txl_check", "FRAGMENT") as library:
        library.define("on_cpu(Tensor x) -> Tensor")
        library.impl("on_cpu", lambda x: x + 1, "CPU")
        assert private.has_kernel("txl_check::on_cpu", "cpu")
        assert not private.has_kernel("txl_check::on_cpu", "cuda")


@checks("_schema")
def arguments_have_names() -> None:
    assert private.argument_names(torch.ops.aten.add.Tensor) == ["self", "other", "alpha"]


@checks(
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_has_any_global_hook",
)
def hooks_are_listed() -> None:
    def hook(*_: object) -> None: ...

    layer = nn.Linear(1, 1)
    assert not private.has_hooks(layer)
    registrations = (
        (layer.register_forward_pre_hook, [hook], []),
        (layer.register_forward_hook, [], [hook]),
        (layer.register_full_backward_pre_hook, [], []),
        (layer.register_full_backward_hook, [], []),
        (register_module_forward_hook, [], []),
    )
    for register, before, after in registrations:
        handle = register(hook)
        assert private.has_hooks(layer), register
        assert private.forward_pre_hooks(layer) == before
        assert private.forward_hooks(layer) == after
        handle.remove()
        assert not private.has_hooks(layer), register


@checks("_modules", "_parameters")
def parameters_are_found() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ParameterList([torch.ones(2)]), nn.ReLU())
    model.register_module("absent", None)
    model.append(model[0])
    assert {*private.modules_of(model)} == {*model.modules()}
    found = private.parameters_of(model)
    assert {id(p) for p in found} == {id(p) for p in model.parameters()}
    assert len(found) == 3


@checks("_ASMoutput")
def adaptive_softmax_returns_its_type() -> None:
    module = nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=1.0)
    result = module(torch.ones(3, 4), torch.tensor([0, 3, 5]))
    assert type(result) is private.ASMoutput
    assert result._fields == ("output", "loss")


@checks(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
def flash_attention_on_the_cpu() -> None:
    q, k, v, dout = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scores = (0.5 * q @ k.transpose(2, 3)).masked_fill(
        torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf
    )
    expected = scores.softmax(-1) @ v
    grads = torch.autograd.grad(expected, leaves, dout)
    with torch.no_grad():
        out, lse = private.flash_attention_cpu(q, k, v, is_causal=True, scale=0.5)
        actual = private.flash_attention_cpu_bwd(dout, q, k, v, out, lse, 0.0, True, scale=0.5)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1), check_dtype=False)
    torch.testing.assert_close(actual, grads)


@checks("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward")
def flash_attention_on_cuda_has_the_same_arguments() -> None:
    """No GPU is needed: tensors without memory have the shapes and types of the results."""
    q, k, v, dout = (torch.empty(1, 2, 5, 8, dtype=torch.half, device="meta") for _ in range(4))
    out, lse, *_ = private.flash_attention_cuda(q, k, v, is_causal=True, scale=0.5)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (1, 2, 5), torch.float32)
    state = torch.empty(2, dtype=torch.uint64, device="meta")
    lengths = (None, None, 5, 5)
    grads = private.flash_attention_cuda_bwd(
        dout, q, k, v, out, lse, *lengths, 0.0, True, state, state, scale=0.5
    )
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


@checks("_dynamo_marked_constant")
def a_marked_function_is_not_traced() -> None:
    @private.constant_in_traces
    def three() -> int:
        return sys._getframe(0).f_lineno * 0 + 3  # the tracer does not support frames

    marked = torch.compiler.assume_constant_result(lambda: 3)
    assert vars(marked) == {"_dynamo_marked_constant": True}
    compiled = torch.compile(lambda x: x * three(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_torch_still_does_what_we_use(name):
    try:
        CHECKS[name]()
    except Exception as error:
        raise AssertionError(
            f"torch {torch.__version__} changed {name}, which txl_kernels/torch_private.py uses"
        ) from error


def test_register_autograd_registers_through_the_library_that_it_is_given():
    """`_derivatives` checks in `Library.impl` which transforms are open."""
    calls = []

    class Recorded(torch.library.Library):
        def impl(self, op_name, fn, dispatch_key="", **options):
            calls.append((op_name, dispatch_key, options))
            super().impl(op_name, fn, dispatch_key, **options)

    library = Recorded("txl_check", "FRAGMENT")
    library.define("registered(Tensor x) -> Tensor")
    torch.library.register_autograd("txl_check::registered", lambda ctx, dout: dout, lib=library)
    assert calls == [("registered", "Autograd", {"with_keyset": True})]
