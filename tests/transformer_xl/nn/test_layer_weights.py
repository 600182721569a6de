"""Adaptive layers compute with the weights that their layers would use, or refuse the layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from transformer_xl.integrations import AdaptiveLogSoftmaxWithLoss, ProjectedAdaptiveLogSoftmax
from transformer_xl.nn import AdaptiveEmbedding, AdaptiveSoftmax, SampledSoftmax

Quantise = Callable[[nn.Module], Tensor]
V, D, CUTOFFS = 20, 8, [5, 12]
BUILD: dict[str, Callable[[], nn.Module]] = {
    "one-table": lambda: AdaptiveSoftmax(V, D, D, tuple(CUTOFFS)),
    "bins": lambda: AdaptiveSoftmax(V, D, D, tuple(CUTOFFS), 2),
    "sampled": lambda: AdaptiveSoftmax(V, D, D, n_sample=V),
    "embedding": lambda: AdaptiveEmbedding(V, D, D, tuple(CUTOFFS), 2),
    "torch": lambda: AdaptiveLogSoftmaxWithLoss(D, V, CUTOFFS, div_value=2.0),
    "hugging-face": lambda: ProjectedAdaptiveLogSoftmax(V, D, D, CUTOFFS, 2),
}
LAYERS = {  # the module and each kind of its layers
    "one-table": ["out_layers.0"],
    "bins": ["out_layers.0", "out_layers.2"],
    "sampled": ["out_layers.0"],
    "embedding": ["emb_layers.0", "emb_layers.2"],
    "torch": ["head", "tail.0.0", "tail.1.1"],
    "hugging-face": ["out_layers.1"],
}
CASES = [(kind, layer) for kind, layers in LAYERS.items() for layer in layers]
each_layer = pytest.mark.parametrize(("kind", "name"), CASES)


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    module = BUILD[kind]().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def call(module: nn.Module) -> list[Tensor]:
    """The results of every method."""
    tokens = torch.arange(V)
    if isinstance(module, AdaptiveEmbedding):
        return [module(tokens)]
    hidden = torch.randn(V, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # the draws of a sampled loss
    loss = module(hidden, tokens)
    return [getattr(loss, "loss", loss), module.log_prob(hidden)]


def with_weight(kind: str, name: str, weight: Tensor) -> nn.Module:
    module = build(kind)
    with torch.no_grad():
        module.get_submodule(name).weight.copy_(weight)
    return module


@each_layer
def test_an_unmerged_adapter_is_refused_by_name(
    kind: str, name: str, lora: type[nn.Module]
) -> None:
    module = build(kind)
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, lora(module.get_submodule(name)))
    with pytest.raises(ValueError, match=f"{type(module).__name__}: {name}: .*Lora; merge the ad"):
        call(module)


@each_layer
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_forward_hook_is_refused_by_name(kind: str, name: str, register: str) -> None:
    module = build(kind)
    handle = getattr(module.get_submodule(name), register)(lambda *_: None)
    with pytest.raises(ValueError, match=f"{name}: .*forward hook on it.*remove the hook"):
        call(module)
    handle.remove()
    torch.testing.assert_close(call(module), call(build(kind)))


def test_a_hook_on_a_whole_tail_and_a_patched_forward_are_refused() -> None:
    module = build("torch")
    module.tail[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"tail.1: expected a plain nn.Sequential"):
        call(module)
    module = build("bins")
    module.out_layers[1].forward = lambda x: x
    with pytest.raises(ValueError, match=r"out_layers.1: .* got a replaced forward method"):
        call(module)


def pruned(layer: nn.Module) -> Callable[[], Tensor]:
    prune.ln_structured(layer, "weight", 0.5, n=1, dim=1)
    return lambda: layer.weight_orig * layer.weight_mask


def normalised(layer: nn.Module) -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer, dim=0)
    return lambda: torch._weight_norm(layer.weight_v, layer.weight_g, 0)


def parametrised(layer: nn.Module) -> Callable[[], Tensor]:
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return lambda: nn.functional.softplus(layer.parametrizations.weight.original)


@each_layer
@pytest.mark.parametrize("change", [pruned, normalised, parametrised])
def test_reparametrised_weights_follow_their_parameters(
    kind: str, name: str, change: Callable[[nn.Module], Callable[[], Tensor]]
) -> None:
    module, plain = build(kind), build(kind)
    layer = module.get_submodule(name)
    effective = change(layer)
    with torch.no_grad():
        for parameter in layer.parameters():  # as a step of an optimizer: no hook has run since
            parameter.add_(0.5)
        plain.get_submodule(name).weight.copy_(effective())
        if getattr(layer, "bias", None) is not None:
            plain.get_submodule(name).bias.copy_(layer.bias)
    results, expected = call(module), call(plain)
    torch.testing.assert_close(results, expected)
    for result in results:
        result.sum().backward(retain_graph=True)
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_other_methods_than_forward_see_pruned_parameters_of_the_module_itself() -> None:
    module, expected = build("bins"), build("bins")
    prune.random_unstructured(module, "cluster_weight", 0.5)
    prune.random_unstructured(module.out_projs, "1", 0.5)
    with torch.no_grad():
        module.cluster_weight_orig.mul_(2.0)
        getattr(module.out_projs, "1_orig").mul_(2.0)
        expected.cluster_weight.mul_(2.0 * module.cluster_weight_mask)
        expected.out_projs[1].mul_(2.0 * getattr(module.out_projs, "1_mask"))
    hidden = torch.randn(3, D, dtype=torch.float64)
    torch.testing.assert_close(module.log_prob(hidden), expected.log_prob(hidden))
    torch.testing.assert_close(module.topk(hidden, 3), expected.topk(hidden, 3))


@pytest.mark.parametrize("kind", BUILD)
def test_functional_call_uses_the_tensors_it_is_given(kind: str) -> None:
    module = build(kind)
    doubled = {name: 2 * x.detach() for name, x in module.named_parameters()}

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self) -> Tensor:
            return call(self.module)[-1]

    actual = torch.func.functional_call(Called(), {f"module.{k}": x for k, x in doubled.items()})
    module.load_state_dict(doubled)
    torch.testing.assert_close(actual, call(module)[-1])


@each_layer
def test_int8_weights_are_dequantised_and_not_trained(
    kind: str, name: str, quantise: Quantise
) -> None:
    module = build(kind).eval()
    layer = module.get_submodule(name)
    weight = quantise(layer)
    torch.testing.assert_close(call(module), call(with_weight(kind, name, weight).eval()))
    layer.weight.requires_grad_()
    with pytest.raises(ValueError, match=f"{name}.weight: .*in training, got a quantised Int8W"):
        call(module)
    with torch.no_grad():
        call(module)
    if kind != "embedding":
        layer.weight.requires_grad_(False)
        hidden = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        with pytest.raises(ValueError, match="in training"):
            module.train()(hidden, torch.tensor([1, 6, 13]))


def test_int8_tables_that_embedding_and_softmax_share(quantise: Quantise) -> None:
    embedding, softmax = build("embedding").eval(), build("bins").eval()
    expected = [build("embedding"), build("bins").eval()]
    for layer, tied, *plain in zip(
        embedding.emb_layers,
        softmax.out_layers,
        expected[0].emb_layers,
        expected[1].out_layers,
        strict=True,
    ):
        weight = quantise(layer)
        tied.weight = layer.weight
        for other in plain:
            other.weight = nn.Parameter(weight)
    assert type(softmax.out_layers[2].weight).__name__ == "Int8Weight"
    torch.testing.assert_close(call(embedding), call(expected[0]))
    torch.testing.assert_close(call(softmax), call(expected[1]))


@pytest.mark.parametrize("training", [True, False])
def test_a_sampled_softmax_with_an_int8_table(training: bool, quantise: Quantise) -> None:
    torch.manual_seed(0)
    module, expected = (SampledSoftmax(V, D, 4).double().train(training) for _ in range(2))
    module.bias = expected.bias
    expected.weight = nn.Parameter(quantise(module))
    hidden, target = torch.randn(V, D, dtype=torch.float64), torch.arange(V)
    losses = []
    for softmax in (module, expected):
        torch.manual_seed(1)
        losses.append(softmax(hidden, target))
    torch.testing.assert_close(*losses)
    if training:
        with pytest.raises(ValueError, match=r"SampledSoftmax: weight: .* in training"):
            module(hidden.requires_grad_(), target)


@pytest.mark.filterwarnings("ignore")  # of deprecation, by torch.ao
@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if case[0] != "embedding"])
def test_dynamically_quantised_layers_are_dequantised(kind: str, name: str) -> None:
    module = build(kind).float()
    torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, inplace=True)
    plain = build(kind).float()
    for name, layer in module.named_modules():
        if type(layer).__name__ == "Linear":
            plain.get_submodule(name).weight = nn.Parameter(layer.weight().dequantize())
    hidden = torch.randn(3, D)
    torch.testing.assert_close(module.log_prob(hidden), plain.log_prob(hidden))


@pytest.mark.slow
def test_reparametrised_layers_compile_to_one_graph() -> None:
    torch.compiler.reset()
    module = build("one-table")
    prune.random_unstructured(module.out_layers[0], "weight", 0.5)
    parametrize.register_parametrization(module.out_layers[0], "bias", nn.Softplus())
    given = torch.ones(V, D, dtype=torch.float64), torch.arange(V)
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), module(*given))
