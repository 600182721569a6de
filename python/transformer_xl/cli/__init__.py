"""The command `transformer-xl`: train, evaluate, score, generate, doctor, demo."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# Modules that the extra [lm] installs in addition to torch.
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
    """Run the command line; exit with the command that installs [lm] if a module is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(
            f"transformer-xl: {', '.join(missing)} not installed; the commands need the extra "
            '[lm]: pip install "transformer-xl[lm]"'
        )
    from transformer_xl.cli.app import app  # imports the modules checked above

    app()
