"""Hugging Face's TransfoXL, its decoding, its first layer or its adaptive softmax, as a worker.

It runs in an environment of its own, with transformers and torch alone, and answers one JSON object
per line on stdout to one per line on stdin.

    {"do": "build", "config": {…}, "tensors": path, "tokens": [[…]], "threads", "lr", "clip"}
    {"do": "check" | "train_step" | "evaluate", "bf16": false}

    {"do": "build_layer", "config": {…}, "tensors": path, "threads"}
    {"do": "evaluate_layer", "bf16": false} | {"do": "save_layer", "bf16": false, "path": path}

    {"do": "build_decoder", "config": {…}, "tensors": path, "segments": [[[…]]], "last", "threads"}
    {"do": "step"} | {"do": "save_step", "path": path}

    {"do": "build_softmax", "config": {…}, "tensors": path, "threads"}
    {"do": "run", "per_token": false} | {"do": "save", "path": path}

    {"do": "quit"}

An answer has "seconds", measured here, or "error". `tokens` is int64 [B, 2·T]: the first half
fills the memory, the second is what is timed. Labels are the tokens: the model shifts them.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback

import torch
from transformers import TransfoXLConfig, TransfoXLLMHeadModel
from transformers.models.deprecated.transfo_xl.modeling_transfo_xl_utilities import (
    ProjectedAdaptiveLogSoftmax,
)


class Worker:
    """The model, its optimizer and a full memory."""

    def __init__(self, request: dict) -> None:
        torch.set_num_threads(request["threads"])
        torch.manual_seed(0)
        weights = torch.load(request["tensors"], weights_only=True)
        self.model = language_model(request["config"], weights)
        tokens = torch.tensor(request["tokens"])
        self.first, self.second = tokens.chunk(2, dim=1)
        self.clip = request["clip"]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=request["lr"])
        with torch.no_grad():
            self.mems = self.model.eval()(self.first).mems

    def check(self, bf16: bool) -> dict:
        """Both segments without dropout: mean losses in nats, the second's gradient norm."""
        self.model.eval()
        with torch.no_grad():
            first = self._loss(self.first, None, bf16)
        second = self._loss(self.second, self.mems, bf16)
        second.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        self.model.zero_grad()
        return {"losses": [first.item(), second.item()], "grad_norm": norm.item()}

    def train_step(self, bf16: bool) -> dict:
        """Forward, backward, clipping and Adam, with dropout, on a full memory."""
        self.model.train()
        self._loss(self.second, self.mems, bf16).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {}

    def evaluate(self, bf16: bool) -> dict:
        """The loss of a segment on a full memory."""
        self.model.eval()
        with torch.no_grad():
            self._loss(self.second, self.mems, bf16)
        return {}

    def _loss(self, tokens: torch.Tensor, mems: list | None, bf16: bool) -> torch.Tensor:
        """Mean loss in nats. The model's own softmax raises under autocast, so it stays outside."""
        if not bf16:
            return self.model(tokens, mems=mems, labels=tokens).loss
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.transformer(tokens, mems=mems).last_hidden_state
        return self.model.crit(hidden.float(), tokens).mean()


class LayerWorker:
    """The first layer of the model, on a segment after a memory; without gradients.

    The model itself makes the arguments of the layer (positions and mask), which are equal for all
    layers of a model and so are not timed. A run includes the copy of the layer's memory.
    """

    def __init__(self, request: dict) -> None:
        torch.set_num_threads(request["threads"])
        tensors = torch.load(request["tensors"], weights_only=True)
        self.model = language_model(request["config"], tensors["weights"]).transformer.eval()
        self.memory = tensors["memory"].transpose(0, 1).contiguous()  # [M, B, d_model]
        layer = self.model.layers[0]
        kept = layer.register_forward_pre_hook(self._keep, with_kwargs=True)
        with torch.no_grad():
            self.model(inputs_embeds=tensors["x"], mems=[self.memory])
        kept.remove()

    def _keep(self, layer: torch.nn.Module, arguments: tuple, options: dict) -> None:
        self.layer, self.arguments, self.options = layer, arguments, options

    def evaluate_layer(self, bf16: bool) -> dict:
        """The output of the segment, and the memory after it."""
        self._output(bf16)
        return {}

    def save_layer(self, bf16: bool, path: str) -> dict:
        """The output of the segment [B, T, d_model], into a file."""
        torch.save(self._output(bf16).transpose(0, 1).contiguous(), path)
        return {}

    def _output(self, bf16: bool) -> torch.Tensor:
        x, memory = self.arguments[0], self.memory
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = self.layer(*self.arguments, **self.options)[0]
            self.model._update_mems([x], [memory], len(memory), len(x))
        return out


