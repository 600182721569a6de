"""What the kernels are asked to reach on an H100 or H200: `make gpu` judges by it, and the static
model's table gives it beside what it expects."""

from __future__ import annotations

from typing import NamedTuple


class Asked(NamedTuple):
    """Of one case in bfloat16; None where nothing is asked.

    Attributes:
        tflops: useful TFLOP/s at least.
        over_flash: at most so many times what position-free flash attention takes.
        of_copy: share of the bandwidth of a copy at least.
        of_gemm: share of the rate of torch's own large products at least.
    """

    tflops: float | None = None
    over_flash: float | None = None
    of_copy: float | None = None
    of_gemm: float | None = None

    def __str__(self) -> str:
        parts = (
            (self.tflops, "≥ {:g} TFLOP/s"),
            (self.over_flash, "≤ {:g} × flash"),
            (self.of_copy, "≥ {:.0%} of copy"),
            (self.of_gemm, "≥ {:.0%} of large products"),
        )
        return ", ".join(form.format(value) for value, form in parts if value is not None)


# By case and part.
ASKED = {
    "train_d64/forward": Asked(tflops=350, over_flash=1.7),
    "train_d128/forward": Asked(tflops=330, over_flash=1.7),
    "train_d64/backward": Asked(tflops=200, over_flash=2.3),
    "train_d128/backward": Asked(tflops=200, over_flash=2.3),
    "decode/forward": Asked(of_copy=0.7),
    "adaptive_loss/forward+backward": Asked(of_gemm=0.6),
    "adaptive_nll/forward+backward": Asked(of_gemm=0.5),
}
