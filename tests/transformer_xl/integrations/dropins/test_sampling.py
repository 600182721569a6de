"""`Sampling` against the logits processors of transformers, which define its numbers."""

from __future__ import annotations

import pytest
import torch

from transformer_xl.sampling import Sampling

generation = pytest.importorskip("transformers.generation")


@pytest.mark.parametrize("seed", range(8))
def test_the_distribution_is_that_of_transformers(seed: int) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(3, 40).mul(3).log_softmax(1)
    text = torch.randint(40, (3, 9))
    options = Sampling(
        temperature=0.8, top_k=20, top_p=0.93, min_p=0.02, repetition_penalty=1.3, banned=(2, 7)
    )
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter_(1, text, True)
    processors = generation.LogitsProcessorList(
        [
            generation.RepetitionPenaltyLogitsProcessor(1.3),
            generation.NoBadWordsLogitsProcessor([[2], [7]], eos_token_id=None),
            generation.TemperatureLogitsWarper(0.8),
            generation.TopKLogitsWarper(20),
            generation.TopPLogitsWarper(0.93),
            generation.MinPLogitsWarper(0.02),
        ]
    )
    expected = processors(text, scores.clone()).softmax(1)
    found = options.probabilities(options.scores(scores, seen))
    torch.testing.assert_close(found.float(), expected)
    assert 0 < (found > 0).sum() < 60
