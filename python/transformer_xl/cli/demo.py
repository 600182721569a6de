"""`transformer-xl demo`: training with and without memory, compared within minutes."""

from __future__ import annotations

import dataclasses
import itertools
import platform
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from transformer_xl import evaluation, training
from transformer_xl.checkpoint import CheckpointError
from transformer_xl.cli.loading import LoadedModel, default_device
from transformer_xl.cli.settings import only_overrides
from transformer_xl.config import RunConfig, load_preset, override
from transformer_xl.config_fields import to_dict
from transformer_xl.data import Corpus, open_corpus
from transformer_xl.data.corpus import EVALUATE_FIELDS
from transformer_xl.data.files import expanded, to_json
from transformer_xl.evaluation import Lengths, Score
from transformer_xl.generation import generate
from transformer_xl.sampling import Sampling
from transformer_xl.streaming_text import TokenDecoder
from transformer_xl.training import Finished, Trainer, join_processes
from transformer_xl.training.curve import plot_curves
from transformer_xl.training.precision import autocast, cpu_flags, processor, uses_bf16
from transformer_xl.training.processes import agreement, only_run_in
from transformer_xl.training.report import read_log
from transformer_xl.training.stopping import Stopped

MEMORY, NO_MEMORY = "memory", "no_memory"  # folders of the two runs
RESULTS = "results.json"
PROBE_STEPS = 12
SAMPLE_CHARACTERS = 500
CACHED, PROJECTED = "cached", "hidden_states"  # the two paths of evaluation and generation


def demo(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...",
            help="Fields of the preset `demo` to change.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    seconds: Annotated[
        int, typer.Option(help="Maximum seconds for both trainings; reduces the number of steps.")
    ] = 240,
) -> None:
    """Train with and without memory, compare both, and write all results into one folder."""
    started = time.perf_counter()
    console = Console(markup=False, emoji=False, highlight=False)
    out = expanded(out)
    config = only_overrides(load_preset("demo"), arguments or [])
    corpus = open_corpus(config.data)
    console.print(corpus.summary())
    accelerator = join_processes()
    with only_run_in(out, accelerator, agreement(accelerator)):
        results = _compare(config, corpus, out, seconds, console)
    results["seconds"] = time.perf_counter() - started
    (out / RESULTS).write_text(to_json(results, indent=1) + "\n", encoding="utf-8")
    console.print(f"Everything is in {out}, after {results['seconds']:.0f} s.", soft_wrap=True)


def _compare(
    config: RunConfig, corpus: Corpus, out: Path, seconds: float, console: Console
) -> dict[str, Any]:
    """Train both models into `out` and evaluate them; returns the results for JSON."""
    config = _within(config, corpus, seconds)
    _remove_earlier_demo(out)
    finished = {}
    for name, run in ((MEMORY, config), (NO_MEMORY, _without_memory(config))):
        mem_len = run.model.mem_len
        console.rule(f"training with mem_len {mem_len}: {run.train.max_step:,} steps")
        finished[name] = training.train(run, out / name, console=console)
        if finished[name].stopped:
            raise Stopped(None)  # a comparison needs both trainings
    with_memory = LoadedModel.open(out / MEMORY / "best", default_device())
    without = LoadedModel.open(out / NO_MEMORY / "best", default_device())

    console.rule("evaluation")
    scores = _evaluations(config, corpus, with_memory, without, cached=True)
    projected = _evaluations(config, corpus, with_memory, without, cached=False)
    _show(console, scores, projected, corpus.metric)
    if problem := _draw(out, config, corpus.metric):
        console.print(problem)
    console.rule(f"{SAMPLE_CHARACTERS} characters")
    speeds = _write_sample(out / "sample.txt", with_memory, console)
    console.print(
        f"\nWritten at {speeds[CACHED]:,.0f} tokens/s with cached keys and values, at "
        f"{speeds[PROJECTED]:,.0f} tokens/s with hidden states that are projected again."
    )
    console.print(_in_words(scores, finished, corpus.metric))
    return {
        "corpus": {"summary": corpus.summary(), "sha256": corpus.fingerprint},
        "config": to_dict(config),
        "parameters": sum(p.numel() for p in with_memory.model.parameters()),
        "machine": _machine(config, with_memory.device),
        "training": {name: dataclasses.asdict(run) for name, run in finished.items()},
        "evaluations": {name: score.as_dict() for name, score in scores.items()},
        "evaluations_hidden_states": {name: s.as_dict() for name, s in projected.items()},
        "generation_tokens_per_second": speeds,
    }


def _remove_earlier_demo(out: Path) -> None:
    """Remove the runs of an earlier demo, and create the results file that marks a demo's folder.

    Raises:
        CheckpointError: the runs are not those of a demo.
    """
    results = out / RESULTS
    for run in (out / MEMORY, out / NO_MEMORY):
        if run.exists() and not results.exists():
            raise CheckpointError(
                f"{run} exists, and without {results} it is not the result of a demo; choose "
                "another folder with --out"
            )
    results.write_text("{}\n", encoding="utf-8")
    for run in (out / MEMORY, out / NO_MEMORY):
        shutil.rmtree(run, ignore_errors=True)


def _without_memory(config: RunConfig) -> RunConfig:
    return override(config, {"model.mem_len": 0, "model.same_length": False})


