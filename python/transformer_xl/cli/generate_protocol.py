"""`transformer-xl generate --protocol paper`: the samples of the paper's appendix E."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from transformer_xl import evaluation
from transformer_xl.cli.generate_prompts import Prompt
from transformer_xl.cli.generate_texts import Settings, Text
from transformer_xl.cli.loading import LoadedModel
from transformer_xl.config import DataConfig
from transformer_xl.data import open_corpus
from transformer_xl.detokenization import detokenize
from transformer_xl.evaluation import Lengths
from transformer_xl.sampling import Sampling

N_PROMPTS = 3
PROMPT_TOKENS = 512
TEXT_TOKENS = 1_000
SAMPLING = Sampling(temperature=1.0, top_k=40)


@dataclasses.dataclass(frozen=True)
class Paper:
    """Three prompts of 512 tokens of the test split, each with the reference that follows it.

    Source: Dai et al. 2019, appendix E.
    """

    prompts: list[Prompt]
    references: list[str]
    description: str

    @classmethod
    def draw(cls, loaded: LoadedModel, data: DataConfig, settings: Settings) -> Paper:
        """Draw the positions with the seed.

        Raises:
            ValueError: a test split that is shorter than a prompt and its reference.
        """
        corpus, vocabulary = open_corpus(data, loaded.vocabulary), loaded.vocabulary
        tokens, needed = corpus.split("test"), PROMPT_TOKENS + settings.length
        if len(tokens) < needed:
            raise ValueError(
                f"test split of {data.name}: expected at least {needed:,} tokens, for a prompt of "
                f"{PROMPT_TOKENS} and a reference of {settings.length:,}, got {len(tokens):,}"
            )
        random = np.random.default_rng(settings.seed % (1 << 64))
        positions = random.integers(len(tokens) - needed + 1, size=N_PROMPTS).tolist()
        prompts, references = [], []
        for at in positions:
            ids = tokens[at : at + PROMPT_TOKENS].tolist()
            prompts.append(Prompt(f"test split from token {at:,}", vocabulary.decode(ids), ids))
            references.append(vocabulary.decode(tokens[at + PROMPT_TOKENS : at + needed]))
        if settings.detokenized:
            references = [detokenize(text) for text in references]
        return cls(prompts, references, _described(loaded, corpus.source("test"), settings))

    def print_text(self, number: int, text: Text) -> None:
        """Print the context, the text and the reference with this number."""
        print(f"=== {number + 1} of {len(self.prompts)}: {text.prompt.name} ===")
        parts = {
            "context": text.shown_prompt,
            "generated": text.text,
            "reference": self.references[number],
        }
        for name, part in parts.items():
            print(f"--- {name} ---\n{part.strip()}\n")

    def as_dict(self) -> dict[str, Any]:
        """Description and references for JSON."""
        return {"protocol": self.description, "references": self.references}


def _described(loaded: LoadedModel, source: str, settings: Settings) -> str:
    """One sentence with everything that the texts depend on beside the model."""
    model = loaded.model
    lengths = Lengths(model.mem_len, model.clamp_len, model.same_length)
    _, *described = lengths.described(1)  # without tgt_len: tokens are read one by one
    parts = [
        f"{source}: {N_PROMPTS} prompts of {PROMPT_TOKENS} tokens at positions drawn with seed "
        f"{settings.seed}",
        f"{settings.length:,} tokens each",
        f"temperature {SAMPLING.temperature:g}",
        f"top-{SAMPLING.top_k} renormalised",
        "no selection",
        *described,
        *evaluation.numerics(model, cache_dtype=loaded.cache_dtype),
    ]
    return ", ".join(parts)
