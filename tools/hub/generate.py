"""Writes the folder of a kernel: the sources for kernel-builder, and the variants that it builds.

    build.toml, CARD.md, LICENSE, flake.nix       settings, card, licence, builder
    torch-ext/txl_kernels/                        the package, with relative imports
    build/torch-<backend>/                        a copy, `_ops.py` and `metadata.json`
    build/CARD.md                                 the card, where kernel-builder uploads it from

A kernel without compiled code has one variant per backend of torch, and all hold the same code. The
builder's settings have no variant for all backends since edition 3.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import string
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tools.hub.relative import with_relative_imports

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PACKAGE = "txl_kernels"
NAME = "txl-kernels"  # the loader's name of the module is this with underscores
BACKENDS = ("cpu", "cuda")
EDITION = 5  # of the format of build.toml
# The package's files by extension; kernel-builder drops all others.
EXTENSIONS = ("py", "json", "txt")
# Modules that only the package's native backend uses.
LEFT_OUT = (PurePosixPath("backends/native_installation.py"),)
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REPLACED_REPO_ID = "OWNER/txl-kernels"

_BUILD_TOML = """\
[general]
name = "$name"
version = $version
edition = $edition
license = "$license"
backends = [$backends]
$hub
[torch-noarch]
pyext = [$extensions]
"""

_OPS = '''\
"""The namespace of this kernel's operators, which no other version of the kernel has."""

import torch

