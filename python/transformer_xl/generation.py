"""Writing text: draw the next token, feed it back, carry the memory along."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from transformer_xl.key_value_window import empty_memory
from transformer_xl.model import TransformerXL
from transformer_xl.nn.inference import inference

SEEDS = range(-(1 << 63), 1 << 64)  # as torch.Generator accepts them


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
    cached: bool = True,
) -> Iterator[Tensor]:
    """Continue `prompt` by `n_tokens`, each yielded as soon as it is drawn.

    The prompt is read in segments, then every token alone with the memory of the tokens before it;
    under `same_length` that gives the probabilities of one long pass. Every module is in evaluation
    mode during a forward pass and in its own mode otherwise. The weights and the lengths of the
    model must stay as they are until the last token.

    Args:
        model: the language model.
        prompt: int64 [B, T] with T ≥ 1, on the model's device.
        n_tokens: number of tokens to draw, 0 or more.
        temperature: divides the log-probabilities; 0 takes the most probable token, as does a
            temperature too small for the precision.
        top_k: draw from the k most probable tokens only.
        top_p: draw from the smallest set of tokens whose probabilities sum to at least p, in
            (0, 1].
        seed: seed of a new generator; the same seed writes the same text.
        generator: generator to use instead, on the model's device.
        segment_len: tokens of the prompt read at a time.
        cached: keep keys and values in a `KeyValueWindow`; False: keep hidden states and project
            them again for each token, as is done in any case where no window serves the model.

    Yields:
        int64 [B], the next token of each row.

    Raises:
        ValueError: an empty prompt, or a number outside its range; before anything is drawn.
        ValueError: logits that are not finite; from the iterator, at the token they belong to.
        ValueError: the weights or the lengths of the model changed; from the iterator.
    """
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt: expected [B, T] with T ≥ 1, got {list(prompt.shape)}")
    _require("temperature", temperature, math.isfinite(temperature), "a finite number")
    _require("temperature", temperature, temperature >= 0, "0 or more")
    _require("top_k", top_k, top_k is None or top_k >= 1, "None or at least 1")
    _require("top_p", top_p, top_p is None or 0 < top_p <= 1, "None or a probability in (0, 1]")
    _require("n_tokens", n_tokens, n_tokens >= 0, "0 or more")
    _require("segment_len", segment_len, segment_len >= 1, "at least 1 token")
    _require("seed", seed, seed is None or generator is None, "None beside a generator")
    _require("seed", seed, seed is None or seed in SEEDS, "an integer in [-2^63, 2^64)")
    if generator is None:
        generator = torch.Generator(prompt.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
    draw = functools.partial(
        model.sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
    )
    return _write(model, prompt, segment_len, n_tokens, draw, cached)


def _write(
    model: TransformerXL,
    prompt: Tensor,
    segment_len: int,
    n_tokens: int,
    draw: Callable[[Tensor], Tensor],
    cached: bool,
) -> Iterator[Tensor]:
    with inference(model):
        memory = empty_memory(model, len(prompt), cached=cached)
    for begin in range(0, prompt.shape[1], segment_len):
        with inference(model):
            output = model(prompt[:, begin : begin + segment_len], memory)
        memory = output.memory
    for left in range(n_tokens, 0, -1):
        with torch.no_grad():
            token = draw(output.hidden[:, -1])
        yield token
        if left > 1:
            with inference(model):
                output = model(token[:, None], output.memory)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value}")
