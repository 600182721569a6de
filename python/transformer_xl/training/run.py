"""A whole training run: from a configuration to its best and last checkpoints."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape

from transformer_xl.checkpoint import (
    STATE,
    Checkpoint,
    CheckpointError,
    check_model,
    check_tokenizer,
    open_checkpoint,
    tidy,
)
from transformer_xl.config import ADJUSTABLE, INITIAL, RunConfig
from transformer_xl.data import Corpus, open_corpus
from transformer_xl.data.files import expanded, resolved
from transformer_xl.training import changes
from transformer_xl.training.precision import uses_bf16
from transformer_xl.training.processes import agreement, join_processes, only_run_in
from transformer_xl.training.report import Report
from transformer_xl.training.stopping import Stopped, StopRequests
from transformer_xl.training.trainer import Trainer, check_run

BEST, LAST = "best", "last"


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a run ended.

    step: optimizer steps taken since the run began.
    seconds: wall time of this call's steps, without validation and checkpoints.
    tokens_per_second: speed of this call's steps.
    best_loss: the lowest validation loss, in nats per token.
    stopped: whether a signal ended the run before its last step or validation.
    """

    step: int
    seconds: float
    tokens_per_second: float
    best_loss: float
    stopped: bool = False


def train(
    config: RunConfig,
    out: Path,
    *,
    resume: Path | None = None,
    init_from: Path | None = None,
    console: Console | None = None,
) -> Finished:
    """Train `config` in the folder `out`, on this process's share where there are several.

    Ctrl-C, SIGTERM or SIGHUP ends the run after its current step with a checkpoint. Before the
    first step there is nothing to save, and they raise `Stopped`.

    Args:
        resume: a checkpoint to go on from, bit for bit.
        init_from: a checkpoint whose weights and vocabulary to begin with.

    Raises:
        CheckpointError: a checkpoint that does not fit, or `out` holds another run or later steps.
        FloatingPointError: the run diverged: a loss, a weight or the optimizer's state is not
            finite. The last checkpoint stays.
        ValueError, FileNotFoundError: an error in the configuration or the data.
        Stopped: a signal arrived before the first step.
    """
    out = expanded(out)
    accelerator = join_processes()
    any_process = agreement(accelerator)
    with StopRequests(any_process) as stops, only_run_in(out, accelerator, any_process):
        with stops.at_once():
            trainer, changed = _prepared(
                config, out, accelerator, resume=resume, init_from=init_from
            )
            report = Report(
                out,
                metric=trainer.corpus.metric,
                step=trainer.step,
                validation_due=trainer.validation_due,
                max_step=config.train.max_step,
                tokens_per_step=trainer.tokens_per_step,
                console=console or Console(),
                shown=accelerator.is_main_process,
            )
        with report:
            for line in (_heading(trainer), *changed):
                report.say(escape(line))
            if trainer.step >= config.train.max_step:
                report.say(
                    f"step {trainer.step:,} is the last already: raise train.max_step to go on"
                )
            finished = _loop(trainer, report, stops)
    accelerator.end_training()
    return finished


def _prepared(
    config: RunConfig,
    out: Path,
    accelerator: Accelerator,
    *,
    resume: Path | None,
    init_from: Path | None,
) -> tuple[Trainer, list[str]]:
    """Check everything that can be checked before the first step.

    Returns:
        The trainer before its first step, and lines that tell how it differs from the checkpoint
        that it begins with.
    """
    if accelerator.is_main_process:
        tidy(out / LAST)
        tidy(out / BEST)
    accelerator.wait_for_everyone()
    saved = None if resume is None else open_checkpoint(resume)
    _check_folder(out, saved)
    check_run(config, accelerator.num_processes)
    begun = None if init_from is None else open_checkpoint(init_from)
    source = saved or begun
    if source is not None:
        source.check_sizes()
        check_tokenizer(source.path, source.vocabulary, config.data.tokenizer)
    corpus = open_corpus(config.data, None if source is None else source.vocabulary)
    config = fit_vocabulary(config, corpus)
    if begun is not None:
        check_model(begun, config.model, ADJUSTABLE | INITIAL | {"vocab_size"})
    trainer = Trainer(config, corpus, accelerator)
    if saved is not None:
        trainer.restore(saved)
        if accelerator.is_main_process:
            _copy_best(saved, out)
        return trainer, changes.since(saved, config, trainer.schedule)
    if begun is not None:
        begun.load_model(trainer.model)
        return trainer, changes.from_weights(begun, config)
    return trainer, []


