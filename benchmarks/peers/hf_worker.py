"""Hugging Face's TransfoXL as a worker: runs in an environment of its own, with transformers and
torch alone, and answers one JSON object per line on stdout to one per line on stdin.

    {"do": "build", "config": {…}, "weights": path, "tokens": [[…]], "threads", "lr", "clip"}
    {"do": "check" | "train_step" | "evaluate", "bf16": false}
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


class Worker:
    """The model, its optimizer and a full memory."""

    def __init__(self, request: dict) -> None:
        torch.set_num_threads(request["threads"])
        torch.manual_seed(0)
        self.model = TransfoXLLMHeadModel(TransfoXLConfig(**request["config"]))
        weights = torch.load(request["weights"], weights_only=True)
        absent, unknown = self.model.load_state_dict(weights, strict=False)
        if unknown or set(absent) - {"transformer.pos_emb.inv_freq"}:
            raise ValueError(f"weights: absent {absent}, unknown {unknown}")
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
            if action == "build":
                worker, answer = Worker(request), {}
            else:
                answer = getattr(worker, action)(**request)
            answer["seconds"] = time.perf_counter() - started
        except Exception as error:
            traceback.print_exc()
            answer = {"error": repr(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
