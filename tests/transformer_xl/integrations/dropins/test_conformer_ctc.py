"""A small Parakeet with a CTC head learns equally with the kernels and without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.integrations import patch, report

pytest.importorskip(
    "transformers", minversion="5.24", reason="make test-dropins installs it and runs these tests"
)

N_MEL, N_SYMBOL, N_STEPS = 16, 4, 80
BLANK = 2 * N_SYMBOL
SYMBOL_FRAMES = 16  # mel frames, two frames of the encoder
GAP_FRAMES = 8


def batch(generator: torch.Generator) -> dict[str, Tensor]:
    """Features and labels of rows of different length.

    A row is the mark of one of two speakers, then three to six symbols with gaps, each a pattern of
    mel values plus noise. A label depends on the symbol and on the speaker, whose mark is too far
    away for the convolutions: the attention must find it.
    """
    patterns = torch.randn(N_SYMBOL + 2, N_MEL, generator=torch.Generator().manual_seed(0)) * 2
    features, labels = [], []
    for _ in range(16):
        n = int(torch.randint(3, 7, (), generator=generator))
        speaker = int(torch.randint(0, 2, (), generator=generator))
        symbols = torch.randint(0, N_SYMBOL, (n,), generator=generator)
        parts = []
        for index in (N_SYMBOL + speaker, *symbols.tolist()):
            parts += [patterns[index].expand(SYMBOL_FRAMES, -1), torch.zeros(GAP_FRAMES, N_MEL)]
        row = torch.cat(parts)
        features.append(row + 0.3 * torch.randn(row.shape, generator=generator))
        labels.append(symbols + N_SYMBOL * speaker)
    mask = [torch.ones(len(row), dtype=torch.long) for row in features]
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_features": pad(features, batch_first=True),
        "attention_mask": pad(mask, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def build(models) -> nn.Module:
    from transformers import ParakeetCTCConfig, ParakeetForCTC

    encoder = {**models.cases["parakeet-sdpa"].config, "hidden_size": 48, "intermediate_size": 96}
    encoder |= {"subsampling_conv_channels": 16, "num_mel_bins": N_MEL, "initializer_range": 0.15}
    torch.manual_seed(0)
    config = ParakeetCTCConfig(vocab_size=BLANK + 1, pad_token_id=BLANK, encoder_config=encoder)
    return ParakeetForCTC(config).train()


def losses(model: nn.Module) -> Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, values = torch.Generator().manual_seed(2), []
    for _ in range(N_STEPS):
        loss = model(**batch(generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.detach())
    return torch.stack(values)


def test_losses_are_equal_and_fall(models):
    """The same model whose attention returns zeros has a mean of 0.56 over the last ten losses."""
    original, model = build(models), build(models)
    assert len(patch(model).patched) == 4
    expected, actual = losses(original), losses(model)
    assert expected[0] > 5.0
    assert max(float(x[-10:].mean()) for x in (expected, actual)) < 0.2
    # Adam enlarges differences of rounding; the largest one was 9e-4.
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=0)
    assert not torch.equal(actual, expected)  # the kernels were used
    assert report(model).fallbacks == 0
