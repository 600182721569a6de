"""Stubs of the CUDA libraries that PyTorch's wheel for aarch64 links, which no test calls.

PyPI's torch for aarch64 is a build with CUDA. Importing it loads 2 GB of libraries, or stubs: each
has the name, the symbols and the symbol versions that torch's libraries need. Their
functions return 100, CUDA's error code for "no device".
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

TOOLS = "aarch64-linux-gnu-"
# torch's libraries search this folder, among others, for those of CUDA.
FOLDER = "nvidia/cu13/lib"


class Symbol(NamedTuple):
    """A row of a library's table of dynamic symbols; `version` is empty for one without."""

    name: str
    version: str
    is_defined: bool


def make_stubs(site: Path, root: Path) -> list[str]:
    """Writes the stubs into `site` and returns their names.

    Args:
        site: the emulated Python's site-packages, with torch.
        root: the emulated machine's root.
    """
    torch = sorted((site / "torch" / "lib").glob("*.so*"))
    system = _libraries_of(root)
    missing = {name for library in torch for name in _needed(library)} - {
        path.name for path in (*torch, *system)
    }
    versions = _required_versions(torch, missing)
    unversioned = _undefined(torch) - _defined([*torch, *system, *root.glob("usr/bin/python3.?*")])
    folder = site / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(missing):
        # A library without versions has all symbols without versions: their library is not known.
        _make_stub(folder / name, versions.get(name) or {"": unversioned})
    return sorted(missing)


def _libraries_of(root: Path) -> list[Path]:
    folders = ("lib", "lib/aarch64-linux-gnu", "usr/lib/aarch64-linux-gnu")
    return [path for name in folders for path in sorted((root / name).glob("*.so*"))]


def _readelf(option: str, library: Path) -> str:
    command = [f"{TOOLS}readelf", "--wide", option, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _readelf("--dynamic", library))


def _symbols(library: Path) -> Iterator[Symbol]:
    """The library's symbols without its weak undefined ones, which the loader leaves out."""
    for line in _readelf("--dyn-syms", library).splitlines():
        words = line.split()
        if len(words) < 8 or not words[0].rstrip(":").isdigit():
            continue
        is_defined = words[6] != "UND"
        if is_defined or words[4] != "WEAK":
            name, _, version = words[7].partition("@")
            yield Symbol(name, version.lstrip("@"), is_defined)


def _defined(libraries: Iterable[Path]) -> set[str]:
    return {x.name for library in libraries for x in _symbols(library) if x.is_defined}


def _undefined(libraries: Iterable[Path]) -> set[str]:
    symbols = (x for library in libraries for x in _symbols(library))
    return {x.name for x in symbols if not x.is_defined and not x.version}


def _required_versions(
    libraries: Iterable[Path], names: set[str]
) -> dict[str, dict[str, set[str]]]:
    """The symbols of each version that `libraries` need from each library in `names`."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for library in libraries:
        owner, file = {}, ""
        for line in _readelf("--version-info", library).splitlines():
            if match := re.search(r"\bFile: (\S+)", line):
                file = match[1]
            elif file and (match := re.search(r"\bName: (\S+) +Flags:", line)):
                owner[match[1]] = file
        for symbol in _symbols(library):
            file = owner.get(symbol.version, "")
            if not symbol.is_defined and file in names:
                found[file][symbol.version].add(symbol.name)
    return found


def _make_stub(path: Path, versions: dict[str, set[str]]) -> None:
    names = sorted(set().union(*versions.values()))
    labels = "".join(f".globl {name}\n.type {name}, %function\n{name}:\n" for name in names)
    nodes = "".join(
        f"{version} {{ global: {' '.join(f'{name};' for name in sorted(symbols))} }};\n"
        for version, symbols in versions.items()
        if symbols
    )
    source, script = path.with_suffix(".s"), path.with_suffix(".map")
    source.write_text(f".text\n{labels}mov x0, #100\nret\n", "utf-8")
    script.write_text(nodes, "utf-8")
    link = ["-shared", "-nostdlib", f"-Wl,-soname,{path.name},--version-script={script}"]
    subprocess.run([f"{TOOLS}gcc", *link, "-o", str(path), str(source)], check=True)
    source.unlink()
    script.unlink()
