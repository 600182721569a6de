"""`transformer-xl train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from transformer_xl import training
from transformer_xl.checkpoint import check_model, open_checkpoint
from transformer_xl.cli.settings import from_preset, only_overrides, split_arguments
from transformer_xl.config import ADJUSTABLE, INITIAL, preset_names


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PRESET] [FIELD=VALUE]...",
            help="A preset and fields to change: `demo train.lr=1e-3 model.n_layer=2`. Presets: "
            f"{', '.join(preset_names())}.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; by default runs/PRESET.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Run or checkpoint to continue.", show_default=False),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Run or checkpoint to start from: its weights and model section (fine-tuning).",
            show_default=False,
        ),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Use deterministic algorithms only.")
    ] = False,
) -> None:
    """Train a model, in one process or under `torchrun` or `accelerate launch`."""
    if deterministic:
        torch.use_deterministic_algorithms(True)
    given = arguments or []
    if resume is None:
        begun = None if init_from is None else open_checkpoint(init_from)
        config = from_preset(given, None if begun is None else begun.config.model)
        if begun is not None:
            check_model(begun, config.model, ADJUSTABLE | INITIAL)
        folder = out or Path("runs", str(split_arguments(given)[0]))
    else:
        if init_from is not None:
            raise ValueError("--resume and --init-from exclude each other")
        saved = open_checkpoint(resume)
        config = only_overrides(saved.config, given)
        folder = out or saved.run
    training.train(config, folder, resume=resume, init_from=init_from)
