"""The layers of Transformer-XL, usable on their own: batch first, [B, T, d_model]."""

from transformer_xl.nn.adaptive_softmax import AdaptiveSoftmax
from transformer_xl.nn.attention import RelativeMultiHeadAttention
from transformer_xl.nn.decoder_layer import DecoderLayer
from transformer_xl.nn.embedding import AdaptiveEmbedding
from transformer_xl.nn.feed_forward import PositionwiseFeedForward
from transformer_xl.nn.grouped_query_attention import GroupedQueryAttention
from transformer_xl.nn.layer_window import LayerWindow
from transformer_xl.nn.position import RelativePositions, SinusoidalPositions
from transformer_xl.nn.relative_bias import RelativeBias
from transformer_xl.nn.sampled_softmax import LogUniformSampler, SampledSoftmax
from transformer_xl.nn.streaming import KeyValueCache

__all__ = [
    "AdaptiveEmbedding",
    "AdaptiveSoftmax",
    "DecoderLayer",
    "GroupedQueryAttention",
    "KeyValueCache",
    "LayerWindow",
    "LogUniformSampler",
    "PositionwiseFeedForward",
    "RelativeBias",
    "RelativeMultiHeadAttention",
    "RelativePositions",
    "SampledSoftmax",
    "SinusoidalPositions",
]
