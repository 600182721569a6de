"""Vocabularies: text to token ids and back, at byte, character, word and subword level."""

from transformer_xl.data.vocabularies.base import UnknownSymbolError, Vocabulary
from transformer_xl.data.vocabularies.byte import ByteVocabulary
from transformer_xl.data.vocabularies.char import CharVocabulary
from transformer_xl.data.vocabularies.subword import SubwordVocabulary
from transformer_xl.data.vocabularies.word import WordVocabulary

__all__ = [
    "ByteVocabulary",
    "CharVocabulary",
    "SubwordVocabulary",
    "UnknownSymbolError",
    "Vocabulary",
    "WordVocabulary",
]
