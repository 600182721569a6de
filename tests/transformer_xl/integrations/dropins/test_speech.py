"""Speech encoders of Hugging Face, patched: streaming with a cache, chunks of the convolutions, the
models around Parakeet's encoder, and calls that run the original code."""

from __future__ import annotations

import pytest
import torch

from transformer_xl.integrations import patch, patched, report, unpatch
from transformer_xl.integrations.subsampling import in_chunks

pytest.importorskip(
    "transformers", minversion="5.24", reason="make test-dropins installs it and runs these tests"
)


def test_a_stream_of_blocks(models):
    model = models.build("nemotron_streaming")
    from transformers.cache_utils import DynamicCache
    from transformers.models.nemotron_asr_streaming import modeling_nemotron_asr_streaming as theirs

    features = torch.randn(2, 8 * 28, 16, generator=torch.Generator().manual_seed(1))

    def stream() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        padding_cache = theirs.NemotronAsrStreamingEncoderCausalConvPaddingCache()
        outputs = []
        for block in features.split(8 * 4, dim=1):  # chunks of four frames
            out = model(
                block,
                cache=cache,
                padding_cache=padding_cache,
                use_cache=True,
                num_lookahead_tokens=3,
            )
            outputs.append(out.last_hidden_state)
        return torch.cat(outputs, 1)

    with torch.no_grad():
        expected = stream()
        patch(model)
        actual = stream()
    assert expected.shape[1] >= 28
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert report(model).fallbacks == 0


@pytest.mark.parametrize("name", ["parakeet-sdpa", "nemotron_streaming"])
@pytest.mark.parametrize("T", [1, 7, 64, 65, 397, 512])
def test_chunks_of_the_subsampling_equal_one_pass(models, name, T):
    module = models.build(name).subsampling
    features = torch.randn(3, T, 16)
    mask = (torch.arange(T) < torch.tensor([[T], [T // 2], [0]])).long()
    original = type(module).forward
    with torch.no_grad():
        for valid in (mask, None):
            expected = module(features, valid)
            actual = in_chunks(original, module, features, valid, chunk=8)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_patched_encoder_uses_chunks(models, monkeypatch):
    model = models.build("parakeet-sdpa")
    features = torch.randn(1, 8 * 300, 16)
    lengths = []
    patch(model)
    model.subsampling.layers[0].register_forward_hook(lambda m, x, y: lengths.append(y.shape[2]))
    with torch.no_grad():
        model.subsampling(features)
    assert len(lengths) == 3
    assert max(lengths) <= 4 * (128 + 4)
    lengths.clear()
    model.subsampling(features)  # with gradients, in one pass
    assert lengths == [4 * 300]


def test_ten_minutes_of_features(models):
    """7,500 frames after subsampling, whose scores would need 675 MB for three heads."""
    model = models.build("parakeet-sdpa", num_hidden_layers=1)
    features = torch.randn(1, 60_000, 16)
    with torch.no_grad():
        patch(model)
        out = model(features, attention_mask=torch.ones(1, 60_000).long()).last_hidden_state
    assert out.shape == (1, 7500, 24)
    assert bool(out.isfinite().all())


def test_padded_frames_get_zero_attention(models):
    model = models.build("parakeet-sdpa")
    kwargs, valid = models.cases["parakeet-sdpa"].inputs([21, 13])
    seen = []
    patch(model)
    attention = model.layers[0].self_attn
    attention.o_proj.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    models.run(model, kwargs)
    assert bool((seen[0][~valid] == 0).all())
    assert bool((seen[0][valid] != 0).any(-1).all())


def test_dropout_of_positions_differs_between_rows(models):
    model = models.build("parakeet-sdpa", dropout_positions=0.5, dropout=0.1).train()
    kwargs, _ = models.cases["parakeet-sdpa"].inputs([21, 21])
    rows = []
    patch(model)
    projection = model.layers[0].self_attn.relative_k_proj
    projection.register_forward_hook(lambda module, args, out: rows.append(out))
    torch.manual_seed(3)
    models.run(model, kwargs)
    assert len(rows[0]) == 2
    assert not torch.equal(rows[0][0], rows[0][1])
    torch.manual_seed(3)
    with_patch = models.run(model, kwargs)
    unpatch(model)
    torch.manual_seed(3)
    torch.testing.assert_close(with_patch, models.run(model, kwargs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["parakeet-eager", "wav2vec2_conformer-eager", "inkling-eager"])
def test_attention_weights_come_from_the_original_code(models, name):
    model = models.build(name)
    kwargs, _ = models.cases[name].inputs([13, 9])
    is_counted = not name.startswith("wav2vec2")  # its encoder alone records no weights
    with patched(model):
        out = model(**kwargs, output_attentions=True)
        assert report(model).fallbacks > 0
        if is_counted:
            expected = model(**kwargs, output_attentions=True)
            assert len(out.attentions) == 2
            assert out.attentions[0].dim() == 4
            torch.testing.assert_close(out.attentions, expected.attentions)


def test_hidden_states_are_recorded(models):
    model = models.build("parakeet-sdpa")
    kwargs, _ = models.cases["parakeet-sdpa"].inputs([13, 13])
    expected = model(**kwargs, output_hidden_states=True).hidden_states
    patch(model)
    actual = model(**kwargs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["CohereAsr", "Canary"])
def test_models_that_contain_parakeets_encoder(models, prefix):
    import transformers

    encoder = models.build("parakeet-sdpa").config.to_dict()
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 32, "head_dim": 8}
    sizes |= {"num_attention_heads": 3, "num_key_value_heads": 3}
    decoder = {"decoder_config": sizes} if prefix == "Canary" else sizes
    config = getattr(transformers, f"{prefix}Config")(encoder_config=encoder, **decoder)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    inputs, _ = models.cases["parakeet-sdpa"].inputs([21, 13])
    inputs["decoder_input_ids"] = torch.ones(2, 3, dtype=torch.long)
    with torch.no_grad():
        expected = model(**inputs).logits
        patch(model)
        assert len(report(model).patched) == 4
        actual = model(**inputs).logits
        assert not torch.equal(actual, expected)  # rounding differs, so the kernels were used
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    assert report(model).fallbacks == 0


def test_nemotron_under_eager_runs_the_original_code(models):
    model = models.build("nemotron_streaming")
    model.config._attn_implementation = "eager"
    kwargs, _ = models.cases["nemotron_streaming"].inputs([13, 13])
    patch(model)
    models.run(model, kwargs)
    assert "inverts" in str(report(model))


def test_a_model_with_one_foreign_layer_makes_its_own_masks(models):
    name = "wav2vec2_conformer-sdpa"
    model, other = models.build(name), models.build(name)
    kwargs, valid = models.cases[name].inputs([13, 9])
    expected = models.results(model, kwargs, valid)
    patch(model)
    unpatch(model.layers[1])
    models.check_equal(models.results(model, kwargs, valid), expected, 1e-5)
    assert "not all of its attention layers are patched" in str(report(model))
    assert not report(other).patched
