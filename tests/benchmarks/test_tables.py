"""Markdown tables of a run: they contain its figures and replace only the text between marks."""

from __future__ import annotations

import json

import pytest

from benchmarks import plot, registry, tables
from benchmarks.machine import Limit
from benchmarks.measure import Comparison, Quartiles
from benchmarks.report import write_json
from benchmarks.step_profile import Share
from benchmarks.suite import Figures

MACHINE = {
    "processor": "a processor",
    "threads": 2,
    "torch": "2.13.0",
    "matmul_float32": 170.2,
    "matmul_bfloat16": 410.0,
    "tiles": {"sgemm": 180.4},
}


@pytest.fixture
def run(tmp_path):
    """The JSON that a run of two cases writes."""

    def beside(ratio, quiet=True):
        around = Quartiles(ratio - 0.1, ratio, ratio + 0.1)
        return Comparison(around, around, around, pairs=7, dropped=0, quiet=quiet)

    attention = Figures(
        "rel_attention/shape/float32/forward",
        seconds=Quartiles(0.01, 0.0123, 0.02),
        gflops=90.0,
        limit=Limit("sgemm", 180.0),
        peers={"eager": beside(4.0), "compiled": beside(3.0)},
        yardsticks={"sdpa": beside(1.25, quiet=False)},
        peak_mib={"ours": 10.0, "eager": 400.0},
    )
    rate = Figures("rel_attention/shape/float32/backward", seconds=Quartiles(0.2, 0.3, 0.4))
    path = tmp_path / "run.json"
    write_json(path, MACHINE, [attention, rate], [Share("dropout", 12.0, 0.125)])
    return json.loads(path.read_text(encoding="utf-8"))


def test_readme_names_the_peer_with_the_smallest_ratio(run):
    table = tables.readme_table(run, "run.json")
    assert "| `shape` | float32 | forward | 12.3 | 3.00 (compiled) | ~1.25 | 50% |" in table
    assert "backward" not in table, "a pass without a peer has no row"
    assert "a processor" in table
    assert "benchmarks/results/run.json" in table


def test_docs_show_every_contender_memory_and_parts(run):
    text = tables.docs_tables(run, "run.json")
    assert "eager 4.00 [3.90, 4.10]<br>compiled 3.00 [2.90, 3.10]" in text
    assert "10 / 400" in text
    assert "|  |  | backward | 300 |" in text
    assert "| dropout | 12 | 12.5% |" in text


def test_a_changed_allocator_is_named(run):
    assert "llocator" not in tables.docs_tables(run, "processor-2026-12-01.json")
    run["machine"]["allocator"] = "MALLOC_MMAP_MAX_=0"
    text = tables.docs_tables(run, "processor-2026-12-01-malloc.json")
    title = text.splitlines()[0]
    assert title == "### a processor, 2026-12-01, an allocator that keeps freed memory"
    assert "Allocator: `MALLOC_MMAP_MAX_=0`." in text


def test_readme_has_the_yardstick_of_grouped_heads(run):
    case = run["cases"][0]
    case["yardsticks"] = {"sdpa-causal": case["yardsticks"].pop("sdpa")}
    assert "| 3.00 (compiled) | ~1.25 | 50% |" in tables.readme_table(run, "run.json")


def test_cases_of_a_shape_are_adjacent_in_any_order_of_runs(run):
    case = run["cases"][0]
    taken = ["a/float32/forward", "b/float32/forward", "a/bfloat16/forward", "a/float32/backward"]
    run["cases"] = [case | {"case": f"rel_attention/{name}"} for name in taken]
    text = tables.docs_tables(run, "run.json")
    rows = [line.split(" | ")[:3] for line in text.splitlines() if line.startswith(("| `", "|  "))]
    assert rows == [
        ["| `a`", "float32", "forward"],
        ["| ", "", "backward"],
        ["| ", "bfloat16", "forward"],
        ["| `b`", "float32", "forward"],
    ]


