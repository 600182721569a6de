"""One process's share of a training run: its rows of the streams, their memory, and the step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from transformer_xl import checkpoint, evaluation
from transformer_xl.checkpoint import Checkpoint, CheckpointError
from transformer_xl.config import RunConfig
from transformer_xl.data import Batch, Corpus
from transformer_xl.data.corpus import EVALUATE_FIELDS
from transformer_xl.evaluation import Batches, Lengths, Score
from transformer_xl.memory import Memory
from transformer_xl.model import TransformerXL
from transformer_xl.nn.inference import inference
from transformer_xl.nn.tensor_names import optimizer_tensors
from transformer_xl.training.precision import autocast
from transformer_xl.training.processes import share
from transformer_xl.training.saved_state import check_rank_tensors, check_training_state
from transformer_xl.training.schedule import Schedule


class Trainer:
    """Model, optimizer, schedule, data position and memory, advanced step by step.

    Several processes split the streams, not the batches: each owns contiguous rows of the
    `[batch_size, tgt_len]` segment and their memory, and gradients are averaged over all rows.
    A batch in `batch_chunk` parts keeps a memory for each part.

    Args:
        config: the run; its vocab_size must be the corpus's.
        accelerator: the processes and the device.

    Attributes:
        step: optimiser steps taken.
        best_loss: the lowest validation loss so far, in nats.
        validation_due: whether the validation that belongs to `step` has not been done yet.

    Raises:
        ValueError: whatever training, its validations or the configuration's `evaluate` section
            would raise later: `check_run`, a split shorter than one segment.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, accelerator: Accelerator) -> None:
        train = config.train
        self.config, self.corpus, self.accelerator = config, corpus, accelerator
        self.device = accelerator.device
        rank, world_size = accelerator.process_index, accelerator.num_processes
        check_run(config, world_size)
        rows = share("batch_size", train.batch_size, rank, world_size)
        self._valid_rows = share("eval_batch_size", train.eval_batch_size, rank, world_size)
        self._batches = corpus.batches(
            "train",
            train.batch_size,
            train.tgt_len,
            rows=rows,
            loop=True,
            seed=train.seed,
            fields=("train.batch_size", "train.tgt_len"),
        )
        self._next_batch = iter(self._batches).__next__
        self._validation_batches()  # raises here the errors of the first validation, hours later
        protocol = config.evaluate
        corpus.batches(  # likewise
            protocol.split, protocol.batch_size, protocol.tgt_len, fields=EVALUATE_FIELDS
        )

        torch.manual_seed(train.seed)
        self.model = TransformerXL(config.model, backend=train.backend)
        if train.compile:
            self.model.compile()
        self.schedule = Schedule(train)
        optimizer = torch.optim.Adam(
            self.model.to(self.device).parameters(),
            lr=train.lr,
            betas=(train.beta1, train.beta2),
            eps=train.eps,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self._wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        torch.manual_seed(train.seed + rank)  # dropout masks differ by process
        self.model.train()

        self._memories: list[Memory | None] = [None] * train.batch_chunk
        self._last_batch: Batch | None = None
        self.step = 0
        self.best_loss = math.inf
        self.validation_due = False
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._loss_steps = 0

    @property
    def tokens_per_step(self) -> int:
        """Targets of one step, over all processes."""
        return self.config.train.batch_size * self.config.train.tgt_len

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last step; before any step, of the first."""
        return self.schedule.at(max(1, self.step))

    def advance(self) -> None:
        """Take one optimiser step on the next segment of every row."""
        train = self.config.train
        self.step += 1
        self.validation_due = self.step == train.max_step or self.step % train.eval_interval == 0
        self._last_batch = self._next_batch()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._loss_sum += self._accumulate(self._last_batch)
        self._loss_steps += 1
        if train.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def mean_loss(self) -> float:
        """Loss in nats per token since the last call, over all processes.

        Raises:
            FloatingPointError: it is not finite.
        """
        total: Tensor = self.accelerator.reduce(self._loss_sum, reduction="sum")
        mean = total.item() / self._loss_steps
        if not math.isfinite(mean):
            raise self._diverged(f"the training loss is {mean}")
        self._loss_sum.zero_()
        self._loss_steps = 0
        return mean

    def validate(self, before_batch: Callable[[], None] = lambda: None) -> Score:
        """Score the valid split and pass the loss to the schedule.

        Args:
            before_batch: called before each batch; an exception that it raises abandons the
                validation, which stays due.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        with autocast(self.config.train.autocast, self.device):
            score = evaluation.score(
                self.model,
                self._validation_batches(),
                validation_lengths(self.config)[1],
                len(self.corpus.split("valid")),
                max_steps=self.config.train.max_eval_steps,
                source=self.corpus.source("valid"),
                total=lambda sums: self.accelerator.reduce(sums, reduction="sum"),
                before_batch=before_batch,
            )
        if not math.isfinite(score.loss):
            raise self._diverged(f"the validation loss is {score.loss}")
        self.schedule.observe(score.loss)
        self.validation_due = False
        return score

    def save(self, directory: Path) -> None:
        """Write everything that a bit-identical continuation needs.

        Raises:
            FloatingPointError: training cannot go on from here, because a loss, a weight or the
                optimizer's state is not finite; nothing is written.
        """
        self._check_finite()
        checkpoint.save(
            directory,
            model=self.model,
            config=self.config,
            state=self._state(),
            vocabulary=self.corpus.vocab,
            optimizer=self.optimizer,
            rank_tensors=self._rank_tensors(),
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            wait=self.accelerator.wait_for_everyone,
        )

    def restore(self, saved: Checkpoint) -> None:
        """Continue where `save` was called.

        Raises:
            CheckpointError, ValueError: the checkpoint has another model, corpus, batch size or
                number of processes, or it is damaged.
        """
        checkpoint.check_model(saved, self.config.model)
        if saved.state.get("corpus") != self.corpus.fingerprint:
            raise CheckpointError(f"{saved.path} was trained on another corpus; resume on the same")
        check_training_state(saved)
        rank = self.accelerator.process_index
        tensors = saved.rank_tensors(rank, self.accelerator.num_processes)
        if (chunks := saved.state["batch_chunk"]) != self.config.train.batch_chunk:
            raise CheckpointError(f"{saved.path} has batch_chunk {chunks}; resume with the same")
        try:
            self._batches.load_state_dict(saved.state["data"])
        except ValueError as error:
            raise CheckpointError(f"{saved.path / checkpoint.STATE}: {error}") from error
        check_rank_tensors(
            saved.path / checkpoint.rank_file(rank),
            tensors,
            self._expected_memories(),
            rng_devices=("cpu", "cuda") if self.device.type == "cuda" else ("cpu",),
        )
        saved.load_model(self.model)
        saved.load_optimizer(self.model, self.optimizer)
        self._next_batch = iter(self._batches).__next__
        self.schedule.load_state_dict(saved.state["schedule"])
        best_loss = saved.state["best_loss"]  # None before the first validation
        self.step, self.best_loss = saved.step, math.inf if best_loss is None else best_loss
        self.validation_due = saved.state.get("validation_due", False)
        self._loss_steps = saved.state["loss_steps"]
        self._loss_sum.copy_(tensors["loss_sum"])
        self._memories = [_memory_from(tensors, i, self.device) for i in range(chunks)]
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)

    def _expected_memories(self) -> list[tuple[int, int, int]]:
        """Layers, rows and width of the memory of each chunk of this process."""
        start, stop = self._batches.rows
        model, parts = self.config.model, self.config.train.batch_chunk
        shares = (share("batch_chunk", stop - start, i, parts) for i in range(parts))
        return [(model.n_layer, end - begin, model.d_model) for begin, end in shares]

    def _accumulate(self, batch: Batch) -> Tensor:
        """Gradients of the batch, chunk by chunk; returns its loss, this process's share."""
        parts = self.config.train.batch_chunk
        tokens, targets = batch.tokens.to(self.device), batch.targets.to(self.device)
        reset = None if batch.reset is None else batch.reset.to(self.device)
        world_size = self.accelerator.num_processes
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in range(parts):
            begin, end = share("batch_chunk", len(tokens), i, parts)
            memory = self._memories[i]
            if memory is not None and reset is not None:
                memory = memory.reset(reset[begin:end])
            last = i == parts - 1
            sync = contextlib.nullcontext() if last else self.accelerator.no_sync(self._wrapped)
            with sync:
                with autocast(self.config.train.autocast, self.device):
                    output = self._wrapped(tokens[begin:end], memory, targets[begin:end])
                # Means over rows, so that all processes' shares add up to the batch's mean;
                # averaging gradients over processes divides by their number.
                part = output.loss * ((end - begin) / self.config.train.batch_size)
                self.accelerator.backward(part * world_size)
            self._memories[i] = output.memory
            loss += part.detach()
        return loss

    def _check_finite(self) -> None:
        """Raise FloatingPointError, in every process, if any process finds a reason."""
        reason = self._not_finite()
        found = torch.tensor(float(reason is not None), device=self.device)
        if self.accelerator.reduce(found, reduction="sum").item() > 0:
            raise self._diverged(reason or "another process cannot go on")

    def _not_finite(self) -> str | None:
        """Why training cannot go on from here, if so."""
        kinds = {
            "training loss": {"of this process": self._loss_sum},
            "weight": self.model.state_dict(),
            "optimizer state": optimizer_tensors(self.model, self.optimizer),
        }
        for kind, tensors in kinds.items():
            if (name := checkpoint.first_not_finite(tensors)) is not None:
                return f"the {kind} {name} is not finite"
        if self._last_batch is not None:
            loss = self._loss_again(self._last_batch).item()
            if not math.isfinite(loss):
                return f"the loss of the last batch with the new weights is {loss}"
        return None

    def _loss_again(self, batch: Batch) -> Tensor:
        """The sum of the chunks' losses, in nats per token, with the weights and the memory that
        the next step would start from.

        Evaluation mode draws no random numbers, and the resulting memory is not kept.
        """
        parts = self.config.train.batch_chunk
        tokens, targets = batch.tokens.to(self.device), batch.targets.to(self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        context = autocast(self.config.train.autocast, self.device)
        with inference(self.model), context:
            for i, memory in enumerate(self._memories):
                begin, end = share("batch_chunk", len(tokens), i, parts)
                # Not through torch.compile, which would compile once more for evaluation mode.
                output = self.model.forward(tokens[begin:end], memory, targets[begin:end])
                assert output.loss is not None  # targets were given
                loss += output.loss
        return loss

    def _diverged(self, reason: str) -> FloatingPointError:
        return FloatingPointError(
            f"{reason} at step {self.step:,}: the run diverged; try a lower train.lr, a longer "
            "train.warmup_step or a smaller train.clip above 0, from the last checkpoint or from "
            "the start"
        )

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "schedule": self.schedule.state_dict(),
            "data": self._batches.state_dict(),
            "corpus": self.corpus.fingerprint,
            "best_loss": self.best_loss,
            "validation_due": self.validation_due,
            "loss_steps": self._loss_steps,
            "batch_chunk": self.config.train.batch_chunk,
        }

    def _rank_tensors(self) -> dict[str, Tensor]:
        tensors = {"rng.cpu": torch.get_rng_state(), "loss_sum": self._loss_sum}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for i, memory in enumerate(self._memories):
            if memory is not None:
                tensors |= {f"memory.{i}.{k}": t for k, t in memory.to_tensors().items()}
        return tensors

    def _validation_batches(self) -> Batches:
        tgt_len, _ = validation_lengths(self.config)
        batch_size = self.config.train.eval_batch_size
        length = "train.eval_tgt_len" if self.config.model.mem_len else "train.tgt_len"
        fields = ("train.eval_batch_size", length)
        return self.corpus.batches(
            "valid", batch_size, tgt_len, rows=self._valid_rows, fields=fields
        )