def fit_vocabulary(config: RunConfig, corpus: Corpus) -> RunConfig:
    """`config` with the size of the corpus's vocabulary; a preset has that of its published
    corpus."""
    model = dataclasses.replace(config.model, vocab_size=len(corpus.vocab))
    return dataclasses.replace(config, model=model)


def _check_folder(out: Path, saved: Checkpoint | None) -> None:
    """Raise CheckpointError if a run in `out` would replace checkpoints that it does not continue.

    A run continues the checkpoint that it resumes, and earlier ones in the same folder.
    """
    held = {
        name: open_checkpoint(out / name).step
        for name in (LAST, BEST)
        if (out / name).is_file() or any((out / name).glob("*"))  # an empty folder is free
    }
    if saved is not None and resolved(saved.run) == resolved(out):
        resumes_last = saved.path.name == LAST
        held = {name: step for name, step in held.items() if step > saved.step and not resumes_last}
    if held:
        steps = " and ".join(f"{name!r} of step {step:,}" for name, step in held.items())
        resumed = "" if saved is None else f", which resuming {saved.path} would replace"
        raise CheckpointError(
            f"{out} holds a run already ({steps}){resumed}; resume {out}, or choose another folder "
            "with --out"
        )


def _copy_best(saved: Checkpoint, out: Path) -> None:
    """Copy the best checkpoint of the resumed run into another folder, where the run may never
    improve on it."""
    best = saved.run / BEST
    if resolved(saved.run) == resolved(out) or not (best / STATE).exists():
        return
    found = open_checkpoint(best)
    if found.state.get("best_loss") == saved.state["best_loss"]:  # else it is another run's
        found.copy(out / BEST)


def _heading(trainer: Trainer) -> str:
    """One line: the size of the model, the processes and the corpus."""
    config, accelerator = trainer.config, trainer.accelerator
    n_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    bf16 = uses_bf16(config.train.autocast, trainer.device)
    place = f"{accelerator.num_processes} x {trainer.device.type}"
    return (
        f"{n_parameters:,} parameters on {place}{', bf16 autocast' if bf16 else ''}; "
        f"{len(trainer.corpus.split('train')):,} tokens of the {trainer.corpus.source('train')}"
    )


def _loop(trainer: Trainer, report: Report, stops: StopRequests) -> Finished:
    config = trainer.config.train
    first_step, seconds = trainer.step, 0.0
    logged_step, logged_seconds = trainer.step, 0.0
    stop = trainer.validation_due and _stopped_validation(trainer, report, stops)
    if stop:
        trainer.save(report.out / LAST)  # where another folder's checkpoint was resumed
    while trainer.step < config.max_step and not stop:
        started = time.perf_counter()
        trainer.advance()
        step = trainer.step
        log = step == config.max_step or step % config.log_interval == 0
        loss = trainer.mean_loss() if log else 0.0  # waits for the device
        seconds += time.perf_counter() - started
        report.advance(step)
        if log:
            speed = (step - logged_step) * trainer.tokens_per_step / (seconds - logged_seconds)
            logged_step, logged_seconds = step, seconds
            report.trained(step, loss, trainer.learning_rate, speed)
        stop = stops.poll()
        if trainer.validation_due or stop or step % config.checkpoint_interval == 0:
            trainer.save(report.out / LAST)
        if trainer.validation_due and not stop:
            stop = _stopped_validation(trainer, report, stops)
    stopped = stop and (trainer.validation_due or trainer.step < config.max_step)
    if stopped:
        resume = f"[bold]--resume {escape(str(report.out))}[/]"
        report.say(f"stopped after step {trainer.step:,}; {resume} goes on")
    trained = (trainer.step - first_step) * trainer.tokens_per_step
    speed = trained / max(seconds, 1e-9)
    return Finished(trainer.step, seconds, speed, trainer.best_loss, stopped)


def _stopped_validation(trainer: Trainer, report: Report, stops: StopRequests) -> bool:
    """Validate, after `last` was saved; True if a stop request abandoned it, so that it is still
    due."""
    try:
        score = trainer.validate(before_batch=stops.check)
    except Stopped:
        return True
    best = score.loss < trainer.best_loss
    report.validated(trainer.step, score, best)
    if best:
        trainer.best_loss = score.loss
        trainer.save(report.out / BEST)
    if trainer.step == trainer.config.train.max_step:
        trainer.save(report.out / LAST)  # the validation is no longer due
    return False
