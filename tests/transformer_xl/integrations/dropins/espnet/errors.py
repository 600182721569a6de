"""Prints the second table of docs/integrations.md: the errors of the patched attention classes of
ESPnet and the libraries that copied it, as far as they are installed.

    python tests/transformer_xl/integrations/dropins/espnet/errors.py

An error is |patched - original| / |original|, both float32: of the outputs of valid frames, and the
largest one of all gradients (those of almost 0 relative to the largest).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from transformer_xl.integrations import patch

spec = importlib.util.spec_from_file_location("classes", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
classes = importlib.util.module_from_spec(spec)
sys.modules["classes"] = classes
spec.loader.exec_module(classes)

# Names on PyPI that differ from those of the modules.
DISTRIBUTIONS = {"espnet2": "espnet", "chatterbox": "chatterbox-tts", "cosyvoice": "cosyvoice2-eu"}


def errors(name: str) -> tuple[float, float]:
    module, lengths = classes.build(name), [21, 13, 18]
    expected = classes.results(module, name, lengths)
    patch(module)
    actual = classes.results(module, name, lengths)
    largest = max(float(x.norm()) for x in expected.values())

    def error(key: str) -> float:
        least = 0.0 if key == "out" else 1e-2 * largest
        return float((actual[key] - expected[key]).norm()) / (float(expected[key].norm()) + least)

    return error("out"), max(error(key) for key in expected if key != "out")


def main() -> None:
    for name, case in classes.CASES.items():
        package = case.path.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            continue
        distribution = DISTRIBUTIONS.get(package, package)
        version = f"{distribution} {importlib.metadata.version(distribution)}"
        forward, gradient = errors(name)
        print(f"| {name} | {version} | {forward:.0e} | {gradient:.0e} |")


if __name__ == "__main__":
    main()
