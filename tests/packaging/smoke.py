"""Tries an installation from outside the checkout; run by `make wheel`, `make installs` and the
release workflow.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch

import transformer_xl
import txl_kernels
from txl_kernels.backends import native


def check_origin(origin: Path, is_native: bool) -> None:
    """Both packages come from this folder, with the native part or without it."""
    for package in (txl_kernels, transformer_xl):
        assert origin.resolve() in Path(package.__file__).resolve().parents, package.__file__
    reason = native.unavailable_reason()
    assert (reason is None) == is_native, reason or "the native part is present"


def check_attention(is_native: bool) -> None:
    """Attention of "auto" equals that of the reference; native is chosen where it exists."""
    B, H, T, D = 2, 3, 17, 41
    q, k, v = torch.randn(3, B, H, T, D).unbind()
    r, r_w_bias, r_r_bias = torch.randn(1, H, T, D), torch.randn(H, D), torch.randn(H, D)
    backends = ("auto", "native", "reference") if is_native else ("auto", "reference")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = {
            backend: txl_kernels.rel_attention(
                q, k, v, r, r_w_bias=r_w_bias, r_r_bias=r_r_bias, causal=True, backend=backend
            )
            for backend in backends
        }
    assert torch.equal(out["auto"], out["native" if is_native else "reference"])
    torch.testing.assert_close(out["auto"], out["reference"], rtol=1e-4, atol=1e-5)
    told = [str(x.message) for x in caught if "plain PyTorch reference" in str(x.message)]
    assert len(told) == int(not is_native), told


def check_command_without_its_extra() -> None:
    """The kernels came without `[lm]`; the command says how to get it."""
    command = shutil.which("transformer-xl", path=str(Path(sys.executable).parent))
    assert command is not None
    answer = subprocess.run([command, "doctor"], capture_output=True, text=True)
    assert answer.returncode != 0
    assert "transformer-xl[lm]" in answer.stderr, answer.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--origin", type=Path, default=Path(sys.prefix), help="folder of the packages"
    )
    parser.add_argument(
        "--without-native", action="store_true", help="the installation has no native part"
    )
    parser.add_argument(
        "--json", type=Path, help="file that receives `native`: yes, or the reason why not"
    )
    options = parser.parse_args()
    if options.json:
        options.json.write_text(json.dumps({"native": native.unavailable_reason() or "yes"}))
    check_origin(options.origin, not options.without_native)
    check_attention(not options.without_native)
    check_command_without_its_extra()
    print(f"smoke test passed: txl_kernels from {Path(txl_kernels.__file__).parent}")
