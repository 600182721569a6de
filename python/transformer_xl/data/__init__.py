"""Corpora as memory-mapped tokens, and the batches read from them."""

from transformer_xl.data.batches import Batch, OrderedBatches
from transformer_xl.data.corpus import Corpus, open_corpus
from transformer_xl.data.sentence_batches import ShuffledSentenceBatches
from transformer_xl.data.vocabularies import Vocabulary

__all__ = [
    "Batch",
    "Corpus",
    "OrderedBatches",
    "ShuffledSentenceBatches",
    "Vocabulary",
    "open_corpus",
]
