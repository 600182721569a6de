"""Imports of a package from itself, rewritten as relative ones: a kernel's name is not fixed."""

from __future__ import annotations

import ast
import re
from pathlib import PurePosixPath

_IMPORT = re.compile(r"from\s+(?P<module>[\w.]+)\s+import\b")


def with_relative_imports(source: str, path: PurePosixPath) -> str:
    """The source of a module whose imports from its own package are relative.

    Args:
        source: Python code.
        path: of the file; its first part is the name of the package.

    Raises:
        ValueError: an import that has no relative form (`import package.module`).
    """
    package = path.parts[0]
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names if _is_of(alias.name, package)]
            if named:
                raise ValueError(
                    f"{path}:{node.lineno}: expected `from {package}… import …`, which can be made "
                    f"relative, got `import {named[0]}`"
                )
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_of(node.module, package):
            line = lines[node.lineno - 1]
            match = _IMPORT.match(line, node.col_offset)
            if match is None:
                raise ValueError(f"{path}:{node.lineno}: expected `from … import` on one line")
            start, end = match.span("module")
            lines[node.lineno - 1] = line[:start] + _relative(match["module"], path) + line[end:]
    return "".join(lines)


def _is_of(module: str | None, package: str) -> bool:
    return module is not None and module.split(".")[0] == package


def _relative(module: str, path: PurePosixPath) -> str:
    """`module` as it is imported from the file `path`: a dot for each level, then its name."""
    here, there = path.parent.parts, module.split(".")
    n = 0
    while n < min(len(here), len(there)) and here[n] == there[n]:
        n += 1
    return "." * (len(here) - n + 1) + ".".join(there[n:])
