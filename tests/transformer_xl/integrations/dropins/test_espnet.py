"""The attention of ESPnet and its relatives, patched, against the classes of their packages."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from transformer_xl.integrations import patch, report, unpatch
from transformer_xl.integrations.adapter import adapter_of
from transformer_xl.integrations.families import FAMILIES

_spec = importlib.util.spec_from_file_location(
    "espnet_classes", Path(__file__).with_name("espnet_classes.py")
)
assert _spec is not None
assert _spec.loader is not None
theirs = importlib.util.module_from_spec(_spec)
sys.modules["espnet_classes"] = theirs
_spec.loader.exec_module(theirs)

LENGTHS = [13, 9, 11]
# One case of each class and convention.
KINDS = [
    "espnet",
    "transducer-chunks",
    "funasr",
    "cosyvoice",
    "chatterbox",
    "fireredasr",
    "fairseq",
]


@pytest.fixture
def load():
    yield theirs.load
    unpatch()


@pytest.fixture(params=theirs.CASES)
def name(request, load):
    if not theirs.is_installed(request.param):
        pytest.skip("its package is not installed")
    return request.param


@pytest.fixture(params=KINDS)
def kind(request, load):
    if not theirs.is_installed(request.param):
        pytest.skip("its package is not installed")
    return request.param


def check_equal(actual, expected, error=1e-5):
    largest = max(float(x.norm()) for x in expected.values())
    assert actual.keys() == expected.keys()
    for key, x in expected.items():
        difference = float((actual[key] - x).norm())
        assert difference <= error * (float(x.norm()) + 1e-2 * largest), f"{key}: {difference}"


@pytest.mark.parametrize("lengths", [LENGTHS, [13, 13], [3, 2]], ids=["ragged", "full", "short"])
def test_outputs_and_gradients_do_not_change(name, lengths):
    module = theirs.build(name)
    expected = theirs.results(module, name, lengths)
    assert len(patch(module).patched) == 1, str(report(module))
    check_equal(theirs.results(module, name, lengths), expected)
    assert report(module).fallbacks == 0


def test_one_frame(kind):
    module, (x, table, valid) = theirs.build(kind), theirs.inputs([1, 1])
    expected = theirs.run(module, kind, x, table, valid)
    patch(module)
    torch.testing.assert_close(theirs.run(module, kind, x, table, valid), expected)
    assert report(module).fallbacks == 0


def test_bfloat16_is_as_exact_as_the_original(name):
    if name in ("espnet-zero_triu", "funasr-sond"):
        pytest.skip("the original does not support it")
    module = theirs.build(name).bfloat16()
    x, table, valid = theirs.inputs(LENGTHS)
    x, table = x.bfloat16(), table.bfloat16()
    with torch.no_grad():
        wide = copy.deepcopy(module).float()
        exact = theirs.run(wide, name, x.float(), table.float(), valid)[valid]
        original = theirs.run(module, name, x, table, valid)[valid].float()
        patch(module)
        ours = theirs.run(module, name, x, table, valid)[valid].float()
    assert report(module).fallbacks == 0
    assert float((ours - exact).norm()) <= 1.5 * float((original - exact).norm())


def test_the_whole_family_by_name(name):
    family = theirs.CASES[name].family
    if family is None:
        pytest.skip("no family has its name")
    module = theirs.build(name)
    expected = theirs.results(module, name, LENGTHS)
    assert patch(family).patched
    assert adapter_of(module) is not None
    check_equal(theirs.results(module, name, LENGTHS), expected)
    unpatch(family)
    assert adapter_of(module) is None
    check_equal(theirs.results(module, name, LENGTHS), expected, 0.0)


def test_a_class_elsewhere_with_the_same_code_is_found(kind):
    module = theirs.build(kind)
    expected = theirs.results(module, kind, LENGTHS)
    module.__class__ = copied(type(module))
    entry = patch(module).entries[0]
    assert entry.patched, entry.reason
    check_equal(theirs.results(module, kind, LENGTHS), expected)
    assert report(module).fallbacks == 0


def copied(original: type) -> type:
    """A class with the same members that does not inherit from the original one."""
    members = {
        key: x for key, x in vars(original).items() if key not in ("__dict__", "__weakref__")
    }
    return type("Copied", original.__bases__, {**members, "__module__": "elsewhere"})


def test_copies_pickles_and_unpatch(kind):
    module = theirs.build(kind)
    before, own = dict(module.__dict__), type(module)
    expected = theirs.results(module, kind, LENGTHS)
    patch(module)
    theirs.results(module, kind, LENGTHS)
    assert getattr(module, "attn", None) is None  # not the probabilities of an earlier call
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert len(report(other).patched) == 1
        check_equal(theirs.results(other, kind, LENGTHS), expected)
    unpatch(module)
    assert type(module) is own
    assert module.__dict__.keys() == before.keys()
    check_equal(theirs.results(module, kind, LENGTHS), expected, 0.0)


def test_gradient_checkpointing(kind):
    module = theirs.build(kind)
    expected = theirs.results(module, kind, LENGTHS)
    patch(module)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, *args, **kwargs):
            return checkpoint(self.attention, *args, use_reentrant=False, **kwargs)

    actual = theirs.results(Checkpointed(), kind, LENGTHS)
    check_equal({key.replace("attention.", ""): x for key, x in actual.items()}, expected)


def test_one_compiled_graph(kind):
    module = theirs.build(kind)
    x, table, valid = theirs.inputs(LENGTHS)
    expected = theirs.run(module, kind, x, table, valid)[valid]
    patch(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    actual = theirs.run(compiled, kind, x, table, valid)[valid]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    actual.sum().backward()
    assert report(module).fallbacks == 0


def test_dropout_of_probabilities(kind):
    """With values of 1 and no last layer, the output is the sum of the kept probabilities."""
    if kind == "fireredasr":
        pytest.skip("it has no dropout of probabilities")
    module = theirs.build(kind, dropout=0.5)
    nn.init.zeros_(module.linear_v.weight)
    nn.init.ones_(module.linear_v.bias)
    nn.init.eye_(module.linear_out.weight)
    nn.init.zeros_(module.linear_out.bias)
    patch(module)

    def sums():
        with torch.no_grad():
            return theirs.run(module, kind, *theirs.inputs([200, 200]))

    assert torch.allclose(sums(), torch.ones(1))
    module.train()
    torch.manual_seed(0)
    first = sums()
    assert 0.9 <= float(first.mean()) <= 1.1
    assert float(first.std()) >= 0.1
    assert not torch.equal(sums(), first)
    torch.manual_seed(0)
    assert torch.equal(sums(), first)


def test_frames_that_see_no_key_get_zero_attention(kind):
    module = theirs.build(kind)
    lengths = [13, 0]
    x, table, valid = theirs.inputs(lengths)
    out = theirs.run(module, kind, x, table, valid)
    patch(module)
    ours = theirs.run(module, kind, x, table, valid)
    torch.testing.assert_close(ours[0], out[0], rtol=1e-4, atol=1e-4)
    empty = x[1] if kind == "fireredasr" else module.linear_out.bias.expand(13, -1)
    torch.testing.assert_close(ours[1], empty, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", theirs.CACHED)
def test_a_stream_with_a_cache(load, cached):
    if not theirs.is_installed(cached):
        pytest.skip("its package is not installed")
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
def test_a_stream_with_left_context(load, is_simplified):
    kind = "transducer-simplified" if is_simplified else "transducer"
    if not theirs.is_installed(kind):
        pytest.skip("its package is not installed")
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


def test_a_table_that_is_not_shifted_runs_the_original_code(load):
    if not theirs.is_installed("cosyvoice"):
        pytest.skip("its package is not installed")
    module = theirs.build("cosyvoice")
    x, table, valid = theirs.inputs(LENGTHS)
    expected = theirs.run(module, "cosyvoice", x, table[:, :13], valid)
    patch(module)
    assert torch.equal(theirs.run(module, "cosyvoice", x, table[:, :13], valid), expected)
    assert "does not have 2 Tk - 1 rows" in str(report(module))


def test_the_legacy_class_is_left_alone(load):
    if not theirs.is_installed("espnet"):
        pytest.skip("its package is not installed")
    legacy = theirs.load(theirs.LEGACY)
    forward, module = legacy.forward, legacy(3, 24, 0.0)
    found = patch(module)
    assert not found.patched
    assert "wraps around" in found.left_alone[0].reason
    assert "wraps around" in patch("espnet").left_alone[0].reason
    assert legacy.forward is forward
    module.__class__ = copied(legacy)
    assert "but a call failed" in patch(module).left_alone[0].reason


def test_classes_of_hugging_face_with_these_parameters_are_left_alone(load):
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


README = Path(__file__).resolve().parents[4] / "README.md"
ROWS = re.findall(r'patch\("\w+"\)', README.read_text(encoding="utf-8"))
OURS = {case.family for case in theirs.CASES.values()} - {None}


@pytest.mark.parametrize("row", [row for row in ROWS if row.split('"')[1] in OURS])
def test_a_row_of_the_readme_patches_its_models(load, row):
    family = row.split('"')[1]
    kind = next(kind for kind, case in theirs.CASES.items() if case.family == family)
    if not theirs.is_installed(kind):
        pytest.skip("its package is not installed")
    module = theirs.build(kind)
    expected = theirs.results(module, kind, LENGTHS)
    assert family in FAMILIES
    assert eval(row, {"patch": patch}).patched
    check_equal(theirs.results(module, kind, LENGTHS), expected)
    unpatch(family)
    assert eval("patch(model)", {"patch": patch, "model": module}).patched
    check_equal(theirs.results(module, kind, LENGTHS), expected)
