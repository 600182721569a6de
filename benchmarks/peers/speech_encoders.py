"""Unpatched encoders of other libraries for speech and text, with random weights and inputs.

Their inputs are frames after the subsampling convolutions, except that Nemotron's encoder includes
its convolutions.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import room
from benchmarks.cases import PeerUnavailableError
from benchmarks.peers import nemo
from benchmarks.peers.hugging_face import modeling

N_FEATURE = 80
N_VOCAB = 32_000
MEL_FRAMES = 8  # of Nemotron for one frame of the encoder
# The weights would make these parameters negligible otherwise.
_POSITION_PARAMETERS = re.compile(r"bias_[uv]|r_[wr]_bias|distance_embedding")
_POSITION_STD = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """An encoder and its input, without padding.

    Attributes:
        kind: a key of `MODELS`.
        n_frame: frames, or tokens, of each row.
        n_memory: tokens before them whose hidden states are given.
    """

    name: str
    kind: str
    n_frame: int
    d_model: int
    n_head: int
    d_inner: int
    n_layer: int = 1
    B: int = 1
    n_memory: int = 0

    @property
    def n_weight(self) -> int:
        """About the number of parameters, embeddings included."""
        per_layer = 4 * self.d_model * self.d_inner + 8 * self.d_model**2
        n_embedding = N_VOCAB * self.d_model if self.kind == "xlnet" else 0
        return self.n_layer * per_layer + n_embedding

    @property
    def score_bytes(self) -> int:
        """About the bytes of the float32 tensors of all queries and keys that exist at a time."""
        n_key = self.n_frame + self.n_memory
        per_pair = 8 * self.n_head + self.d_model // self.n_head
        return 4 * self.B * self.n_frame * n_key * per_pair

    def tiny(self) -> EncoderShape:
        sizes = {"d_model": 32, "n_head": 2, "d_inner": 64, "n_frame": 16}
        return dataclasses.replace(self, **sizes, n_memory=min(self.n_memory, 8))


def model(shape: EncoderShape) -> nn.Module:
    """A float32 model in eval mode; all calls with one shape return equal weights.

    Raises:
        PeerUnavailableError: this environment does not have the model's library.
    """
    room.require(4 * shape.n_weight)
    torch.manual_seed(0)
    made = MODELS[shape.kind](shape)
    for name, parameter in made.named_parameters():
        if _POSITION_PARAMETERS.search(name):
            nn.init.normal_(parameter, std=_POSITION_STD)
    return made.eval().requires_grad_(False)


def run(model: Any, shape: EncoderShape) -> Callable[[], Tensor]:
    """A call with normal random frames, or random tokens, that returns the hidden states."""
    torch.manual_seed(1)
    B, T = shape.B, shape.n_frame
    if shape.kind.startswith("nemo_"):
        frames, lengths = torch.randn(B, N_FEATURE, T), torch.full((B,), T)
        return lambda: model(audio_signal=frames, length=lengths)[0]  # type: ignore[no-any-return]
    if shape.kind == "espnet":
        frames, mask = torch.randn(B, T, N_FEATURE), torch.ones(B, 1, T, dtype=torch.bool)
        return lambda: model(frames, mask)[0]  # type: ignore[no-any-return]
    if shape.kind == "xlnet":
        tokens = torch.randint(N_VOCAB, (B, T))
        memory = [torch.randn(shape.n_memory, B, shape.d_model)] * shape.n_layer
        return lambda: model(tokens, mems=memory).last_hidden_state  # type: ignore[no-any-return]
    if shape.kind == "nemotron":
        frames = torch.randn(B, MEL_FRAMES * T, N_FEATURE)
    else:
        frames = torch.randn(B, T, shape.d_model)
    return lambda: _hidden(model(frames))


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output.last_hidden_state
    return hidden


def _nemo(**options: Any) -> Callable[[EncoderShape], nn.Module]:
    def make(shape: EncoderShape) -> nn.Module:
        encoder: nn.Module = nemo.load().ConformerEncoder(
            feat_in=N_FEATURE,
            n_layers=shape.n_layer,
            d_model=shape.d_model,
            n_heads=shape.n_head,
            ff_expansion_factor=shape.d_inner // shape.d_model,
            subsampling_factor=1,
            conv_kernel_size=9,
            **options,
        )
        return encoder

    return make


def _espnet(shape: EncoderShape) -> nn.Module:
    if importlib.util.find_spec("espnet") is None:
        raise PeerUnavailableError("this environment has no espnet: make bench-dropins-env")
    from espnet.nets.pytorch_backend.conformer.encoder import Encoder

    encoder: nn.Module = Encoder(
        N_FEATURE,
        shape.d_model,
        shape.n_head,
        shape.d_inner,
        shape.n_layer,
        input_layer="linear",
        macaron_style=True,
        use_cnn_module=True,
        pos_enc_layer_type="rel_pos",
        selfattention_layer_type="rel_selfattn",
    )
    return encoder


def _transformers(
    package: str, model: str, config: str, names: tuple[str, str, str, str], **options: Any
) -> Callable[[EncoderShape], nn.Module]:
    """The configuration has `names` for d_model, n_head, d_inner and n_layer."""

    def make(shape: EncoderShape) -> nn.Module:
        module = modeling(package)
        sizes = (shape.d_model, shape.n_head, shape.d_inner, shape.n_layer)
        configuration = getattr(module, config)(**dict(zip(names, sizes, strict=True)), **options)
        if package not in ("xlnet", "seamless_m4t"):  # which have "eager" only
            configuration._attn_implementation = "sdpa"
        made: nn.Module = getattr(module, model)(configuration)
        return made

    return make


_NAMES = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
_SPEECH_NAMES = (
    "hidden_size",
    "speech_encoder_attention_heads",
    "speech_encoder_intermediate_size",
    "speech_encoder_layers",
)
MODELS: dict[str, Callable[[EncoderShape], nn.Module]] = {
    "nemo_full": _nemo(),
    "nemo_local": _nemo(self_attention_model="rel_pos_local_attn", att_context_size=[128, 128]),
    "nemotron": _transformers(
        "nemotron_asr_streaming",
        "NemotronAsrStreamingEncoder",
        "NemotronAsrStreamingEncoderConfig",
        _NAMES,
    ),
    "espnet": _espnet,
    "wav2vec2_conformer": _transformers(
        "wav2vec2_conformer",
        "Wav2Vec2ConformerEncoder",
        "Wav2Vec2ConformerConfig",
        _NAMES,
        position_embeddings_type="relative",
    ),
    "wav2vec2_bert": _transformers(
        "wav2vec2_bert", "Wav2Vec2BertEncoder", "Wav2Vec2BertConfig", _NAMES
    ),
    "seamless_m4t": _transformers(
        "seamless_m4t", "SeamlessM4TConformerEncoder", "SeamlessM4TConfig", _SPEECH_NAMES
    ),
    "seamless_m4t_v2": _transformers(
        "seamless_m4t_v2", "SeamlessM4Tv2ConformerEncoder", "SeamlessM4Tv2Config", _SPEECH_NAMES
    ),
    "xlnet": _transformers(
        "xlnet", "XLNetModel", "XLNetConfig", ("d_model", "n_head", "d_inner", "n_layer")
    ),
}
