"""Writing text: draw the next token, feed it back, carry the memory along."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from transformer_xl.model import TransformerXL


def generate(
    model: TransformerXL,
    prompt: Tensor,
    n_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    segment_len: int = 512,
) -> Iterator[Tensor]:
    """Continue `prompt` by `n_tokens`, each yielded as soon as it is drawn.

    The prompt is read in segments, then every token alone with the memory of what came before;
    under `same_length` that gives the probabilities of one long pass. The model is in evaluation
    mode while it writes.

    Args:
        model: what writes.
        prompt: int64 [B, T] with T ≥ 1, on the model's device.
        n_tokens: how many to draw, 0 or more.
        temperature: divides the log-probabilities; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only.
        top_p: draw from the fewest tokens whose probabilities sum to at least p, in (0, 1].
        seed: of a generator of its own; the same seed writes the same text.
        generator: draw from this one instead; it lives on the model's device.
        segment_len: tokens of the prompt read at once.

    Yields:
        int64 [B], the next token of each row.

    Raises:
        ValueError: an empty prompt, or a number outside its range; before anything is drawn.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt: expected [B, T] with T ≥ 1, got {list(prompt.shape)}")
    _require("n_tokens", n_tokens, n_tokens >= 0, "0 or more")
    _require("segment_len", segment_len, segment_len >= 1, "at least 1 token")
    _require("seed", seed, seed is None or generator is None, "None beside a generator")
    if generator is None:
        generator = torch.Generator(prompt.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
    return _write(model, prompt, segment_len, n_tokens, sampling, generator)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; fields as `generate` has them."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        k, p = self.top_k, self.top_p
        _require("temperature", self.temperature, self.temperature >= 0, "0 or more")
        _require("top_k", k, k is None or k >= 1, "None or at least 1")
        _require("top_p", p, p is None or 0 < p <= 1, "None or a probability in (0, 1]")

    def draw(self, log_probs: Tensor, generator: torch.Generator) -> Tensor:
        """int64 [B] from log-probabilities [B, V]."""
        if self.temperature == 0:
            return log_probs.argmax(dim=-1)
        probs = self.probs(log_probs)
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1)

    def probs(self, log_probs: Tensor) -> Tensor:
        """The probabilities [B, V] drawn from, at a temperature above 0: top_k, then top_p."""
        logits = log_probs.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        probs = logits.softmax(dim=-1)
        if self.top_p is not None:
            ordered, order = probs.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered  # what the more probable tokens hold
            kept = ordered.masked_fill(before >= self.top_p, 0)
            probs = torch.zeros_like(probs).scatter(-1, order, kept)
        return probs / probs.sum(dim=-1, keepdim=True)


@torch.no_grad()
def _write(
    model: TransformerXL,
    prompt: Tensor,
    segment_len: int,
    n_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    was_training = model.training
    model.eval()
    try:
        memory = None
        for begin in range(0, prompt.shape[1], segment_len):
            output = model(prompt[:, begin : begin + segment_len], memory)
            memory = output.memory
        for left in range(n_tokens, 0, -1):
            token = sampling.draw(model.log_probs(output.hidden[:, -1]), generator)
            yield token
            if left > 1:
                output = model(token[:, None], output.memory)
    finally:
        model.train(was_training)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value}")
