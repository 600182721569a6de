"""Checks the torch of the environment whose Python runs this file; the Makefile calls it.

    python tools/environment_torch.py installed   # print its version; status 1 if there is none
    python tools/environment_torch.py prepare     # once, after `pip install $TORCH`
    python tools/environment_torch.py check       # compare its version with $TORCH

`prepare` removes torch's requirements of CUDA packages and of one Triton version from its metadata
in this environment. With them pip would install gigabytes of CUDA although TORCH has --no-deps, and
would replace a torch that requires another Triton than the tests do.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

OLDEST = "2.11"
UNUSED = re.compile(r"^Requires-Dist: (nvidia|cuda|triton)\b.*\n", re.MULTILINE)


def installed() -> str | None:
    """The version of the installed torch."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def version_error(version: str | None, arguments: str, environment: Path) -> str | None:
    """Why the tests cannot run with this torch, in one sentence, or None.

    Args:
        version: that of the installed torch.
        arguments: the arguments of `pip install` that the user gave.
        environment: its folder.
    """
    if version is None:
        return f"TORCH={arguments!r} installs no torch: expected torch>={OLDEST} or the like"
    if _numbers(version) < _numbers(OLDEST):
        return (
            f"torch {version} is not supported: expected {OLDEST} or newer; remove {environment} "
            "and set TORCH= to another version"
        )
    exact = re.search(r"(?<![\w-])torch\s*==\s*([\w.+!]+)", arguments)
    if exact is not None and exact[1] not in (version, version.partition("+")[0]):
        return (
            f"{environment} has torch {version}, but TORCH= requires torch {exact[1]}: choose "
            "another environment with VENV=, and an interpreter without torch with PYTHON="
        )
    return None


def import_error(version: str, environment: Path) -> str | None:
    """Why `import torch` fails, in one sentence, or None."""
    command = [sys.executable, "-W", "ignore", "-c", "import torch"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return (
        f"torch {version} does not load ({lines[-1]}): remove {environment} and add the packages "
        "of the missing libraries to TORCH="
    )


def remove_requirements(environment: Path) -> None:
    """Removes the requirements in `UNUSED`; the metadata of a torch elsewhere are not changed."""
    torch = metadata.distribution("torch")
    path = Path(str(torch.locate_file(f"torch-{torch.version}.dist-info/METADATA")))
    if path.is_file() and environment in path.parents:
        path.write_text(UNUSED.sub("", path.read_text("utf-8")), "utf-8")


def main(action: str) -> str | int:
    """Returns the exit status, or a message that becomes the error."""
    version, environment = installed(), Path(sys.prefix)
    if action == "installed":
        print(version or "")
        return int(version is None)
    error = version_error(version, os.environ.get("TORCH", ""), environment)
    if action == "prepare" and version is not None and error is None:
        remove_requirements(environment)
        error = import_error(version, environment)
    return error or 0


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
