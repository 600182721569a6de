"""Private parts of torch are used in `txl_kernels/torch_private.py` only: a scan of the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from txl_kernels import torch_private

ROOT = Path(__file__).resolve().parents[1]
PLACE = Path(torch_private.__file__)
SOURCES = [
    path
    for package in (
        ROOT / "txl_kernels",
        ROOT / "python" / "transformer_xl",
        ROOT / "tools" / "hub" / "overlay",
    )
    for path in sorted(package.rglob("*.py"))
    if path != PLACE
]
# Documented attributes of named tuples and of sys, and private parts of other libraries.
NOT_OF_TORCH = {
    *("_asdict", "_fields", "_getframe", "_make", "_replace"),
    *("_pack_args", "_patch_lang", "_LangPatchScope"),  # Triton
    *("_get_output_attention_mask", "_resolve_attn_context"),  # transformers, of checked versions
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def is_private_path(dotted: str) -> bool:
    """Whether a dotted name of torch contains a private or experimental part."""
    parts = dotted.split(".")
    return parts[0] == "torch" and any(is_private(x) or x == "experimental" for x in parts)


def own_names() -> set[str]:
    """The private names that the two packages define and that no class of torch has."""
    own: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
    library = torch.library.Library("txl_scan", "FRAGMENT")
    bases = (nn.Linear(1, 1), torch.ones(1), torch.autograd.Function, library)
    return own.union(NOT_OF_TORCH).difference(*map(dir, bases))


class PrivateUses(ast.NodeVisitor):
    """Collects the lines and names of private parts of torch that a file uses."""

    def __init__(self, own: set[str]) -> None:
        self.own, self.found = own, []

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, x.name) for x in node.names if is_private_path(x.name)]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if is_private_path(f"{node.module}.{alias.name}"):
                self.found.append((node.lineno, alias.name))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if is_private(node.attr) and node.attr not in self.own:
            self.found.append((node.lineno, node.attr))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr"):
            for argument in node.args:
                text = argument.value if isinstance(argument, ast.Constant) else None
                if isinstance(text, str) and is_private(text) and text not in self.own:
                    self.found.append((node.lineno, text))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        text = node.value if isinstance(node.value, str) else ""
        if re.fullmatch(r"torch(\.\w+)+", text) and is_private_path(text):
            self.found.append((node.lineno, text))


def private_uses(source: str, own: set[str]) -> Iterator[tuple[int, str]]:
    """Lines and names, for the text of a file."""
    visitor = PrivateUses(own)
    visitor.visit(ast.parse(source))
    yield from visitor.found


@pytest.fixture(scope="module")
def own() -> set[str]:
    return own_names()


def test_private_parts_of_torch_are_used_in_one_module_only(own):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in SOURCES
        for line, name in private_uses(path.read_text("utf-8"), own)
    ]
    assert not found, f"import these from txl_kernels.torch_private: {found}"


def test_every_private_part_has_a_check_of_its_behaviour():
    used = {name for _, name in private_uses(PLACE.read_text("utf-8"), set())}
    checks = ROOT / "tests" / "txl_kernels" / "test_torch_private.py"
    checked = {
        argument.value
        for node in ast.walk(ast.parse(checks.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "checks"
        for argument in node.args
    }
    assert used == checked


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "from torch import _C",
        "from torch._C import DispatchKey",
        "from torch.fx.experimental import proxy_tensor",
        "torch._assert_async(x)",
        "torch._C._get_tracing_state()",
        "x._version",
        "self._forward_hooks",
        "getattr(x, '_base')",
        "sys.modules.get('torch._inductor')",
    ],
)
def test_the_scan_finds_a_private_part(source, own):
    assert list(private_uses(source, own))


@pytest.mark.parametrize(
    "source", ["call._replace(q=q)", "self._tokens", "x.__class__", "'torch.onnx'", "import torch"]
)
def test_the_scan_accepts_public_names_and_our_own(source, own):
    assert not list(private_uses(source, own))


IMPORTS = """
import sys, torch
before = set(sys.modules)
import txl_kernels
print(*(x for x in set(sys.modules) - before if x.startswith(("torch.", "triton"))))
import transformer_xl.cli.app
print(*(x for x in ("torch._dynamo", "torch.utils.cpp_extension") if x in sys.modules))
"""


def test_importing_the_packages_loads_nothing_slow_or_noisy_of_torch():
    """torch._dynamo takes seconds; cpp_extension warns where nvcc is installed but no GPU."""
    command = [sys.executable, "-c", IMPORTS]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_a_torch_without_a_private_part_is_an_error_that_names_it():
    code = (
        "import torch.nn.modules.module as module; del module._has_any_global_hook; "
        "import txl_kernels"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    error = run.stderr.splitlines()[-1]
    assert error.startswith("ImportError: txl_kernels uses a private part of torch that torch 2.")
    assert "_has_any_global_hook" in error
