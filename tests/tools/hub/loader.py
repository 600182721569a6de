"""The loader of Hugging Face's `kernels`, or the lines of it that import a local variant."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ATTENTION = ("q", "k", "v", "r", "r_w_bias", "r_r_bias", "mem_k", "mem_v")


def load_variant(variant: Path) -> ModuleType:
    """Imports a variant as `kernels` 0.17.2 does: under the name in its metadata."""
    name = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_with_kernels(root: Path) -> ModuleType:
    """Checks the folder with the package `kernels` and loads it."""
    import kernels
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    backends = [str(backend).lower() for backend in Build.open(root).general.backends]
    assert backends == ["cpu", "cuda"], backends
    for backend in backends:
        variant = root / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    return kernels.get_local_kernel(root)


def inputs(dtype: torch.dtype, B: int = 2, H: int = 3) -> dict[str, Tensor]:
    """Tensors of a call of `rel_attention` that require gradients, by name."""
    Tq, Tm, D = 7, 5, 4
    shapes = {
        **dict.fromkeys("qkv", (B, H, Tq, D)),
        "r": (1, H, Tm + Tq, D),
        **dict.fromkeys(("r_w_bias", "r_r_bias"), (H, D)),
        **dict.fromkeys(("mem_k", "mem_v"), (B, H, Tm, D)),
    }
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shapes[name], generator=random, dtype=dtype).requires_grad_()
        for name in ATTENTION
    }


def formula(q, k, v, r, *, r_w_bias, r_r_bias, mem_k, mem_v) -> Tensor:
    """Causal attention over memory and segment, pair by pair."""
    k, v = torch.cat([mem_k, k], 2), torch.cat([mem_v, v], 2)
    Tq, Tk, D = q.shape[2], k.shape[2], q.shape[3]
    rows = []
    for i in range(Tq):
        content, position = q[:, :, i] + r_w_bias, q[:, :, i] + r_r_bias
        scores = [
            (content * k[:, :, j]).sum(-1) + (position * r[:, :, j - i + Tq - 1]).sum(-1)
            for j in range(i + Tk - Tq + 1)
        ]
        probs = (torch.stack(scores, -1) / D**0.5).softmax(-1)
        rows.append((probs[..., None] * v[:, :, : probs.shape[-1]]).sum(2))
    return torch.stack(rows, 2)


def outputs_and_gradients(function, tensors: dict[str, Tensor], **options) -> list[Tensor]:
    """The output of a function of `inputs`, and the gradient of each tensor."""
    positional = [tensors[name] for name in "qkvr"]
    named = {name: tensors[name] for name in ATTENTION[4:]}
    out = function(*positional, **named, **options)
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out) / out.numel()
    return [out, *torch.autograd.grad(out, list(tensors.values()), weights)]
