"""Calls of ESPnet's attention and its relatives with caches and other rules; classes that are left
alone; the rows of README.md."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from transformer_xl.integrations import patch, report, unpatch

LENGTHS = [13, 9, 11]
README = Path(__file__).resolve().parents[5] / "README.md"
ROWS = re.findall(r'patch\("(\w+)"\)', README.read_text(encoding="utf-8"))


@pytest.mark.parametrize("cached", ["chatterbox", "cosyvoice"])
def test_a_stream_with_a_cache(theirs, cached):
    module = theirs.build(cached)

    def stream():
        x, _, _ = theirs.inputs([12])
        _, table, _ = theirs.inputs([20])  # rows of distances 19 to -19
        cache, outputs = torch.zeros(0, 0, 0, 0), []
        for block in x.split(4, 1):
            Tk = 4 + (cache.shape[2] if cache.numel() else 0)
            rows = table[:, 20 - Tk : 19 + Tk]
            mask = torch.ones(1, 1, Tk + 2, dtype=torch.bool)  # longer masks are cut
            mask[:, :, 0] = False
            out, cache = module(block, block, block, mask, pos_emb=rows, cache=cache)
            outputs.append(out)
        return torch.cat(outputs, 1), cache

    expected = stream()
    patch(module)
    torch.testing.assert_close(stream(), expected, rtol=1e-4, atol=1e-5)
    assert report(module).fallbacks == 0


@pytest.mark.parametrize("is_simplified", [False, True])
def test_a_stream_with_left_context(theirs, is_simplified):
    kind = "transducer-simplified" if is_simplified else "transducer"
    module, left, T = theirs.build(kind), 5, 4
    x, table, valid = theirs.inputs([left + T, 7])
    args = (x[:, left:], x, x, table[:, T : 2 * T + left + T - 1], ~valid)

    def call():
        return module(*args, chunk_mask=torch.eye(T, T + left).bool(), left_context=left)

    expected = call()
    patch(module)
    torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
    assert report(module).fallbacks == 0
    with pytest.raises(RuntimeError):  # the original code raises it
        module(*args, left_context=left + 1)
    assert "left_context" in str(report(module))


def test_a_table_that_is_not_shifted_runs_the_original_code(theirs):
    module = theirs.build("cosyvoice")
    x, table, valid = theirs.inputs(LENGTHS)
    expected = theirs.run(module, "cosyvoice", x, table[:, :13], valid)
    patch(module)
    assert torch.equal(theirs.run(module, "cosyvoice", x, table[:, :13], valid), expected)
    assert "does not have 2 Tk - 1 rows" in str(report(module))


def test_the_trainer_of_espnet_plots_attention_weights(theirs, monkeypatch):
    """A patched module runs its original code while a hook may read the weights."""
    for name, unused in (
        ("espnet2.gan_tts.jets.alignments", "AlignmentModule"),
        ("espnet2.train.abs_espnet_model", "AbsESPnetModel"),
    ):  # they import packages that are not installed
        empty = types.SimpleNamespace(**{unused: type(unused, (), {})})
        monkeypatch.setitem(sys.modules, name, empty)
    calculate_all_attentions = theirs.load(
        "espnet2.main_funcs.calculate_all_attentions.calculate_all_attentions"
    )
    model = Speech(theirs.build("espnet"))
    x, _, _ = theirs.inputs(LENGTHS)
    batch = {"speech": x, "speech_lengths": torch.tensor(LENGTHS)}
    expected = calculate_all_attentions(model, batch)["attention"]
    patch(model)
    actual = calculate_all_attentions(model, batch)["attention"]
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    assert report(model).entries[0].fallbacks == {"a hook may read the attention weights": 3}


class Speech(torch.nn.Module):
    """A model with the arguments of ESPnet's."""

    def __init__(self, attention: torch.nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, speech: torch.Tensor, speech_lengths: torch.Tensor) -> torch.Tensor:
        table = torch.ones(1, 2 * speech.shape[1] - 1, speech.shape[2])
        return self.attention(speech, speech, speech, table, None)


@pytest.mark.parametrize("name", ["espnet", "funasr", "transducer", "chatterbox"])
def test_a_derived_class_is_compared(theirs, name):
    module = theirs.build(name)
    own = type(module)
    module.__class__ = type("Derived", (own,), {"extra": 1})
    assert patch(module).patched
    other = theirs.build(name)
    shift = {"rel_shift": lambda self, x, **options: 2 * own.rel_shift(self, x, **options)}
    other.__class__ = type("Doubled", (own,), shift)
    assert "another result (difference" in patch(other).left_alone[0].reason


def test_the_legacy_class_is_left_alone(theirs):
    legacy = theirs.load(theirs.legacy)
    forward, module = legacy.forward, legacy(3, 24, 0.0)
    found = patch(module)
    assert not found.patched
    assert "wraps around" in found.left_alone[0].reason
    assert "wraps around" in patch("espnet").left_alone[0].reason
    assert legacy.forward is forward
    members = {key: x for key, x in vars(legacy).items() if not key.startswith("__")}
    module.__class__ = type("Copied", legacy.__bases__, members)
    assert "but a call failed" in patch(module).left_alone[0].reason


def test_classes_of_hugging_face_with_these_parameters_are_left_alone(theirs):
    pytest.importorskip("transformers")
    fastspeech = theirs.load(
        "transformers.models.fastspeech2_conformer.modeling_fastspeech2_conformer."
        "FastSpeech2ConformerAttention"
    )
    config = fastspeech.__init__.__globals__["FastSpeech2ConformerConfig"](hidden_size=24)
    attention = {"num_attention_heads": 3, "attention_dropout_rate": 0.0}
    found = patch(fastspeech(config, {**config.encoder_config, **attention}))
    assert not found.patched
    assert "other arguments (hidden_states" in found.left_alone[0].reason


@pytest.mark.parametrize("family", ["espnet", "funasr", "chatterbox", "fairseq", "fireredasr"])
def test_a_row_of_the_readme_patches_its_models(theirs, family):
    assert family in ROWS
    kind = next(kind for kind, case in theirs.cases.items() if case.family == family)
    model = theirs.build(kind)
    expected = theirs.results(model, kind, LENGTHS)
    assert eval(f'patch("{family}")', {"patch": patch}).patched
    theirs.check_equal(theirs.results(model, kind, LENGTHS), expected)
    unpatch(family)
    assert eval("patch(model)", {"patch": patch, "model": model}).patched
    theirs.check_equal(theirs.results(model, kind, LENGTHS), expected)


def test_the_row_of_cosyvoice_in_the_readme(theirs):
    """Its class is in no package that a family names."""
    row = next(line for line in README.open(encoding="utf-8") if line.startswith("| CosyVoice |"))
    assert "`patch(model)`" in row
    assert 'patch("' not in row
    model = theirs.build("cosyvoice")
    expected = theirs.results(model, "cosyvoice", LENGTHS)
    assert eval("patch(model)", {"patch": patch, "model": model}).patched
    theirs.check_equal(theirs.results(model, "cosyvoice", LENGTHS), expected)
