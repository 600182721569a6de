"""Stage "ncu": four launches under Nsight Compute: tensor pipe, shared-memory conflicts, stalls."""

from __future__ import annotations

import csv
import re
import sys

import torch

from tools.gpu import command, sweep
from tools.gpu.stages import Context, UnavailableError
from txl_kernels.backends.triton import interprets

SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats"),
    *("MemoryWorkloadAnalysis_Tables", "MemoryWorkloadAnalysis_Chart", "Occupancy"),
)
LAUNCHES = 4  # the forward pass at D 64; forward, dk/dv and dq/dr at D 128
_KEPT = re.compile(r"tensor|bank.?conflict|stall|throughput|duration|achieved occupancy", re.I)


def run(context: Context) -> None:
    """Results: by launch, the metrics and the profiler's advice that concern these questions.

    Raises:
        UnavailableError: ncu is not installed, or cannot read the counters here.
    """
    if context.device.type == "cpu" and interprets():
        profiled(context.device)
    ncu = command.find("ncu")
    sections = [word for section in SECTIONS for word in ("--section", section)]
    status, printed = command.run(
        [
            *(ncu, "--clock-control", "none", "--target-processes", "all", *sections),
            *("--kernel-name", "regex:^_rel_attention_(fwd|bwd_dkdv|bwd_dqdr)"),
            *("--launch-count", str(LAUNCHES), "--csv", "--page", "details"),
            *("--print-details", "all", sys.executable, "-m", "tools.gpu.ncu"),
        ],
        context.seconds_left() - 1,
    )
    found = parse(printed)
    context.results |= found
    context.save()
    if not found:
        raise UnavailableError(f"ncu reads no counters here: {command.tail(printed, 3)}")
    context.results["summary"] = [
        f"{launch}: {name} {value}"
        for launch, metrics in found.items()
        for name, value in metrics.items()
        if re.search(r"tensor|conflict|Duration", name)
    ]
    context.save()
    assert status == 0, f"ncu ended with status {status}: {command.tail(printed, 3)}"


def parse(printed: str) -> dict[str, dict[str, str]]:
    """By launch, "metric" or "section: rule" and its value, from ncu's CSV among other output."""
    lines = printed.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID","')), len(lines))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        metrics = found.setdefault(f"{row['ID']} {row['Kernel Name']}", {})
        if _KEPT.search(row.get("Metric Name") or ""):
            metrics[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
        if _KEPT.search(row.get("Rule Description") or ""):
            metrics[f"{row['Section Name']}: {row['Rule Name']}"] = row["Rule Description"]
    return found


def profiled(device: torch.device) -> None:
    """The calls that ncu profiles; a backward pass needs a forward pass before it."""
    sweep.attention_calls(64, device)
    sweep.attention_calls(128, device)[1]()


if __name__ == "__main__":
    profiled(torch.device("cuda"))
