"""What is timed on a GPU: contenders agree on the CPU, figures are counted and judged right."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from benchmarks import registry
from benchmarks.gpu import adaptive, attention, sanitizer, stages, summary, timing, timings
from benchmarks.gpu.stages import UnavailableError
from benchmarks.measure import Quartiles

SMALL = dataclasses.replace(attention.TRAIN[0], B=1, H=2, Tq=16, Tm=24, D=16)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [attention.OURS, attention.EAGER, attention.SDPA_BIAS])
def test_contenders_compute_the_same_attention(name):
    inputs = attention.inputs_on(SMALL, CPU, requires_grad=True)
    attend, leaves = attention.bind(name, SMALL, inputs)
    out = attend()
    assert timings._error(out.detach(), SMALL, inputs) <= timings.GATE
    assert len(torch.autograd.grad(out.sum(), leaves)) == len(leaves)


def test_flex_reads_the_captured_scores():
    """Eager FlexAttention, which the GPU's compiled one stands for."""
    from torch.nn.attention.flex_attention import flex_attention

    inputs = attention.inputs_on(SMALL, CPU, requires_grad=False)
    mask = attention._block_mask(SMALL, CPU)
    with torch.no_grad():
        out = attention.with_captured_scores(flex_attention, SMALL, mask, inputs)
    assert timings._error(out, SMALL, inputs) <= timings.GATE


def test_a_wrong_result_is_beyond_the_gate():
    inputs = attention.inputs_on(SMALL, CPU, requires_grad=False)
    attend, _ = attention.bind(attention.OURS, SMALL, inputs)
    assert timings._error(1.1 * attend(), SMALL, inputs) > timings.GATE


def test_inputs_are_never_zeros_and_differ_by_seed():
    one, other = (
        attention.inputs_on(SMALL, CPU, requires_grad=False, seed=seed) for seed in (0, 1)
    )
    for x, y in zip(one.leaves(), other.leaves(), strict=True):
        assert x.std() > 0
        assert not torch.equal(x, y)


def test_useful_flop_count_attended_pairs_alone():
    shape = dataclasses.replace(SMALL, Tq=4, Tm=3)
    pairs = shape.B * shape.H * (4 + 5 + 6 + 7)
    assert attention.flop(attention.OURS, shape, "forward") == 6 * shape.D * pairs
    assert attention.flop(attention.OURS, shape, "backward") == 16 * shape.D * pairs
    assert attention.flop(attention.FLASH, shape, "forward") == 4 * shape.D * pairs
    assert attention.flop(attention.CUDNN, shape, "forward") == 4 * shape.D * 2 * 4 * 7


def test_the_promised_shapes_are_timed():
    for shape, D in zip(attention.TRAIN, (64, 128), strict=True):
        assert (shape.B, shape.H, shape.Tq, shape.Tm, shape.D) == (8, 16, 2048, 2048, D)
    decode = attention.DECODE
    assert (decode.Tq, decode.n_keys, decode.B, decode.H, decode.D) == (1, 3800, 32, 16, 64)
    assert adaptive.WT103_LARGE.N == 8192
    assert [shape.N for shape in adaptive.OTHERS] == [9000, 9000]


def test_the_adaptive_shapes_are_the_presets():
    presets = {shape.name.removesuffix("_softmax"): shape for shape in registry.softmax_shapes()}
    timed = (adaptive.WT103_LARGE, *adaptive.OTHERS)
    assert {shape.name for shape in timed} == set(presets)
    for shape in timed:
        preset = presets[shape.name]
        assert shape == dataclasses.replace(preset, name=shape.name, N=shape.N)


@pytest.mark.parametrize("stage", [*stages.NAMES, "child"])
def test_stages_need_no_package_beyond_torch_and_triton(stage):
    blocked = "yaml rich typer accelerate safetensors matplotlib tokenizers pytest tensorboard"
    code = f"""
import sys
for name in {blocked.split()!r}:
    sys.modules[name] = None
import importlib
importlib.import_module("benchmarks.gpu.{stage}")
"""
    env = stages.environment()
    subprocess.run([sys.executable, "-c", code], cwd=stages.ROOT, env=env, check=True)


@pytest.mark.parametrize("op", adaptive.OPS)
@pytest.mark.parametrize("shape", [adaptive.WT103_LARGE, *adaptive.OTHERS], ids=lambda s: s.name)
def test_adaptive_contenders_agree_where_they_have_the_same_weights(op, shape):
    shape = shape.tiny()
    inputs = adaptive.inputs_on(shape, CPU, torch.float32)
    right = pytest.approx(adaptive.reference(shape, inputs), rel=1e-5)
    assert float(adaptive.bind(adaptive.OURS, op, shape, inputs)()) == right
    assert float(adaptive.bind(adaptive.MODULE, op, shape, inputs)()) == right
    for name in (adaptive.CHUNKED, adaptive.FULL):
        assert float(adaptive.bind(name, op, shape, inputs)()) > 0


def test_each_turn_of_the_adaptive_softmax_has_other_inputs():
    one, other = (
        adaptive.inputs_on(adaptive.WT103_LARGE.tiny(), CPU, torch.float32, turn=turn)
        for turn in range(2)
    )
    for (name, x), y in zip(one.leaves().items(), other.leaves().values(), strict=True):
        assert not torch.equal(x, y), name
    assert not torch.equal(one.target, other.target)


