"""`python -m tools.hub`: the folder that it writes, and the kernel loaded from that folder."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

import txl_kernels
from tools.hub import __main__ as command
from tools.hub import generate
from tools.hub.relative import with_relative_imports

ROOT = Path(__file__).resolve().parents[3]
VARIANTS = [f"build/torch-{backend}" for backend in generate.BACKENDS]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Path:
    """The folder of a kernel, outside the checkout."""
    out = tmp_path_factory.mktemp("hub") / "kernel"
    assert command.main(["--out", str(out), "--repo-id", "someone/txl-kernels"]) == 0
    return out


@pytest.fixture(scope="module")
def trees(kernel) -> dict[str, ast.Module]:
    """The syntax trees of the kernel's modules, by path."""
    package = kernel / "torch-ext" / "txl_kernels"
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text("utf-8"))
        for path in package.rglob("*.py")
    }


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def run(script: str, kernel: Path, *arguments: str, **env: str) -> dict:
    """The JSON that a script of this folder prints, in a process outside the checkout."""
    hidden = ("PYTHONPATH", "TRITON_INTERPRET")
    plain = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), kernel, *arguments],
        cwd=kernel,
        env={**plain, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_settings_are_those_of_edition_5(kernel):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert tomllib.loads((kernel / "build.toml").read_text("utf-8")) == {
        "general": {
            "name": "txl-kernels",
            "version": int(project["version"].split(".")[0]),
            "edition": 5,
            "license": "Apache-2.0",
            "backends": ["cpu", "cuda"],
            "hub": {"repo-id": "someone/txl-kernels"},
        },
        "torch-noarch": {"pyext": ["py", "json", "txt"]},
    }


def test_a_variant_is_the_source_with_its_namespace_and_description(kernel):
    source = files(kernel / "torch-ext" / "txl_kernels")
    assert "_ops.py" not in source  # the builder writes it and refuses to replace one
    assert "backends/triton/launch_table.json" in source
    assert source["LICENSE.txt"] == (ROOT / "LICENSE").read_bytes()
    ids = set()
    for variant in VARIANTS:
        built = files(kernel / variant)
        metadata, operators = json.loads(built.pop("metadata.json")), built["_ops.py"].decode()
        digests = {
            name: base64.b64encode(hashlib.sha256(content).digest()).decode()
            for name, content in built.items()
        }
        assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
        assert metadata["backend"]["type"] == variant.rpartition("-")[2]
        assert f'"{metadata["id"]}"' in operators
        assert metadata["id"].isidentifier()
        ids.add(metadata["id"])
        assert built == {**source, "_ops.py": built["_ops.py"]}
    assert len(ids) == len(VARIANTS)


def bound_names(tree: ast.Module) -> set[str]:
    """The names that a module defines or imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_every_imported_module_is_part_of_the_kernel(trees):
    """Functions import some modules at their first call, which no other test here reaches."""
    missing = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.level == 0 or node.module == "_ops":
                continue
            here = ".".join(("kernel", *PurePosixPath(path).parent.parts))
            name = importlib.util.resolve_name("." * node.level + (node.module or ""), here)
            place = "/".join(name.split(".")[1:])
            if f"{place}.py" in trees:
                continue
            package = f"{place}/__init__.py".lstrip("/")
            offered = bound_names(trees[package]) if package in trees else set()
            for alias in node.names:
                inner = f"{place}/{alias.name}".lstrip("/")
                is_module = bool({f"{inner}.py", f"{inner}/__init__.py"} & trees.keys())
                if not is_module and (alias.name not in offered or path == package):
                    missing.append(f"{path}: {name}.{alias.name}")
    assert not missing


def test_the_code_imports_itself_by_relative_names_only(trees):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    assert len(trees) > 60
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, path


def test_the_replaced_modules_have_the_names_that_others_use(trees):
    """Of `_namespaces.py` and `backends/native.py`, which exist twice."""
    used, defined = set(), set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "_namespaces":
                used |= {alias.name for alias in node.names}
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "native":
                used.add(node.attr)
        for node in tree.body if path in ("_namespaces.py", "backends/native.py") else ():
            if isinstance(node, ast.FunctionDef):
                defined.add(node.name)
            if isinstance(node, ast.AnnAssign):
                defined.add(ast.unparse(node.target))
    assert {"TRITON", "unavailable_reason"} <= used <= defined


def test_the_oldest_torch_is_that_of_the_package():
    overlay = ast.parse((ROOT / "tools" / "hub" / "overlay" / "_namespaces.py").read_text("utf-8"))
    values = {
        ast.unparse(node.targets[0]): node.value
        for node in overlay.body
        if isinstance(node, ast.Assign)
    }
    oldest = ".".join(map(str, ast.literal_eval(values["OLDEST_TORCH"])))
    assert f'"torch>={oldest}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_card_lists_the_functions_and_how_to_load_them(kernel):
    card = (kernel / "CARD.md").read_text("utf-8")
    assert 'get_kernel("someone/txl-kernels", version=0)' in card
    assert "- `rel_attention_with_lse`\n" in card
    assert "- `AdaptiveLogSoftmaxWithLoss`\n" in card
    assert "$" not in card
    assert (kernel / "build" / "CARD.md").read_text("utf-8") == card


def test_equal_sources_give_equal_bytes_and_replace_an_earlier_result(kernel, tmp_path):
    earlier = tmp_path / "again"
    earlier.mkdir()
    (earlier / "build.toml").write_text('[general]\nname = "txl-kernels"\n')
    (earlier / "removed.py").touch()
    generate.generate(earlier)
    first, second = files(kernel), files(earlier)
    assert first.keys() == second.keys()
    differing = {name for name in first if first[name] != second[name]}
    assert differing == {"CARD.md", "build.toml", "build/CARD.md"}  # they name the repository
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repo-id", "txl-kernels"], "repo-id: expected owner/name, got 'txl-kernels'"),
        ([], "expected a new or an empty folder, or one that this command wrote"),
    ],
)
def test_a_refused_call_changes_nothing(tmp_path, capsys, arguments, message):
    (tmp_path / "notes.txt").write_text("mine")
    assert command.main(["--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert files(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("path", "source", "relative"),
    [
        ("p/a.py", "from p import b", "from . import b"),
        ("p/a.py", "from p.c.d import e", "from .c.d import e"),
        ("p/c/__init__.py", "from p.c.d import e", "from .d import e"),
        ("p/c/d.py", "from p.c import e", "from . import e"),
        ("p/c/d/e.py", "from p.c.f import (\n    g,\n)", "from ..f import (\n    g,\n)"),
        ("p/c/d/e.py", "from p import f", "from ... import f"),
        ("p/a.py", "def é():\n    from p.b import c", "def é():\n    from .b import c"),
        ("p/a.py", "import os\nfrom pp.b import c", "import os\nfrom pp.b import c"),
        ("p/a.py", '"""from p.b import c"""', '"""from p.b import c"""'),
    ],
)
def test_imports_become_relative(path, source, relative):
    assert with_relative_imports(source, PurePosixPath(path)) == relative


@pytest.mark.parametrize("source", ["import p.b", "import os, p", "from \\\n    p.b import c"])
def test_an_import_without_a_relative_form_is_an_error(source):
    with pytest.raises(ValueError, match=r"p/a\.py:1: expected"):
        with_relative_imports(source, PurePosixPath("p/a.py"))


@pytest.mark.parametrize("loader", ["variant", "kernels"])
def test_the_kernel_computes_the_formula_without_the_package(kernel, loader):
    env = {}
    if loader == "kernels":
        package = Path(pytest.importorskip("kernels").__file__).parents[1]
        env["PYTHONPATH"] = str(package)
    answer = run("alone.py", kernel, loader, **env)
    names = [*txl_kernels.__all__, "layers"]
    assert sorted(answer["names"]) == sorted(names)
    assert answer["name"].startswith("_txl_kernels_cpu_")
    assert {name.partition("::")[0] for name in answer["operators"]} == {answer["name"]}
    assert "contains no compiled code" in answer["native"]
    assert len(answer["warnings"]) == 1
    assert "runs on the plain PyTorch reference" in answer["warnings"][0]
    assert "pip install transformer-xl" in answer["warnings"][0]
    assert answer["origins"] == ["loader.py"]  # the line that calls the public function


def test_variants_run_beside_the_installed_package(kernel):
    pytest.importorskip("triton")
    package = str(Path(txl_kernels.__file__).parents[1])
    answer = run("beside.py", kernel, PYTHONPATH=package, TRITON_INTERPRET="1")
    for name, node in zip(["txl_triton", *answer["names"][1:]], answer["nodes"], strict=True):
        assert node == f"GeneratedBackwardFor_{name}_rel_attention_fwd_defaultBackward"
