"""From seconds of layers to the cost of a token: measured, and in floating-point operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from benchmarks.cases import OURS
from benchmarks.cases.layer import HF, HIDDEN_STATES, LayerShape
from benchmarks.measure import Quartiles, Rounds
from benchmarks.table9.contenders import ATTENTION, CACHED, WHOLE, cached_steps

VANILLA_SDPA, VANILLA_EAGER = "vanilla-sdpa", "vanilla-eager"
VANILLA_CACHED = "vanilla-cached"
N_LAYERS = (12, 24)
# Times that the vanilla model was slower in the paper, by attention length (one GPU).
PAPER = {800: 363, 1800: 773, 2800: 1409, 3800: 1874}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        preset: has the widths.
        length: the attention length in tokens.
        n_layer: of all models.
        seconds: per token, by model.
        ratio: of a model's cost to ours, by model; formed in each round.
        flop_ratio: the ratio of the floating-point operations of their products, by model.
        quiet: whether the machine was quiet.
    """

    preset: str
    length: int
    n_layer: int
    seconds: dict[str, Quartiles]
    ratio: dict[str, Quartiles]
    flop_ratio: dict[str, float]
    rounds: int
    dropped: int
    quiet: bool


def row(
    preset: str, shape: LayerShape, n_layer: int, names: list[str], rounds: Rounds, whole: int
) -> Row:
    """The row of models of `n_layer` layers.

    Args:
        names: of the contenders, in the order of the seconds of a round.
        whole: the number of layers of our whole model; it is in the row of this number.
    """
    costs = []
    for taken in rounds.kept:
        seconds = dict(zip(names, taken.seconds, strict=True))
        if n_layer != whole:
            seconds.pop(WHOLE, None)
        costs.append(per_token(seconds, n_layer, shape.tgt_len))
    models = costs[0].keys()
    operations = flop_per_token(shape, n_layer)
    return Row(
        preset=preset,
        length=shape.config.mem_len,
        n_layer=n_layer,
        seconds={name: Quartiles.of(cost[name] for cost in costs) for name in models},
        ratio={name: Quartiles.of(cost[name] / cost[OURS] for cost in costs) for name in models},
        flop_ratio={name: flop / operations[OURS] for name, flop in operations.items()},
        rounds=len(rounds.kept),
        dropped=rounds.dropped,
        quiet=rounds.quiet,
    )


def per_token(seconds: Mapping[str, float], n_layer: int, tgt_len: int) -> dict[str, float]:
    """Seconds per token of each model, from the seconds of its measured parts.

    Embedding and softmax are left out, except in `WHOLE`.
    """
    costs = {
        name: n_layer * seconds[name] / tgt_len
        for name in (OURS, HIDDEN_STATES, HF)
        if name in seconds
    }
    for attention in ATTENTION:
        inner, last = f"inner-{attention}", f"last-{attention}"
        if inner in seconds:
            costs[f"vanilla-{attention}"] = (n_layer - 1) * seconds[inner] + seconds[last]
    if CACHED in seconds:
        costs[VANILLA_CACHED] = n_layer * seconds[CACHED] / cached_steps()
    if WHOLE in seconds:
        costs[WHOLE] = seconds[WHOLE] / tgt_len
    return costs


def flop_per_token(shape: LayerShape, n_layer: int) -> dict[str, float]:
    """Floating-point operations of the products of each model's layers, for one token.

    The vanilla model's masked scores are not counted, although its eager attention computes them.
    """
    c = shape.config
    length, width = c.mem_len, c.n_head * c.d_head
    feed_forward = 4 * c.d_model * c.d_inner
    token = 8 * c.d_model * width + feed_forward  # all weights of a layer
    inner = length * token + 2 * length**2 * width
    keys_values, query_and_output = 4 * c.d_model * width, 4 * c.d_model * width
    last = length * keys_values + query_and_output + feed_forward + 4 * length * width
    recomputed = (n_layer - 1) * inner + last
    costs = {name: n_layer * shape.flop(name) / shape.tgt_len for name in (OURS, HIDDEN_STATES, HF)}
    cached = n_layer * (token + 2 * length * width)  # of the mean length
    return costs | {VANILLA_SDPA: recomputed, VANILLA_EAGER: recomputed, VANILLA_CACHED: cached}