def test_peers_that_take_long_to_compile_come_last():
    cases = [name for name, _ in timings._cases(CPU, {})]
    last = ["train_d64/forward", "train_d128/forward"]
    last += [name + "+backward" for name in last]
    n = len(cases) - len(last) - 2 * len(adaptive.OTHERS)
    assert cases[n : n + len(last)] == last
    assert set(last) <= set(cases[:n])
    assert {"decode/forward", "adaptive_loss/forward+backward"} <= set(cases[:n])


def test_ours_keeps_its_first_figure_where_it_is_timed_again(monkeypatch):
    ran = []

    def contenders(_shape, _direction, _gpu, names, rows):
        ran.extend(names)
        rows |= {name: {"peak_mib": 1.0} for name in names}
        return [timings.Contender(name, []) for name in names]

    def take(contenders, _flush):
        return {each.name: Quartiles(len(ran), len(ran), len(ran)) for each in contenders}

    monkeypatch.setattr(timings, "_contenders", contenders)
    monkeypatch.setattr(timing, "take", take)
    rows = {}
    timings._attention(SMALL, "forward", CPU, ("ours", "eager"))(rows, None)
    timings._attention(SMALL, "forward", CPU, ("ours", "flex"))(rows, None)
    assert {name: row["ms"]["median"] for name, row in rows.items()} == {
        "ours": 2, "eager": 2, "flex": 4,
    }  # fmt: skip
    assert rows["flex"]["over_ours"] == 1.0
    assert rows["ours"]["useful_tflops"] > 0


def test_no_contender_takes_no_time():
    assert timing.take([], lambda: None) == {}


def test_why_ours_has_no_figure():
    assert timings._why({"ours": {"note": "off by 1"}}) == "off by 1"
    assert timings._why({"ours": {}, timings.CASE: {"note": "no memory"}}) == "no memory"
    assert timings._why({}) == "it was not timed"


def test_rounds_fill_the_time_within_bounds():
    assert timing.rounds_for(1.0) == timing.FEWEST
    assert timing.rounds_for(1e-6) == timing.MOST
    assert timing.rounds_for(0.01) == 25


def test_ratios_are_over_ours():
    taken = {name: Quartiles(ms, ms, ms) for name, ms in (("ours", 2.0), ("flash", 1.0))}
    assert timing.ratios(taken, "ours") == {"flash": 0.5}


def row(ms, **more):
    return {"ms": {"q1": ms, "median": ms, "q3": ms}, **more}


@pytest.fixture
def measured():
    rows = {
        "ours": row(1.0, useful_tflops=400.0, peak_mib=100.0),
        "flash": row(0.5, peak_mib=100.0),
        "eager": row(6.0, over_ours=6.0),
        "compiled": row(3.0, over_ours=3.0),
        "sdpa+bias": row(1.6, over_ours=1.5),  # whose run saw ours a little slower
        "flex": {"note": "it failed"},
    }
    return {"cases": {"train_d64/forward": rows}, "gemm_flop_per_second": 7.5e14}


def test_promises_are_judged(measured):
    judged = {text: (found, verdict) for text, _, found, verdict in summary.promises(measured)}
    assert judged["train_d64/forward: useful TFLOP/s"] == ("400", "met")
    assert judged["train_d64/forward: time over flash's"] == ("2", "MISSED")
    assert judged["train_d64/forward: fastest peer's time over ours"] == ("1.5", "MISSED")
    assert judged["train_d64/forward: eager's time over ours"] == ("6", "met")
    assert judged["train_d128/forward: useful TFLOP/s"] == ("–", "not measured")


def test_the_summary_shows_notes_and_figures(measured, capsys):
    machine = {"gpu": "A GPU", "torch": "2", "triton": "3", "commit": "abc", "changed": False}
    record = {"status": "passed", "seconds": 3.0, "error": None, "results": measured}
    summary.show({"machine": machine, "stages": {"timings": record}})
    shown = capsys.readouterr().out
    assert "it failed" in shown
    assert "MISSED" in shown


def test_compute_sanitizers_summary_is_read():
    assert sanitizer.errors("========= ERROR SUMMARY: 0 errors") == 0
    assert sanitizer.errors("========= ERROR SUMMARY: 12 errors") == 12
    assert sanitizer.errors("===== RACECHECK SUMMARY: 3 hazards displayed (3 errors)") == 3
    with pytest.raises(UnavailableError, match=r"does not attach here: .*permission"):
        sanitizer.errors("Error: debugger has no permission to attach\n")


SCRIPT = """#!/bin/sh
echo "caching: $PYTORCH_NO_CUDA_MEMORY_CACHING, $2"
echo "========= {summary}"
"""


def sanitized(monkeypatch, tmp_path, summary):
    """The stage's results with a script in compute-sanitizer's place, and what it raised."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SCRIPT.format(summary=summary))
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer.device, "require", lambda: None)
    monkeypatch.setattr(sanitizer, "find", lambda: str(tool))
    results = {}
    try:
        sanitizer.run(results, lambda: None)
    except (AssertionError, UnavailableError) as error:
        return results, str(error)
    return results, None


def test_both_tools_run_without_torchs_large_allocations(monkeypatch, tmp_path):
    clean = sanitized(monkeypatch, tmp_path, "ERROR SUMMARY: 0 errors")
    assert clean == ({"memcheck": 0, "racecheck": 0}, None)
    results, said = sanitized(monkeypatch, tmp_path, "ERROR SUMMARY: 2 errors")
    assert results == {"memcheck": 2}
    assert "caching: 1, memcheck" in said
    results, said = sanitized(monkeypatch, tmp_path, "Error: unable to attach")
    assert results == {}
    assert "does not attach here" in said
