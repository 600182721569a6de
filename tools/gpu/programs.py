"""Stages that run other programs: pytest, Nsight Compute and compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence

import torch

from benchmarks.cases import OURS
from tools.gpu.runner import ROOT, Context, UnavailableError
from tools.gpu.sweep import training_case

CUDA = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
PYTEST = (sys.executable, "-m", "pytest", "-q", "tests/gpu", "-m", "gpu")
# Small tests, for compute-sanitizer and for a rehearsal, whose interpreter has no bfloat16.
SANITIZED = "shift or torch.float16 and (wild_lengths or head_41 or dropout or two_tails)"
REHEARSED = "shift and native or torch.float16 and (one_query or two_tails) or training"
PROCESSES = str(min(8, os.cpu_count() or 1))  # each holds a CUDA context of about half a GiB
NCU = (
    "--clock-control none --launch-count 4 --page details --print-details all"
    " --kernel-name regex:_rel_attention_(fwd|bwd_dkdv|bwd_dqdr)_kernel --section SpeedOfLight"
    " --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis_Tables"
    " --section WarpStateStats"
)
PROFILED = "import torch, tools.gpu.programs as p; p.profiled_calls(torch.device('cuda'))"


def full_parity(context: Context) -> None:
    """All GPU tests, in several processes; a rehearsal runs a few on the CPU."""
    options = ["--device", "cpu", "-k", REHEARSED] if context.is_rehearsal else ["-n", PROCESSES]
    status, lines = run_program([*PYTEST, *options], context.seconds_left() - 2)
    context.results["output"] = lines[-60:]
    context.results["summary"] = [x for x in lines[:-1] if x.startswith("FAILED")] + lines[-1:]
    assert status == 0, "time ran out" if status is None else f"pytest ended with status {status}"


def ncu(context: Context) -> None:
    """Four launches under Nsight Compute: tensor pipe, shared-memory conflicts, stalls."""
    if context.is_rehearsal:
        profiled_calls(context.device)
    command = [find_program("ncu"), *NCU.split(), sys.executable, "-c", PROFILED]
    status, lines = run_program(command, context.seconds_left() - 2)
    context.results["output"] = lines
    kept = re.compile(r"_rel_attention|tensor|bank.?conflict|stall|throughput|duration", re.I)
    context.results["summary"] = [" ".join(line.split()) for line in lines if kept.search(line)]
    if status != 0 or "_rel_attention" not in str(lines):
        raise UnavailableError(f"ncu ended with status {status}: {lines[-3:]}")


def profiled_calls(device: torch.device) -> None:
    """Four launches: forward at D 64; forward, dk/dv and dq/dr at D 128."""
    training_case(64, "forward", device).results(OURS)
    training_case(128, "backward", device).results(OURS)


def sanitizer(context: Context) -> None:
    """The smallest GPU tests under compute-sanitizer: memcheck, then racecheck."""
    program = find_program("compute-sanitizer")
    # Each tensor has an allocation: within torch's larger ones no access is out of bounds.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    for tool, parts in (("memcheck", 2), ("racecheck", 1)):
        seconds = (context.seconds_left() - 2) / parts
        status, lines = run_program([program, "--tool", tool, *PYTEST, "-k", SANITIZED], seconds)
        found = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) ", "\n".join(lines))
        context.results[tool] = lines[-40:]
        context.results.setdefault("summary", []).append(f"{tool}: {found[0] if found else None}")
        context.save()
        if status is not None and found is None:
            raise UnavailableError(f"compute-sanitizer does not work here: {lines[-3:]}")
        assert (status, found and found[1]) == (0, "0"), f"{tool}: {lines[-10:]}"


def find_program(name: str) -> str:
    """The program of the active Python, on PATH, or in CUDA's folders; else UnavailableError."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath), *CUDA]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise UnavailableError(f"{name} is not installed")
    return found


def run_program(command: Sequence[str], seconds: float) -> tuple[int | None, list[str]]:
    """The exit status, None if it was ended after `seconds`, and the lines that are not empty."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
        output.seek(0)
        return process.returncode, [line for line in output.read().splitlines() if line.strip()]
