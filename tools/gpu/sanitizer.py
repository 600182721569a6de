"""Stage "sanitizer": small GPU tests under compute-sanitizer."""

from __future__ import annotations

import re
import sys

from tools.gpu import command
from tools.gpu.stages import Context, UnavailableError

TOOLS = ("memcheck", "racecheck")
TESTS = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu", "-k", "sanitizer"]
# Each tensor in an allocation of its own: within torch's larger ones no access is out of bounds.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_COUNT = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def run(context: Context) -> None:
    """Results: the number of errors by tool, and the output if there are any.

    Raises:
        UnavailableError: compute-sanitizer is not installed, or cannot attach here.
        AssertionError: it reports errors, a test failed, or time ran out.
    """
    tests = [sys.executable, "-m", "pytest", *TESTS]
    if context.device.type == "cpu":
        command.run([*tests, "--collect-only"], context.seconds_left())
    sanitizer = command.find("compute-sanitizer")
    for number, tool in enumerate(TOOLS):
        seconds = (context.seconds_left() - 2) / (len(TOOLS) - number)
        status, printed = command.run([sanitizer, "--tool", tool, *tests], seconds, ENVIRONMENT)
        assert status is not None, f"{tool}: time ran out: {command.tail(printed, 3)}"
        context.results[tool] = {"errors": errors(printed), "tests": status}
        context.results[tool]["output"] = command.tail(printed, 40).splitlines()
        context.results["summary"] = [
            f"{name}: {context.results[name]['errors']} errors" for name in TOOLS[: number + 1]
        ]
        context.save()
        assert status == 0 and not errors(printed), f"{tool}:\n{command.tail(printed)}"  # noqa: PT018


def errors(printed: str) -> int:
    """The number of errors in the summary of compute-sanitizer.

    Raises:
        UnavailableError: there is no summary, as when it cannot attach.
    """
    count = _COUNT.search(printed)
    if count is None:
        raise UnavailableError(f"compute-sanitizer does not work here: {command.tail(printed, 3)}")
    return int(count[1] or count[2])
