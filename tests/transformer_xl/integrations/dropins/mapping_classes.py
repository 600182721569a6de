"""The classes of docs/mappings.md from their packages, with random weights and inputs.

A package whose import needs many others is not imported: the one file of the class is loaded, with
stand-ins for the names that it imports and the class does not use.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

B, T, H, D, M = 3, 27, 4, 8, 6  # M: frames of memory
C = H * D
LENGTHS = torch.tensor([27, 19, 8])
VALID = torch.arange(T) < LENGTHS[:, None]
EVERYTHING: Any = ...


class Case(NamedTuple):
    """A class's forward and the arguments for it and for the page's function.

    Args:
        theirs: the forward as a function of the module and the inputs.
        valid: the part of the output that must be equal.
    """

    module: nn.Module
    inputs: dict[str, Any]
    theirs: Callable[..., Tensor]
    valid: Any


def load(package: str, file: str, **stand_ins: dict[str, Any]) -> types.ModuleType:
    """One file of an installed package.

    Args:
        stand_ins: for a module of the package, dots as `__`, the names that are imported from it;
            names that are not given are mocks.
    """
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(Path(file).stem, Path(folder) / file)
    module = importlib.util.module_from_spec(spec)
    modules = {
        f"{package}.{name.replace('__', '.')}": mock.MagicMock(**names)
        for name, names in stand_ins.items()
    }
    with mock.patch.dict(sys.modules, modules):
        spec.loader.exec_module(module)
    return module


def transformers(name: str) -> tuple[types.ModuleType, types.ModuleType]:
    """The modules with a model's classes and with its configurations."""
    models = f"transformers.models.{name}"
    return (
        importlib.import_module(f"{models}.modeling_{name}"),
        importlib.import_module(f"{models}.configuration_{name}"),
    )


def randomised(module: nn.Module) -> nn.Module:
    """All weights random, also those that a class initialises with zeros."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def fastspeech2_conformer() -> Case:
    modeling, configuration = transformers("fastspeech2_conformer")
    config = configuration.FastSpeech2ConformerConfig(hidden_size=C)
    options = {"num_attention_heads": H, "attention_dropout_rate": 0.1}
    options["positional_dropout_rate"] = 0.0
    x = torch.randn(B, T, C)
    _, table = modeling.FastSpeech2ConformerRelPositionalEncoding(config, options)(x)
    module = modeling.FastSpeech2ConformerAttention(config, options)
    inputs = {"hidden_states": x, "attention_mask": VALID[:, None].long(), "pos_emb": table}
    return Case(randomised(module), inputs, lambda m, **y: m(**y)[0], EVERYTHING)


def speechbrain() -> Case:
    attention = load("speechbrain", "nnet/attention.py", dataio__dataio={}, utils__logger={})
    x = torch.randn(B, T, C)
    module = attention.RelPosMHAXL(C, H, dropout=0.1, vbias=True)
    inputs = {"x": x, "pos_embs": attention.RelPosEncXL(C)(x), "key_padding_mask": ~VALID}

    def theirs(m: nn.Module, x: Tensor, **options: Any) -> Tensor:
        out: Tensor = m(x, x, x, return_attn_weights=False, **options)
        return out

    return Case(randomised(module), inputs, theirs, EVERYTHING)


def gemma3n_audio() -> Case:
    modeling, configuration = transformers("gemma3n")
    sizes = {"hidden_size": C, "conf_num_attention_heads": H, "conf_attention_logit_cap": 2.0}
    sizes |= {"conf_attention_context_left": 5, "conf_attention_context_right": 2}
    config = configuration.Gemma3nAudioConfig(**sizes, conf_attention_chunk_size=4)
    module = randomised(modeling.Gemma3nAudioAttention(config))
    inputs = {"hidden_states": torch.randn(B, T, C), "mask": ~VALID}
    return Case(module, inputs, lambda m, **y: m(**y), VALID)


def gemma4_audio() -> Case:
    """The inputs of the attention, mask included, are those that the model computes."""
    modeling, configuration = transformers("gemma4")
    sizes = {"hidden_size": C, "num_attention_heads": H, "num_hidden_layers": 1}
    config = configuration.Gemma4AudioConfig(**sizes, attention_logit_cap=2.0)
    config._attn_implementation = "eager"
    model = randomised(modeling.Gemma4AudioModel(config))
    module, calls = model.layers[0].self_attn, []
    hook = module.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
    mel = torch.arange(4 * T) < 4 * LENGTHS[:, None]  # four frames of features for one
    n_valid = model(torch.randn(B, 4 * T, 128), mel).attention_mask.sum(1)
    hook.remove()
    inputs = {name: calls[0][name] for name in ("hidden_states", "position_embeddings")}

    def theirs(m: nn.Module, n_valid: Tensor, **inputs: Any) -> Tensor:
        out: Tensor = m(**inputs, attention_mask=calls[0]["attention_mask"])[0]
        return out

    valid = torch.arange(T) < n_valid[:, None]
    return Case(module, {**inputs, "n_valid": n_valid}, theirs, valid)


def funnel(block_index: int = 0) -> Case:
    modeling, configuration = transformers("funnel")
    sizes = {"d_model": C, "n_head": H, "d_head": D, "hidden_dropout": 0.0}
    config = configuration.FunnelConfig(**sizes, block_sizes=[2, 2], attention_dropout=0.1)
    x, kinds = torch.randn(B, T, C), torch.randint(2, (B, T))
    kinds[:, 0] = 2  # the kind of <cls>
    structure = modeling.FunnelAttentionStructure(config).eval()
    inputs = structure.init_attention_inputs(x, VALID.float(), kinds)
    if block_index:  # as between two blocks
        _, inputs = structure.pre_attention_pooling(x, inputs)
        inputs = structure.post_attention_pooling(inputs)
        x = x[:, : inputs[2].shape[1]]
    module = randomised(modeling.FunnelRelMultiheadAttention(config, block_index))

    def theirs(m: nn.Module, x: Tensor, attention_inputs: Any) -> Tensor:
        out: Tensor = m(x, x, x, attention_inputs)[0]
        return out

    return Case(module, {"x": x, "attention_inputs": tuple(inputs)}, theirs, EVERYTHING)


SIZES = {"num_rel_pos_features": 12, "heads": H, "dim_key": D, "dim_value": 3 * D, "dropout": 0.1}


def enformer() -> Case:
    modeling = load("enformer_pytorch", "modeling_enformer.py", data={}, config_enformer={})

    def theirs(m: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
        with mock.patch.object(modeling, "get_positional_embed", return_value=positions):
            out: Tensor = m(x)
        return out

    positions = modeling.get_positional_embed(T, 12, torch.device("cpu"), use_tf_gamma=False)
    inputs = {"x": torch.randn(B, T, C), "positions": positions}
    return Case(randomised(modeling.Attention(C, **SIZES)), inputs, theirs, EVERYTHING)


def borzoi() -> Case:
    modeling = load("borzoi_pytorch", "pytorch_borzoi_transformer.py")

    def theirs(m: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
        m.positions = positions
        out: Tensor = m(x)
        return out

    positions = modeling.get_positional_embed(T, 4096, 12, torch.device("cpu"))
    inputs = {"x": torch.randn(B, T, C), "positions": positions}
    return Case(randomised(modeling.Attention(C, **SIZES)), inputs, theirs, EVERYTHING)


class Kept(nn.Module):
    """A table that was computed once; the class computes it in float32 only."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Buffer(table)

    def forward(self, n: int) -> Tensor:
        assert n == len(self.table)
        return self.table


