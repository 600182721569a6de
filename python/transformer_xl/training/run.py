"""A whole training run: from a configuration to its best and last checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from transformer_xl.checkpoint import Checkpoint, CheckpointError, open_checkpoint, tidy
from transformer_xl.config import RunConfig
from transformer_xl.data import Corpus, open_corpus
from transformer_xl.training.precision import uses_bf16
from transformer_xl.training.report import Report
from transformer_xl.training.trainer import Trainer, join_processes

BEST, LAST = "best", "last"


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a run ended: steps taken in all, those and the seconds of this call, its speed.

    The seconds are of training steps alone, without validation and checkpoints.
    """

    step: int
    seconds: float
    tokens_per_second: float
    best_loss: float


def train(
    config: RunConfig,
    out: Path,
    *,
    resume: Path | None = None,
    init_from: Path | None = None,
    console: Console | None = None,
) -> Finished:
    """Train `config` in the folder `out`, on this process's share where there are several.

    Ctrl-C, or SIGTERM, ends the run after its current step with a checkpoint.

    Args:
        resume: a checkpoint to go on from, bit for bit.
        init_from: a checkpoint whose weights alone to begin with.

    Raises:
        CheckpointError: a checkpoint that does not fit, or `out` holds one already and `resume`
            does not name it. FloatingPointError: the loss is not a number any more.
        ValueError, FileNotFoundError: what the configuration and the data may raise.
    """
    accelerator = join_processes()
    if accelerator.is_main_process:
        tidy(out / LAST)
        tidy(out / BEST)
    accelerator.wait_for_everyone()
    if resume is None and (out / LAST).exists():
        raise CheckpointError(f"{out} holds a run already; resume it, or choose another folder")
    saved = None if resume is None else open_checkpoint(resume)
    with accelerator.main_process_first():  # which encodes the corpus; the others find it encoded
        corpus = open_corpus(config.data)
    trainer = Trainer(fit_vocabulary(config, corpus), corpus, accelerator)
    if saved is not None:
        trainer.restore(saved)
    elif init_from is not None:
        _initialise(trainer, open_checkpoint(init_from))
    report = Report(
        out,
        metric=corpus.metric,
        step=trainer.step,
        max_step=config.train.max_step,
        tokens_per_step=trainer.tokens_per_step,
        console=console or Console(),
        shown=accelerator.is_main_process,
    )
    with report, _stop_requests() as stop_requested:
        report.say(_heading(trainer))
        if trainer.step >= config.train.max_step:
            report.say(f"step {trainer.step:,} is the last already: raise train.max_step to go on")
        finished = _loop(trainer, report, stop_requested)
    accelerator.end_training()
    return finished


def fit_vocabulary(config: RunConfig, corpus: Corpus) -> RunConfig:
    """`config` for the vocabulary at hand: presets name the size of their published corpus's."""
    model = dataclasses.replace(config.model, vocab_size=len(corpus.vocab))
    return dataclasses.replace(config, model=model)


def _heading(trainer: Trainer) -> str:
    """What is trained, on what."""
    config, accelerator = trainer.config, trainer.accelerator
    n_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    bf16 = uses_bf16(config.train.autocast, trainer.device)
    place = f"{accelerator.num_processes} x {trainer.device.type}"
    return (
        f"{n_parameters:,} parameters on {place}{', bf16 autocast' if bf16 else ''}; "
        f"{len(trainer.corpus.split('train')):,} tokens of {trainer.corpus.protocol}"
    )


def _initialise(trainer: Trainer, saved: Checkpoint) -> None:
    if saved.vocabulary.to_dict() != trainer.corpus.vocab.to_dict():
        raise CheckpointError(
            f"{saved.path} has another vocabulary than {trainer.config.data.name}"
        )
    saved.load_model(trainer.model)


def _loop(trainer: Trainer, report: Report, stop_requested: Callable[[], bool]) -> Finished:
    config = trainer.config.train
    first_step, seconds = trainer.step, 0.0
    logged_step, logged_seconds = trainer.step, 0.0
    stop = False
    while trainer.step < config.max_step and not stop:
        started = time.perf_counter()
        trainer.advance()
        step = trainer.step
        end = step == config.max_step
        log = end or step % config.log_interval == 0
        loss = trainer.mean_loss() if log else 0.0  # waits for the device
        seconds += time.perf_counter() - started
        report.advance(step)
        if log:
            _check_finite(loss, step)
            speed = (step - logged_step) * trainer.tokens_per_step / (seconds - logged_seconds)
            logged_step, logged_seconds = step, seconds
            report.trained(step, loss, trainer.learning_rate, speed)
            stop = _agreed(trainer, stop_requested())
        elif trainer.accelerator.num_processes == 1:
            stop = stop_requested()
        if end or step % config.eval_interval == 0:
            _validate(trainer, report)
        if end or stop or step % config.checkpoint_interval == 0:
            trainer.save(report.out / LAST)
    if stop:
        report.say(f"stopped after step {trainer.step:,}; [bold]--resume {report.out}[/] goes on")
    trained = (trainer.step - first_step) * trainer.tokens_per_step
    speed = trained / max(seconds, 1e-9)
    return Finished(trainer.step, seconds, speed, trainer.best_loss)


def _validate(trainer: Trainer, report: Report) -> None:
    score = trainer.validate()
    best = score.loss < trainer.best_loss
    report.validated(trainer.step, score, best)
    if best:
        trainer.best_loss = score.loss
        trainer.save(report.out / BEST)


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the training loss is {loss} at step {step:,}: try a lower train.lr, a longer "
            "train.warmup_step or a smaller train.clip, from the last checkpoint or anew"
        )


def _agreed(trainer: Trainer, stop: bool) -> bool:
    """Whether any process was asked to stop: all must take the same steps."""
    flag = torch.tensor(float(stop), device=trainer.device)
    return bool(trainer.accelerator.reduce(flag, reduction="sum").item() > 0)


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came; a second one acts at once, as it would without this."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
