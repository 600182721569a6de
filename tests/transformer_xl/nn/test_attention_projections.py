"""Wrapped, hooked, quantised or reparametrised projections of the attention process the memory as
they process the segment."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from transformer_xl.config import ModelConfig
from transformer_xl.model import TransformerXL
from transformer_xl.nn import PositionwiseFeedForward, RelativeMultiHeadAttention

D_MODEL, H, HK, D = 12, 3, 1, 4
PROJECTIONS = ["qkv_net", "r_net", "o_net"]
each_projection = pytest.mark.parametrize("name", PROJECTIONS)


def attention() -> RelativeMultiHeadAttention:
    torch.manual_seed(0)
    module = RelativeMultiHeadAttention(D_MODEL, H, D, n_kv_head=HK).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def tokens(length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, D_MODEL, dtype=torch.float64, generator=generator)


def in_all_ways(module: RelativeMultiHeadAttention, x: Tensor) -> list[Tensor]:
    """The last tokens' outputs: after a memory, after a cache, in one block."""
    after_memory = module(x[:, 4:], x[:, :4])
    _, cache = module.stream(x[:, :4], cache_len=4)
    after_cache, _ = module.stream(x[:, 4:], cache, cache_len=4)
    return [after_memory, after_cache, module(x)[:, 4:]]


def assert_equal_to(module: RelativeMultiHeadAttention, expected: Tensor, **tolerance: Any) -> None:
    for out in in_all_ways(module, tokens().to(expected.dtype)):
        torch.testing.assert_close(out, expected, **tolerance)


@each_projection
def test_an_adapter_changes_the_memorys_keys_too(name: str, lora: Any) -> None:
    module, merged = attention(), attention()
    wrapper = lora(getattr(module, name))
    setattr(module, name, wrapper)
    setattr(merged, name, wrapper.merged())
    expected = merged(tokens())[:, 4:]
    assert (expected - attention()(tokens())[:, 4:]).abs().max() > 0.01
    assert_equal_to(module, expected)
    module(tokens()[:, 4:], tokens()[:, :4]).sum().backward()
    assert wrapper.lora_A.weight.grad.abs().max() > 0


@each_projection
def test_a_hook_may_change_the_output(name: str) -> None:
    module, doubled = attention(), attention()
    getattr(module, name).register_forward_hook(lambda _module, _input, output: 2 * output)
    with torch.no_grad():
        getattr(doubled, name).weight.mul_(2)
    assert_equal_to(module, doubled(tokens())[:, 4:])


def test_hooks_see_the_memory_and_the_segment() -> None:
    module, lengths = attention(), []
    module.qkv_net.register_forward_pre_hook(lambda _module, args: lengths.append(len(args[0][0])))
    module(tokens(), tokens(5))
    module(tokens(), tokens(0))
    assert lengths == [5, 7, 7]


def test_global_hooks_see_the_memory() -> None:
    module, seen = attention(), []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(layer))
    try:
        module(tokens(), tokens(5))
    finally:
        handle.remove()
    assert seen.count(module.qkv_net) == 2


@each_projection
@pytest.mark.parametrize("technique", ["prune", "weight_norm", "parametrization"])
def test_reparametrised_projections(name: str, technique: str) -> None:
    module, plain = attention(), attention()
    layer = getattr(module, name)
    if technique == "prune":
        prune.ln_structured(layer, "weight", 0.5, n=1, dim=1)
    elif technique == "weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(layer)
    else:
        parametrize.register_parametrization(layer, "weight", nn.Softplus())
    with torch.no_grad():
        for (
            parameter
        ) in layer.parameters():  # as an optimizer does; no hook runs before the next call
            parameter.add_(0.3)
        if technique == "prune":
            weight = layer.weight_orig * layer.weight_mask
        elif technique == "weight_norm":
            weight = torch._weight_norm(layer.weight_v, layer.weight_g, 0)
        else:
            weight = layer.weight
        getattr(plain, name).weight.copy_(weight)
    assert_equal_to(module, plain(tokens())[:, 4:])


@each_projection
def test_int8_projections(name: str, quantise: Callable[[nn.Module], Tensor]) -> None:
    module, plain = attention(), attention()
    getattr(plain, name).weight = nn.Parameter(quantise(getattr(module, name)))
    assert_equal_to(module, plain(tokens())[:, 4:])


@pytest.mark.filterwarnings("ignore")  # of deprecation, by torch.ao
def test_dynamically_quantised_projections() -> None:
    module = attention().float()
    expected = module(tokens().float())[:, 4:]
    torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, inplace=True)
    assert not isinstance(module.o_net, nn.Linear)
    scale = expected.abs().max().item()
    assert_equal_to(module, expected, rtol=0, atol=0.05 * scale)


def test_a_projection_with_a_bias() -> None:
    module, x = attention(), tokens()
    module.qkv_net = nn.Linear(D_MODEL, (H + 2 * HK) * D).double()
    assert_equal_to(module, module(x)[:, 4:])


def test_pruned_biases_are_computed_anew_in_every_block() -> None:
    module, x = attention(), tokens()
    prune.random_unstructured(module, "r_w_bias", 0.5)
    with torch.no_grad():
        module.r_w_bias_orig.mul_(3.0)
    out, _ = module.stream(x, cache_len=0)
    torch.testing.assert_close(out, module(x))


def test_a_plain_layer_computes_only_keys_and_values_of_the_memory() -> None:
    rows = []

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None):
            if func is F.linear:
                rows.append((args[0].shape[1], args[1].shape[0]))
            return func(*args, **(kwargs or {}))

    with Products():
        attention()(tokens(), tokens(5))
    assert rows[:2] == [(5, 2 * HK * D), (7, (H + 2 * HK) * D)]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("pre_lnorm", [False, True])
def test_backward_hooks_on_all_modules_change_nothing(pre_lnorm: bool) -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 8, "mem_len": 4}
    config = ModelConfig(
        vocab_size=30, cutoffs=(10, 20), div_val=2, pre_lnorm=pre_lnorm, dropout=0.0, **sizes
    )
    models = [TransformerXL(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    called = set()
    for module in models[1].modules():
        module.register_full_backward_hook(lambda module, *_: called.add(module))
    segment = torch.randint(0, 30, (2, 9))
    for model in models:
        memory = model(segment).memory
        model(segment[:, :-1], memory, segment[:, 1:]).loss.backward()
    for expected, actual in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)
    assert called >= {models[1].layers[0].dec_attn.qkv_net, models[1].layers[1].pos_ff.CoreNet[1]}


def test_a_hook_in_the_feed_forward_sees_its_output_unchanged() -> None:
    module, seen = PositionwiseFeedForward(6, 10), []
    module.CoreNet[0].register_forward_hook(lambda _module, _input, output: seen.append(output))
    x = torch.randn(2, 3, 6)
    module(x)
    first = module.CoreNet[0]
    torch.testing.assert_close(seen[0], F.linear(x, first.weight, first.bias))
    assert (seen[0] < 0).any()
