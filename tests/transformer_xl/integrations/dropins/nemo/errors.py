"""Prints the table of docs/integrations.md for NeMo's encoders.

    PYTHONPATH=. python tests/transformer_xl/integrations/dropins/nemo/errors.py

An error is |patched - original| / |original|, both float32: of all frames of the output, and the
largest one of all parameters' gradients (those of almost 0 relative to the largest).
"""

from __future__ import annotations

import importlib.metadata

import encoders

from transformer_xl.integrations import patch


def main() -> None:
    version = importlib.metadata.version("nemo_toolkit")
    for name in encoders.CASES:
        encoder, inputs = encoders.build(name), encoders.features([21, 13, 18])
        expected = encoders.results(encoder, inputs)
        patch(encoder)
        found = encoders.errors(encoders.results(encoder, inputs), expected)
        forward = found.pop("out")
        print(f"| {name} | nemo_toolkit {version} | {forward:.0e} | {max(found.values()):.0e} |")


if __name__ == "__main__":
    main()
