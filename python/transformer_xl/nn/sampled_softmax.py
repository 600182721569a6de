"""Sampled softmax: a loss of a large vocabulary from its target and some tokens drawn by chance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from txl_kernels.ops.checks import check_int


class LogUniformSampler:
    """Tokens sorted by falling frequency, drawn with P(k) = log((k + 2) / (k + 1)) / log(V + 1).

    Close to Zipf's law, and drawn without a table: k = floor((V + 1)^u) - 1, u uniform in [0, 1).

    Args:
        vocab_size: number of tokens V.
    """

    def __init__(self, vocab_size: int) -> None:
        vocab_size = check_int("LogUniformSampler", "vocab_size", vocab_size)
        if vocab_size < 1:
            raise ValueError(f"vocab_size: expected at least 1, got {vocab_size}")
        self.vocab_size = vocab_size

    def draw(
        self, n: int, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """`n` tokens with replacement, int64 [n]; nothing waits for the device."""
        u = torch.rand(n, dtype=torch.float64, device=device, generator=generator)
        tokens = torch.exp(u * math.log(self.vocab_size + 1)).long() - 1
        return tokens.clamp_(0, self.vocab_size - 1)

    def log_prob(self, tokens: Tensor) -> Tensor:
        """log P of each token, float32."""
        k = tokens.double()
        return (torch.log1p(1 / (k + 1)) / math.log(self.vocab_size + 1)).log().float()


def sampled_nll(
    rows: Tensor,
    token: Tensor,
    weight: Tensor,
    bias: Tensor,
    sampler: LogUniformSampler,
    n_sample: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """-log p(token) in nats, int64 [N] given rows [N, d], the sum in p estimated from draws.

    As `SampledSoftmax` says; weight [V, d], bias [V].
    """
    drawn = sampler.draw(n_sample, device=rows.device, generator=generator)
    # One gather for targets and draws: one gradient of the table, where two would be added.
    both = torch.cat([token, drawn])
    found = nn.functional.embedding(both, weight)  # [N + n_sample, d]
    found_bias = nn.functional.embedding(both, bias[:, None])[:, 0]
    own, others = torch.split(found, [len(token), len(drawn)])
    own_bias, other_bias = torch.split(found_bias, [len(token), len(drawn)])

    own_logit = ((rows * own).sum(1) + own_bias).float()[:, None]  # [N, 1]
    logits = nn.functional.linear(rows, others, other_bias).float()  # [N, n_sample]
    logits = logits - (sampler.log_prob(drawn) + math.log(n_sample))
    logits = logits.masked_fill(drawn == token[:, None], -torch.inf)
    return torch.cat([own_logit, logits], dim=1).logsumexp(1) - own_logit[:, 0]


class SampledSoftmax(nn.Module):
    """-log p(target), the sum over all V in it estimated from `n_sample` draws.

    log p = l_y - log(exp(l_y) + Σ_{k drawn, k ≠ y} exp(l_k) / (n_sample · P(k))), the same draws
    for all tokens of a call; a token drawn twice counts twice. The sum is without bias, so the
    gradient's expectation nears the full softmax's as 1 / n_sample falls. The target's own logit
    is not corrected, for it is always there: correcting it too, as for a classifier among
    candidates, has the same optimum but not the full softmax's gradient.

    In evaluation mode it is the full softmax.

    Args:
        vocab_size, d: number of tokens, in order of falling frequency, and width of hidden states.
        n_sample: draws per call.

    State: `weight` [V, d], `bias` [V].
    Source: Jean et al., "On using very large target vocabulary", ACL 2015; the sampler is that of
    TensorFlow and of the Transformer-XL code, whose own loss never ran.
    """

    def __init__(self, vocab_size: int, d: int, n_sample: int) -> None:
        super().__init__()
        op = type(self).__name__
        vocab_size, d = check_int(op, "vocab_size", vocab_size), check_int(op, "d", d, at_least=1)
        n_sample = check_int(op, "n_sample", n_sample)
        if n_sample < 1:
            raise ValueError(f"n_sample: expected at least 1, got {n_sample}")
        self.sampler, self.n_sample = LogUniformSampler(vocab_size), n_sample
        self.weight = nn.Parameter(torch.randn(vocab_size, d) * d**-0.5)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(
        self, hidden: Tensor, target: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean loss in nats of `target` int64 […] given `hidden` […, d]; -100 is not scored.

        Args:
            generator: of the draws, on hidden's device; torch's own if None.

        Raises:
            IndexError: a target out of range (on the CPU; a device assert on CUDA).
        """
        rows, wanted = hidden.flatten(0, -2), target.flatten()
        scored = wanted != -100
        token = wanted.where(scored, 0)
        if self.training:
            drawing = (self.sampler, self.n_sample, generator)
            nll = sampled_nll(rows, token, self.weight, self.bias, *drawing)
        else:
            logits = nn.functional.linear(rows, self.weight, self.bias).float()
            nll = nn.functional.cross_entropy(logits, token, reduction="none")
        return (nll * scored).sum() / scored.sum().clamp(min=1)
