"""Patched models under torch.compile, export, checkpointing, autocast, PEFT, torchao, DDP and
FSDP2."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transformer_xl.integrations import patch, report, unpatch

# One model of each kind: causal ranges, sinks, a projected table, chunks, a clamped table.
KINDS = ["inkling-sdpa", "inkling2", "parakeet-sdpa", "nemotron_streaming", "wav2vec2_bert"]
# XLNet has no linear layers in its attention.
KINDS_AND_XLNET = [*KINDS, "xlnet"]
LENGTHS = [13, 9]
PROCESSES = Path(__file__).with_name("processes.py")


def prepare(models, name, lengths=LENGTHS):
    model = models.build(name)
    kwargs, valid = models.cases[name].inputs(lengths)
    return model, kwargs, valid


@pytest.mark.parametrize("name", ["parakeet-sdpa", "nemotron_streaming", "wav2vec2_bert"])
def test_one_compiled_graph(models, name):
    model, kwargs, valid = prepare(models, name)
    expected = models.results(model, kwargs, valid)
    patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = models.run(compiled, kwargs)[valid]
    torch.testing.assert_close(out, expected["out"], rtol=1e-4, atol=1e-4)
    out.sum().backward()
    assert report(model).fallbacks == 0


@pytest.mark.parametrize("name", ["inkling-sdpa", "inkling2"])
def test_one_compiled_graph_of_an_attention(models, name):
    """Hugging Face's own Inkling does not compile to one graph: its experts loop over tokens."""
    model, kwargs, valid = prepare(models, name, [13, 13])
    expected = models.run(model, kwargs)[valid]
    patch(model)
    for layer in model.layers:
        layer.self_attn.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(models.run(model, kwargs)[valid], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["parakeet-sdpa", "nemotron_streaming", "wav2vec2_bert"])
def test_export(models, name):
    model, kwargs, _ = prepare(models, name, [13, 13])
    del kwargs["attention_mask"]
    with torch.no_grad():
        expected = models.run(model, kwargs)
        patch(model)
        program = torch.export.export(model, (), kwargs, strict=False)
        out = models.run(program.module(), kwargs)
    assert "rel_attention" in str(program.graph)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_export_of_an_attention_with_any_length(models):
    """Hugging Face's own Inkling cannot be exported whole: its experts loop over tokens."""
    attention = models.build("inkling-sdpa").layers[1].self_attn
    T = torch.export.Dim("T", min=2, max=64)
    with torch.no_grad():
        patch(attention)
        program = torch.export.export(
            attention,
            (torch.randn(2, 9, 24), None),
            dynamic_shapes={"hidden_states": {1: T}, "attention_mask": None},
            strict=False,
        )
        x = torch.randn(2, 21, 24)
        actual = program.module()(x, None)[0]
        unpatch(attention)
        expected = attention(x, None)[0]
    assert "rel_attention" in str(program.graph)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["inkling-sdpa", "inkling2", "parakeet-sdpa", "nemotron_streaming"]
)
def test_gradient_checkpointing(models, name):
    model, kwargs, valid = prepare(models, name)
    expected = models.results(model.train(), kwargs, valid)
    patch(model)
    model.gradient_checkpointing_enable()
    if name.startswith("inkling"):
        kwargs["use_cache"] = False
    models.check_equal(models.results(model, kwargs, valid), expected, 1e-4)


@pytest.mark.parametrize("name", KINDS_AND_XLNET)
def test_autocast(models, name):
    options = {"num_experts_per_tok": 4} if name.startswith("inkling") else {}
    model = models.build(name, **options)
    kwargs, valid = models.cases[name].inputs(LENGTHS)
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
    "parakeet-sdpa": ["q_proj", "relative_k_proj", "o_proj"],
    "nemotron_streaming": ["v_proj", "relative_k_proj"],
    "wav2vec2_bert": ["linear_q", "distance_embedding"],
    "xlnet": ["layer_1"],
}


@pytest.mark.parametrize("is_patched_first", [True, False], ids=["patch_first", "lora_first"])
@pytest.mark.parametrize("name", KINDS_AND_XLNET)
def test_adapters_of_peft(models, name, is_patched_first):
    peft = pytest.importorskip("peft")
    model, kwargs, valid = prepare(models, name)
    config = peft.LoraConfig(target_modules=PROJECTIONS[name], r=4, init_lora_weights=False)

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


@pytest.mark.parametrize("name", KINDS)
def test_int8_weights_of_torchao(models, name):
    quantization = pytest.importorskip("torchao.quantization")
    model, kwargs, valid = prepare(models, name)
    patch(model)

    def is_projection(module: torch.nn.Module, path: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "attn" in path

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=is_projection)
    with torch.no_grad():
        actual = models.run(model, kwargs)[valid]
        again = models.run(model, kwargs)[valid]
        unpatch(model)
        expected = models.run(model, kwargs)[valid]
    assert torch.equal(actual, again)
    assert float((actual - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", KINDS_AND_XLNET)
def test_two_processes_train_as_one(models, name, wrapper):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(PROCESSES), name, wrapper],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal" in done.stdout


def test_sharded_models_are_patched_before(models):
    from torch.distributed.fsdp import FSDPModule

    model = models.build("parakeet-sdpa")
    attention = model.layers[0].self_attn
    sharded = type("FSDPAttention", (FSDPModule, type(attention)), {})  # as fully_shard does
    attention.__class__ = sharded
    for function in (patch, unpatch):
        with pytest.raises(ValueError, match="expected a model before fully_shard"):
            function(model)


@pytest.mark.parametrize("name", KINDS_AND_XLNET)
def test_save_pretrained_writes_the_models_own_class(models, name, tmp_path):
    model, kwargs, valid = prepare(models, name)
    if not hasattr(model, "save_pretrained"):
        pytest.skip("this encoder is no model of its own")
    expected = models.run(model, kwargs)[valid]
    patch(model)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == [models.cases[name].path[1]]
    loaded = type(models.build(name)).from_pretrained(tmp_path).eval()
    loaded.config._attn_implementation = models.cases[name].implementation
    assert not report(loaded).patched
    torch.testing.assert_close(models.run(loaded, kwargs)[valid], expected, rtol=1e-4, atol=1e-4)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert len(report(again).patched) == models.cases[name].n_patched
    torch.testing.assert_close(models.run(again, kwargs)[valid], models.run(model, kwargs)[valid])


def test_projected_positions_are_kept_without_gradients_only(models):
    model, kwargs, valid = prepare(models, "parakeet-sdpa")
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