def _within(config: RunConfig, corpus: Corpus, seconds: float) -> RunConfig:
    """Return `config` with at most the steps that both trainings can run in `seconds`."""
    step_seconds = sum(_step_seconds(run, corpus) for run in (config, _without_memory(config)))
    affordable = max(1, int(seconds / step_seconds))
    if affordable >= config.train.max_step:
        return config
    return override(config, {"train.max_step": affordable})


def _step_seconds(config: RunConfig, corpus: Corpus) -> float:
    """Return the duration of the fastest step with full memory, which has no momentary delay."""
    trainer = Trainer(training.fit_vocabulary(config, corpus), corpus, join_processes())
    warm_up = 4 + config.model.mem_len // config.train.tgt_len
    times = []
    for _ in range(warm_up + PROBE_STEPS):
        started = time.perf_counter()
        trainer.advance()
        times.append(time.perf_counter() - started)
    return min(times[warm_up:])


def _evaluations(
    config: RunConfig,
    corpus: Corpus,
    with_memory: LoadedModel,
    without: LoadedModel,
    *,
    cached: bool,
) -> dict[str, Score]:
    """Return the score of each case, on the same tokens in segments of the same length."""
    model, protocol = config.model, config.evaluate
    as_trained = Lengths(model.mem_len, model.clamp_len, model.same_length)
    longer = Lengths(protocol.mem_len, protocol.clamp_len, protocol.same_length)
    cases = {
        "trained without memory": (without, Lengths(0)),
        "without its memory": (with_memory, Lengths(0)),
        "memory as trained": (with_memory, as_trained),
        "memory longer than trained": (with_memory, longer),
    }
    scores = {}
    for name, (loaded, lengths) in cases.items():
        with autocast(config.train.autocast, loaded.device):
            scores[name] = evaluation.score(
                loaded.model,
                corpus.batches(
                    protocol.split, protocol.batch_size, protocol.tgt_len, fields=EVALUATE_FIELDS
                ),
                lengths,
                len(corpus.split(protocol.split)),
                max_steps=protocol.max_eval_steps,
                source=corpus.source(protocol.split),
                cached=cached,
            )
    return scores


def _show(
    console: Console, scores: dict[str, Score], projected: dict[str, Score], metric: str
) -> None:
    """Print score and speed of each case on both paths."""
    paths = {"cached": scores, "hidden states": projected}
    table = Table("model", *(f"{unit}, {path}" for path in paths for unit in (metric, "tokens/s")))
    for name in scores:
        found = [path[name] for path in paths.values()]
        cells = [(f"{getattr(s, metric):.4f}", f"{s.tokens_per_second:,.0f}") for s in found]
        table.add_row(name, *itertools.chain(*cells))
    console.print(table)
    for name, score in scores.items():
        console.print(f"{name}: {score.protocol}", style="dim")


def _draw(out: Path, config: RunConfig, metric: str) -> str | None:
    """Plot both runs; returns the reason of a failure, as `plot_curves`."""
    runs = {
        f"with memory (mem_len {config.model.mem_len})": read_log(out / MEMORY),
        "without memory (mem_len 0)": read_log(out / NO_MEMORY),
    }
    title = f"The same Transformer-XL on {config.data.name}, segments of {config.train.tgt_len}"
    return plot_curves(out / "curve.png", runs, metric, title)


def _write_sample(path: Path, loaded: LoadedModel, console: Console) -> dict[str, float]:
    """Print and save a sample; returns the tokens/s of both paths, from the first token on."""
    text, cached = _sample(loaded, cached=True)
    _, projected = _sample(loaded, cached=False)
    console.out(text)
    path.write_text(text + "\n", encoding="utf-8")
    return {CACHED: cached, PROJECTED: projected}


def _sample(loaded: LoadedModel, *, cached: bool) -> tuple[str, float]:
    """Write a text after the end of a line; returns it and the tokens/s."""
    before = loaded.vocabulary.first_tokens()
    tokens = generate(
        loaded.model,
        torch.tensor([before], device=loaded.device),
        SAMPLE_CHARACTERS,
        sampling=Sampling(temperature=0.8),
        seed=1,
        cached=cached,
    )
    decoder = TokenDecoder(loaded.vocabulary, before)
    text = decoder.feed(int(next(tokens)))  # the first one includes the prompt
    started = time.perf_counter()
    text += "".join(decoder.feed(int(token)) for token in tokens)
    seconds = time.perf_counter() - started
    return text + decoder.end(), (SAMPLE_CHARACTERS - 1) / seconds


def _machine(config: RunConfig, device: torch.device) -> dict[str, Any]:
    return {
        "processor": processor(),
        "bf16_instructions": sorted(cpu_flags() & {"avx512_bf16", "amx_bf16"}),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "autocast_bf16": uses_bf16(config.train.autocast, device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _in_words(scores: dict[str, Score], finished: dict[str, Finished], metric: str) -> str:
    best, vanilla = scores["memory as trained"], scores["trained without memory"]
    gain = 1 - getattr(best, metric) / getattr(vanilla, metric)
    speeds = [f"{run.tokens_per_second:,.0f}" for run in finished.values()]
    return (
        f"Memory is worth {gain:.1%}: {getattr(vanilla, metric):.3f} {metric} without, "
        f"{getattr(best, metric):.3f} with it; trained at {' and '.join(speeds)} tokens/s."
    )
