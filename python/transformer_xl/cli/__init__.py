"""The command `transformer-xl`: train, evaluate, generate, doctor, demo, benchmark."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# What the extra [lm] brings beside torch, by the names under which it is imported.
NEEDED = (
    "accelerate",
    "filelock",
    "matplotlib",
    "numpy",
    "rich",
    "safetensors",
    "tensorboard",
    "typer",
    "yaml",
)


def main() -> None:
    """Run the command line; without the extra [lm], say how to get it."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(
            f"transformer-xl: {', '.join(missing)} not installed; the commands need the extra "
            'that brings it: pip install "transformer-xl[lm]"'
        )
    from transformer_xl.cli.app import app  # needs what was looked for above

    app()
