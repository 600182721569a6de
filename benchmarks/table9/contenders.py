"""The measured parts of the contenders: single layers, and a whole model of ours."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

from benchmarks import room
from benchmarks.cases import OURS, PeerUnavailableError, WrongResultError
from benchmarks.cases.layer import GATE, HF, HIDDEN_STATES, LayerCase, LayerShape
from benchmarks.measure import Timed, stopwatch
from benchmarks.peers import vanilla
from transformer_xl.key_value_window import KeyValueWindow
from transformer_xl.model import TransformerXL

CACHED, WHOLE = "cached", "ours-whole"
ATTENTION = {"sdpa": vanilla.sdpa, "eager": vanilla.eager}

# With fewer layers the processor's cache could keep their weights from one token to the next.
CACHED_LAYERS = 12
# A token's cost grows linearly with its position, so that the middles of equal parts have the mean.
CACHED_POSITIONS = 8
EAGER_SCORES = 4  # tensors [H, T, T] that exist at the same time


def check(shape: LayerShape, notes: dict[str, str]) -> None:
    """Compare every contender with its formula in float64; without Hugging Face's environment
    leave a note instead.

    Ours, with a `KeyValueWindow` and with a `Memory`, and Hugging Face's layer have the measured
    sizes, the vanilla layer small ones.

    Raises:
        WrongResultError: a result is wrong.
    """
    torch.manual_seed(0)
    layer = vanilla.VanillaLayer(24, 3, 8, 32, n_positions=17).requires_grad_(False)
    for name, error in vanilla.errors(layer, torch.randn(1, 17, 24)).items():
        if not error <= GATE[torch.float32]:  # NaN is an error too
            raise WrongResultError(f"vanilla {name} is off by {error:.1e} of its norm")
    case = LayerCase(shape, torch.float32)
    for name in (OURS, HIDDEN_STATES, HF):
        with _noting(notes, name):
            case.check(name)


@contextlib.contextmanager
def contenders(
    shape: LayerShape, n_layer: int, notes: dict[str, str]
) -> Iterator[dict[str, Timed]]:
    """Every contender by name; those that cannot run are absent and have a note.

    Args:
        n_layer: of our whole model.
        notes: receives the notes.
    """
    case = LayerCase(shape, torch.float32)
    with contextlib.ExitStack() as stack:
        timed: dict[str, Timed] = {}
        for name in (OURS, HIDDEN_STATES, HF):
            with _noting(notes, name):
                timed[name] = stack.enter_context(case.contender(name))
        for name, attend in ATTENTION.items():
            with _noting(notes, f"vanilla-{name}"):
                timed |= _recomputed(shape, name, attend)
        timed[CACHED] = _cached(shape)
        timed[WHOLE] = _whole(shape, n_layer)
        yield timed


def cached_steps() -> int:
    """Steps of single layers in one run of `CACHED`."""
    return CACHED_LAYERS * CACHED_POSITIONS


def _recomputed(shape: LayerShape, name: str, attend: vanilla.Attend) -> dict[str, Timed]:
    """An inner and the last layer of the vanilla Transformer, for one token."""
    length = shape.config.mem_len
    if attend is vanilla.eager:
        room.require(EAGER_SCORES * 4 * shape.config.n_head * length**2)
    layer = _vanilla_layer(shape)
    x = torch.randn(1, length, shape.config.d_model)
    return {
        f"inner-{name}": _without_gradients(functools.partial(layer, x, attend)),
        f"last-{name}": _without_gradients(functools.partial(layer.last, x, attend)),
    }


def _cached(shape: LayerShape) -> Timed:
    """`cached_steps` steps, with keys and values of normal random numbers."""
    length = shape.config.mem_len
    layers = [_vanilla_layer(shape) for _ in range(CACHED_LAYERS)]
    caches = [vanilla.empty_cache(layer, 1).normal_() for layer in layers]
    positions = [length * (2 * n + 1) // (2 * CACHED_POSITIONS) for n in range(CACHED_POSITIONS)]
    token = torch.randn(1, 1, shape.config.d_model)

    def run() -> None:
        for position in positions:
            x = token
            for layer, cache in zip(layers, caches, strict=True):
                x = layer.step(x, cache, position)

    return _without_gradients(run)


def _whole(shape: LayerShape, n_layer: int) -> Timed:
    """The loss of a segment by our whole model, with embedding and softmax."""
    torch.manual_seed(0)
    config = dataclasses.replace(shape.config, n_layer=n_layer)
    model = TransformerXL(config).eval()
    window = KeyValueWindow.empty(model, 1)
    n_tokens = config.mem_len + shape.tgt_len + 1
    tokens = torch.randint(config.vocab_size, (1, n_tokens))
    segment, targets = tokens[:, -shape.tgt_len - 1 : -1], tokens[:, -shape.tgt_len :]
    with torch.no_grad():
        for piece in tokens[:, : config.mem_len].split(shape.tgt_len, dim=1):
            model(piece, window)
    return _without_gradients(functools.partial(model, segment, window, targets))


def _vanilla_layer(shape: LayerShape) -> vanilla.VanillaLayer:
    c = shape.config
    layer = vanilla.VanillaLayer(c.d_model, c.n_head, c.d_head, c.d_inner, n_positions=c.mem_len)
    return layer.requires_grad_(False)


def _without_gradients(work: Callable[[], object]) -> Timed:
    return stopwatch(torch.no_grad()(work))


@contextlib.contextmanager
def _noting(notes: dict[str, str], contender: str) -> Iterator[None]:
    try:
        yield
    except PeerUnavailableError as unavailable:
        notes[contender] = str(unavailable)
