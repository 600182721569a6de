"""`python -m txl_kernels.testing.aot`: the gates, their table and the model, of all shipped calls.

`gates` compiles and checks (`make gates`); `renew` also writes the table of inner loops and the
model's part of docs/benchmarks.md (`make model`). Needs a checkout, no GPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import sys
import time
from collections.abc import Mapping

from txl_kernels.testing.aot import gates, model, shipped, survey
from txl_kernels.testing.aot.survey import Surveyed


def main() -> int:
    """Exit status: 1 where a gate does not hold."""
    parser = argparse.ArgumentParser(prog="python -m txl_kernels.testing.aot", description=__doc__)
    parser.add_argument("what", choices=("gates", "renew"))
    parser.add_argument("calls", nargs="*", default=["*"], help="parts of names; all if none")
    options = parser.parse_args()
    calls = [
        call
        for call in shipped.shipped_calls()
        if any(fnmatch.fnmatch(call.name, f"*{part}*") for part in options.calls)
    ]
    version = survey.triton_version()
    table = survey.read_table().get(version, {})
    found: list[Surveyed] = []
    failed, started = 0, time.monotonic()
    print(f"Triton {version}, {len(calls)} calls")
    for call, arch in itertools.product(calls, shipped.ARCHITECTURES):
        try:
            surveyed = list(survey.survey([call], [arch]))
        except Exception as error:  # the others are looked at all the same
            failed += 1
            print(f"FAILED {call.name}/sm_{arch}: {type(error).__name__}: {error}", flush=True)
            continue
        found += surveyed
        failed += sum(_failed(each, table, options.what) for each in surveyed)
    print(f"{len(found)} launches, {failed} failed, {time.monotonic() - started:.0f} s")
    if options.what == "renew":
        # A part of the calls renews its own rows.
        kept = table if options.calls != ["*"] else {}
        survey.write_table(version, {**kept, **{each.name: each.row for each in found}})
        if options.calls == ["*"] and version == gates.TRITON_VERSIONS[0]:
            model.write(found, version)
    return int(failed > 0)


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
