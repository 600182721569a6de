"""The application with all commands, and its error messages and exit statuses."""

from __future__ import annotations

import signal
import sys
from importlib import metadata
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from transformer_xl.cli.demo import demo
from transformer_xl.cli.doctor import doctor
from transformer_xl.cli.evaluate import evaluate
from transformer_xl.cli.generate import generate
from transformer_xl.cli.score import score
from transformer_xl.cli.train import train
from transformer_xl.training.stopping import Stopped, StopRequests
from txl_kernels import BackendUnavailableError

# Errors that users can correct; any other is a defect of this package and keeps its traceback.
EXPECTED = (ValueError, TypeError, OSError, FloatingPointError, BackendUnavailableError)


class Commands(TyperGroup):
    """Commands that print one sentence and return an exit status if they cannot continue.

    The status is 1 for a run that diverged, 2 for other expected errors, and 128 + N, as in a
    shell, for a command that signal N stopped. A closed pipe (`| head`) is no error: the status is
    0.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line."""
        try:
            return super().main(*args, **kwargs)
        except SystemExit as end:  # typer and rich both raise it for a closed pipe
            if isinstance(end.__context__, BrokenPipeError):
                sys.exit(0)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            with StopRequests() as stops, stops.at_once():
                return super().invoke(ctx)
        except Stopped as stopped:
            _print_error(str(stopped))
            raise typer.Exit(128 + (stopped.number or signal.SIGINT)) from stopped
        except BrokenPipeError:
            raise
        except EXPECTED as error:
            if ctx.params.get("traceback"):
                raise
            _print_error(f"[bold red]error[/] {escape(str(error))}")
            raise typer.Exit(1 if isinstance(error, FloatingPointError) else 2) from error


def _print_error(message: str) -> None:
    Console(stderr=True, soft_wrap=True, emoji=False).print(message, highlight=False)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Transformer-XL: train, evaluate and sample language models with memory.",
)


def _show_version(requested: bool) -> None:
    if requested:
        print(f"transformer-xl {metadata.version('transformer-xl')}")
        raise typer.Exit


@app.callback()
def options(
    traceback: bool = typer.Option(False, "--traceback", help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Options of every command, which `Commands` reads."""


for command in (train, evaluate, score, generate, doctor, demo):
    app.command()(command)