class DecoderWorker:
    """The model that reads a prompt, then draws one token of each row after another."""

    def __init__(self, request: dict) -> None:
        torch.set_num_threads(request["threads"])
        torch.manual_seed(0)
        weights = torch.load(request["tensors"], weights_only=True)
        self.model = language_model(request["config"], weights).eval()
        self.mems, self.tokens = None, torch.tensor(request["last"])  # [B, 1]
        with torch.no_grad():
            for segment in request["segments"]:
                tokens = torch.tensor(segment)
                self.mems = self.model.transformer(tokens, mems=self.mems).mems

    def step(self) -> dict:
        """Read the last token of each row and draw the next one."""
        self._log_probs()
        return {}

    def save_step(self, path: str) -> dict:
        """The same; the log-probabilities [B, V] are written into a file."""
        torch.save(self._log_probs(), path)
        return {}

    def _log_probs(self) -> torch.Tensor:
        with torch.no_grad():
            out = self.model(self.tokens, mems=self.mems)
            log_probs = out.prediction_scores[:, -1]
            self.mems = out.mems
            self.tokens = torch.multinomial(log_probs.exp(), 1)
        return log_probs


class SoftmaxWorker:
    """ProjectedAdaptiveLogSoftmax with the weights, the hidden states and the targets of a file."""

    def __init__(self, request: dict) -> None:
        torch.set_num_threads(request["threads"])
        tensors = torch.load(request["tensors"], weights_only=True)
        with torch.device("meta"):
            self.softmax = ProjectedAdaptiveLogSoftmax(**request["config"])
        for k in request["unprojected"]:
            self.softmax.out_projs[k] = None
        self.softmax.load_state_dict(tensors["weights"], assign=True)
        for parameter in self.softmax.parameters():
            parameter.requires_grad_()
        # The class scores each label given the hidden state before it.
        self.hidden = torch.nn.functional.pad(tensors["hidden"], (0, 0, 0, 1)).requires_grad_()
        self.labels = torch.nn.functional.pad(tensors["target"], (1, 0))
        self.dout = tensors["dout"].to(self.hidden.dtype)

    def run(self, per_token: bool) -> dict:
        """Forward and backward: of the mean loss, or of each token's with a gradient each."""
        self._backward(per_token, keep_order=False)
        return {}

    def save(self, path: str) -> dict:
        """Losses in token order and all gradients, into a file."""
        nll = self._backward(True, keep_order=True)
        results = {name: x.grad for name, x in self.softmax.named_parameters()}
        torch.save({"nll": nll, "hidden": self.hidden.grad[:-1], **results}, path)
        return {}

    def _backward(self, per_token: bool, keep_order: bool) -> torch.Tensor:
        for tensor in (self.hidden, *self.softmax.parameters()):
            tensor.grad = None
        nll = self.softmax(self.hidden, self.labels, keep_order=keep_order)
        if per_token:
            nll.backward(self.dout)
        else:
            nll.mean().backward()
        return nll.detach()


BUILDERS = {
    "build": Worker,
    "build_decoder": DecoderWorker,
    "build_layer": LayerWorker,
    "build_softmax": SoftmaxWorker,
}


def language_model(config: dict, weights: dict) -> TransfoXLLMHeadModel:
    """The model with these weights."""
    model = TransfoXLLMHeadModel(TransfoXLConfig(**config))
    absent, unknown = model.load_state_dict(weights, strict=False)
    if unknown or set(absent) - {"transformer.pos_emb.inv_freq"}:
        raise ValueError(f"weights: absent {absent}, unknown {unknown}")
    return model


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("do")
        if action == "quit":
            break
        started = time.perf_counter()
        try:
            if action in BUILDERS:
                worker, answer = BUILDERS[action](request), {}
            else:
                answer = getattr(worker, action)(**request)
            answer["seconds"] = time.perf_counter() - started
        except Exception as error:
            traceback.print_exc()
            answer = {"error": repr(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
