"""Hugging Face's ProjectedAdaptiveLogSoftmax as a peer in another process; see `hf`."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.hf import Worker
from benchmarks.softmax_inputs import SoftmaxInputs


def softmax_state(inputs: SoftmaxInputs) -> dict[str, Tensor]:
    """The inputs' weights under Hugging Face's names; tails without biases have zeros there."""
    tails = [weight.detach() for weight in inputs.tail_weights]
    n_tails = len(tails)
    first = inputs.head_weight.shape[0] - n_tails
    words, clusters = inputs.head_weight.detach().split([first, n_tails])
    bias, cluster_bias = inputs.head_bias.detach().split([first, n_tails])
    weights, biases = [words, *tails], [bias, *(bias.new_zeros(len(tail)) for tail in tails)]
    if not inputs.projections:  # one table
        weights, biases = [torch.cat(weights)], [torch.cat(biases)]
    state = {"cluster_weight": clusters.clone(), "cluster_bias": cluster_bias.clone()}
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        state |= {f"out_layers.{k}.weight": weight.clone(), f"out_layers.{k}.bias": bias.clone()}
    for k, projection in enumerate(inputs.projections, start=1):
        state[f"out_projs.{k}"] = projection.detach().t().contiguous()
    return state


class SoftmaxWorker(Worker):
    """The adaptive softmax alone in its process, on the inputs of a case."""

    def __init__(self, inputs: SoftmaxInputs, div_val: int, dout: Tensor) -> None:
        """`dout` [N]: each token's gradient in `results` and where `run` is told "per_token"."""
        super().__init__()
        first = inputs.head_weight.shape[0] - len(inputs.tail_weights)
        sizes = [first, *(weight.shape[0] for weight in inputs.tail_weights)]
        ends = list(itertools.accumulate(sizes))
        d = inputs.hidden.shape[1]
        tensors = {
            "weights": softmax_state(inputs),
            "hidden": inputs.hidden.detach(),
            "target": inputs.target,
            "dout": dout,
        }
        self._sizes = sizes
        self._build(
            "build_softmax",
            tensors,
            config={
                "n_token": ends[-1],
                "d_embed": d,
                "d_proj": d,
                "cutoffs": ends[:-1],
                "div_val": div_val,
            },
            unprojected=[0] if inputs.projections else [],
        )

    def results(self) -> dict[str, Tensor]:
        """Losses [N] as "nll", and gradients by the names of `SoftmaxInputs.leaves`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.pt"
            self.ask("save", path=str(path))
            saved: dict[str, Tensor] = torch.load(path, weights_only=True)
        if len(self._sizes) > 1 and "out_layers.1.weight" not in saved:  # one table
            parts = saved["out_layers.0.weight"].split(self._sizes)
            bias_parts = saved["out_layers.0.bias"].split(self._sizes)
            saved |= {f"out_layers.{k}.weight": part for k, part in enumerate(parts)}
            saved["out_layers.0.bias"] = bias_parts[0]
        found = {"nll": saved["nll"], "hidden": saved["hidden"]}
        found["head_weight"] = torch.cat([saved["out_layers.0.weight"], saved["cluster_weight"]])
        found["head_bias"] = torch.cat([saved["out_layers.0.bias"], saved["cluster_bias"]])
        for k in range(1, len(self._sizes)):
            found[f"tail_weights[{k - 1}]"] = saved[f"out_layers.{k}.weight"]
            if f"out_projs.{k}" in saved:
                found[f"projections[{k - 1}]"] = saved[f"out_projs.{k}"].t()
        return found
