"""Which module may import or include which other, checked in the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL_PACKAGE = ROOT / "python" / "transformer_xl"
KERNEL_PACKAGE = ROOT / "txl_kernels"
CSRC = ROOT / "csrc"

# The parts of transformer_xl from the bottom up: a part imports its own row and the rows below.
ROWS = (
    {"memory", "messages"},
    {"nn"},
    {"config", "config_fields"},
    {"data"},
    {"checkpoint_files", "checkpoint_state"},
    {"model", "model_guard", "key_value_window", "window_file", "integrations"},
    {"quantization"},
    {"checkpoint", "convert", "detokenization", "evaluation", "sampling", "scoring", "training"}
    | {"generation", "reader", "streaming_text"},
    {"cli"},
)
# These rows use tensors and numbers only; they do not import the configuration.
BLIND_TO_CONFIG = {"memory", "nn"}

IMPORT_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # any import of it raises
import txl_kernels
assert "transformer_xl" not in sys.modules
assert "txl_kernels._C" not in sys.modules, "_C was loaded at import"
import torch
assert not torch.ops.loaded_libraries, "the library was loaded at import"
"""


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from package import part` may name a module: both readings are yielded.
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def part_of(name: str) -> str | None:
    """The part of transformer_xl that a dotted name lies in; None for the package itself."""
    match = re.match(r"transformer_xl\.(\w+)", name)
    return match.group(1) if match and match.group(1) in set().union(*ROWS) else None


def row_of(part: str) -> int:
    return next(row for row, parts in enumerate(ROWS) if part in parts)


def includes(path: Path) -> Iterator[str]:
    for match in re.finditer(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text("utf-8"), re.M):
        yield match.group(1)


def all_includes(path: Path, seen: set[Path] | None = None) -> Iterator[tuple[Path, str]]:
    """Pairs (file, header that it includes), for a file and this project's headers below it."""
    seen = set() if seen is None else seen
    seen.add(path)
    for header in includes(path):
        ours = [p for p in (path.parent / header, CSRC / "include" / header) if p.exists()]
        if not ours:
            yield path, header
        elif ours[0] not in seen:
            yield from all_includes(ours[0], seen)


def per_isa_sources() -> list[Path]:
    text = (ROOT / "CMakeLists.txt").read_text("utf-8")
    listed = re.search(r"set\(TXL_ISA_SOURCES\s*([^)]*)\)", text)
    assert listed is not None
    return [ROOT / name for name in listed.group(1).split()]


@pytest.mark.parametrize("path", sources(KERNEL_PACKAGE), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_import_torch_and_themselves_only(path):
    allowed = {"torch", "txl_kernels"} | set(sys.stdlib_module_names)
    if KERNEL_PACKAGE / "backends" / "triton" in path.parents:
        allowed.add("triton")
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", sources(MODEL_PACKAGE), ids=lambda p: str(p.relative_to(ROOT)))
def test_transformer_xl_imports_downwards(path):
    own = path.relative_to(MODEL_PACKAGE).parts[0].removesuffix(".py")
    if own in {"__init__", "__main__"}:
        return  # the package itself re-exports names of all rows
    for name in imports(path):
        assert not name.startswith(("benchmarks", "tools")), "these are not installed"
        part = part_of(name)
        if part is None or part == own:
            continue
        assert row_of(part) <= row_of(own), f"{own} imports {part} from a row above its own"
        assert part != "config" or own not in BLIND_TO_CONFIG, f"{own} imports the configuration"


def test_every_part_of_transformer_xl_has_a_row():
    parts = {
        p.stem for p in MODEL_PACKAGE.iterdir() if p.suffix == ".py" or any(p.glob("*.py"))
    } - {"__init__", "__main__"}
    assert parts <= set().union(*ROWS)


def test_kernels_import_without_triton_and_load_nothing_native():
    subprocess.run([sys.executable, "-c", IMPORT_WITHOUT_TRITON], check=True)


def test_cuda_kernels_include_cuda_and_plain_headers_only():
    """No torch header, and of this project only headers in standard C++."""
    kernels = [*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")]
    assert kernels
    for path in kernels:
        assert path.parent == CSRC / "cuda"
        for file, header in all_includes(path):
            allowed = re.match(r"(cuda_(runtime|fp16|bf16)\.h|[a-z_]+)$", header)
            assert allowed, f"{file} includes {header}"


def test_torch_glue_includes_no_cuda_header():
    assert list((CSRC / "ops").glob("*_cuda.cpp"))
    for path in (CSRC / "ops").glob("*"):
        for file, header in all_includes(path):
            assert not re.match(r"(c10|ATen)/cuda|cuda", header), f"{file} includes {header}"


def test_per_instruction_set_files_include_atens_vectors_and_plain_types_only():
    """A function inlined from elsewhere could be kept in its AVX-512 form for every processor."""
    allowed = r"ATen/cpu/vec/|c10/util/(BFloat16|Half)\.h$|txl/|[a-z_]+$|immintrin\.h$"
    for path in per_isa_sources():
        for file, header in all_includes(path):
            assert re.match(allowed, header), f"{file} includes {header}"


def test_module_includes_no_torch_header():
    headers = [header for _, header in all_includes(CSRC / "module.cpp")]
    assert not [header for header in headers if re.match(r"(ATen|c10|torch)/", header)]
