"""Small models of Hugging Face with random weights, one of each family that `patch` supports."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers.hugging_face import TINY_INKLING
from transformer_xl.integrations import unpatch

# Without the libraries one file is collected, which is skipped with the command that installs them.
if importlib.util.find_spec("transformers") is None:
    files = Path(__file__).parent.rglob("test_*.py")
    collect_ignore = [str(path) for path in files if path.name != "test_parity.py"]

N_VOCAB = TINY_INKLING["vocab_size"]
PARAKEET = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 32,
    "num_mel_bins": 16,
    "subsampling_conv_channels": 6,
    "conv_kernel_size": 5,
    "layerdrop": 0.0,
    "dropout": 0.0,
    "dropout_positions": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
}
SPEECH = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "feature_projection_input_dim": 16,
    "conv_dim": (8, 8),
    "conv_stride": (3, 2),
    "conv_kernel": (5, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "conformer_conv_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
SEAMLESS = {
    "hidden_size": 24,
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 3,
    "speech_encoder_intermediate_size": 32,
    "feature_projection_input_dim": 16,
    "speech_encoder_dropout": 0.0,
    "speech_encoder_layerdrop": 0.0,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "max_source_positions": 64,
    "add_adapter": False,
}
XLNET = {
    "vocab_size": N_VOCAB,
    "d_model": 24,
    "n_layer": 2,
    "n_head": 3,
    "d_inner": 32,
    "dropout": 0.0,
    "mem_len": 16,
    "clamp_len": 9,
}


@dataclass(frozen=True)
class Case:
    """A model class with its configuration, and which arguments a call needs.

    Args:
        path: module of the class below transformers.models, the class, the configuration class.
        n_patched: the number of modules that `patch` must patch.
        inputs: returns keyword arguments and the frames or tokens that are valid, for the lengths
            of the rows and True for padding at the left.
    """

    path: tuple[str, str, str]
    config: dict[str, Any]
    implementation: str
    n_patched: int
    inputs: Callable[[list[int]], tuple[dict[str, Tensor], Tensor]]


def _prefix(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def _tokens(lengths: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """Padding at the left."""
    valid = _prefix(lengths).flip(1)
    tokens = torch.randint(1, N_VOCAB, valid.shape, generator=torch.Generator().manual_seed(1))
    ids = (valid.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": tokens, "attention_mask": valid.long(), "position_ids": ids}, valid


def _segments(lengths: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens of two segments, and a third one for padding."""
    inputs, valid = _tokens(lengths)
    del inputs["position_ids"]
    second = torch.arange(valid.shape[1]) > valid.shape[1] // 2
    return {**inputs, "token_type_ids": torch.where(valid, second.long(), 3)}, valid


