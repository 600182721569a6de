"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from transformer_xl.quantization import Weights as WeightsDtype
from transformer_xl.training.precision import Autocast

Checkpoint = Annotated[
    Path, typer.Argument(help="Folder of a checkpoint or of a run.", show_default=False)
]
TgtLen = Annotated[int | None, typer.Option(help="Tokens per segment.", show_default=False)]
MemLen = Annotated[int | None, typer.Option(help="Memory length in tokens.", show_default=False)]
ClampLen = Annotated[
    int | None,
    typer.Option(help="Distances above it share one position embedding.", show_default=False),
]
SameLength = Annotated[
    bool | None,
    typer.Option(help="Every query attends to equally many keys.", show_default=False),
]
Precision = Annotated[
    Autocast | None, typer.Option(help="Whether to compute in bfloat16.", show_default=False)
]
Weights = Annotated[
    WeightsDtype | None,
    typer.Option(
        help="bfloat16: weights and activations; int8: also the linear layers' weights, in int8.",
        show_default=False,
    ),
]
CacheDtype = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        help="Dtype of the cached keys and values; by default that of the computation.",
        show_default=False,
    ),
]
