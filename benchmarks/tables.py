"""Figures as Markdown: `python -m benchmarks.tables FILE.json …` updates the marked tables.

README.md has a table of the first file. docs/benchmarks.md has a section for each file, and a table
of decoding from the first file with such cases. docs/integrations.md has tables of the drop-ins
from the first file with such cases and from later files of the same processor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS

ROOT = Path(__file__).parents[1]
NOTHING = "–"
PASSES = {
    "forward": "forward",
    "forward+backward": "forward + backward",
    "train_step": "training step",
    "evaluate": "evaluation of a segment",
    "evaluate_layer": "evaluation of a segment by one layer",
}

README_HEAD = """\
| shape | dtype | pass | ours, ms | fastest peer / ours | plain SDPA / ours | share of limit |
|---|---|---|---|---|---|---|"""

DOCS_HEAD = """\
| shape | dtype | pass | ours, ms | rate | of limit | peer or yardstick / ours | peak MiB |
|---|---|---|---|---|---|---|---|"""

DROPINS_HEAD = """\
| class | shape | dtype | pass | patched, ms | unpatched ÷ patched | peak MiB, patched / unpatched |
|---|---|---|---|---|---|---|"""
UNPATCHED = ("hf-sdpa", "unpatched")  # names of the peer
# By the beginning of the shape's name.
CLASSES = {
    "parakeet_core": "`ParakeetEncoderAttention` without projections",
    "parakeet_block": "`ParakeetEncoderBlock`",
    "parakeet_": "`ParakeetEncoder`",
    "inkling_layer": "`InklingAttention`",
    "inkling_": "`InklingAttention` without projections",
    "nemo_full": "NeMo's `ConformerEncoder`, `rel_pos`",
    "nemo_local": "NeMo's `ConformerEncoder`, `rel_pos_local_attn`",
    "nemotron_": "`NemotronAsrStreamingEncoder`",
    "espnet_": "ESPnet's `Encoder`, `rel_selfattn`",
    "wav2vec2_conformer_": "`Wav2Vec2ConformerEncoder`",
    "wav2vec2_bert_": "`Wav2Vec2BertEncoder`",
    "seamless_m4t_v2": "`SeamlessM4Tv2ConformerEncoder`",
    "seamless_m4t_": "`SeamlessM4TConformerEncoder`",
    "xlnet_": "`XLNetModel`",
}

DECODING_HEAD = (
    "| model, rows and memory | weights | tokens/s | ms per step | MB read per step | limit, ms "
    "| of the limit | Hugging Face ÷ ours |\n|---|---|---|---|---|---|---|---|"
)

PARTS_HEAD = """\
| part of the float32 training step | ms | share |
|---|---|---|"""

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument(
        "results", type=Path, nargs="+", help="JSON files that `python -m benchmarks` wrote"
    )
    paths: list[Path] = parser.parse_args().results
    runs = [(json.loads(path.read_text(encoding="utf-8")), path.name) for path in paths]
    renew(ROOT / "README.md", "speed", readme_table(*runs[0]))
    renew(ROOT / "docs" / "benchmarks.md", "bench", "\n\n".join(docs_tables(*run) for run in runs))
    decodes = (run for run in runs if any(_is("decode", case) for case in run[0]["cases"]))
    if decoding := next(decodes, None):
        renew(ROOT / "docs" / "benchmarks.md", "decode", decoding_table(*decoding))
    if dropins := dropins_tables(runs):
        renew(ROOT / "docs" / "integrations.md", "speed", "\n\n".join(dropins))


def renew(document: Path, mark: str, text: str) -> None:
    """Put `text` between `<!-- mark -->` and `<!-- /mark -->`.

    Raises:
        ValueError: the document has no such pair of marks.
    """
    before = document.read_text(encoding="utf-8")
    between = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    after, found = between.subn(lambda match: f"{match[1]}{text}\n{match[2]}", before)
    if found != 1:
        raise ValueError(
            f"{document}: expected one <!-- {mark} --> … <!-- /{mark} -->, got {found}"
        )
    document.write_text(after, encoding="utf-8")


def readme_table(run: Record, source: str) -> str:
    """The rows that a newcomer reads: forward and both passes of each shape, the strongest peer."""
    rows = _rows(
        [
            case
            for case in run["cases"]
            if _pass(case) in PASSES and case["peers"] and not _is("dropin", case)
        ],
        lambda case: (_ms(case), _fastest(case), _plain_sdpa(case), _share(case)),
    )
    return "\n".join([README_HEAD, *rows, "", _caption(run, source)])


def dropins_tables(runs: list[tuple[Record, str]]) -> list[str]:
    """A table for each run with drop-ins on the processor of the first such run.

    A case that is in several runs appears only in the first table.
    """
    tables: list[str] = []
    seen: set[str] = set()
    processor = ""
    for run, source in runs:
        rows = dropins_rows([case for case in run["cases"] if case["case"] not in seen])
        processor = processor or (run["machine"]["processor"] if rows else "")
        if rows and run["machine"]["processor"] == processor:
            seen |= {case["case"] for case in run["cases"]}
            tables.append("\n".join([DROPINS_HEAD, *rows, "", _caption(run, source)]))
    return tables


def dropins_rows(cases: list[Record]) -> list[str]:
    """Patched classes compared with unpatched ones, for the cases that have such a peer."""
    rows = []
    for case in cases:
        _, shape, dtype, direction = case["case"].split("/")
        unpatched = next((name for name in UNPATCHED if name in case["peers"]), "")
        if not _is("dropin", case) or not unpatched:
            continue
        class_name = next(CLASSES[start] for start in CLASSES if shape.startswith(start))
        peaks = (case["peak_mib"].get(name) for name in (OURS, unpatched))
        memory = " / ".join(_number(x, ".0f") for x in peaks)
        cells = (class_name, f"`{shape}`", dtype, PASSES[direction], _ms(case))
        rows.append(f"| {' | '.join((*cells, _ratio(case, unpatched), memory))} |")
    return rows


def decoding_table(run: Record, source: str) -> str:
    """Decoding steps, and the shortest time in which the memory's bandwidth lets them read."""
    rows = []
    for case in run["cases"]:
        if not _is("decode", case) or case["gigabytes_per_second"] is None:
            continue
        _, shape, weights, _ = case["case"].split("/")
        n_bytes = case["gigabytes_per_second"] * case["seconds"]["median"]  # in GB
        cells = (
            f"`{shape}`",
            weights,
            _figure(case["tokens_per_second"]),
            _ms(case),
            f"{n_bytes * 1e3:.0f}",
            _figure(n_bytes / case["limit"]["rate"] * 1e3),
            _share(case),
            _ratio(case, "hf"),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([DECODING_HEAD, *rows, "", _caption(run, source)])


def docs_tables(run: Record, source: str) -> str:
    """All cases of one run, under its processor and date, and the parts of a training step."""
    rows = _rows(
        [case for case in run["cases"] if not _is("decode", case)],
        lambda case: (_ms(case), _rate(case), _share(case), _everyone(case), _memory(case)),
    )
    parts = [
        f"| {part['part']} | {_figure(part['ms'])} | {_number(part['share'], '.1%')} |"
        for part in run["training_step"]
    ]
    date = re.search(r"\d{4}-\d{2}-\d{2}", source)
    title = f"### {run['machine']['processor']}, {date[0] if date else source}"
    if run["machine"].get("allocator"):
        title += ", an allocator that keeps freed memory"
    tables = [title, "", DOCS_HEAD, *rows, "", _caption(run, source)]
    return "\n".join([*tables, "", PARTS_HEAD, *parts] if parts else tables)


def _rows(cases: list[Record], cells: Callable[[Record], tuple[str, ...]]) -> Iterator[str]:
    """One row per case, in the order in which shapes, dtypes and passes first appear.

    Shape and dtype are written where they change.
    """
    names = [case["case"].split("/")[1:] for case in cases]
    order = {part: place for place, part in enumerate(dict.fromkeys(itertools.chain(*names)))}
    ordered = sorted(
        zip(names, cases, strict=True), key=lambda item: [order[part] for part in item[0]]
    )
    above = ["", "", ""]
    for name, case in ordered:
        shape = "" if name[0] == above[0] else f"`{name[0]}`"
        dtype = "" if name[:2] == above[:2] else name[1]
        yield f"| {' | '.join((shape, dtype, PASSES.get(name[2], name[2]), *cells(case)))} |"
        above = name


def _caption(run: Record, source: str) -> str:
    machine = run["machine"]
    settings = machine.get("allocator")
    tiles = ", ".join(f"{kind} {rate:.0f}" for kind, rate in machine["tiles"].items())
    return (
        f"Measured on an {machine['processor']}, {machine['threads']} threads, torch "
        f"{machine['torch']}; GFLOP/s there: torch.mm float32 {machine['matmul_float32']:.0f}, "
        f"bfloat16 {machine['matmul_bfloat16']:.0f}; products of cached tiles {tiles}. "
        f"{f'Allocator: `{settings}`. ' if settings else ''}"
        f"`~`: the machine was not quiet. From `benchmarks/results/{source}`."
    )


def _pass(case: Record) -> str:
    return str(case["case"].rpartition("/")[2])


def _is(kind: str, case: Record) -> bool:
    """Whether the name of the case begins with this part."""
    return str(case["case"]).startswith(f"{kind}/")


def _ms(case: Record) -> str:
    median = (case["seconds"] or {}).get("median")
    if median is None:
        return NOTHING
    return ("" if case["quiet"] else "~") + _figure(median * 1e3)


def _fastest(case: Record) -> str:
    name = case["fastest_peer"]
    return NOTHING if name is None else f"{_ratio(case, name)} ({name})"


def _plain_sdpa(case: Record) -> str:
    names = (name for name in ("sdpa", "sdpa-causal") if name in case["yardsticks"])
    return _ratio(case, next(names, ""))


def _ratio(case: Record, name: str) -> str:
    found = (case["peers"] | case["yardsticks"]).get(name)
    if found is None:
        return NOTHING
    return f"{'' if found['quiet'] else '~'}{_number(found['ratio']['median'], '.2f')}"


def _everyone(case: Record) -> str:
    """Every contender with the quartiles of its ratio, or the memory that it would need."""
    lines = []
    for name, one in (case["peers"] | case["yardsticks"]).items():
        q1, q3 = (_number(one["ratio"][end], ".2f") for end in ("q1", "q3"))
        lines.append(f"{name} {_ratio(case, name)} [{q1}, {q3}]")
    needed = case.get("needed_bytes", {})  # absent in older records
    lines += [f"{name} needs {n / 2**30:.0f} GiB" for name, n in needed.items()]
    return "<br>".join(lines) or NOTHING


def _rate(case: Record) -> str:
    if case["gflops"] is not None:
        return f"{case['gflops']:.0f} GFLOP/s"
    if case.get("gigabytes_per_second") is not None:  # absent in older records
        return f"{case['gigabytes_per_second']:.0f} GB/s"
    if case["tokens_per_second"] is not None:
        return f"{case['tokens_per_second']:,.0f} tokens/s"
    return NOTHING


def _share(case: Record) -> str:
    return _number(case["share_of_limit"], ".0%")


def _memory(case: Record) -> str:
    if OURS not in case["peak_mib"]:
        return NOTHING
    found = (case["peak_mib"].get(name) for name in case["peers"])
    peers = [mib for mib in found if mib is not None]
    return _number(case["peak_mib"][OURS], ".0f") + (f" / {min(peers):.0f}" if peers else "")


def _figure(value: float | None) -> str:
    """Three significant digits, or all before the point."""
    return _number(value, ".3g" if value is not None and value < 100 else ".0f")


def _number(value: float | None, form: str) -> str:
    """The number in this form; files of results have null for NaN and infinities."""
    return NOTHING if value is None else format(value, form)


if __name__ == "__main__":
    main()
