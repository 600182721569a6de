"""The model's tables: what stands in them, and that nobody takes them for measurements."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest

from txl_kernels.testing.aot import model, shipped, shipped_attention, speed, survey
from txl_kernels.testing.asked import ASKED

MODELLED = [call for call in shipped.shipped_calls() if call.modelled]
SMALL = shipped_attention.Attention(B=1, H=2, Tq=256, Tm=256)


@functools.cache
def surveyed():
    call = shipped_attention.call("train_d64", SMALL, "backward", modelled=True)
    return list(survey.survey([call], [90]))


@pytest.fixture
def backward():
    """A small call's backward kernels, under the name of the one that is asked for."""
    return surveyed()


def test_forward_backward_decoding_and_the_adaptive_ops_are_modelled():
    parts = {(call.name.split("/")[-2], part) for call in MODELLED for part in call.flop}
    assert {("train_d64", "forward"), ("train_d64", "backward")} <= parts
    assert {("train_d128", "forward"), ("train_d128", "backward")} <= parts
    names = " ".join(call.name for call in MODELLED)
    for part in ("one_query", "adaptive_loss", "adaptive_nll", "adaptive_embedding"):
        assert part in names


def test_every_figure_that_is_asked_stands_beside_one_that_is_modelled():
    asked = [target for call in MODELLED for target in call.asked.values()]
    for case, target in ASKED.items():
        assert case.startswith("decode") or target in asked, case  # decoding: test_nvcc.py


def test_useful_flop_are_6_and_16_for_a_pair_and_element():
    pairs = sum(2048 + i + 1 for i in range(2048)) * 8 * 16
    by_name = {call.name: call.flop for call in MODELLED}
    for part, flop in (("forward", 6), ("backward", 16)):
        found = by_name[f"rel_attention/bfloat16/train_d128/{part}"]
        assert found == {part: flop * 128 * pairs}


def test_the_backward_pass_is_the_sum_of_its_three_kernels(backward):
    kernels = [each.binary.launch.name for each in backward]
    assert [re.search(r"rows|dkdv|dqdr", name)[0] for name in kernels] == ["rows", "dkdv", "dqdr"]
    (row,) = model._times(backward)
    total = sum(model.expected(each, speed.H100) for each in backward)
    flop = 16 * SMALL.D * SMALL.pairs
    assert float(row[2]) == pytest.approx(total * 1e3, rel=1e-2)
    assert row[3] == f"{flop / total / 1e12:.0f} TFLOP/s"
    assert row[-1] == str(ASKED["train_d64/backward"]) == "≥ 200 TFLOP/s, ≤ 2.3 × flash"


def test_twice_the_heads_take_longer_in_every_kernel_with_products(backward):
    for each in backward:
        if each.kernel.passes is None:
            continue
        passes = each.kernel.passes(each.binary.launch)
        once, twice = (speed.estimate(each.binary, n * passes, speed.H100) for n in (1, 2))
        assert twice.seconds > once.seconds


def test_the_library_s_products_count_once(backward):
    one = dataclasses.replace(backward[0], library_flop=7 * 10**14)
    (row,) = model._times([one])
    assert float(row[2]) == pytest.approx(1000, rel=1e-2)
    assert float(model._loop(one)[1]) < 1


def test_the_text_says_that_nothing_was_measured(backward):
    text = model.text(backward, "a compiler")
    assert "Modelled, not measured: nothing of this has been run on a GPU." in text
    for kernel in ("bwd_rows", "bwd_dkdv", "bwd_dqdr"):
        assert f"rel_attention_{kernel}`" in text


def test_only_what_is_between_the_marks_is_replaced(backward, monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    monkeypatch.setattr(model, "PAGE", page)
    page.write_text(f"before\n{model.BEGIN}\nold\n{model.END}\nbehind\n", encoding="utf-8")
    model.write(backward, "a compiler")
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{model.BEGIN}\nMachine code of a compiler")
    assert text.endswith(f"{model.END}\nbehind\n")
    assert "old" not in text
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="has no <!-- model -->"):
        model.write(backward, "a compiler")
