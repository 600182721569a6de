"""`transformer-xl generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from transformer_xl.cli.generate_interactive import converse
from transformer_xl.cli.generate_prompts import read_prompts
from transformer_xl.cli.generate_protocol import TEXT_TOKENS
from transformer_xl.cli.generate_run import Output, check, run_paper, run_prompts, with_tokens
from transformer_xl.cli.generate_texts import Settings
from transformer_xl.cli.loading import LoadedModel, default_device
from transformer_xl.cli.options import CacheDtype, Checkpoint, ClampLen, SameLength, Weights
from transformer_xl.cli.settings import only_overrides
from transformer_xl.generation import PLAIN
from transformer_xl.sampling import Sampling, new_seed

LENGTH = 500
BATCH_SIZE = 16


def generate(
    checkpoint: Checkpoint,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...",
            help="Data of --protocol, such as `data.path=…`; by default the checkpoint's.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to continue; by default the end of a line. Repeatable.", show_default=False
        ),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(help="File whose text is a prompt. Repeatable.", show_default=False),
    ] = None,
    lines: Annotated[
        bool, typer.Option("--lines", help="Each line of a prompt file is a prompt.")
    ] = False,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive", help="Read prompts from the terminal and keep the memory between them."
        ),
    ] = False,
    protocol: Annotated[
        Literal["paper"] | None,
        typer.Option(
            help="Samples of the paper's appendix E: context, generated text and reference.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of texts for each prompt.")] = 1,
    length: Annotated[
        int | None,
        typer.Option(
            help=f"Maximum number of tokens of a text; by default {LENGTH}, with --protocol "
            f"{TEXT_TOKENS:,}.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 selects the most probable token.")
    ] = 1.0,
    top_k: Annotated[
        int | None,
        typer.Option(help="Top-k sampling: keep the K most probable tokens.", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Nucleus sampling: keep the smallest set of tokens whose cumulative probability "
            "is at least P.",
            show_default=False,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Keep tokens that are at least P times as probable as the most probable one.",
            show_default=False,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float,
        typer.Option(help="Above 1, tokens of the prompt and the text so far are less probable."),
    ] = 1.0,
    ban: Annotated[
        list[str] | None,
        typer.Option(
            help="Token that is never drawn: its text, or id:N. Repeatable.", show_default=False
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End a text before this string. Repeatable.", show_default=False),
    ] = None,
    stop_token: Annotated[
        list[str] | None,
        typer.Option(
            help="End a text before this token: its text, or id:N. Repeatable.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Random seed; the same seed gives the same text.", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help=f"Prompts that are continued together; by default {BATCH_SIZE}.",
            show_default=False,
        ),
    ] = None,
    mem_len: Annotated[
        int | None,
        typer.Option(
            help="Memory length in tokens; by default as in training.", show_default=False
        ),
    ] = None,
    clamp_len: ClampLen = None,
    same_length: SameLength = None,
    weights: Weights = None,
    cache_dtype: CacheDtype = None,
    detokenize: Annotated[
        bool,
        typer.Option("--detokenize", help="Show ordinary text for WikiText's words."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON at the end.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print tokens/s and the size of the memory to stderr.")
    ] = False,
) -> None:
    """Generate text and print each token when it is drawn.

    Ctrl-C ends with the text so far. A text of length 0 is not printed.
    """
    is_paper = protocol == "paper"
    settings = Settings(
        length=length if length is not None else TEXT_TOKENS if is_paper else LENGTH,
        sampling=Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        ),
        seed=new_seed() if seed is None else seed,
        n_samples=samples,
        stops=tuple(stop or ()),
        detokenized=detokenize,
    )
    check(settings)
    named = {"--ban": ban or [], "--stop-token": stop_token or []}
    if is_paper:
        given = [bool(prompt), bool(prompt_file), interactive, samples != 1, bool(stop), detokenize]
        given += [batch_size is not None, *map(bool, named.values())]
        if any(given) or settings.sampling != PLAIN:
            raise ValueError(
                "--protocol paper: expected no prompts, no stops, no --batch-size, no --detokenize "
                "and no options of sampling, which it defines"
            )
        if length == 0:
            raise ValueError("--length: expected 1 or more with --protocol paper, got 0")
    elif arguments:
        raise ValueError(f"expected FIELD=VALUE with --protocol only, got {arguments[0]!r}")
    if interactive and (prompt or prompt_file or samples != 1 or as_json or batch_size is not None):
        raise ValueError(
            "--interactive: expected no prompts, one sample, no --json and no --batch-size"
        )
    if lines and not prompt_file:
        raise ValueError("--lines: expected a --prompt-file, got none")
    batch_size = BATCH_SIZE if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"--batch-size: expected 1 or more, got {batch_size}")
    loaded = LoadedModel.open(
        checkpoint, default_device(), weights=weights, cache_dtype=cache_dtype
    )
    loaded.model.set_lengths(mem_len=mem_len, clamp_len=clamp_len, same_length=same_length)
    settings = with_tokens(settings, loaded.vocabulary, named["--ban"], named["--stop-token"])
    output = Output(as_json=as_json, stats=stats)
    if is_paper:
        data = only_overrides(loaded.config, arguments or []).data
        run_paper(loaded, data, settings, output)
    elif interactive:
        converse(loaded, settings, with_stats=stats)
    else:
        prompts = read_prompts(loaded.vocabulary, prompt or [], prompt_file or [], lines=lines)
        run_prompts(loaded, prompts, settings, output, batch_size)
