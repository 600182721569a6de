"""The models that Hugging Face saves and loads, with a patched encoder or decoder inside: one of
each class, also with Wav2Vec2's and SeamlessM4T's adapter layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from transformer_xl.integrations import patch, report, unpatch

pytest.importorskip(
    "transformers", minversion="5.24", reason="make test-dropins installs it and runs these tests"
)

# The other cases have a class that can be saved.
WHOLE = {
    "wav2vec2_conformer-sdpa": "Wav2Vec2ConformerModel",
    "wav2vec2_bert": "Wav2Vec2BertModel",
    "seamless_m4t": "SeamlessM4TSpeechEncoder",
    "seamless_m4t_v2": "SeamlessM4Tv2SpeechEncoder",
}
OTHER_POSITIONS = [
    ("wav2vec2_conformer-sdpa", "rotary"),
    ("seamless_m4t", "rotary"),
    ("wav2vec2_bert", "relative"),
    ("wav2vec2_bert", "rotary"),
]


def family_of(models, name: str) -> str:
    return models.cases[name].path[0].replace("_asr", "").replace("_loop", "")


def prepare(models, name, **options):
    """A model, the keyword arguments of a call, and the index of the valid outputs."""
    if name not in WHOLE:
        return models.prepare(name, **options)
    model = models.build(name, WHOLE[name], **options)
    lengths = torch.tensor([[83], [59]] if "conformer" in name else [[13], [9]])
    T = int(lengths[0])
    x = torch.randn(2, T, 16, generator=torch.Generator().manual_seed(1))
    inputs = {"input_values": x[..., 0]} if "conformer" in name else {"input_features": x}
    return model, {**inputs, "attention_mask": (torch.arange(T) < lengths).long()}, ...


def test_save_pretrained_writes_the_models_own_class(models, name_once, tmp_path):
    model, kwargs, valid = prepare(models, name_once)
    expected = models.run(model, kwargs)[valid]
    own, n_patched = type(model), models.cases[name_once].n_patched
    patch(model)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == [own.__name__]
    loaded = own.from_pretrained(tmp_path).eval()
    loaded.config._attn_implementation = models.cases[name_once].implementation
    assert type(loaded) is own
    assert not report(loaded).patched
    torch.testing.assert_close(models.run(loaded, kwargs)[valid], expected, rtol=1e-4, atol=1e-4)
    assert len(patch(loaded).patched) == n_patched
    actual = models.run(model, kwargs)[valid]
    torch.testing.assert_close(models.run(loaded, kwargs)[valid], actual, rtol=1e-4, atol=1e-4)
    copies = [copy.deepcopy(model)]
    if "conformer" not in name_once:  # torch does not pickle its weight norm
        copies.append(pickle.loads(pickle.dumps(model)))
    for again in copies:
        assert len(report(again).patched) == n_patched
        torch.testing.assert_close(models.run(again, kwargs)[valid], actual)


def test_a_family_is_patched_before_loading(models, name_once, tmp_path):
    model, kwargs, valid = prepare(models, name_once)
    expected = models.run(model, kwargs)[valid]
    model.save_pretrained(tmp_path)
    patch(family_of(models, name_once))
    loaded = type(model).from_pretrained(tmp_path).eval()
    loaded.config._attn_implementation = models.cases[name_once].implementation
    assert len(report(loaded).patched) == models.cases[name_once].n_patched
    actual = models.run(loaded, kwargs)[valid]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert report(loaded).fallbacks == 0


@pytest.mark.parametrize("is_patched_first", [True, False], ids=["patch_first", "enable_first"])
def test_gradient_checkpointing(models, name_once, is_patched_first):
    model, kwargs, valid = prepare(models, name_once)
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers does not checkpoint this model")
    if name_once.startswith("inkling"):
        kwargs["use_cache"] = False
    expected = models.results(model.train(), kwargs, valid)
    if is_patched_first:
        patch(model)
    model.gradient_checkpointing_enable()
    patch(model)
    models.check_equal(models.results(model, kwargs, valid), expected, 1e-4)


@pytest.mark.parametrize("target", ["model", "family"])
@pytest.mark.parametrize("name", WHOLE)
def test_adapter_layers_without_positions_are_left_alone(models, name, target):
    model, kwargs, valid = prepare(models, name, add_adapter=True)
    expected = models.results(model, kwargs, valid)
    family = family_of(models, name)
    patch(model if target == "model" else family)
    models.check_equal(models.results(model, kwargs, valid), expected, 1e-4)
    has_attention = "conformer" not in name
    if target == "model":
        assert len(report(model).patched) == models.cases[name].n_patched
        assert bool(report(model).left_alone) == has_attention
        assert report(model).fallbacks == 0
    else:
        assert bool(report(family).fallbacks) == has_attention
        unpatch(family)
        assert torch.equal(models.results(model, kwargs, valid)["out"], expected["out"])


@pytest.mark.parametrize(("name", "kind"), OTHER_POSITIONS)
def test_other_kinds_of_positions_run_the_original_code(models, name, kind):
    model, kwargs, _ = prepare(models, name, position_embeddings_type=kind)
    expected = models.run(model, kwargs)
    found = patch(model)
    assert not found.patched
    assert str(found).count(f"position_embeddings_type is {kind!r}") == 3
    family = family_of(models, name)
    patch(family)
    assert torch.equal(models.run(model, kwargs), expected)
    reason = f"its position_embeddings_type is {kind!r}"
    entries = {entry.class_name: entry.fallbacks for entry in report(family).entries}
    assert sorted(entries.values(), key=str) == [{reason: 1}, {reason: 2}]
