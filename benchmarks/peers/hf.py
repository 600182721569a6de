"""Hugging Face's TransfoXL 4.37.2, the last one that runs, as a peer in another process.

It needs an environment of its own, `make bench-hf-env`; `hf_worker` runs there and is spoken to
through a pipe. Both sides wait for each other, so they never compete for the processor.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.cases import PeerUnavailableError
from transformer_xl.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("hf_worker.py")
W = TypeVar("W", bound="Worker")

# Our names, and the same parameters in Hugging Face's layers.
_RENAMED = {"attn_layer_norm": "dec_attn.layer_norm", "ff_layer_norm": "pos_ff.layer_norm"}


def interpreter() -> Path:
    """The Python of the peer's environment.

    Raises:
        PeerUnavailableError: it was not made.
    """
    python = ROOT / os.environ.get("HF_VENV", ".venv-hf") / "bin" / "python"
    if not python.exists():
        raise PeerUnavailableError("TransfoXL's environment is not there: make bench-hf-env")
    return python


def config(ours: ModelConfig) -> dict[str, Any]:
    """Arguments of TransfoXLConfig for the same model, with own biases in each layer."""
    tied = (False, *(True for _ in ours.cutoffs)) if ours.cutoffs else ()
    if not ours.untie_r or ours.first_memory != "zeros" or ours.tie_projs != tied:
        raise ValueError(f"expected a config with untie_r, a memory of zeros and tie_projs {tied}")
    names = ("vocab_size", "div_val", "n_layer", "d_model", "n_head", "d_head", "d_inner")
    options = ("mem_len", "clamp_len", "same_length", "dropout", "dropatt", "pre_lnorm", "untie_r")
    same = {name: getattr(ours, name) for name in (*names, *options)}
    cutoffs = list(ours.cutoffs)
    return same | {"d_embed": ours.embed_width(0), "cutoffs": cutoffs, "tie_word_embeddings": True}


def state_dict(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our model's parameters under Hugging Face's names."""
    renamed = {}
    for name, tensor in ours.items():
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        renamed[name if name.startswith("crit.") else f"transformer.{name}"] = tensor
    return renamed


class Worker:
    """A process in the peer's environment; a context, which ends the process."""

    def __init__(self) -> None:
        python = interpreter()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self._process = subprocess.Popen(
            [str(python), str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer.

        Raises:
            RuntimeError: the worker failed or has died; its traceback is on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": action, **arguments}), file=self._process.stdin, flush=True)
        except (BrokenPipeError, ValueError):  # ValueError: closed
            raise RuntimeError(f"TransfoXL's worker ended before {action}") from None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"TransfoXL's worker ended during {action}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"TransfoXL's worker, {action}: {answer['error']}")
        return answer

    def __enter__(self: W) -> W:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _saved(self, action: str, **arguments: Any) -> Tensor:
        """The tensor that the worker writes into a file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "output.pt"
            self.ask(action, path=str(path), **arguments)
            saved: Tensor = torch.load(path, weights_only=True)
        return saved

    def _build(self, action: str, tensors: Mapping[str, Any], **request: Any) -> None:
        """Let the worker build from `tensors`, handed over as a file, and the request."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "tensors.pt"
                torch.save(tensors, path)
                threads = torch.get_num_threads()
                self.ask(action, tensors=str(path), threads=threads, **request)
        except BaseException:
            self.close()
            raise


class HuggingFaceWorker(Worker):
    """The model in its process."""

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        tokens: Tensor,  # int64 [B, 2·T]
        *,
        lr: float,
        clip: float,
    ) -> None:
        super().__init__()
        self._build(
            "build",
            state_dict(model.state_dict()),
            config=config(model_config),
            tokens=tokens.tolist(),
            lr=lr,
            clip=clip,
        )


class HuggingFaceLayer(Worker):
    """The first layer of the model, on a segment after a memory of hidden states."""

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        memory: Tensor,  # [B, M, d_model]
        x: Tensor,  # [B, T, d_model]
    ) -> None:
        super().__init__()
        tensors = {"weights": state_dict(model.state_dict()), "memory": memory, "x": x}
        self._build("build_layer", tensors, config=config(model_config))

    def output(self, *, bf16: bool) -> Tensor:
        """The layer's output [B, T, d_model]."""
        return self._saved("save_layer", bf16=bf16)


class HuggingFaceDecoder(Worker):
    """The model that writes one token after another, after a prompt."""

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: ModelConfig,
        segments: Sequence[Tensor],  # int64 [B, T], the prompt in the parts in which it is read
        last: Tensor,  # int64 [B, 1]
    ) -> None:
        super().__init__()
        self._build(
            "build_decoder",
            state_dict(model.state_dict()),
            config=config(model_config),
            segments=[segment.tolist() for segment in segments],
            last=last.tolist(),
        )

    def log_probs(self) -> Tensor:
        """Log-probabilities [B, V] after the prompt; the next step continues after it."""
        return self._saved("save_step")
