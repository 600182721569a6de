"""Generate txl_kernels as a kernel for Hugging Face's `kernels`: its sources and built variants."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.hub.generate import generate


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m tools.hub", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("build/hub"), help="folder (default: %(default)s)"
    )
    parser.add_argument("--repo-id", help="repository on the Hub, owner/name")
    options = parser.parse_args(arguments)
    try:
        variants = generate(options.out, options.repo_id)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: sources for kernel-builder, and {len(variants)} variants:")
    for path in variants:
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
