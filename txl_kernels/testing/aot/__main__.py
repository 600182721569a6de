"""`python -m txl_kernels.testing.aot`: the gates, their table and the model, of all shipped calls.

`gates` compiles and checks (`make gates`); `renew` also writes the table of inner loops and the
model's part of docs/benchmarks.md (`make model`); `model` writes that part alone, from the launches
that stand in it. Needs a checkout, no GPU; nvcc for the CUDA kernels, which else are left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from txl_kernels.testing.aot import gates, model, nvcc, shipped, survey
from txl_kernels.testing.aot.survey import Surveyed

# What is compiled: a name for it, and how.
Job = tuple[str, Callable[[], Sequence[Surveyed]]]


def main() -> int:
    """Exit status: 1 where a gate does not hold."""
    parser = argparse.ArgumentParser(prog="python -m txl_kernels.testing.aot", description=__doc__)
    parser.add_argument("what", choices=("gates", "renew", "model"))
    parser.add_argument("calls", nargs="*", default=["*"], help="parts of names; all if none")
    options = parser.parse_args()
    everything, modelled = options.calls == ["*"], options.what == "model"
    version, compiler = survey.triton_version(), nvcc.compiler()
    is_shipped = version == gates.TRITON_VERSIONS[0]
    if modelled and not (everything and is_shipped):
        parser.error(f"model: of all launches and Triton {gates.TRITON_VERSIONS[0]} alone")
    started = time.monotonic()
    print(f"Triton {version}, {nvcc.version(compiler) if compiler else 'no nvcc: decode left out'}")
    found, failed = _compile(_triton_jobs(options.calls, modelled), version, options.what)
    decode: list[Surveyed] = []
    failed_too = 0
    if compiler and is_shipped and _chosen(nvcc.NAME, options.calls):
        arches = (90,) if modelled else tuple(nvcc.ARCHITECTURES)
        jobs = [(f"nvcc/sm_{a}", functools.partial(nvcc.survey, compiler, a)) for a in arches]
        decode, failed_too = _compile(jobs, nvcc.version(compiler), options.what)
    failed += failed_too
    print(f"{len(found + decode)} launches, {failed} failed, {time.monotonic() - started:.0f} s")
    if options.what == "renew":
        # A part of the calls renews its own rows.
        kept = {} if everything else survey.read_table().get(version, {})
        survey.write_table(version, {**kept, **{each.name: each.row for each in found}})
        if decode and compiler:
            survey.write_table(nvcc.version(compiler), {each.name: each.row for each in decode})
    if options.what != "gates" and everything and is_shipped:
        decoding = nvcc.version(compiler) if compiler else "no nvcc (decoding in CUDA is left out)"
        model.write([*found, *decode], f"Triton {version} and {decoding}")
    return int(failed > 0)


def _triton_jobs(parts: Sequence[str], modelled: bool) -> Iterator[Job]:
    """Each shipped call for each architecture, or only what the model's table needs."""
    for call, arch in itertools.product(shipped.shipped_calls(), shipped.ARCHITECTURES):
        if modelled and not (call.modelled and arch == model.ARCHITECTURE):
            continue
        if _chosen(call.name, parts):
            yield f"{call.name}/sm_{arch}", functools.partial(_surveyed, call, arch)


def _chosen(name: str, parts: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, f"*{part}*") for part in parts)


def _surveyed(call: shipped.Call, arch: int) -> list[Surveyed]:
    return list(survey.survey([call], [arch]))


def _compile(jobs: Iterable[Job], compiler: str, what: str) -> tuple[list[Surveyed], int]:
    """What the jobs give, each launch printed, and how many failed."""
    table = survey.read_table().get(compiler, {})
    found: list[Surveyed] = []
    failed = 0
    for name, compile_it in jobs:
        try:
            surveyed = compile_it()
        except Exception as error:  # the others are looked at all the same
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
            continue
        found += surveyed
        failed += sum(_failed(each, table, what) for each in surveyed)
    return found, failed


def _failed(each: Surveyed, table: Mapping[str, survey.Row], what: str) -> bool:
    """Prints a launch with what does not hold."""
    failures = list(each.failures)
    if what == "gates" and (grown := survey.growth_failure(each, table)):
        failures.append(grown)
    row = " ".join(f"{name} {value}" for name, value in each.row.items())
    print(f"{'FAILED' if failures else 'ok':6} {each.name}: {row}", flush=True)
    for failure in failures:
        print(f"       {failure}", flush=True)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