def rllib_gtrxl() -> Case:
    annotations = {name: lambda x: x for name in ("DeveloperAPI", "OldAPIStack")}
    common = {
        "rllib__utils__annotations": annotations,
        "rllib__utils__framework": {"try_import_torch": lambda: (torch, nn)},
        "rllib__utils__typing": {"TensorType": Tensor},
    }
    activations = {"get_activation_fn": lambda *_: nn.ReLU}
    misc = load("ray", "rllib/models/torch/misc.py", rllib__models__utils=activations, **common)

    def sequence_mask(lengths: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.arange(int(lengths.max())) < lengths[:, None]

    attention = load(
        "ray",
        "rllib/models/torch/modules/relative_multi_head_attention.py",
        rllib__models__torch__misc={"SlimFC": misc.SlimFC},
        rllib__utils__torch_utils={"sequence_mask": sequence_mask},
        **common,
    )
    options = {"input_layernorm": True, "output_activation": "relu"}
    module = randomised(attention.RelativeMultiHeadAttention(C, C, H, D, **options))
    module._rel_pos_embedding = Kept(module._rel_pos_embedding(M + T))
    inputs = {"inputs": torch.randn(B, T, C), "memory": torch.randn(B, M, C)}
    return Case(module, inputs, lambda m, **y: m(**y), EVERYTHING)


class Row(NamedTuple):
    """One row of the page's table; the page's function has the name of the case."""

    package: str
    name: str
    case: Callable[[], Case]

    @property
    def function(self) -> str:
        return "enformer" if self.case is borzoi else self.case.__name__


ROWS = (
    Row("transformers", "FastSpeech2ConformerAttention", fastspeech2_conformer),
    Row("speechbrain", "RelPosMHAXL", speechbrain),
    Row("transformers", "Gemma3nAudioAttention", gemma3n_audio),
    Row("transformers", "Gemma4AudioAttention", gemma4_audio),
    Row("transformers", "FunnelRelMultiheadAttention", funnel),
    Row("enformer-pytorch", "Attention", enformer),
    Row("borzoi-pytorch", "Attention", borzoi),
    Row("ray", "RelativeMultiHeadAttention", rllib_gtrxl),
)


def case_of(row: Row) -> Case:
    torch.manual_seed(0)
    return row.case()
