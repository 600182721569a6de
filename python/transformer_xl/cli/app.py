"""The commands in one application, and how it speaks of errors."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from transformer_xl.cli.benchmark import benchmark
from transformer_xl.cli.demo import demo
from transformer_xl.cli.doctor import doctor
from transformer_xl.cli.evaluate import evaluate
from transformer_xl.cli.generate import generate
from transformer_xl.cli.train import train
from txl_kernels import BackendUnavailableError

# What a person can mend; anything else is ours, and keeps its traceback.
EXPECTED = (ValueError, TypeError, OSError, FloatingPointError, BackendUnavailableError)


class Commands(TyperGroup):
    """Commands whose expected errors are one sentence and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command chosen."""
        try:
            return super().invoke(ctx)
        except EXPECTED as error:
            if ctx.params.get("traceback"):
                raise
            message = f"[bold red]error[/] {escape(str(error))}"
            Console(stderr=True, soft_wrap=True).print(message, highlight=False)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Transformer-XL: train, evaluate and sample language models with memory.",
)


@app.callback()
def options(
    traceback: bool = typer.Option(False, "--traceback", help="Show where an error came from."),
) -> None:
    """Options of every command; `Commands` reads them."""


for command in (train, evaluate, generate, doctor, demo):
    app.command()(command)
app.add_typer(benchmark, name="benchmark")
