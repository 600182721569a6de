"""The attention classes of ESPnet and of the libraries that copied it, and calls of them.

Most of these libraries import many packages that the classes do not need. The packages that contain
a class are therefore replaced by empty ones, so that its own file is imported alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.integrations import unpatch

H, D = 3, 24
# Packages whose __init__ imports the whole library.
_EMPTY = {"funasr", "chatterbox", "chatterbox.models", "chatterbox.models.s3gen", "fairseq"}
_EMPTY |= {"fairseq.modules"}


def load(path: str) -> Any:
    """A class, from its importable name; the test is skipped where its package is missing."""
    module, _, name = path.rpartition(".")
    parts = module.split(".")
    if parts[0] not in sys.modules and importlib.util.find_spec(parts[0]) is None:
        pytest.skip(f"{parts[0]} is not installed")
    for n in range(1, len(parts)):
        package = ".".join(parts[:n])
        if package in _EMPTY and package not in sys.modules:
            spec = importlib.util.find_spec(package)
            assert spec is not None
            empty = types.ModuleType(package)
            empty.__spec__, empty.__path__ = spec, list(spec.submodule_search_locations or ())
            sys.modules[package] = empty
    return getattr(importlib.import_module(module), name)


Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One class.

    Args:
        call: arguments of a call, given the inputs [B, T, D], a table and the valid frames.
        family: None where the class is found by its parameters.
        is_time_first: tensors are [T, B, D].
    """

    path: str
    call: Callable[[Tensor, Tensor, Tensor], Call]
    family: str | None
    options: dict[str, Any] = field(default_factory=dict)
    is_time_first: bool = False


def _keep(x: Tensor, table: Tensor, valid: Tensor) -> Call:
    return (x, x, x, table, valid[:, None]), {}


def _dense(x: Tensor, table: Tensor, valid: Tensor) -> Call:
    """Each frame also sees at most four frames before it and two after it."""
    T = valid.shape[1]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return (x, x, x, table, valid[:, None] & (distance <= 4) & (distance >= -2)), {}


def _integers(x: Tensor, table: Tensor, valid: Tensor) -> Call:
    """The first frame is masked out and the third is not: the valid keys are no range."""
    valid = valid.clone()
    valid[:, 1] = False
    return (x, x, x), {"pos_emb": table, "mask": valid[:, None].int()}


def _without_mask(x: Tensor, table: Tensor, valid: Tensor) -> Call:
    return (x, x, x, table, None), {}


def _cached(x: Tensor, table: Tensor, valid: Tensor) -> Call:
    return (x, x, x, valid[:, None], table), {}


def _transducer(x: Tensor, table: Tensor, valid: Tensor) -> Call:
    return (x, x, x, table, ~valid), {}


def _chunked(x: Tensor, table: Tensor, valid: Tensor) -> Call:
    chunk = torch.arange(valid.shape[1]) // 4
    return (x, x, x, table, ~valid), {"chunk_mask": chunk > chunk[:, None]}


def _time_first(x: Tensor, table: Tensor, valid: Tensor) -> Call:
    x, table = x.transpose(0, 1), table.transpose(0, 1)
    return (x, x, x, table), {"key_padding_mask": ~valid}


