"""What memory is for: a dependency longer than the segment is learnt with it and not without."""

from __future__ import annotations

import math

import torch

from transformer_xl.config import ModelConfig
from transformer_xl.model import TransformerXL

TGT_LEN, LAG, V = 4, 6, 8


def learnt_loss(mem_len: int, steps: int = 150) -> float:
    """Mean of the last 30 losses in nats on streams whose every second block of LAG tokens repeats
    the one before: LAG tokens back is farther than a segment reaches."""
    torch.manual_seed(0)
    model = TransformerXL(
        ModelConfig(
            vocab_size=V,
            n_layer=1,
            d_model=32,
            n_head=2,
            d_head=16,
            d_inner=32,
            mem_len=mem_len,
            dropout=0.0,
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    blocks = torch.randint(0, V, (16, steps * TGT_LEN // (2 * LAG) + 2, LAG))
    stream = blocks.repeat_interleave(2, dim=1).flatten(1)
    memory, losses = None, []
    for step in range(steps):
        segment = stream[:, step * TGT_LEN :][:, : TGT_LEN + 1]
        output = model(segment[:, :-1], memory, segment[:, 1:])
        memory = output.memory
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return sum(losses[-30:]) / 30


def test_memory_carries_what_a_segment_cannot() -> None:
    chance = math.log(V)
    assert learnt_loss(mem_len=8) < 0.85 * chance
    assert learnt_loss(mem_len=0) > 0.97 * chance
