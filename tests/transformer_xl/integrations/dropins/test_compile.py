"""Patched models under torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch

from transformer_xl.integrations import patch, report, unpatch

pytest.importorskip(
    "transformers", minversion="5.24", reason="make test-dropins installs it and runs these tests"
)

# Hugging Face's experts loop over tokens, so these have none.
DENSE = {"mlp_layer_types": ["dense", "dense"], "intermediate_size": 16}
ENCODERS = [
    "parakeet-sdpa",
    "nemotron_streaming",
    "wav2vec2_conformer-sdpa",
    "wav2vec2_bert",
    "seamless_m4t",
    "seamless_m4t_v2",
]


@pytest.mark.parametrize("name", ["inkling-sdpa", *ENCODERS])
def test_one_compiled_graph(models, name):
    options = DENSE if name.startswith("inkling") else {}
    model, kwargs, valid = models.prepare(name, **options)
    expected = models.results(model, kwargs, valid)
    patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = models.results(compiled, kwargs, valid)
    actual = {key.replace("_orig_mod.", ""): x for key, x in actual.items()}
    models.check_equal(actual, expected, 1e-4)
    assert report(model).fallbacks == 0


@pytest.mark.parametrize("name", ["inkling-sdpa", "inkling2"])
def test_one_compiled_graph_of_an_attention(models, name):
    """Whole models with experts do not compile to one graph: these loop over tokens."""
    model, kwargs, valid = models.prepare(name, (13, 13))
    expected = models.run(model, kwargs)[valid]
    patch(model)
    for layer in model.layers:
        layer.self_attn.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(models.run(model, kwargs)[valid], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["inkling-sdpa", *ENCODERS])
def test_export(models, name):
    options = DENSE if name.startswith("inkling") else {}
    model, kwargs, _ = models.prepare(name, (13, 13), **options)
    del kwargs["attention_mask"]
    with torch.no_grad():
        expected = models.run(model, kwargs)
        patch(model)
        program = torch.export.export(model, (), kwargs, strict=False)
        out = models.run(program.module(), kwargs)
    assert "rel_attention" in str(program.graph)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_export_of_an_attention_with_any_length(models):
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


@pytest.mark.parametrize("name", ["inkling-sdpa", "inkling2"])
def test_generation_with_a_static_cache(models, name):
    """`generate` compiles the steps of decoding into one graph if the cache is static."""
    from transformers import CompileConfig

    # `generate` of transformers 5.24 fails where the window is shorter than a static cache.
    model = models.causal_model(name, **DENSE, sliding_window_size=80)
    kwargs, _ = models.cases[name].inputs([9, 6])
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    options = {
        "attention_mask": kwargs["attention_mask"],
        "max_new_tokens": 20,
        "min_new_tokens": 20,
        "do_sample": False,
        "pad_token_id": 0,
        "cache_implementation": "static",
    }
    expected = model.generate(kwargs["input_ids"], **options, disable_compile=True)
    patch(model)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    actual = model.generate(kwargs["input_ids"], **options, compile_config=compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    assert torch.equal(actual, expected)
