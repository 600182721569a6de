"""The whole model with adapters of peft and int8 weights of torchao, if these are installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.config import ModelConfig
from transformer_xl.model import TransformerXL

CONFIG = ModelConfig(
    vocab_size=30,
    cutoffs=(10, 20),
    div_val=2,
    n_layer=2,
    d_model=16,
    n_head=2,
    d_head=8,
    d_inner=16,
    mem_len=6,
    dropout=0.0,
    init_std=0.3,
)


def build() -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(CONFIG).eval()


def loss_after_memory(model: nn.Module) -> Tensor:
    tokens = torch.randint(0, 30, (2, 13), generator=torch.Generator().manual_seed(1))
    memory = model(tokens[:, :6]).memory
    loss: Tensor = model(tokens[:, 6:-1], memory, tokens[:, 7:]).loss
    return loss


@pytest.mark.parametrize("name", ["qkv_net", "r_net", "o_net", "CoreNet.0"])
def test_an_adapter_of_peft_equals_the_merged_model(name: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[name], r=4, init_lora_weights=False)
    model = peft.get_peft_model(build(), config).eval()
    loss = loss_after_memory(model)
    assert loss != loss_after_memory(build())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(loss_after_memory(model.merge_and_unload()), loss)


@pytest.mark.parametrize("name", ["crit.out_layers.1", "word_emb.emb_layers.1"])
def test_an_adapter_of_peft_around_an_adaptive_layer_must_be_merged(name: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[name], r=4, init_lora_weights=False)
    model = peft.get_peft_model(build(), config)
    with pytest.raises(ValueError, match=rf"{name.split('.', 1)[1]}: .*merge_and_unload"):
        loss_after_memory(model)
    loss_after_memory(model.merge_and_unload())


@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_int8_weights_of_torchao(config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = build()
    quantization.quantize_(model, getattr(quantization, config)())
    expected = loss_after_memory(build())
    torch.testing.assert_close(loss_after_memory(model), expected, rtol=0.01, atol=0)
    with pytest.raises(ValueError, match="in training, got a quantised"):
        loss_after_memory(model.train())


@pytest.mark.filterwarnings("ignore")  # of deprecation, by torch.ao
def test_dynamic_quantisation_of_all_linear_layers() -> None:
    model = torch.ao.quantization.quantize_dynamic(build(), {nn.Linear})
    expected = loss_after_memory(build())
    torch.testing.assert_close(loss_after_memory(model), expected, rtol=0.05, atol=0)
