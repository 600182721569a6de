"""Hugging Face's and the original's class: from their state dicts, and in place in their model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import PeerUnavailableError
from benchmarks.peers.hf import interpreter
from transformer_xl.integrations import (
    ProjectedAdaptiveLogSoftmax,
    from_hugging_face,
    from_original,
)
from transformer_xl.nn import AdaptiveSoftmax

ROOT = Path(__file__).resolve().parents[3]
IN_THEIR_MODEL = Path(__file__).with_name("hugging_face_model.py")
V, CUTOFFS = 20, (5, 12)
KINDS: dict[str, tuple[int, int, int]] = {  # d_embed, d_proj, div_val
    "one-table": (8, 8, 1),
    "one-narrow-table": (4, 8, 1),
    "bins": (8, 8, 2),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return KINDS[request.param]


def state_of(kind: tuple[int, int, int]) -> dict[str, Tensor]:
    """A state dict under the names that both codes share."""
    d_embed, d_proj, div_val = kind
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / 2

    sizes, widths = [5, 7, 8], [d_embed // div_val**k for k in range(3)]
    state = {"cluster_weight": normal(2, d_embed), "cluster_bias": normal(2)}
    for k, (n, width) in enumerate(zip(sizes, widths, strict=True)):
        if div_val > 1:
            state |= {f"out_layers.{k}.weight": normal(n, width), f"out_layers.{k}.bias": normal(n)}
        if div_val > 1 or d_embed != d_proj:
            state[f"out_projs.{k}"] = normal(d_proj, width)
    if div_val == 1:
        state |= {"out_layers.0.weight": normal(V, d_embed), "out_layers.0.bias": normal(V)}
    return state


def their_log_prob(hidden: Tensor, state: dict[str, Tensor], *, column: Any) -> Tensor:
    """Their formula: logits = (h · proj) · weightᵀ + bias; `column(k)` is the head's of tail k."""
    ends = (0, *CUTOFFS, V)

    def logits(k: int) -> Tensor:
        rows = slice(ends[k], ends[k + 1])
        if "out_layers.1.weight" in state:
            weight, bias = state[f"out_layers.{k}.weight"], state[f"out_layers.{k}.bias"]
        else:
            weight, bias = state["out_layers.0.weight"][rows], state["out_layers.0.bias"][rows]
        if k == 0:
            weight = torch.cat([weight, state["cluster_weight"]])
            bias = torch.cat([bias, state["cluster_bias"]])
        projection = state.get(f"out_projs.{k}")
        return F.linear(hidden if projection is None else hidden @ projection, weight, bias)

    head = logits(0).log_softmax(1)
    tails = [logits(k).log_softmax(1) + head[:, column(k), None] for k in (1, 2)]
    return torch.cat([head[:, : CUTOFFS[0]], *tails], dim=1)


@pytest.mark.parametrize("prefix", ["", "crit."])
def test_hugging_faces_state_gives_its_probabilities(
    kind: tuple[int, int, int], prefix: str
) -> None:
    state = state_of(kind)
    given = {prefix + name: x for name, x in state.items()} | {"transformer.w": torch.zeros(1)}
    softmax = from_hugging_face(given if prefix else state, CUTOFFS, kind[2])
    hidden = torch.randn(6, 8, dtype=torch.float64)
    due = their_log_prob(hidden, state, column=lambda k: CUTOFFS[0] + k - 1)
    torch.testing.assert_close(softmax.log_prob(hidden), due)


def test_the_originals_state_gives_its_probabilities(kind: tuple[int, int, int]) -> None:
    """Whose cluster k is the k-th column from the end."""
    state = state_of(kind)
    softmax = from_original(state, CUTOFFS, kind[2])
    hidden = torch.randn(6, 8, dtype=torch.float64)
    due = their_log_prob(hidden, state, column=lambda k: -k)
    torch.testing.assert_close(softmax.log_prob(hidden), due)
    natural = from_hugging_face(state, CUTOFFS, kind[2]).log_prob(hidden)
    assert not torch.allclose(natural, due)


def test_without_cutoffs_it_is_a_plain_softmax() -> None:
    state = {"out_layers.0.weight": torch.randn(V, 8), "out_layers.0.bias": torch.randn(V)}
    hidden = torch.randn(3, 8)
    due = F.linear(hidden, *state.values()).log_softmax(1)
    torch.testing.assert_close(from_original(state, ()).log_prob(hidden), due)


def test_a_state_of_something_else_is_named(kind: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"expected crit\.out_layers\.0\.weight .* got weight"):
        from_hugging_face({"weight": torch.zeros(1)}, CUTOFFS)
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key|Unexpected key"):
        from_hugging_face(state_of(kind), (5,), kind[2])


def test_the_class_scores_each_label_given_those_before_it(kind: tuple[int, int, int]) -> None:
    d_embed, d_proj, div_val = kind
    softmax = ProjectedAdaptiveLogSoftmax(V, d_embed, d_proj, list(CUTOFFS), div_val).double()
    softmax.load_state_dict(state_of(kind))
    hidden = torch.randn(2, 7, 8, dtype=torch.float64)
    labels = torch.randint(0, V, (2, 7))
    labels[0, 3] = -100
    log_prob = softmax(hidden).view(2, 7, V)
    torch.testing.assert_close(log_prob, softmax.log_prob(hidden))
    due = -log_prob[:, :-1].gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    due[0, 2] = 0
    torch.testing.assert_close(softmax(hidden, labels), due.flatten())


def test_ties_survive_the_taking_over(kind: tuple[int, int, int]) -> None:
    d_embed, d_proj, div_val = kind
    theirs = AdaptiveSoftmax(V, d_embed, d_proj, CUTOFFS, div_val)
    # What of Hugging Face's module is read beside its parameters.
    theirs.n_token, theirs.d_embed, theirs.d_proj = V, d_embed, d_proj
    theirs.cutoffs, theirs.div_val = [*CUTOFFS, V], div_val
    made = ProjectedAdaptiveLogSoftmax.from_module(theirs)
    assert made.out_layers is theirs.out_layers
    assert all(a is b for a, b in zip(made.parameters(), theirs.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("div_val", [1, 2])
def test_in_their_model_it_gives_their_loss_and_gradients(div_val: int) -> None:
    """transformers 4.37.2, in an environment of its own."""
    try:
        python = interpreter()
    except PeerUnavailableError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [str(python), str(IN_THEIR_MODEL), str(div_val)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) > 20
    assert max(errors.values()) < 1e-5, errors
