"""Tries an installed wheel from outside the checkout; run by `make wheel`, not by pytest."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

import transformer_xl
import txl_kernels
from txl_kernels.backends import native


def check_origin() -> None:
    """Both packages come from the environment, and the native part came with them."""
    prefix = Path(sys.prefix).resolve()
    for package in (txl_kernels, transformer_xl):
        assert prefix in Path(package.__file__).resolve().parents, package.__file__
    assert native.unavailable_reason() is None, native.unavailable_reason()


def check_attention() -> None:
    """Native attention answers as the reference does, and `auto` chooses it."""
    B, H, T, D = 2, 3, 17, 41
    q, k, v = torch.randn(3, B, H, T, D).unbind()
    r, r_w_bias, r_r_bias = torch.randn(1, H, T, D), torch.randn(H, D), torch.randn(H, D)
    out = {
        backend: txl_kernels.rel_attention(
            q, k, v, r, r_w_bias=r_w_bias, r_r_bias=r_r_bias, causal=True, backend=backend
        )
        for backend in ("auto", "native", "reference")
    }
    assert torch.equal(out["auto"], out["native"])
    torch.testing.assert_close(out["native"], out["reference"], rtol=1e-4, atol=1e-5)


def check_command_without_its_extra() -> None:
    """The kernels came without `[lm]`; the command says how to get it."""
    command = shutil.which("transformer-xl", path=str(Path(sys.executable).parent))
    assert command is not None
    answer = subprocess.run([command, "doctor"], capture_output=True, text=True)
    assert answer.returncode != 0
    assert "transformer-xl[lm]" in answer.stderr, answer.stderr


if __name__ == "__main__":
    check_origin()
    check_attention()
    check_command_without_its_extra()
    print(f"smoke test passed: txl_kernels from {Path(txl_kernels.__file__).parent}")
