"""Cases of the drop-ins at tiny sizes: formulas, refusals and, with transformers, all parts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import machine, peak_memory, registry, room, suite
from benchmarks.cases import OURS, PeerUnavailableError, WrongResultError, dropins
from benchmarks.cases.dropins import HF
from benchmarks.cases.encoders import UNPATCHED, encoder_cases
from benchmarks.cases.inkling import CORE, LAYER, DecodeCase, InklingCase
from benchmarks.cases.parakeet import (
    BLOCK,
    CHANNELS_LAST,
    FLOAT32,
    ONNX,
    OPENVINO,
    EncoderCase,
    PartCase,
)
from benchmarks.inputs import AttentionShape
from benchmarks.measure import Probe
from benchmarks.peers import inkling_layer, parakeet
from benchmarks.peers.hugging_face import VERSION
from benchmarks.peers.parakeet import EncoderShape
from txl_kernels import rel_attention

ENCODER = EncoderShape(name="tiny", seconds=3, n_layer=2, d_model=32, n_head=2, d_inner=48)
GLOBAL = AttentionShape(
    name="tiny", B=1, H=4, Hk=2, Tq=37, Tm=0, D=16, causal=True, d_rel=5, rel_extent=20
)
SLIDING = dataclasses.replace(GLOBAL, rel_extent=9, window=8)
DECODED = dataclasses.replace(GLOBAL, Tq=1, Tm=30)
CASES = [
    EncoderCase(ENCODER, with_channels_last=True),
    EncoderCase(ENCODER, "bfloat16"),
    PartCase(ENCODER, "core"),
    PartCase(ENCODER, BLOCK),
    *(InklingCase(x, CORE) for x in (GLOBAL, SLIDING)),
    *(InklingCase(x, CORE, "forward+backward") for x in (GLOBAL, SLIDING)),
    *(InklingCase(x, LAYER) for x in (GLOBAL, SLIDING)),
    DecodeCase(DECODED, grows=False),
    DecodeCase(DECODED, grows=True),
    *(case.tiny() for case in encoder_cases()),
]
# Without the contenders that need a compiler or another library.
RUNNABLE = [
    pytest.param(
        case, name, id=f"{type(case).__name__}-{case.shape.name}-{case.direction}-{i}-{name}"
    )
    for i, case in enumerate(CASES)
    for name in (OURS, HF, CHANNELS_LAST, FLOAT32, UNPATCHED)
    if name in (OURS, *case.peers, *case.yardsticks)
]


@pytest.fixture
def transformers():
    pytest.importorskip("transformers", minversion=VERSION)


def test_rows_of_parakeets_core_are_those_of_rel_attention():
    inputs = parakeet.core_inputs(ENCODER)
    heads = [x.double().view(1, -1, 2, 16).transpose(1, 2) for x in inputs[:4]]
    out = rel_attention(
        *heads,
        r_w_bias=inputs.bias_u.double(),
        r_r_bias=inputs.bias_v.double(),
        backend="reference",
    )
    rows = torch.tensor([0, 5, ENCODER.n_frame - 1])
    expected = out.transpose(1, 2).flatten(2)[0, rows]
    torch.testing.assert_close(parakeet.core_rows(inputs, rows), expected)


@pytest.mark.parametrize("shape", [GLOBAL, SLIDING], ids=["global", "sliding"])
def test_rows_of_inklings_core_are_those_of_rel_attention(shape):
    inputs = inkling_layer.core_inputs(shape).convert(torch.float64)
    q, k, v, rel = (
        x.view(1, shape.Tq, n, -1).transpose(1, 2)
        for x, n in zip(inputs.leaves()[:4], (4, 2, 2, 4), strict=True)
    )
    out = rel_attention(
        q,
        k,
        v,
        inputs.proj.T.flip(0)[None, None],
        q_pos=rel,
        scale=1 / shape.D,
        pos_scale=1.0,
        offset=shape.offset,
        causal=True,
        window=None if shape.window is None else (shape.window, None),
        backend="reference",
    )
    rows = torch.tensor([0, 8, 36])
    expected = out.transpose(1, 2).flatten(2)[0, rows].detach()
    torch.testing.assert_close(inkling_layer.core_rows(shape, inputs, rows), expected)


def test_a_contender_that_does_not_fit_is_refused_with_the_bytes_that_it_needs(monkeypatch):
    monkeypatch.setattr(room, "free", lambda: 8 * 2**30)
    case = PartCase(parakeet.EncoderShape(name="long", seconds=1200), "core")
    scores = 2 * 4 * 8 * 15_000 * 29_999  # [H, T, 2T - 1] and its padded copy
    for attempt in (case.check, lambda name: case.contender(name).__enter__()):
        with pytest.raises(room.TooLargeError, match="needs 2") as refused:
            attempt(HF)
        assert scores < refused.value.n_bytes < 1.1 * scores
    assert case.n_bytes(OURS) < 2**31
    figures = suite.Figures(case.name)
    with suite.noting(figures, HF):
        case.check(HF)
    assert figures.needed_bytes == {HF: refused.value.n_bytes}


def test_free_memory_is_less_than_all():
    assert 2**20 < room.free() < 2**50


def test_reading_has_a_bandwidth_of_gigabytes():
    limit = machine.read_limit(2**24)
    assert limit.kind == "read"
    assert 0.1 < limit.rate < 1e5


def test_a_long_run_is_measured_once(monkeypatch):
    children = []

    def in_child(case, contender):
        children.append((case, contender))
        return peak_memory.Peak(300.0, 200.0)

    monkeypatch.setattr(peak_memory, "in_child", in_child)
    monkeypatch.setattr(EncoderCase, "check", lambda case, name: None)
    (case,) = registry.long_cases()
    figures = suite.take_once(case, Probe(size=64))
    assert children == [("dropin/parakeet_24_layers_20min/float32/forward", OURS)]
    assert figures.seconds.median == 200
    assert figures.peak_mib == {OURS: 300}


def test_a_long_run_with_a_wrong_result_is_not_measured(monkeypatch):
    def wrong(case, name):
        raise WrongResultError("wrong")

    monkeypatch.setattr(EncoderCase, "check", wrong)
    monkeypatch.setattr(peak_memory, "in_child", lambda *_: pytest.fail("it was measured"))
    figures = suite.take_once(registry.long_cases()[0], Probe(size=64))
    assert figures.notes == {OURS: "WrongResultError: wrong"}


def test_without_the_library_dropins_are_left_out(monkeypatch):
    cases = registry.timed_cases()
    monkeypatch.setattr(dropins, "is_available", lambda: False)
    left_out = set(cases) - set(registry.runnable(cases))
    assert left_out == set(registry.dropin_cases())


def test_a_run_of_dropins_alone_without_the_library_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(dropins, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmarks", "dropin/", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"left out: \d+ drop-ins, .*make bench-dropins-env"):
        benchmarks.main()
    assert not list(tmp_path.iterdir())


def test_results_with_a_larger_error_or_nan_are_wrong():
    case, right = PartCase(ENCODER, "core"), torch.ones(4, dtype=torch.float64)
    case.compare(OURS, right.float(), right, 1e-5)
    for wrong in (right + 1e-4, right * torch.nan):
        with pytest.raises(WrongResultError, match="is off by"):
            case.compare(OURS, wrong, right, 1e-5)


def test_sizes_are_those_of_the_published_models():
    cases = {case.name: case for case in registry.dropin_cases()}
    parts = {name.split("/")[1]: case.shape for name, case in cases.items()}
    frames = {name: parts[name].n_frame for name in parts if "encoder" in name}
    assert list(frames.values()) == [375, 1500, 3750, 7500, 15_000]
    shape = parts["parakeet_24_layers_5min"]
    assert (shape.n_layer, shape.d_model, shape.n_head, shape.d_inner) == (24, 1024, 8, 4096)
    decoded = cases["dropin/inkling_decode_4096/float32/forward"]
    assert decoded.bytes_read == 2 * 8 * 4097 * 128 * 4
    sliding = parts["inkling_attention_sliding_32768"]
    assert (sliding.Tq, sliding.window, sliding.rel_extent) == (32_768, 511, 512)
    frames = {case.shape.name: case.shape.n_frame for case in encoder_cases()}
    assert (frames["nemo_local_300s"], frames["espnet_60s"]) == (3750, 1500)
    assert (frames["wav2vec2_bert_30s"], frames["xlnet_base_512"]) == (1500, 512)


def test_a_growing_cache_is_shortened_after_some_tokens(monkeypatch):
    case, tokens = DecodeCase(DECODED, grows=True), []
    steps = (lambda: tokens.append("token"), lambda: tokens.append("shortened"))
    monkeypatch.setattr(DecodeCase, "_prepared", lambda self, name, seed: steps)
    monkeypatch.setattr(DecodeCase, "N_SETS", 1)
    monkeypatch.setattr(DecodeCase, "N_STEPS", 2)
    with case.contender(OURS) as run:
        for _ in range(3):
            run()
    assert tokens == ["shortened", *["token"] * 3, "shortened", *["token"] * 2]


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize(("case", "name"), RUNNABLE)
def test_contenders_have_the_right_result_and_run(case, name):
    try:
        case.check(name)
    except PeerUnavailableError as error:
        pytest.skip(str(error))
    for each in (case, case.tiny()):
        with each.contender(name) as run:
            assert run() > 0


@pytest.mark.usefixtures("transformers")
def test_contenders_share_weights_and_stay_as_they_are():
    first, second = parakeet.encoder(ENCODER), parakeet.encoder(ENCODER)
    assert first is not second
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    own = type(first)
    dropins.patched_if(True, first)
    assert type(first) is not own
    assert type(second) is own
    with pytest.raises(ValueError, match="no module of"):
        dropins.patched_if(True, second.layers[0].feed_forward1)


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("name", [ONNX, OPENVINO])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_exported_encoders(name, precision, monkeypatch, tmp_path):
    needed = ["onnxscript", name] + (["nncf"] if (name, precision) == (OPENVINO, "int8") else [])
    for module in needed:
        pytest.importorskip(module)
    monkeypatch.setattr("benchmarks.peers.exported.FOLDER", tmp_path)
    EncoderCase(ENCODER, precision).check(name)
    (folder, *_) = sorted(tmp_path.iterdir())
    assert (folder / "encoder.onnx").is_file()
