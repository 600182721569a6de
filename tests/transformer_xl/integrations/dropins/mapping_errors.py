"""Prints the table of docs/mappings.md: the errors of each function relative to its class.

    python tests/transformer_xl/integrations/dropins/mapping_errors.py

They are those of `errors` in tests/transformer_xl/integrations/conftest.py. A class without an
installed package is left out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    folder = Path(__file__).parent
    classes, comparison = load(folder / "mapping_classes.py"), load(folder.parent / "conftest.py")
    page = comparison.page()
    for row in classes.ROWS:
        try:
            version = importlib.metadata.version(row.package)
        except importlib.metadata.PackageNotFoundError:
            continue
        m, inputs, theirs, valid = classes.case_of(row)
        ours = getattr(page, row.function)
        forward, gradient = comparison.compare(ours, theirs, m, inputs, valid)
        names = f"{row.package} {version}, `{row.name}` | `{row.function}`"
        print(f"| {names} | {forward:.0e} | {gradient:.0e} |")


if __name__ == "__main__":
    main()
