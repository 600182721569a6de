"""The two workloads: a training step of an Inkling and a forward pass of a Parakeet encoder.

Both have random weights and run in float32. `prepare` returns the function to measure; its result
is a list of norms that must be equal for the original and the patched model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from transformer_xl.integrations import patch

Run = Callable[[], list[float]]

# Sizes of the attention of Inkling-Small with fewer heads; a small model around it.
INKLING = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 128,
    "sliding_window_size": 512,
    "d_rel": 16,
    "rel_extent": 1024,
    "log_scaling_n_floor": 128_000,
    "initializer_range": 0.2,  # large enough that the attention is not uniform
}
MEL_PER_MINUTE = 6_000  # a mel frame every 10 ms


@dataclasses.dataclass(frozen=True)
class InklingStep:
    """Forward, backward and AdamW, with gradient checkpointing; of six layers the last is global.

    All layers have a dense feed-forward, which the class supports beside a mixture of experts.
    """

    n_layer: int = 6
    lengths: tuple[float, ...] = (2048, 4096, 8192, 16384, 32768)
    name: ClassVar[str] = "inkling"
    unit: ClassVar[str] = "tokens"

    @property
    def title(self) -> str:
        return "One training step of an Inkling-shaped model"

    @property
    def details(self) -> str:
        n_global = self.n_layer // 6
        return (
            f"{self.n_layer - n_global} sliding layers (window 512) and {n_global} global, "
            "8 query and 2 key heads of 128, d_model 256; gradient checkpointing; batch 1"
        )

    def tiny(self) -> InklingStep:
        """A step of a few milliseconds that loads the same libraries."""
        return InklingStep(n_layer=1, lengths=(64,))

    def prepare(self, length: float, *, is_patched: bool) -> Run:
        from transformers.models.inkling.configuration_inkling import InklingTextConfig
        from transformers.models.inkling.modeling_inkling import InklingForCausalLM

        dense = ["dense"] * self.n_layer
        config = InklingTextConfig(**INKLING, num_hidden_layers=self.n_layer, mlp_layer_types=dense)
        model = _built(InklingForCausalLM, config, is_patched).train()
        model.activation_checkpointing_enable()  # of each layer
        optimizer = torch.optim.AdamW(model.parameters())
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(config.vocab_size, (1, int(length)), generator=generator)

        def step() -> list[float]:
            loss = model(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            return [loss.item(), *(gradient.norm().item() for gradient in gradients)]

        return step


@dataclasses.dataclass(frozen=True)
class ParakeetEncoder:
    """A forward pass without gradients over one recording; lengths in minutes of audio."""

    n_layer: int = 4
    lengths: tuple[float, ...] = (1, 2, 5, 10, 20)
    name: ClassVar[str] = "parakeet"
    unit: ClassVar[str] = "minutes"

    @property
    def title(self) -> str:
        return "Parakeet's encoder on one recording"

    @property
    def details(self) -> str:
        return f"{self.n_layer} of 24 layers, 8 heads of 128, d_model 1024; batch 1; no gradients"

    def tiny(self) -> ParakeetEncoder:
        """A pass of a few milliseconds that loads the same libraries."""
        return ParakeetEncoder(n_layer=1, lengths=(0.02,))

    def prepare(self, length: float, *, is_patched: bool) -> Run:
        from transformers.models.parakeet.configuration_parakeet import ParakeetEncoderConfig
        from transformers.models.parakeet.modeling_parakeet import ParakeetEncoder as Encoder

        config = ParakeetEncoderConfig(num_hidden_layers=self.n_layer)
        model = _built(Encoder, config, is_patched).eval()
        size = (1, round(length * MEL_PER_MINUTE), config.num_mel_bins)
        features = torch.randn(size, generator=torch.Generator().manual_seed(1))
        mask = torch.ones(size[:2], dtype=torch.long)

        def encode() -> list[float]:
            with torch.no_grad():
                out = model(features, attention_mask=mask).last_hidden_state
            frames = out[0, :: max(1, out.shape[1] // 16)]
            norms: list[float] = frames.unflatten(1, (16, -1)).norm(dim=-1).flatten().tolist()
            return norms

        return encode


Workload = InklingStep | ParakeetEncoder
WORKLOADS: dict[str, type[Workload]] = {kind.name: kind for kind in (InklingStep, ParakeetEncoder)}


def _built(model_class: Any, config: Any, is_patched: bool) -> Any:
    """The model with attention "sdpa"; both sides have the same random weights."""
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = model_class(config)
    if is_patched:
        patch(model)
    return model
