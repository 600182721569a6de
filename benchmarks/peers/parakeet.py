"""Hugging Face's Parakeet encoder with random weights, its blocks, and its attention alone."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import room
from benchmarks.peers.given import Given, with_shared_tensors
from benchmarks.peers.hugging_face import modeling

MEL_FRAMES_PER_SECOND, SUBSAMPLING = 100, 8
N_MEL, N_CHANNEL = 80, 256
# The weights would make biases of this size negligible otherwise.
_BIAS_STD = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """An encoder and its input: one recording without padding. A frame is 80 ms long.

    Attributes:
        seconds: duration of the audio.
    """

    name: str
    seconds: int
    n_layer: int = 2
    d_model: int = 1024
    n_head: int = 8
    d_inner: int = 4096

    @property
    def n_mel_frame(self) -> int:
        return self.seconds * MEL_FRAMES_PER_SECOND

    @property
    def n_frame(self) -> int:
        """Frames after subsampling."""
        return -(-self.n_mel_frame // SUBSAMPLING)

    @property
    def n_weight(self) -> int:
        """About the number of parameters: feed-forward, attention and convolution modules."""
        per_layer = 4 * self.d_model * self.d_inner + 8 * self.d_model**2
        return self.n_layer * per_layer + N_CHANNEL * (N_MEL // SUBSAMPLING) * self.d_model

    @property
    def score_bytes(self) -> int:
        """Of the float32 position scores [H, T, 2T - 1] and their padded copy, in one layer."""
        return 2 * 4 * self.n_head * self.n_frame * (2 * self.n_frame - 1)

    @property
    def subsampling_bytes(self) -> int:
        """Of the first convolution's float32 output in one pass, and of its ReLU's."""
        return 2 * 4 * N_CHANNEL * (self.n_mel_frame // 2) * (N_MEL // 2)

    def cut(self, seconds: int) -> EncoderShape:
        """The same encoder, at most so many seconds of audio."""
        return dataclasses.replace(self, seconds=min(self.seconds, seconds))

    def tiny(self) -> EncoderShape:
        sizes = {"n_layer": 1, "d_model": 32, "n_head": 2, "d_inner": 64}
        return dataclasses.replace(self, seconds=2, **sizes)


def encoder(shape: EncoderShape) -> Any:
    """A float32 encoder in eval mode; all calls of this shape return copies with one set of
    weights, which stay in memory until a call with another shape."""
    return with_shared_tensors(_encoder(dataclasses.replace(shape, name="", seconds=0)))


def converted(model: Any, dtype: torch.dtype) -> Any:
    """A copy in another dtype; as with `from_pretrained`, position angles stay in float32."""
    model = copy.deepcopy(model)
    inv_freq = model.encode_positions.inv_freq
    model.to(dtype)
    model.encode_positions.inv_freq = inv_freq
    return model


def features(shape: EncoderShape) -> Tensor:
    """[1, n_mel_frame, n_mel]: a shorter recording is the beginning of a longer one."""
    return _normal(0, shape.n_mel_frame, N_MEL)[None]


def reference(shape: EncoderShape) -> Tensor:
    """[1, n_frame, d_model]: the output of the unpatched encoder in float64."""
    room.require(2 * (4 * shape.n_weight + max(shape.score_bytes, shape.subsampling_bytes)))
    model = converted(_encoder(dataclasses.replace(shape, name="", seconds=0)), torch.float64)
    with torch.no_grad():
        out: Tensor = model(features(shape).double()).last_hidden_state
    return out


class CoreInputs(NamedTuple):
    """The tensors between the projections of an attention."""

    q: Tensor  # [1, T, H * D]
    k: Tensor  # [1, T, H * D]
    v: Tensor  # [1, T, H * D]
    r: Tensor  # [1, 2T - 1, H * D]
    bias_u: Tensor  # [H, D]
    bias_v: Tensor  # [H, D]


def core_inputs(shape: EncoderShape) -> CoreInputs:
    """Normal random numbers."""
    T, d_model, heads = shape.n_frame, shape.d_model, (shape.n_head, -1)
    sequences = (_normal(seed, T, d_model)[None] for seed in (1, 2, 3))
    r = _normal(4, 2 * T - 1, d_model)[None]
    return CoreInputs(*sequences, r, *(_normal(seed, d_model).view(heads) for seed in (5, 6)))


def core(shape: EncoderShape, inputs: CoreInputs) -> tuple[Any, Tensor]:
    """The attention without its projections, and an input for its forward.

    The forward returns ([1, T, H * D], …), before the output projection.
    """
    config = _config(dataclasses.replace(shape, n_layer=1))
    with torch.device("meta"):
        attention = modeling("parakeet").ParakeetEncoderAttention(config, 0)
    for name in ("q", "k", "v"):
        setattr(attention, f"{name}_proj", Given(getattr(inputs, name)))
    attention.relative_k_proj = Given(inputs.r)
    attention.o_proj = nn.Identity()
    attention.bias_u, attention.bias_v = nn.Parameter(inputs.bias_u), nn.Parameter(inputs.bias_v)
    return attention.eval(), inputs.q


def core_rows(inputs: CoreInputs, rows: Tensor) -> Tensor:
    """[len(rows), H * D]: the output of the core for some queries, by its formula in float64."""
    H, D = inputs.bias_u.shape
    q, k, v, r = (x[0].double().view(-1, H, D).transpose(0, 1) for x in inputs[:4])
    bias_u, bias_v = (x.detach().double()[:, None] for x in inputs[4:])
    T, outputs = k.shape[1], []
    for i in rows.tolist():
        query = q[:, i : i + 1]
        distances = r[:, T - 1 - i : 2 * T - 1 - i]  # row m is distance T - 1 - m
        scores = (query + bias_u) @ k.mT + (query + bias_v) @ distances.mT
        outputs.append(((scores * D**-0.5).softmax(-1) @ v).flatten())
    return torch.stack(outputs)


@functools.lru_cache(maxsize=1)
def _encoder(shape: EncoderShape) -> Any:
    room.require(2 * 4 * shape.n_weight)
    torch.manual_seed(0)
    model = modeling("parakeet").ParakeetEncoder(_config(shape)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias_u", "bias_v")):
            nn.init.normal_(parameter, std=_BIAS_STD)
    return model.requires_grad_(False)


def _config(shape: EncoderShape) -> Any:
    from transformers.models.parakeet.configuration_parakeet import ParakeetEncoderConfig

    config = ParakeetEncoderConfig(
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        intermediate_size=shape.d_inner,
    )
    config._attn_implementation = "sdpa"
    return config


def _normal(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))
