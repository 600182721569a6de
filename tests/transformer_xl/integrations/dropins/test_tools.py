"""Patched models under autocast, with adapters of PEFT and with int8 weights of torchao; the tables
of positions that they keep."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from transformer_xl.integrations import patch, report, unpatch

pytest.importorskip(
    "transformers", minversion="5.24", reason="make test-dropins installs it and runs these tests"
)


def test_autocast(models, name_once):
    # All experts take part: a choice between them would be another one after rounding.
    options = {"num_experts_per_tok": 4} if name_once.startswith("inkling") else {}
    model, kwargs, valid = models.prepare(name_once, **options)
    with torch.no_grad():
        exact = models.run(model, kwargs)[valid]
        with torch.autocast("cpu", torch.bfloat16):
            theirs = models.run(model, kwargs)[valid].float()
            patch(model)
            ours = models.run(model, kwargs)[valid].float()
    assert float((ours - exact).norm()) <= 1.5 * float((theirs - exact).norm())


PROJECTIONS = {
    "inkling-sdpa": ["q_proj", "r_proj", "o_proj"],
    "inkling2": ["q_proj.linear", "sink_proj", "relative_position_bias.linear"],
    "inkling2_loop": ["q_proj.linear", "v_proj.linear", "o_proj.linear"],
    "parakeet-sdpa": ["q_proj", "relative_k_proj", "o_proj"],
    "nemotron_streaming": ["v_proj", "relative_k_proj"],
    "wav2vec2_conformer-sdpa": ["linear_q", "linear_pos"],
    "wav2vec2_bert": ["linear_q", "distance_embedding"],
    "seamless_m4t": ["linear_v", "linear_pos"],
    "seamless_m4t_v2": ["linear_out", "distance_embedding"],
    "xlnet": ["layer_1"],  # its attention has no linear layers
}


@pytest.mark.parametrize("is_patched_first", [True, False], ids=["patch_first", "lora_first"])
def test_adapters_of_peft(models, name_once, is_patched_first):
    peft = pytest.importorskip("peft")
    model, kwargs, valid = models.prepare(name_once)
    config = peft.LoraConfig(target_modules=PROJECTIONS[name_once], r=4, init_lora_weights=False)

    def with_adapters(model):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).base_model.model.eval()

    expected = models.results(with_adapters(copy.deepcopy(model)), kwargs, valid)
    if is_patched_first:
        patch(model)
    model = with_adapters(model)
    patch(model)
    actual = models.results(model, kwargs, valid)
    models.check_equal(actual, expected, 1e-4)
    assert any("lora" in key for key in actual)
    assert report(model).fallbacks == 0


@pytest.mark.parametrize("is_patched_first", [True, False], ids=["patch_first", "int8_first"])
def test_int8_weights_of_torchao(models, name_once, is_patched_first):
    quantization = pytest.importorskip("torchao.quantization")
    model, kwargs, valid = models.prepare(name_once)

    def is_projection(module: torch.nn.Module, path: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "attn" in path

    if is_patched_first:
        patch(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=is_projection)
    patch(model)
    with torch.no_grad():
        actual = models.run(model, kwargs)[valid]
        again = models.run(model, kwargs)[valid]
        assert report(model).fallbacks == 0
        unpatch(model)
        expected = models.run(model, kwargs)[valid]
    assert torch.equal(actual, again)
    assert float((actual - expected).norm()) <= 1e-4 * float(expected.norm())


def test_projected_positions_are_kept_without_gradients_only(models):
    model, kwargs, valid = models.prepare("parakeet-sdpa")
    patch(model)
    projection = model.layers[0].self_attn.relative_k_proj
    calls = []
    own = projection.weight

    def count(module, args, output):
        calls.append(output.shape)

    with torch.no_grad():
        first = models.run(model, kwargs)[valid]
        assert torch.equal(models.run(model, kwargs)[valid], first)
        handle = projection.register_forward_hook(count)
        models.run(model, kwargs)
        models.run(model, kwargs)
        assert len(calls) == 2  # a hook sees every call
        assert calls[0][0] == 1  # for the whole batch
        handle.remove()
        own.mul_(2.0)
        changed = models.run(model, kwargs)[valid]
        assert not torch.allclose(changed, first)
        own.mul_(0.5)
        assert torch.equal(models.run(model, kwargs)[valid], first)
        model.double()
        assert_close(models.run(model, doubles(kwargs))[valid].float(), first)
        model.float()
    expected = models.results(model, kwargs, valid)
    assert expected["dlayers.0.self_attn.relative_k_proj.weight"].norm() > 0


def doubles(kwargs):
    return {
        key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in kwargs.items()
    }


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