def check_run(config: RunConfig, world_size: int) -> None:
    """Raise ValueError for a run that must fail on every corpus: too few rows for its processes and
    chunks, lengths that its validation cannot have."""
    train = config.train
    start, stop = share("batch_size", train.batch_size, 0, world_size)  # the smallest share
    share("batch_chunk", stop - start, 0, train.batch_chunk)
    share("eval_batch_size", train.eval_batch_size, 0, world_size)
    validation_lengths(config)


def validation_lengths(config: RunConfig) -> tuple[int, Lengths]:
    """Return tgt_len and the model's lengths in validation.

    Segments may be shorter than in training. The memory is longer by as many tokens, as in the
    original, so that the last token of a segment reaches equally far. A model trained without
    memory is validated in segments of the training's tgt_len.

    Raises:
        ValueError: eval_tgt_len leaves no memory, which the model's same_length needs.
    """
    train, model = config.train, config.model
    tgt_len = train.eval_tgt_len if model.mem_len else train.tgt_len
    mem_len = max(0, model.mem_len + train.tgt_len - tgt_len)
    if model.same_length and mem_len == 0:
        raise ValueError(
            f"train.eval_tgt_len: expected fewer than {model.mem_len + train.tgt_len} tokens "
            f"(mem_len + tgt_len), which leaves model.same_length a memory, got {tgt_len}"
        )
    return tgt_len, Lengths(mem_len, model.clamp_len, model.same_length)


def _memory_from(tensors: dict[str, Tensor], index: int, device: torch.device) -> Memory | None:
    prefix = f"memory.{index}."
    own = {k.removeprefix(prefix): t.to(device) for k, t in tensors.items() if k.startswith(prefix)}
    return Memory.from_tensors(own) if own else None
