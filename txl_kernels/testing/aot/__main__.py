"""`python -m txl_kernels.testing.aot`: the gates, their table and the model, of all shipped calls.

`gates` compiles and checks (`make gates`); `renew` also writes the table of inner loops and the
model's part of docs/benchmarks.md (`make model`). Needs a checkout, no GPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time

from txl_kernels.testing.aot import gates, model, shipped, survey


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
    found, failed, started = [], 0, time.monotonic()
    print(f"Triton {version}, {len(calls)} calls")
    for each in survey.survey(calls, on_error=lambda said: print(f"FAILED {said}", flush=True)):
        if each is None:
            failed += 1
            continue
        found.append(each)
        failures = list(each.failures)
        if options.what == "gates" and (grown := survey.growth_failure(each, table)):
            failures.append(grown)
        failed += bool(failures)
        row = " ".join(f"{name} {value}" for name, value in each.row.items())
        print(f"{'FAILED' if failures else 'ok':6} {each.name}: {row}", flush=True)
        for failure in failures:
            print(f"       {failure}", flush=True)
    print(f"{len(found)} launches, {failed} failed, {time.monotonic() - started:.0f} s")
    if options.what == "renew":
        # A part of the calls renews its own rows.
        kept = table if options.calls != ["*"] else {}
        survey.write_table(version, {**kept, **{each.name: each.row for each in found}})
        if options.calls == ["*"] and version == gates.TRITON_VERSIONS[0]:
            model.write(found, version)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
