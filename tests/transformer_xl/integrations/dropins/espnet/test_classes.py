"""The attention of ESPnet and its relatives, patched, against the classes of their packages."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from transformer_xl.integrations import patch, report, unpatch
from transformer_xl.integrations.adapter import adapter_of

LENGTHS = [13, 9, 11]


@pytest.mark.parametrize("lengths", [LENGTHS, [13, 13], [3, 2]], ids=["ragged", "full", "short"])
def test_outputs_and_gradients_do_not_change(theirs, name, lengths):
    module = theirs.build(name)
    expected = theirs.results(module, name, lengths)
    assert len(patch(module).patched) == 1, str(report(module))
    theirs.check_equal(theirs.results(module, name, lengths), expected)
    assert report(module).fallbacks == 0


def test_one_frame(theirs, kind):
    module, (x, table, valid) = theirs.build(kind), theirs.inputs([1, 1])
    expected = theirs.run(module, kind, x, table, valid)
    patch(module)
    torch.testing.assert_close(theirs.run(module, kind, x, table, valid), expected)
    assert report(module).fallbacks == 0


def test_bfloat16_is_as_exact_as_the_original(theirs, name):
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


def test_the_whole_family_by_name(theirs, name):
    family = theirs.cases[name].family
    if family is None:
        pytest.skip("no family has its name")
    module = theirs.build(name)
    expected = theirs.results(module, name, LENGTHS)
    assert patch(family).patched
    assert adapter_of(module) is not None
    theirs.check_equal(theirs.results(module, name, LENGTHS), expected)
    unpatch(family)
    assert adapter_of(module) is None
    theirs.check_equal(theirs.results(module, name, LENGTHS), expected, 0.0)


def test_a_class_elsewhere_with_the_same_code_is_found(theirs, kind):
    module = theirs.build(kind)
    expected = theirs.results(module, kind, LENGTHS)
    module.__class__ = copied(type(module))
    entry = patch(module).entries[0]
    assert entry.patched, entry.reason
    theirs.check_equal(theirs.results(module, kind, LENGTHS), expected)
    assert report(module).fallbacks == 0


def copied(original: type) -> type:
    """A class with the same members that does not inherit from the original one."""
    members = {key: x for key, x in vars(original).items() if not key.startswith("__")}
    return type("Copied", original.__bases__, members)


def test_copies_pickles_and_unpatch(theirs, kind):
    module = theirs.build(kind)
    before, own = dict(module.__dict__), type(module)
    expected = theirs.results(module, kind, LENGTHS)
    patch(module)
    theirs.results(module, kind, LENGTHS)
    assert getattr(module, "attn", None) is None  # not the probabilities of an earlier call
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert len(report(other).patched) == 1
        theirs.check_equal(theirs.results(other, kind, LENGTHS), expected)
    unpatch(module)
    assert type(module) is own
    assert module.__dict__.keys() == before.keys()
    theirs.check_equal(theirs.results(module, kind, LENGTHS), expected, 0.0)


def test_gradient_checkpointing(theirs, kind):
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
    theirs.check_equal({key.replace("attention.", ""): x for key, x in actual.items()}, expected)


def test_one_compiled_graph(theirs, kind):
    module = theirs.build(kind)
    x, table, valid = theirs.inputs(LENGTHS)
    expected = theirs.run(module, kind, x, table, valid)[valid]
    patch(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    actual = theirs.run(compiled, kind, x, table, valid)[valid]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    actual.sum().backward()
    assert report(module).fallbacks == 0


def test_export(theirs, kind):
    module, (x, table, valid) = theirs.build(kind), theirs.inputs(LENGTHS)
    args, kwargs = theirs.cases[kind].call(x, table, valid)
    with torch.no_grad():
        expected = theirs.run(module, kind, x, table, valid)[valid]
        patch(module)
        program = torch.export.export(module, args, kwargs, strict=False)
        actual = theirs.run(program.module(), kind, x, table, valid)[valid]
    assert "rel_attention" in str(program.graph)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_autocast(theirs, kind):
    module, (x, table, valid) = theirs.build(kind), theirs.inputs(LENGTHS)
    with torch.no_grad():
        exact = theirs.run(module, kind, x, table, valid)[valid]
        with torch.autocast("cpu", torch.bfloat16):
            original = theirs.run(module, kind, x, table, valid)[valid].float()
            patch(module)
            ours = theirs.run(module, kind, x, table, valid)[valid].float()
    assert float((ours - exact).norm()) <= 1.5 * float((original - exact).norm())


@pytest.mark.parametrize("is_patched_first", [True, False], ids=["patch_first", "lora_first"])
def test_adapters_of_peft(theirs, kind, is_patched_first):
    peft = pytest.importorskip("peft")
    if kind == "cosyvoice" and not is_patched_first:
        pytest.skip("after PEFT a class is not found by its parameters")
    names = ["w_qs", "fc"] if kind == "fireredasr" else ["linear_q", "linear_out"]
    config = peft.LoraConfig(target_modules=[*names, "linear_pos"], r=4, init_lora_weights=False)

    def with_adapters(module):
        torch.manual_seed(0)
        return peft.get_peft_model(module, config).base_model.model.eval()

    expected = theirs.results(with_adapters(theirs.build(kind)), kind, LENGTHS)
    module = theirs.build(kind)
    if is_patched_first:
        patch(module)
    module = with_adapters(module)
    if not is_patched_first:
        patch(module)
    actual = theirs.results(module, kind, LENGTHS)
    theirs.check_equal(actual, expected)
    assert any("lora" in key for key in actual)
    assert len(report(module).patched) == 1
    assert report(module).fallbacks == 0


def test_dropout_of_probabilities(theirs, kind):
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


def test_frames_that_see_no_key_get_zero_attention(theirs, kind):
    module = theirs.build(kind)
    lengths = [13, 0]
    x, table, valid = theirs.inputs(lengths)
    out = theirs.run(module, kind, x, table, valid)
    patch(module)
    ours = theirs.run(module, kind, x, table, valid)
    torch.testing.assert_close(ours[0], out[0], rtol=1e-4, atol=1e-4)
    empty = x[1] if kind == "fireredasr" else module.linear_out.bias.expand(13, -1)
    torch.testing.assert_close(ours[1], empty, rtol=1e-4, atol=1e-4)
