"""Look for known vulnerabilities in the packages that the project's extras install.

    python tools/audit.py [--service pypi|osv]     in an environment with pip-audit

pip resolves the extras without installing them. A package that the service does not know, or a
service that cannot be reached, is a failure: nothing counts as audited that was not.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("lm", "test", "bench", "dev", "fuzz")
OWN = re.compile(r"transformer-xl\[([\w,]+)\]")


def requirements(project: Mapping[str, Any], extras: Sequence[str] = EXTRAS) -> list[str]:
    """The requirements of the package and of these extras, with those that they refer to."""
    found = list(project["dependencies"])
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            own = OWN.fullmatch(requirement)
            found += requirements(project, own[1].split(",")) if own else [requirement]
    return list(dict.fromkeys(found))


def resolved(wanted: Sequence[str]) -> list[str]:
    """The packages that pip would install for these requirements, as NAME==VERSION."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--dry-run", "--ignore-installed", "--report", "-", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"audit: pip cannot resolve the extras: {_last_line(done.stderr)}")
    found = (package["metadata"] for package in json.loads(done.stdout)["install"])
    # A local version, such as PyTorch's +cpu, is in no list of vulnerabilities.
    return sorted(f"{each['name']}=={each['version'].partition('+')[0]}" for each in found)


def verdict(report: Mapping[str, Any] | None, packages: Sequence[str], error: str) -> list[str]:
    """What is wrong, a line each: nothing if every package was audited and none is vulnerable.

    Args:
        report: pip-audit's, or None if it wrote none.
        packages: the packages that it was given.
        error: the end of its error output.
    """
    if report is None:
        return [f"nothing was audited: the vulnerability service cannot be reached ({error})"]
    known = {entry["name"].lower(): entry for entry in report["dependencies"]}
    lines, missed = [], []
    for package in packages:
        name = package.partition("==")[0]
        entry = known.get(name.lower().replace("_", "-"), known.get(name.lower()))
        if entry is None or "skip_reason" in entry:
            missed.append(package)
            continue
        for fault in entry["vulns"]:
            fixed = ", ".join(fault["fix_versions"]) or "no version"
            lines.append(f"{package}: {fault['id']}, fixed in {fixed}")
    if missed:
        number = f"{len(missed)} of {len(packages)} packages were not audited"
        lines.append(f"{number}: the vulnerability service does not know {', '.join(missed)}")
    return lines


def audit(packages: Sequence[str], service: str) -> list[str]:
    """Run pip-audit over exactly these packages; returns the lines of `verdict`."""
    with tempfile.TemporaryDirectory() as folder:
        pinned, output = Path(folder, "pinned.txt"), Path(folder, "report.json")
        pinned.write_text("\n".join(packages) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", service]
        command += ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", "30"]
        command += ["--requirement", str(pinned), "--format", "json", "--output", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        report = None
        if output.exists() and (text := output.read_text(encoding="utf-8")).strip():
            report = json.loads(text)
        return verdict(report, packages, _last_line(done.stderr))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def main() -> int:
    """The command; returns its exit status."""
    import tomli  # a requirement of pip-audit

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi")
    service = parser.parse_args().service
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = resolved(requirements(project))
    faults = audit(packages, service)
    for line in faults:
        print(f"audit: {line}", file=sys.stderr)
    if not faults:
        print(f"audit: {len(packages)} packages, none with a known vulnerability")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
