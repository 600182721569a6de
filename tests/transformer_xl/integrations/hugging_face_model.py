"""Runs where transformers 4.37.2 is: TransfoXL's losses and gradients with its own adaptive softmax
and with ours in its place, on the same parameters. Prints the relative error of each, as JSON.

    python hugging_face_model.py DIV_VAL
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import TransfoXLConfig, TransfoXLLMHeadModel

from transformer_xl.integrations import ProjectedAdaptiveLogSoftmax


def losses_and_gradients(model: TransfoXLLMHeadModel, tokens: torch.Tensor) -> dict:
    model.zero_grad()
    losses = model(tokens, labels=tokens).losses  # [B, T - 1]
    (
        losses * torch.linspace(0, 1, losses.numel(), dtype=losses.dtype).view_as(losses)
    ).sum().backward()
    grads = {name: x.grad.clone() for name, x in model.named_parameters()}
    return {"losses": losses.detach(), **grads}


def main() -> None:
    torch.manual_seed(0)
    config = TransfoXLConfig(
        vocab_size=40,
        cutoffs=[10, 25],
        div_val=int(sys.argv[1]),
        d_model=16,
        d_embed=16,
        n_head=2,
        d_head=8,
        d_inner=16,
        n_layer=2,
        mem_len=8,
        clamp_len=-1,
        tie_projs=[False, True, True],
        init_std=0.3,
        proj_init_std=0.3,
    )
    model = TransfoXLLMHeadModel(config).eval()  # in float32: it knows no other
    model.crit.keep_order = True  # theirs are in the order of clusters unless asked
    tokens = torch.randint(0, 40, (3, 17))
    due = losses_and_gradients(model, tokens)
    model.crit = ProjectedAdaptiveLogSoftmax.from_module(model.crit)
    got = losses_and_gradients(model, tokens)
    assert due.keys() == got.keys()
    print(json.dumps({k: float((got[k] - due[k]).norm() / due[k].norm()) for k in due}))


if __name__ == "__main__":
    main()