_TORCH = "espnet.nets.pytorch_backend.transformer.attention."
_TRANSDUCER = "espnet2.asr_transducer.encoder.modules.attention.RelPositionMultiHeadedAttention"
_FUNASR = "funasr.models.transformer.attention.RelPositionMultiHeadedAttention"
_ESPNET = f"{_TORCH}RelPositionMultiHeadedAttention"
LEGACY = f"{_TORCH}LegacyRelPositionMultiHeadedAttention"
CASES = {
    "espnet": Case(_ESPNET, _keep, "espnet"),
    "espnet-dense": Case(_ESPNET, _dense, "espnet"),
    "espnet-integers": Case(_ESPNET, _integers, "espnet"),
    "espnet-no_mask": Case(_ESPNET, _without_mask, "espnet"),
    "espnet-zero_triu": Case(_ESPNET, _keep, "espnet", {"zero_triu": True}),
    "transducer": Case(_TRANSDUCER, _transducer, "espnet"),
    "transducer-chunks": Case(_TRANSDUCER, _chunked, "espnet"),
    "transducer-simplified": Case(
        _TRANSDUCER, _chunked, "espnet", {"simplified_attention_score": True}
    ),
    "funasr": Case(_FUNASR, _keep, "funasr"),
    "funasr-sond": Case(
        "funasr.models.sond.attention.RelPositionMultiHeadedAttention", _dense, "funasr"
    ),
    "funasr-chunk": Case(f"{_FUNASR}Chunk", _chunked, "funasr"),
    "chatterbox": Case(
        "chatterbox.models.s3gen.transformer.attention.RelPositionMultiHeadedAttention",
        _cached,
        "chatterbox",
    ),
    "cosyvoice": Case(
        "cosyvoice.transformer.attention.RelPositionMultiHeadedAttention", _cached, None
    ),
    "fireredasr": Case(
        "fireredasr.models.module.conformer_encoder.RelPosMultiHeadAttention", _keep, "fireredasr"
    ),
    "fairseq": Case(
        "fairseq.modules.espnet_multihead_attention.RelPositionMultiHeadedAttention",
        _time_first,
        "fairseq",
        is_time_first=True,
    ),
}


def build(name: str, dropout: float = 0.0) -> nn.Module:
    """The class of a case in eval mode, with random weights that are large enough to matter."""
    case = CASES[name]
    torch.manual_seed(0)
    sizes = (D, H) if case.is_time_first else (H, D)
    module: nn.Module = load(case.path)(*sizes, dropout, **case.options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def inputs(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Frames [B, T, D], a table [1, 2T - 1, D] and the valid frames [B, T]."""
    T, generator = max(lengths), torch.Generator().manual_seed(1)
    x = torch.randn(len(lengths), T, D, generator=generator)
    table = torch.randn(1, 2 * T - 1, D, generator=generator)
    return x, table, torch.arange(T) < torch.tensor(lengths)[:, None]


def run(module: nn.Module, name: str, x: Tensor, table: Tensor, valid: Tensor) -> Tensor:
    """[B, T, D]."""
    args, kwargs = CASES[name].call(x, table, valid)
    out = module(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(0, 1) if CASES[name].is_time_first else out


def results(module: nn.Module, name: str, lengths: list[int]) -> dict[str, Tensor]:
    """The output of valid frames; gradients of the inputs and of all parameters from them."""
    x, table, valid = inputs(lengths)
    x.requires_grad_()
    module.zero_grad()
    out = run(module, name, x, table, valid)[valid]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = {f"d{n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"out": out.detach(), "dx": x.grad, **grads}


def check_equal(
    actual: dict[str, Tensor], expected: dict[str, Tensor], error: float = 1e-5
) -> None:
    largest = max(float(x.norm()) for x in expected.values())
    assert actual.keys() == expected.keys()
    for key, x in expected.items():
        difference = float((actual[key] - x).norm())
        assert difference <= error * (float(x.norm()) + 1e-2 * largest), f"{key}: {difference}"


class Classes:
    """The functions of this file, for tests."""

    load, build, inputs = staticmethod(load), staticmethod(build), staticmethod(inputs)
    run, results, check_equal = staticmethod(run), staticmethod(results), staticmethod(check_equal)
    cases, legacy = CASES, LEGACY


@pytest.fixture
def theirs() -> Any:
    yield Classes
    unpatch()


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    """Each case."""
    return str(request.param)


KINDS = ["espnet", "transducer-chunks", "funasr", "cosyvoice", "chatterbox", "fireredasr"]
KINDS += ["fairseq"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """One case of each convention."""
    return str(request.param)
