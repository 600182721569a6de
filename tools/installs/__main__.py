"""Install the project in every way that users do, and run the smoke test after each.

The first interpreter is used for all ways, the others for `pip install .` and the wheel. Each must
have torch; the new environments contain links to it. Only build tools are downloaded. The builds
are not optimised unless CXXFLAGS and CMAKE_ARGS are set.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.installs.environments import Interpreter, create, interpreter, run
from tools.installs.ways import (
    SMOKE_TEST,
    WAYS,
    Place,
    Sources,
    Way,
    environment,
    prepare,
    wheel_way,
)


class Row(NamedTuple):
    """The result of one installation."""

    way: str
    python: str
    torch: str
    native: str  # "yes", or the reason why not
    smoke: str  # "passed", or the part that failed
    log: Path

    def line(self) -> str:
        """The row of the table."""
        return "  ".join(
            [
                f"{self.way:51}",
                f"{self.python:8}",
                f"{self.torch:13}",
                f"smoke test {self.smoke}",
                f"native: {self.native}",
            ]
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if an installation failed, 2 for bad arguments."""
    options = _options(arguments)
    out = options.out.resolve()
    try:
        bases = [interpreter(path) for path in options.python]
        missing = [str(path) for path in options.wheel if not path.is_file()]
        if missing:
            raise ValueError(f"wheel: expected a file, {missing[0]} does not exist")
        wheels = [wheel_way(path.resolve()) for path in options.wheel]
        jobs = [job for job in _jobs(bases, wheels) if fnmatch.fnmatch(_name(*job), options.only)]
        if not jobs:
            raise ValueError(f"only: no installation has a name like {options.only!r}")
    except ValueError as error:
        print(f"python -m tools.installs: {error}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    with (out / "prepare.log").open("w", encoding="utf-8") as log:
        sources = prepare(out, bases[0], log)
    rows = []
    for way, base in jobs:
        rows.append(install(way, base, sources, out))
        print(rows[-1].line(), flush=True)
    (out / "summary.txt").write_text("".join(f"{row.line()}\n" for row in rows), encoding="utf-8")
    print(f"logs and summary: {out}")
    return int(any(row.smoke != "passed" for row in rows))


def install(way: Way, base: Interpreter, sources: Sources, out: Path) -> Row:
    """Installs in a fresh environment and runs the smoke test; all output is in one log."""
    name = _name(way, base)
    path = out / f"{name}.log"
    result = out / name / "native.json"
    stage = "not run: the installation failed"
    with path.open("w", encoding="utf-8") as log:
        try:
            folder = out / name
            folder.mkdir(exist_ok=True)
            result.unlink(missing_ok=True)
            environment_folder = "Ümgebung mit Leerzeichen" if way.name == "path" else "env"
            python = create(folder / environment_folder, base, log)
            place = Place(folder, python, environment(python), log)
            origin = way.install(place, sources)
            stage = "failed"
            # numpy is not installed: torch warns.
            test = (python, "-W", "ignore:Failed to init", SMOKE_TEST, "--origin", origin)
            expected = () if way.is_native else ("--without-native",)
            run((*test, "--json", result, *expected), log, cwd=Path("/"), env=place.env)
            stage = "passed"
        except (OSError, subprocess.CalledProcessError):
            log.write(traceback.format_exc())
    native = f"unknown, see {path}"
    if result.exists():  # the smoke test writes it first
        native = json.loads(result.read_text(encoding="utf-8"))["native"]
    return Row(way.text, base.python, base.torch, native, stage, path)


def _jobs(bases: Sequence[Interpreter], wheels: Sequence[Way]) -> Iterator[tuple[Way, Interpreter]]:
    for n, base in enumerate(bases):
        yield from ((way, base) for way in (WAYS if n == 0 else WAYS[:1]))
        yield from ((way, base) for way in wheels)


def _name(way: Way, base: Interpreter) -> str:
    """The name of an installation: of its folder and its log."""
    return f"{way.name}-python{base.python}-torch{base.torch}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.installs", description=__doc__)
    parser.add_argument(
        "--python",
        type=Path,
        nargs="+",
        default=[Path(sys.executable)],
        help="interpreters that have torch (default: the one that runs this command)",
    )
    parser.add_argument(
        "--wheel", type=Path, nargs="*", default=[], help="wheels with native libraries to try"
    )
    parser.add_argument(
        "--only", default="*", help="pattern of names, such as 'pip-*' or '*-torch2.11*'"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/installs"), help="folder (default: %(default)s)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
