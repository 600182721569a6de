"""Transformer-XL: the language model, its layers, data, training, evaluation and generation."""