def _mel(lengths: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """Eight mel frames for each frame of the encoder."""
    mask = _prefix([8 * n for n in lengths])
    features = torch.randn(*mask.shape, 16, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "attention_mask": mask.long()}, _prefix(lengths)


def _streamed_mel(lengths: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """With causal convolutions n frames of the encoder need 8 (n - 1) mel frames."""
    inputs, _ = _mel([n - 1 for n in lengths])
    return {**inputs, "num_lookahead_tokens": 3}, _prefix(lengths)


def _hidden(lengths: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of an encoder after the convolutions of the waveform."""
    valid = _prefix(lengths)
    features = torch.randn(*valid.shape, 24, generator=torch.Generator().manual_seed(1))
    return {"hidden_states": features, "attention_mask": valid}, valid


def _case(
    module: str, name: str, config: str, sizes: dict[str, Any], how: str, n: int, inputs: Any
) -> Case:
    return Case((module, name, config), sizes, how, n, inputs)


_CLIPS = {"qk_l2_clip_threshold": 3.0, "rel_l2_clip_threshold": 1.0}
_LOOP = {
    "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 3,
    "loop_num_passes": 2,
}
_LAYERS = {"num_hidden_layers": 4, "layer_types": ["hybrid_sliding", "hybrid"] * 2}
_DENSE = {"mlp_layer_types": ["dense", "sparse"], "intermediate_size": 16}
_NEMOTRON = {**PARAKEET, "sliding_window": 9, "default_num_lookahead_tokens": 3}
_BERT = {**SPEECH, "position_embeddings_type": "relative_key", "left_max_position_embeddings": 5}
_BERT = {**_BERT, "right_max_position_embeddings": 2}
_SEAMLESS2 = {**SEAMLESS, "position_embeddings_type": "relative_key"}
_SEAMLESS2 = {**_SEAMLESS2, "left_max_position_embeddings": 5, "right_max_position_embeddings": 2}
_WAVE = {**SPEECH, "position_embeddings_type": "relative", "max_source_positions": 64}

CASES = {
    "inkling-sdpa": _case(
        "inkling",
        "InklingTextModel",
        "InklingTextConfig",
        {**TINY_INKLING, **_DENSE},
        "sdpa",
        3,
        _tokens,
    ),
    "inkling-eager": _case(
        "inkling",
        "InklingTextModel",
        "InklingTextConfig",
        {**TINY_INKLING, **_DENSE},
        "eager",
        3,
        _tokens,
    ),
    "inkling2": _case(
        "inkling2",
        "Inkling2TextModel",
        "Inkling2TextConfig",
        {**TINY_INKLING, **_CLIPS},
        "eager",
        3,
        _tokens,
    ),
    "inkling2_loop": _case(
        "inkling2_loop",
        "Inkling2LoopTextModel",
        "Inkling2LoopTextConfig",
        {**TINY_INKLING, **_CLIPS, **_LOOP, **_LAYERS},
        "eager",
        5,
        _tokens,
    ),
    "parakeet-sdpa": _case(
        "parakeet", "ParakeetEncoder", "ParakeetEncoderConfig", PARAKEET, "sdpa", 4, _mel
    ),
    "parakeet-eager": _case(
        "parakeet", "ParakeetEncoder", "ParakeetEncoderConfig", PARAKEET, "eager", 4, _mel
    ),
    "nemotron_streaming": _case(
        "nemotron_asr_streaming",
        "NemotronAsrStreamingEncoder",
        "NemotronAsrStreamingEncoderConfig",
        _NEMOTRON,
        "sdpa",
        4,
        _streamed_mel,
    ),
    "wav2vec2_conformer-sdpa": _case(
        "wav2vec2_conformer",
        "Wav2Vec2ConformerEncoder",
        "Wav2Vec2ConformerConfig",
        _WAVE,
        "sdpa",
        3,
        _hidden,
    ),
    "wav2vec2_conformer-eager": _case(
        "wav2vec2_conformer",
        "Wav2Vec2ConformerEncoder",
        "Wav2Vec2ConformerConfig",
        _WAVE,
        "eager",
        3,
        _hidden,
    ),
    "wav2vec2_bert": _case(
        "wav2vec2_bert", "Wav2Vec2BertEncoder", "Wav2Vec2BertConfig", _BERT, "sdpa", 3, _hidden
    ),
    "seamless_m4t": _case(
        "seamless_m4t",
        "SeamlessM4TConformerEncoder",
        "SeamlessM4TConfig",
        SEAMLESS,
        "eager",
        3,
        _hidden,
    ),
    "seamless_m4t_v2": _case(
        "seamless_m4t_v2",
        "SeamlessM4Tv2ConformerEncoder",
        "SeamlessM4Tv2Config",
        _SEAMLESS2,
        "sdpa",
        3,
        _hidden,
    ),
    "xlnet": _case("xlnet", "XLNetModel", "XLNetConfig", XLNET, "eager", 3, _segments),
}


def build(name: str, class_name: str = "", **options: Any) -> nn.Module:
    """The model of a case in eval mode; all weights are random and large enough to matter.

    Args:
        class_name: of another class with the same configuration, which contains that of the case.
    """
    case = CASES[name]
    package, case_class, config_name = case.path
    models = f"transformers.models.{package}"
    modeling = importlib.import_module(f"{models}.modeling_{package}")
    configuration = importlib.import_module(f"{models}.configuration_{package}")
    config = getattr(configuration, config_name)(**{**case.config, **options})
    config._attn_implementation = case.implementation
    torch.manual_seed(0)
    model = getattr(modeling, class_name or case_class)(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # also those whose initial values are all 0 or 1
            # A deeper model multiplies rounding errors.
            nn.init.normal_(parameter, std=0.15 if name == "inkling2_loop" else 0.3)
    model.eval()
    return model


def causal_model(name: str, **options: Any) -> nn.Module:
    """The language model around the text model of a case."""
    package, text_model, _ = CASES[name].path
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    language_model = getattr(modeling, text_model.replace("TextModel", "ForCausalLM"))
    text = build(name, unpadded_vocab_size=N_VOCAB, **options)
    model: nn.Module = language_model(text.config)
    model.model.load_state_dict(text.state_dict())
    nn.init.normal_(model.lm_head.weight, std=0.3)
    return model.eval()


def to_bfloat16(model: nn.Module) -> nn.Module:
    """As `from_pretrained` does: some modules of a class stay in float32."""
    model.bfloat16()
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in model.named_parameters():
        if any(part in name for part in kept):
            parameter.data = parameter.data.float()
    return model


def run(model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """Hidden states of the last layer."""
    kwargs = {key: x.clone() if isinstance(x, Tensor) else x for key, x in kwargs.items()}
    out = model(**kwargs)
    return out if isinstance(out, Tensor) else out.last_hidden_state


def results(model: nn.Module, kwargs: dict[str, Any], valid: Tensor) -> dict[str, Tensor]:
    """Valid hidden states, and the gradients of all parameters from them."""
    out = run(model, kwargs)[valid]  # padding may have any result
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    model.zero_grad()
    (out * weights).sum().backward()
    grads = {f"d{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads}


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], error: float) -> None:
    largest = max(float(x.norm()) for x in expected.values())
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        difference = float((actual[name] - x).norm())
        assert difference <= error * (float(x.norm()) + 1e-2 * largest), f"{name}: {difference}"


def prepare(
    name: str, lengths: tuple[int, ...] = (13, 9), **options: Any
) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """A model, the keyword arguments of a call, and the frames or tokens that are valid."""
    return build(name, **options), *CASES[name].inputs(list(lengths))


class Models:
    """The functions of this file, for tests."""

    build, run, results = staticmethod(build), staticmethod(run), staticmethod(results)
    prepare, causal_model = staticmethod(prepare), staticmethod(causal_model)
    to_bfloat16 = staticmethod(to_bfloat16)
    check_equal, cases = staticmethod(check_equal), CASES


@pytest.fixture
def models() -> Any:
    yield Models
    unpatch()


@pytest.fixture(autouse=True)
def _no_programs_of_other_tests():
    """torch compiles one function at most eight times."""
    torch.compiler.reset()


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[name for name in CASES if not name.endswith("-eager")])
def name_once(request: pytest.FixtureRequest) -> Any:
    """One case of each class."""
    return request.param