def test_docs_have_a_section_for_each_processor_and_readme_one_of_the_first(
    run, tmp_path, monkeypatch
):
    (tmp_path / "docs").mkdir()
    for name, mark in {"README.md": "speed", "docs/benchmarks.md": "bench"}.items():
        (tmp_path / name).write_text(f"<!-- {mark} -->\n<!-- /{mark} -->\n", encoding="utf-8")
    for name in ("one", "two"):
        run["machine"]["processor"] = f"processor {name}"
        (tmp_path / f"{name}.json").write_text(json.dumps(run), encoding="utf-8")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["tables", *(str(tmp_path / f"{x}.json") for x in ("one", "two"))]
    )
    tables.main()
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    docs = (tmp_path / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert "processor one" in readme
    assert "processor two" not in readme
    assert docs.index("### processor one") < docs.index("### processor two")


def test_only_the_text_between_the_marks_is_replaced(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- speed -->\nold\n<!-- /speed -->\nb\n", encoding="utf-8")
    tables.renew(document, "speed", r"new \1")
    text = document.read_text(encoding="utf-8")
    assert text == "a\n<!-- speed -->\nnew \\1\n<!-- /speed -->\nb\n"


def test_missing_marks_are_named(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("nothing here\n", encoding="utf-8")
    with pytest.raises(ValueError, match="speed"):
        tables.renew(document, "speed", "new")


def test_dropins_have_a_table_of_their_own(tmp_path):
    ratio = Comparison(*[Quartiles(3.0, 4.25, 5.0)] * 3, pairs=7, dropped=0, quiet=True)
    core = Figures(
        "dropin/parakeet_core_5min/float32/forward",
        seconds=Quartiles(0.3, 0.4, 0.5),
        peers={"hf-sdpa": ratio},
        peak_mib={"ours": 35.0, "hf-sdpa": 1700.0},
    )
    large = Figures("dropin/inkling_layer_global_32768/float32/forward", seconds=core.seconds)
    large.needed_bytes["hf-sdpa"] = 48 * 2**30
    decode = Figures("dropin/inkling_decode_4096/float32/forward", seconds=core.seconds)
    decode.gigabytes_per_second, decode.limit = 15.0, Limit("read", 20.0)
    nemo = Figures("dropin/nemo_local_300s/float32/forward", seconds=core.seconds)
    nemo.peers = {"unpatched": ratio}
    nemo.peak_mib = {"ours": 50.0, "unpatched": 90.0}
    own = Figures("rel_attention/shape/float32/forward", peers={"hf-sdpa": ratio})
    path = tmp_path / "run.json"
    write_json(path, MACHINE, [core, large, decode, nemo, own])
    run = json.loads(path.read_text(encoding="utf-8"))

    (table,) = tables.dropins_tables([(run, "run.json")])
    row = "`parakeet_core_5min` | float32 | forward | 400 | 4.25 | 35 / 1700 |"
    assert f"| `ParakeetEncoderAttention` without projections | {row}" in table
    row = "`nemo_local_300s` | float32 | forward | 400 | 4.25 | 50 / 90 |"
    assert f"| NeMo's `ConformerEncoder`, `rel_pos_local_attn` | {row}" in table
    assert "inkling" not in table, "no ratio, no row"
    assert "`shape`" not in table
    assert "parakeet" not in tables.readme_table(run, "run.json")
    elsewhere = {**run, "machine": {**run["machine"], "processor": "another"}}
    layer = {**run["cases"][0], "case": "dropin/espnet_60s/float32/forward"}
    later = {**run, "cases": [*run["cases"], layer]}
    runs = [(run, "run.json"), (elsewhere, "elsewhere.json"), (later, "later.json")]
    first, second = tables.dropins_tables(runs)
    assert first == table
    assert "ESPnet" in second
    assert "Parakeet" not in second
    assert "later.json" in second
    docs = tables.docs_tables(run, "run.json")
    assert "hf-sdpa needs 48 GiB" in docs
    assert "15 GB/s | 75%" in docs


def test_null_is_shown_as_a_missing_figure(tmp_path):
    nan, inf = float("nan"), float("inf")
    without = Comparison(*[Quartiles(nan, nan, inf)] * 3, pairs=1, dropped=0, quiet=True)
    figures = Figures(
        "rel_attention/shape/float32/forward",
        seconds=Quartiles(nan, nan, nan),
        gflops=inf,
        limit=Limit("sgemm", 180.0),
        peers={"eager": without},
        peak_mib={"ours": nan, "eager": nan},
    )
    path = tmp_path / "run.json"
    cases = write_json(path, MACHINE, [figures], [Share("dropout", nan, nan)])
    run = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)

    docs = tables.docs_tables(run, "run.json")
    assert "| `shape` | float32 | forward | – | – | – | eager – [–, –] | – |" in docs
    assert "| dropout | – | – |" in docs
    assert "| – | – (eager) | – | – |" in tables.readme_table(run, "run.json")
    for drawn in (cases, run["cases"]):
        plot.plot(tmp_path / "run.png", drawn, "a processor")


def test_every_drop_in_has_a_class_in_the_table():
    for case in registry.dropin_cases():
        shape = case.name.split("/")[1]
        assert any(shape.startswith(start) for start in tables.CLASSES), shape


def test_the_table_of_dropins_has_a_place():
    text = (tables.ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert "<!-- speed -->" in text
    assert tables.DROPINS_HEAD in text
