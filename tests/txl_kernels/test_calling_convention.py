"""An argument of `rel_attention` is named in few files besides the kernels that compute with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")
# Kernels with their launchers and problem structures; the specification; tests and documentation.
COMPUTING = (
    "csrc/cpu/",
    "csrc/cuda/",
    "csrc/include/txl/rel_attention",
    "txl_kernels/backends/reference/",
    "txl_kernels/backends/triton/rel_attention",
    "txl_kernels/testing/",
    "txl_kernels/ops/warmup.py",  # only its docstring lists the arguments
    "txl_kernels/ops/banded_attention.py",  # another op, which has some of the arguments
)


@pytest.mark.parametrize("argument", ["q_start", "pos_scale"])
def test_a_new_argument_is_named_in_at_most_six_files(argument):
    """The optional tensor and the number that were added last."""
    files = (path for folder in ("txl_kernels", "csrc") for path in (ROOT / folder).rglob("*"))
    sources = {str(path.relative_to(ROOT)): path for path in files if path.suffix in SUFFIXES}
    assert len(sources) > 50
    naming = [
        name
        for name, path in sources.items()
        if not name.startswith(COMPUTING)
        and re.search(rf"\b{argument}\b", path.read_text(encoding="utf-8"))
    ]
    assert 0 < len(naming) <= 6, naming
