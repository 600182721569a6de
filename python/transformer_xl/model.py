"""The Transformer-XL language model: embedding, layers with memory, adaptive softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transformer_xl.config import ModelConfig, check_lengths
from transformer_xl.key_value_window import KeyValueWindow
from transformer_xl.memory import Memory, document_key_start
from transformer_xl.nn import AdaptiveEmbedding, AdaptiveSoftmax, DecoderLayer, SinusoidalPositions
from transformer_xl.nn.adaptive_softmax import Reduction
from transformer_xl.nn.dropout import Dropout
from transformer_xl.nn.layer_window import LayerWindow
from transformer_xl.nn.position import RelativePositions
from txl_kernels.transforms import inside_transform


class Output(NamedTuple):
    """Results of a segment.

    `hidden` [B, T, d_model] is the input of the softmax; `loss` is in nats, None without targets;
    `memory` is the argument for the next segment, of the class of the argument of this one.
    """

    hidden: Tensor
    loss: Tensor | None
    memory: Memory | KeyValueWindow


class TransformerXL(nn.Module):
    """p(token | all tokens before), segment after segment.

    Args:
        config: sizes and options of the model.
        backend: "auto", or the only implementation of the ops of `txl_kernels` that may run.

    `mem_len`, `clamp_len` and `same_length` are initially those of the config; `set_lengths`
    changes them for evaluation.

    Source: Dai et al. 2019, section 3; equal to the released PyTorch code with `attn_type` 0.
    """

    r_w_bias: nn.Parameter | None
    r_r_bias: nn.Parameter | None
    mem_len: int
    same_length: bool

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        vocabulary: tuple[Any, ...] = (
            config.vocab_size,
            config.embed_width(0),
            config.d_model,
            config.cutoffs,
            config.div_val,
        )
        projected: dict[str, Any] = {"proj_same_dim": config.proj_same_dim, "backend": backend}
        self.word_emb = AdaptiveEmbedding(*vocabulary, **projected)
        self.pos_emb = SinusoidalPositions(config.d_model)
        self.drop = Dropout(config.dropout)
        self.layers = nn.ModuleList(_layer(config, backend) for _ in range(config.n_layer))
        self.final_layer_norm = (
            nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
            if config.final_lnorm
            else nn.Identity()
        )
        n_sample = max(config.sample_softmax, 0)
        self.crit = AdaptiveSoftmax(*vocabulary, **projected, n_sample=n_sample)
        for name in ("r_w_bias", "r_r_bias"):
            shape = (config.n_head, config.d_head)
            bias = None if config.untie_r else nn.Parameter(torch.zeros(shape))
            self.register_parameter(name, bias)
        self._tie()
        initialise(self, config)
        self.set_lengths(
            mem_len=config.mem_len, clamp_len=config.clamp_len, same_length=config.same_length
        )

    def forward(
        self,
        tokens: Tensor,
        memory: Memory | KeyValueWindow | None = None,
        targets: Tensor | None = None,
        *,
        reduction: Reduction = "mean",
        document_start: Tensor | None = None,
    ) -> Output:
        """Compute hidden states, and the loss, of a segment that follows the tokens in `memory`.

        Args:
            tokens: int64 [B, T]; B and T may be 0.
            memory: `Output.memory` of the previous segment; None: no tokens precede this one. A
                `KeyValueWindow` is updated in place, and is much faster where no gradients are
                needed.
            targets: int64 [B, T], the token that follows each of `tokens` (nothing is shifted
                here); -100 is not scored.
            reduction: of the loss over the scored targets: "mean" (0 if there are none), "sum", or
                "none" for [B, T] in token order.
            document_start: bool [B, T], True at the first token of a document; None: nowhere. No
                token attends before the last True at or before it, in this segment and in later
                ones: the returned memory starts where the row's last document starts. Needs a
                config with `first_memory` "empty".

        Raises:
            ValueError, TypeError: an argument of another shape or dtype; a memory of another model;
                a window of which a condition does not hold.
            IndexError: a token or target out of range.
        """
        _check_tokens("tokens", tokens, shape=None)
        B, T = tokens.shape
        x = self.drop(self.word_emb(tokens))  # [B, T, d_model]
        memory = self.init_memory(B) if memory is None else memory
        if document_start is not None and self.config.first_memory == "zeros":
            raise ValueError("document_start: expected None with first_memory 'zeros'")
        layer_memories, positions, key_start = self._layer_memories(memory, x, document_start)

        inputs = []
        for layer, layer_memory in zip(self.layers, layer_memories, strict=True):
            inputs.append(x)
            biases = (self.r_w_bias, self.r_r_bias)
            x = self._run(layer, x, layer_memory, positions, *biases, key_start)  # [B, T, d_model]
        hidden = self.drop(self.final_layer_norm(x))

        loss = None
        if targets is not None:
            _check_tokens("targets", targets, shape=tokens.shape)
            loss = self.crit(hidden, targets, reduction=reduction)
        if isinstance(memory, KeyValueWindow):
            return Output(hidden, loss, memory.advance(T, document_start))
        new_memory = memory.update(inputs, self.mem_len, document_start=document_start)
        return Output(hidden, loss, new_memory)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Natural logarithms of all V probabilities […, V], from `Output.hidden` […, d_model]."""
        return self.crit.log_prob(hidden)

    def init_memory(self, batch_size: int) -> Memory:
        """The memory before the first segment: of length 0 or, with the config's `first_memory`
        "zeros", `mem_len` zeros."""
        table = self.table()
        return Memory.empty(
            self.config.n_layer,
            batch_size,
            self.config.d_model,
            length=self.mem_len if self.config.first_memory == "zeros" else 0,
            dtype=table.dtype,
            device=table.device,
        )

    def set_lengths(
        self,
        *,
        mem_len: int | None = None,
        clamp_len: int | None = None,
        same_length: bool | None = None,
    ) -> None:
        """Use other lengths (in tokens) than in training; None leaves a length as it is.

        A memory that is longer than the new `mem_len` is attended to once more and then cut.
        """
        new_mem_len = self.mem_len if mem_len is None else mem_len
        new_same_length = self.same_length if same_length is None else same_length
        check_lengths(new_mem_len, new_same_length)
        self.mem_len, self.same_length = new_mem_len, new_same_length
        if clamp_len is not None:
            self.pos_emb.clamp_len = clamp_len
        keys_before = self.mem_len - (self.config.same_length_keys == "mem_len")
        self.pos_emb.window = (keys_before, None) if self.same_length else None

    @property
    def clamp_len(self) -> int:
        """Distances above it, in tokens, share one embedding; 0 or less: no clamp."""
        return self.pos_emb.clamp_len

    def table(self) -> Tensor:
        """The first embedding table, for its dtype and device, which are those of the memory."""
        return cast(Tensor, self.word_emb.emb_layers[0].weight)

    def _layer_memories(
        self, memory: Memory | KeyValueWindow, x: Tensor, document_start: Tensor | None
    ) -> tuple[Sequence[Tensor | LayerWindow], RelativePositions | None, Tensor | None]:
        """For each layer the memory before the segment `x` [B, T, d_model], and for all layers the
        positions and the first key of each row or token; a `LayerWindow` contains both."""
        if isinstance(memory, KeyValueWindow):
            return memory.begin(self, x, document_start), None, None
        B, T, _ = x.shape
        self._check_memory(memory, B)
        positions = self.pos_emb(T, memory.length + T, dtype=x.dtype, device=x.device)
        R = self.drop(positions.embedding)  # [R, d_model], one mask for all layers
        # With `first_memory` "zeros" the model attends to the zeros before the first segment too.
        key_start = memory.start if self.config.first_memory == "empty" else None
        if document_start is not None:
            key_start = document_key_start(document_start, (B, T), memory.length, key_start)
        return memory.hidden.detach().unbind(), positions._replace(embedding=R), key_start

    def _run(self, layer: nn.Module, *arguments: object) -> Tensor:
        recomputes = self.config.gradient_checkpointing and torch.is_grad_enabled()
        if recomputes and not inside_transform("vmap", "grad", "jvp"):
            out: Tensor = checkpoint(layer, *arguments, use_reentrant=False)
        else:
            out = layer(*arguments)
        return out

    def _tie(self) -> None:
        """Let the softmax use the embedding's tables and projections, as the config requires."""
        config = self.config
        if config.tie_weight:
            for softmax, embedding in zip(
                self.crit.out_layers, self.word_emb.emb_layers, strict=True
            ):
                softmax.weight = embedding.weight
        for k, tied in enumerate(config.tie_projs):
            projection = self.word_emb.emb_projs[k if config.div_val > 1 else 0]
            if tied and projection is not None:
                self.crit.out_projs[k] = projection

    def _check_memory(self, memory: Memory, batch_size: int) -> None:
        hidden, start = memory
        M = hidden.shape[2] if hidden.dim() == 4 else "M"
        expected = [self.config.n_layer, batch_size, M, self.config.d_model]
        if list(hidden.shape) != expected or list(start.shape) != [batch_size]:
            raise ValueError(
                f"memory: expected hidden {expected} and start [{batch_size}], "
                f"got {list(hidden.shape)} and {list(start.shape)}"
            )
        table = self.table()
        if (hidden.dtype, hidden.device) != (table.dtype, table.device):
            raise TypeError(
                f"memory: expected {table.dtype} on {table.device} as the parameters, "
                f"got {hidden.dtype} on {hidden.device}"
            )


