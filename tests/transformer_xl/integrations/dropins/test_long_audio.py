"""A Parakeet encoder on 10 s to 10 minutes of features: the valid frames of the original."""

from __future__ import annotations

import pytest
import torch

from transformer_xl.integrations import patched, report

pytest.importorskip(
    "transformers", minversion="5.24", reason="make test-dropins installs it and runs these tests"
)

# An eighth of the width of parakeet-ctc-1.1b.
SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "num_mel_bins": 80,
    "subsampling_conv_channels": 32,
}
MEL_PER_S = 100


# The original needs 2.4 GB for one row of 10 minutes.
@pytest.mark.parametrize(
    ("seconds", "rows"),
    [(10, [10, 7, 4]), (60, [60, 41]), (300, [300, 220]), (600, [540])],
    ids=["10s", "1min", "5min", "10min"],
)
def test_valid_frames_are_equal(models, seconds, rows):
    """`rows` has the seconds of each row that are not padding."""
    model = models.build("parakeet-sdpa", **SIZES)
    n_mel = seconds * MEL_PER_S
    features = torch.randn(len(rows), n_mel, 80, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(n_mel) < torch.tensor(rows)[:, None] * MEL_PER_S
    kwargs = {"input_features": features, "attention_mask": mask.long()}
    with torch.no_grad():
        original = model(**kwargs)
        with patched(model):
            out = model(**kwargs)
            assert report(model).fallbacks == 0
    assert torch.equal(out.attention_mask, original.attention_mask)
    valid = out.attention_mask.bool()
    assert int(valid.sum()) == sum(-(-n * MEL_PER_S // 8) for n in rows)
    actual, expected = out.last_hidden_state[valid], original.last_hidden_state[valid]
    assert not torch.equal(actual, expected)  # the kernels were used
    assert float((actual - expected).norm()) <= 1e-5 * float(expected.norm())
