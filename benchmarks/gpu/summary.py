"""The table at the end of `make gpu`: what each stage said, speeds, and what they had to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from txl_kernels.testing.asked import ASKED

OURS, FLASH, EAGER = "ours", "flash", "eager"
PEERS = (EAGER, "compiled", "sdpa+bias", "flex")  # whose "over_ours" is from one run with ours
NOTHING = "–"

Rows = Mapping[str, Mapping[str, Any]]


class Target(NamedTuple):
    """A figure that was promised: `value` of a case's rows, and the least or the most it may be."""

    case: str
    says: str
    value: Callable[[Rows, Mapping[str, Any]], float]
    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )


def show(report: Mapping[str, Any]) -> None:
    """Prints stages, speeds, and promises."""
    machine = report["machine"]
    print(
        f"\n{machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, "
        f"commit {str(machine['commit'])[:12]}{' with changes' if machine['changed'] else ''}\n"
    )
    print_table(
        ["stage", "status", "s", "note"],
        [
            [name, record["status"], f"{record['seconds']:.0f}", _first_line(record["error"])]
            for name, record in report["stages"].items()
        ],
    )
    timings = report["stages"].get("timings", {}).get("results", {})
    if timings.get("cases"):
        print_table(
            ["case", "contender", "ms", "useful TFLOP/s", "/ ours", "peak MiB", "note"],
            [
                [case, name, *_figures(row)]
                for case, rows in timings["cases"].items()
                for name, row in rows.items()
            ],
        )
    print_table(["promised", "due", "found", ""], promises(timings))


def promises(timings: Mapping[str, Any]) -> list[list[str]]:
    """One row per target: met, missed or not measured."""
    rows = []
    for target in TARGETS:
        due = f"≥ {target.least:g}" if target.least is not None else f"≤ {target.most:g}"
        try:
            value = target.value(timings["cases"][target.case], timings)
        except (KeyError, ValueError):
            rows.append([f"{target.case}: {target.says}", due, NOTHING, "not measured"])
            continue
        verdict = "met" if target.met(value) else "MISSED"
        rows.append([f"{target.case}: {target.says}", due, f"{value:.3g}", verdict])
    return rows


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as what stands in them."""
    widths = [max(len(row[n]) for row in [header, *rows]) for n in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print()


def _figures(row: Mapping[str, Any]) -> list[str]:
    def figure(name: str, form: str) -> str:
        return format(row[name], form) if name in row else NOTHING

    ms = f"{row['ms']['median']:.3g}" if "ms" in row else NOTHING
    rate = figure("useful_tflops", ".0f")
    if "of_copy_bandwidth" in row:
        rate = f"{row['of_copy_bandwidth']:.0%} of copy"
    return [
        ms,
        rate,
        figure("over_ours", ".2f"),
        figure("peak_mib", ".0f"),
        _first_line(row.get("note")),
    ]


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0][:100]


def _ms(rows: Rows, name: str) -> float:
    return float(rows[name]["ms"]["median"])


def _rate(rows: Rows, _: Mapping[str, Any]) -> float:
    return float(rows[OURS]["useful_tflops"])


def _to_flash(rows: Rows, _: Mapping[str, Any]) -> float:
    return _ms(rows, OURS) / _ms(rows, FLASH)


def _to_fastest_peer(rows: Rows, _: Mapping[str, Any]) -> float:
    return min(rows[name]["over_ours"] for name in PEERS if "ms" in rows.get(name, {}))


def _to_eager(rows: Rows, _: Mapping[str, Any]) -> float:
    return float(rows[EAGER]["over_ours"])


def _memory_to_flash(rows: Rows, _: Mapping[str, Any]) -> float:
    return float(rows[OURS]["peak_mib"]) / float(rows[FLASH]["peak_mib"])


def _of_copy(rows: Rows, _: Mapping[str, Any]) -> float:
    return float(rows[OURS]["of_copy_bandwidth"])


def _of_gemm(rows: Rows, timings: Mapping[str, Any]) -> float:
    return float(rows[OURS]["useful_tflops"]) * 1e12 / float(timings["gemm_flop_per_second"])


def _to_module(rows: Rows, _: Mapping[str, Any]) -> float:
    return _ms(rows, "torch's module") / _ms(rows, OURS)


def _targets() -> tuple[Target, ...]:
    found = []
    for shape in ("train_d64", "train_d128"):
        forward, backward = (ASKED[f"{shape}/{part}"] for part in ("forward", "backward"))
        both = f"{shape}/forward+backward"
        found += [
            Target(f"{shape}/forward", "useful TFLOP/s", _rate, least=forward.tflops),
            Target(f"{shape}/forward", "time over flash's", _to_flash, most=forward.over_flash),
            Target(f"{shape}/forward", "fastest peer's time over ours", _to_fastest_peer, least=2),
            Target(f"{shape}/forward", "eager's time over ours", _to_eager, least=5),
            Target(f"{shape}/backward", "useful TFLOP/s", _rate, least=backward.tflops),
            Target(f"{shape}/backward", "time over flash's", _to_flash, most=backward.over_flash),
            Target(both, "fastest peer's time over ours", _to_fastest_peer, least=2),
            Target(both, "eager's time over ours", _to_eager, least=5),
            Target(both, "peak memory over flash's", _memory_to_flash, most=1.15),
        ]
    least = ASKED["decode/forward"].of_copy
    found.append(Target("decode/forward", "share of copy bandwidth", _of_copy, least=least))
    for op in ("adaptive_loss", "adaptive_nll"):
        case = f"{op}/forward+backward"
        share = ASKED[case].of_gemm
        found += [
            Target(case, "share of the rate of large products", _of_gemm, least=share),
            Target(case, "torch's module's time over ours", _to_module, least=3),
        ]
    return tuple(found)


TARGETS = _targets()