def _layer(config: ModelConfig, backend: str) -> DecoderLayer:
    return DecoderLayer(
        config.d_model,
        config.n_head,
        config.d_head,
        config.d_inner,
        dropout=config.dropout,
        dropatt=config.dropatt,
        pre_lnorm=config.pre_lnorm,
        layer_norm_epsilon=config.layer_norm_epsilon,
        untie_r=config.untie_r,
        backend=backend,
    )


def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Draw every parameter from the distributions of the original's training script.

    Weights, tables, cluster columns and position biases are normal (init_std) or uniform
    (±init_range); projections normal (proj_init_std); LayerNorm weights normal around 1; biases 0.
    """

    def draw(weight: Tensor) -> None:
        if config.init == "uniform":
            nn.init.uniform_(weight, -config.init_range, config.init_range)
        else:
            nn.init.normal_(weight, 0.0, config.init_std)

    for name, parameter in model.named_parameters():
        if "layer_norm.weight" in name:
            nn.init.normal_(parameter, 1.0, config.init_std)
        elif "_projs." in name:
            nn.init.normal_(parameter, 0.0, config.proj_init_std)
        elif name.endswith(("weight", "r_w_bias", "r_r_bias")):
            draw(parameter)
        else:
            nn.init.zeros_(parameter)


def _check_tokens(name: str, tokens: Tensor, *, shape: torch.Size | None) -> None:
    if tokens.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {tokens.dtype}")
    if tokens.dim() != 2 or (shape is not None and tokens.shape != shape):
        expected = "[B, T]" if shape is None else list(shape)
        raise ValueError(f"{name}: expected {expected}, got {list(tokens.shape)}")
