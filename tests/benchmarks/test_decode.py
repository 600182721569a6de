"""Decoding: all contenders have one result; bytes are counted; the table has the figures."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from benchmarks import registry, tables
from benchmarks.cases import OURS, PeerUnavailableError, WrongResultError, decode
from benchmarks.cases.decode import HF, DecodeCase
from benchmarks.machine import Limit
from benchmarks.measure import Comparison, Quartiles
from benchmarks.peers import hf
from benchmarks.report import write_json
from benchmarks.suite import Figures

SHAPES = {shape.name: shape for shape in registry.decode_shapes()}
LARGE, BASE = SHAPES["wt103_large_b1_mem1600"], SHAPES["enwik8_base_b8_mem2100"]
# The vocabulary of WikiText-103 is too large for a test.
SMALL_VOCABULARY = dataclasses.replace(
    LARGE.tiny().config, vocab_size=60, cutoffs=(20, 30, 50), d_model=64, n_head=2, d_head=32
)
TINY = dataclasses.replace(LARGE, config=SMALL_VOCABULARY)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [TINY, SHAPES["enwik8_base_b8_mem0"].tiny()], ids=["wt", "enwik"])
def test_ours_has_the_references_result_and_decodes(shape, weights):
    if weights == "int8":
        pytest.importorskip("torchao.quantization")
    case = DecodeCase(shape, weights)
    case.check(OURS)
    with case.contender(OURS) as run:
        assert run() > 0


@pytest.mark.slow
def test_hugging_faces_model_has_the_references_result():
    try:
        hf.interpreter()
    except PeerUnavailableError as error:
        pytest.skip(str(error))
    for shape in (TINY, BASE.tiny(), SHAPES["enwik8_base_b1_mem512"].tiny()):
        case = DecodeCase(shape, "float32")
        assert case.peers == (HF,)
        case.check(HF)
    with case.contender(HF) as run:
        assert run() > 0


def test_a_wrong_result_is_found(monkeypatch):
    log_probs = decode._log_probs

    def wrong(*arguments, cached):
        return log_probs(*arguments, cached=cached) * (1 + 1e-3 * cached)

    monkeypatch.setattr(decode, "_log_probs", wrong)
    with pytest.raises(WrongResultError, match="ours is off by"):
        DecodeCase(TINY, "float32").check(OURS)


def test_without_torchao_int8_cannot_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(PeerUnavailableError, match="int8 needs the package torchao"):
        DecodeCase(TINY, "int8").check(OURS)


def test_shapes_are_those_of_the_published_models():
    config = LARGE.config
    assert (config.n_layer, config.d_model, config.n_head, config.d_head) == (18, 1024, 16, 64)
    assert (config.d_inner, config.vocab_size, config.mem_len) == (4096, 267_735, 1600)
    assert (config.clamp_len, config.same_length) == (1000, True)
    base = [(s.batch_size, s.config.mem_len) for s in SHAPES.values() if s != LARGE]
    assert base == [(1, 0), (8, 0), (1, 512), (8, 512), (1, 2100), (8, 2100)]


def test_bytes_of_a_step():
    layers = 18 * (4 * 1024 * 1024 + 2 * 1024 * 4096)
    words = 20_003 * 1024 + 20_000 * 256 + 160_000 * 64 + 67_735 * 16  # head, clusters
    words += 1024 * (1024 + 256 + 64 + 16) + 267_735 + 3  # projections, biases
    cached = 18 * 1024 * (2 * 1600 + 1001)
    assert LARGE.bytes_read("float32") == 4 * (layers + words + cached)
    assert LARGE.bytes_read("bfloat16") == 2 * (layers + words + cached)
    assert LARGE.bytes_read("int8") == layers + 2 * (words + cached)
    layers = 12 * (4 * 512 * 512 + 2 * 512 * 2048)
    letters = 204 * 512 + 204
    alone = layers + letters + 12 * 512 * (2 + 1)  # the token itself
    assert SHAPES["enwik8_base_b1_mem0"].bytes_read("float32") == 4 * alone
    rows = 8 * 2 * 513 + 513
    assert SHAPES["enwik8_base_b8_mem512"].bytes_read("float32") == 4 * (
        layers + letters + 12 * 512 * rows
    )


def test_the_table_has_rate_bytes_limit_and_share(tmp_path):
    ratio = Comparison(*[Quartiles(19.0, 20.0, 21.0)] * 3, pairs=7, dropped=0, quiet=True)
    figures = Figures(
        "decode/wt103_large_b1_mem1600/float32/step",
        seconds=Quartiles(0.07, 0.08, 0.09),
        gigabytes_per_second=16.0,
        tokens_per_second=12.5,
        limit=Limit("read", 20.0),
        peers={"hf": ratio},
    )
    failed = Figures("decode/wt103_large_b1_mem1600/int8/step", notes={"ours": "no torchao"})
    machine = {"processor": "a processor", "threads": 2, "torch": "2.13.0", "tiles": {}}
    machine |= {"matmul_float32": 170.2, "matmul_bfloat16": 410.0}
    write_json(tmp_path / "run.json", machine, [figures, failed])
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    table = tables.decoding_table(run, "run.json")
    assert "| `wt103_large_b1_mem1600` | float32 | 12.5 | 80 | 1280 | 64 | 80% | 20.00 |" in table
    assert "int8" not in table
    assert "decode" not in tables.docs_tables(run, "run.json").replace("a processor", "")


def test_the_table_of_decoding_has_a_place():
    text = (tables.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "<!-- decode -->" in text
