"""Encoders with one layer, for each patched class that has no other case."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from torch import Tensor

from benchmarks.cases import OURS
from benchmarks.cases.dropins import DropInCase, patched_if, without_gradients
from benchmarks.peers import speech_encoders
from benchmarks.peers.speech_encoders import EncoderShape

UNPATCHED = "unpatched"
GATE = 1e-5  # relative error by Frobenius norm


@dataclasses.dataclass(frozen=True)
class EncoderCase(DropInCase):
    """A call without gradients, of the patched encoder and of the unpatched one."""

    shape: EncoderShape
    peers = (UNPATCHED,)
    in_process = (OURS, UNPATCHED)

    @property
    def name(self) -> str:
        return f"dropin/{self.shape.name}/float32/{self.direction}"

    def run(self, name: str) -> Callable[[], Tensor]:
        model = patched_if(name == OURS, speech_encoders.model(self.shape))
        return without_gradients(speech_encoders.run(model, self.shape))

    def n_bytes(self, name: str) -> int:
        hidden = 4 * self.shape.B * self.shape.n_frame * 4 * self.shape.d_inner
        scores = self.shape.score_bytes if name == UNPATCHED else 0
        return 4 * self.shape.n_weight + hidden + scores

    def check_result(self, name: str) -> None:
        """Compares both contenders with each other, whatever the name is."""
        self.compare(name, self.run(OURS)(), _unpatched(self).double(), GATE)

    def tiny(self) -> EncoderCase:
        return dataclasses.replace(self, shape=self.shape.tiny())


@functools.lru_cache(maxsize=1)
def _unpatched(case: EncoderCase) -> Tensor:
    return case.run(UNPATCHED)()


def encoder_cases() -> list[DropInCase]:
    """The sizes of published models, with one of their layers."""
    small = {"d_model": 512, "n_head": 8, "d_inner": 2048}
    large = {"d_model": 1024, "n_head": 16, "d_inner": 4096}
    base = {"d_model": 768, "n_head": 12, "d_inner": 3072}
    seconds = {  # by kind: the audio, and frames per second
        "nemo_full": (120, 12.5, small),
        "nemo_local": (300, 12.5, small),
        "nemotron": (60, 12.5, {**large, "n_head": 8}),
        "espnet": (60, 25.0, small),
        "wav2vec2_conformer": (30, 50.0, large),
        "wav2vec2_bert": (30, 50.0, large),
        "seamless_m4t": (30, 50.0, large),
        "seamless_m4t_v2": (30, 50.0, large),
    }
    shapes = [
        EncoderShape(name=f"{kind}_{n}s", kind=kind, n_frame=round(n * rate), **sizes)
        for kind, (n, rate, sizes) in seconds.items()
    ]
    xlnet = EncoderShape(
        name="xlnet_base_512", kind="xlnet", n_frame=512, B=4, n_memory=384, **base
    )
    return [EncoderCase(shape) for shape in (*shapes, xlnet)]
