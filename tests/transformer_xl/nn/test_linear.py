"""Linear layers and log-probabilities of few rows: the same results, and when the kernels run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from transformer_xl.nn import AdaptiveSoftmax, PositionwiseFeedForward
from transformer_xl.nn import linear as module
from transformer_xl.nn.linear import linear
from txl_kernels import few_row_linear


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights with which `few_row_linear` was called."""
    weights: list[Tensor] = []

    def counted(x: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        weights.append(weight)
        return few_row_linear(x, weight, *args, **options)

    monkeypatch.setattr(module, "few_row_linear", counted)
    return weights


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 20, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_few_rows_equal_a_call_of_the_layer(
    calls: list[Tensor], bias: bool, dtype: torch.dtype
) -> None:
    plain, x = layer(bias).to(dtype), torch.randn(2, 8, 12, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(linear(plain, x), plain(x))
    assert len(calls) == 1


def _hooked() -> nn.Module:
    plain = layer()
    plain.register_forward_hook(lambda _module, _args, out: 2 * out)
    return plain


def _parametrised() -> nn.Module:
    plain = layer()
    return parametrize.register_parametrization(plain, "weight", nn.Softplus())


def _replaced() -> nn.Module:
    plain = layer()
    plain.forward = lambda x: x  # type: ignore[method-assign]
    return plain


class _Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize(
    "make",
    [_hooked, _parametrised, _replaced, lambda: _Subclass(12, 20), nn.ReLU],
    ids=["hook", "parametrisation", "replaced", "subclass", "other"],
)
def test_a_layer_that_computes_more_is_called(
    calls: list[Tensor], make: Callable[[], nn.Module]
) -> None:
    other, x = make(), torch.randn(3, 12)
    with torch.no_grad():
        assert torch.equal(linear(other, x), other(x))
    assert not calls


def test_an_adapter_is_called(calls: list[Tensor], lora: Callable[[nn.Module], nn.Module]) -> None:
    wrapped, x = lora(layer()), torch.randn(3, 12)
    with torch.no_grad():
        assert torch.equal(linear(wrapped, x), wrapped(x))
    assert not calls


def test_the_layer_is_called_where_its_result_differs(calls: list[Tensor]) -> None:
    plain, x = layer(), torch.randn(3, 12)
    linear(plain, x).sum().backward()
    assert plain.weight.grad is not None
    with torch.no_grad():
        linear(plain, torch.randn(17, 12))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(plain, x).dtype == torch.bfloat16
        assert torch.equal(torch.vmap(lambda row: linear(plain, row))(x), plain(x))
        with pytest.raises(RuntimeError):
            linear(plain, x.double())
    assert not calls


def test_it_can_be_compiled_and_exported(calls: list[Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer()

        def forward(self, x: Tensor) -> Tensor:
            return linear(self.inner, x)

    torch.compiler.reset()
    model, x = Model(), torch.randn(3, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, backend="eager", fullgraph=True)(x), model.inner(x)
        )
        rows = torch.export.Dim("rows", min=2, max=100)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
        x = torch.randn(50, 12)
        torch.testing.assert_close(program.module()(x), model.inner(x))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_rows_of_torchao_are_not_dequantised(calls: list[Tensor], dtype: torch.dtype) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    plain = layer().to(dtype)
    quantization.quantize_(plain, quantization.Int8WeightOnlyConfig())
    x = torch.randn(3, 12, dtype=dtype)
    expected = x.float() @ plain.weight.dequantize().float().t() + plain.bias.float()
    with torch.no_grad():
        out = linear(plain, x)
        assert [weight.dtype for weight in calls] == [torch.int8]
        torch.testing.assert_close(out, expected.to(dtype), rtol=1e-2, atol=1e-2)
        other = x.half()  # another dtype than that of the bias, which torchao accepts
        assert torch.equal(linear(plain, other), plain(other))
    assert len(calls) == 1


def test_other_quantisations_of_torchao_are_called(calls: list[Tensor]) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    configurations = (
        quantization.Int8WeightOnlyConfig(granularity=granularity.PerTensor()),
        quantization.Int8DynamicActivationInt8WeightConfig(),
    )
    for configuration in configurations:
        plain, x = layer(), torch.randn(3, 12)
        quantization.quantize_(plain, configuration)
        with torch.no_grad():
            assert torch.equal(linear(plain, x), plain(x))
    plain = layer()
    quantization.quantize_(plain, quantization.Int8WeightOnlyConfig())
    weight: Any = plain.weight
    weight.zero_point = torch.ones_like(weight.scale, dtype=torch.int8)
    with torch.no_grad():
        assert torch.equal(linear(plain, x), plain(x))
    assert not calls


def test_the_feed_forward_uses_it_and_is_a_plain_sequence(calls: list[Tensor]) -> None:
    feed_forward, x = PositionwiseFeedForward(12, 20).eval(), torch.randn(1, 3, 12)
    core = feed_forward.CoreNet
    with torch.no_grad():
        expected = nn.Sequential(*core)(x)
        for same in (core, copy.deepcopy(core), pickle.loads(pickle.dumps(core))):
            torch.testing.assert_close(same(x), expected)
    assert len(calls) == 6
    assert repr(core) == repr(nn.Sequential(*core))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("proj_same_dim", [True, False])
@pytest.mark.parametrize("div_val", [1, 2])
@pytest.mark.parametrize("cutoffs", [(), (10, 30)], ids=str)
def test_log_probabilities_of_few_rows_are_those_of_many(
    cutoffs: tuple[int, ...], div_val: int, proj_same_dim: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    softmax = AdaptiveSoftmax(50, 12, 12, cutoffs, div_val, proj_same_dim=proj_same_dim).to(dtype)
    for parameter in softmax.parameters():
        nn.init.normal_(parameter)
    hidden = torch.randn(20, 1, 12, dtype=dtype)
    with torch.no_grad():
        expected = softmax.log_prob(hidden)
        for rows in (1, 16):
            log_prob = softmax.log_prob(hidden[:rows])
            torch.testing.assert_close(log_prob, expected[:rows])
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones_like(log_prob[..., 0]))


def test_the_weights_of_a_softmax_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax = AdaptiveSoftmax(50, 12, 12, (10, 30), 2)
    monkeypatch.setattr(softmax, "_clusters", None)  # joins the matrices of the head
    with torch.no_grad():
        softmax.log_prob(torch.randn(4, 12))