_NAMESPACE = "$namespace"

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator in this namespace."""
    return f"{_NAMESPACE}::{op_name}"
'''


def generate(out: Path, repo_id: str | None = None) -> list[Path]:
    """Writes the folder of the kernel and returns the folders of its variants.

    An earlier result in `out` is replaced, after the new one is complete.

    Args:
        out: the folder.
        repo_id: "owner/name" of the repository for build.toml and the card.

    Raises:
        ValueError: `repo_id` has another form; `out` is a file, or a folder with other content.
    """
    if repo_id is not None and not _REPO_ID.fullmatch(repo_id):
        raise ValueError(f"repo-id: expected owner/name, got {repo_id!r}")
    out = out.resolve()
    if out.exists() and not _is_replaceable(out):
        raise ValueError(
            f"out: expected a new or an empty folder, or one that this command wrote; {out} has "
            "other content"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        new = Path(temporary) / "new"
        variants = _write(new, repo_id)
        new.chmod(0o755)
        if out.exists():
            out.rename(Path(temporary) / "earlier")
        new.rename(out)
    return [out / variant for variant in variants]


def sources() -> dict[PurePosixPath, bytes]:
    """The files of the package in a kernel, by their path in it."""
    found = {}
    for folder in (ROOT / PACKAGE, HERE / "overlay"):
        for path in sorted(folder.rglob("*")):
            name = PurePosixPath(path.relative_to(folder).as_posix())
            is_built = bool({"__pycache__", "_native"} & set(name.parts))
            if path.suffix[1:] in EXTENSIONS and not is_built and name not in LEFT_OUT:
                found[name] = path.read_bytes()
    found[PurePosixPath("LICENSE.txt")] = (ROOT / "LICENSE").read_bytes()
    for name, content in found.items():
        if name.suffix == ".py":
            text = content.decode("utf-8")
            if name == PurePosixPath("__init__.py"):
                text = _with_layers(text)
            found[name] = with_relative_imports(text, PACKAGE / name).encode("utf-8")
    return found


def public_names() -> list[str]:
    """The names that the kernel offers: those of the package, and `layers`."""
    text = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    return sorted([*ast.literal_eval(_all(text).value), "layers"])


def _is_replaceable(out: Path) -> bool:
    """Whether a folder is empty or holds an earlier result."""
    if not out.is_dir():
        return False
    if not any(out.iterdir()):
        return True
    settings = out / "build.toml"
    return settings.exists() and f'name = "{NAME}"' in settings.read_text(encoding="utf-8")


def _write(out: Path, repo_id: str | None) -> list[str]:
    """Writes all files; returns the variants, relative to `out`."""
    version, license_name = _project()
    code = sources()
    sha = hashlib.sha256()
    for name, content in sorted(code.items()):
        sha.update(f"{name}\0{len(content)}\0".encode() + content)
    unique = sha.hexdigest()[:10]

    texts = {
        "build.toml": _build_toml(version, license_name, repo_id),
        "CARD.md": _card(version, license_name, repo_id or _REPLACED_REPO_ID),
        "LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8"),
        "flake.nix": (HERE / "flake.nix").read_text(encoding="utf-8"),
    }
    texts["build/CARD.md"] = texts["CARD.md"]
    files = {PurePosixPath(name): text.encode("utf-8") for name, text in texts.items()}
    files |= {
        "torch-ext" / PurePosixPath(PACKAGE) / name: content for name, content in code.items()
    }
    variants = []
    for backend in BACKENDS:
        variant = f"build/torch-{backend}"
        namespace = f"_{PACKAGE}_{backend}_{unique}"
        operators = string.Template(_OPS).substitute(namespace=namespace)
        built = {**code, PurePosixPath("_ops.py"): operators.encode("utf-8")}
        metadata = _metadata(namespace, version, license_name, backend, built)
        built[PurePosixPath("metadata.json")] = (json.dumps(metadata, indent=2) + "\n").encode()
        files |= {variant / name: data for name, data in built.items()}
        variants.append(variant)
    for name, data in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return variants


def _metadata(
    namespace: str,
    version: int,
    license_name: str,
    backend: str,
    code: Mapping[PurePosixPath, bytes],
) -> dict[str, Any]:
    """The loader's description of a variant, as kernel-builder writes it."""
    digests = {
        str(name): base64.b64encode(hashlib.sha256(content).digest()).decode("ascii")
        for name, content in sorted(code.items())
    }
    return {
        "name": NAME,
        "id": namespace,
        "version": version,
        "license": license_name,
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def _project() -> tuple[int, str]:
    """The kernel's version, which is the major one of the package, and the licence."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(\d+)\.', text, re.M)
    license_name = re.search(r'^license = "(.+)"', text, re.M)
    if version is None or license_name is None:
        raise ValueError("pyproject.toml: expected `version` and `license` in [project]")
    return int(version[1]), license_name[1]


def _build_toml(version: int, license_name: str, repo_id: str | None) -> str:
    return string.Template(_BUILD_TOML).substitute(
        name=NAME,
        version=version,
        edition=EDITION,
        license=license_name,
        backends=_listed(BACKENDS),
        extensions=_listed(EXTENSIONS),
        hub="" if repo_id is None else f'\n[general.hub]\nrepo-id = "{repo_id}"\n',
    )


def _listed(words: tuple[str, ...]) -> str:
    return ", ".join(f'"{word}"' for word in words)


def _card(version: int, license_name: str, repo_id: str) -> str:
    layers = ast.parse((HERE / "overlay" / "layers.py").read_text(encoding="utf-8"))
    return string.Template((HERE / "CARD.md").read_text(encoding="utf-8")).substitute(
        license=license_name.lower(),
        repo_id=repo_id,
        version=version,
        functions=_bullets([name for name in public_names() if name[0].islower()]),
        layers=_bullets([node.name for node in layers.body if isinstance(node, ast.ClassDef)]),
    )


def _bullets(names: list[str]) -> str:
    return "\n".join(f"- `{name}`" for name in names if name != "layers")


def _all(text: str) -> ast.Assign:
    """The assignment of `__all__`."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return node
    raise ValueError(f"{PACKAGE}/__init__.py: expected an assignment of __all__")


def _with_layers(text: str) -> str:
    """The package's `__init__.py`, which also imports and exports `layers`."""
    node, lines = _all(text), text.splitlines(keepends=True)
    names = "".join(f'    "{name}",\n' for name in public_names())
    before, after = lines[: node.lineno - 1], lines[node.end_lineno :]
    middle = f"from {PACKAGE} import layers\n\n__all__ = [\n{names}]\n"
    return "".join(before).rstrip("\n") + "\n" + middle + "".join(after)
