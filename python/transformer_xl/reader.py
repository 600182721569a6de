"""Reading a batch of texts of different lengths without gradients, each exactly as if alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from transformer_xl.key_value_window import KeyValueWindow, empty_memory
from transformer_xl.memory import Memory
from transformer_xl.model import Output, TransformerXL
from transformer_xl.nn.inference import inference


class Reader:
    """The memory of a batch of texts, each at its own position.

    A text is read in segments that begin where they would if it were alone. Every module is in
    evaluation mode during a forward pass and in its own mode otherwise.

    Args:
        model: the language model; its weights and lengths must stay as they are.
        batch_size: B, the number of texts.
        segment_len: the most tokens that are read at a time.
        cached: keep keys and values in a `KeyValueWindow`; False: keep hidden states and project
            them again at each call, as is done in any case where no window serves the model.
        cache_dtype: of the keys and values; None: as `KeyValueWindow.empty` chooses it.

    Attributes:
        memory: of the tokens read so far.
    """

    def __init__(
        self,
        model: TransformerXL,
        batch_size: int,
        *,
        segment_len: int = 512,
        cached: bool = True,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.segment_len = model, segment_len
        with inference(model):
            self.memory = empty_memory(model, batch_size, cached=cached, cache_dtype=cache_dtype)

    @property
    def n_bytes(self) -> int:
        """Bytes of the memory."""
        memory = self.memory
        return memory.n_bytes if isinstance(memory, KeyValueWindow) else memory.hidden.nbytes

    def read(self, texts: Sequence[Tensor]) -> Tensor:
        """Read more tokens of every text.

        Args:
            texts: B times int64 [T_b], T_b ≥ 1.

        Returns:
            [B, d_model], the hidden state of the last token of each text.
        """
        lengths = [len(text) for text in texts]
        if isinstance(self.memory, Memory) and len(set(lengths)) > 1:
            return self._read_one_by_one(self.memory, texts)
        padded = pad_sequence(list(texts), batch_first=True)  # [B, T]
        ends = torch.tensor(lengths, device=padded.device)
        rows = torch.arange(len(ends), device=padded.device)
        hidden = None
        for begin in range(0, max(lengths), self.segment_len):
            segment = padded[:, begin : begin + self.segment_len]
            output = self._forward(segment)
            T = segment.shape[1]
            if isinstance(self.memory, KeyValueWindow) and min(lengths) < begin + T:
                self.memory.crop((begin + T - ends).clamp(0, T))
            last = output.hidden[rows, (ends - 1 - begin).clamp(0, T - 1)]
            # The last segment in which a text has a token decides.
            hidden = last if hidden is None else torch.where((ends > begin)[:, None], last, hidden)
        assert hidden is not None
        return hidden

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token of every text, int64 [B]; returns its hidden state [B, d_model]."""
        return self._forward(tokens[:, None]).hidden[:, 0]

    def select(self, rows: Tensor) -> None:
        """Keep the texts with these indices, int64 [B'], in any order; one may be repeated."""
        if isinstance(self.memory, KeyValueWindow):
            self.memory.select(rows)
        else:
            self.memory = Memory(self.memory.hidden[:, rows], self.memory.start[rows])

    def _forward(self, tokens: Tensor) -> Output:
        with inference(self.model):
            output: Output = self.model(tokens, self.memory)
        self.memory = output.memory
        return output

    def _read_one_by_one(self, memory: Memory, texts: Sequence[Tensor]) -> Tensor:
        """As `read`. Hidden states of different lengths need not be read side by side."""
        hidden, memories = [], []
        for b, text in enumerate(texts):
            self.memory = Memory(memory.hidden[:, [b]], memory.start[[b]])
            hidden.append(self.read([text]))
            memories.append(self.memory)
        self.memory = _side_by_side(memories)
        return torch.cat(hidden)


def _side_by_side(memories: Sequence[Memory]) -> Memory:
    """One memory with all rows; shorter ones are empty before their first token."""
    longest = max(memory.length for memory in memories)
    missing = [longest - memory.length for memory in memories]
    return Memory(
        torch.cat([pad(m.hidden, (0, 0, n, 0)) for m, n in zip(memories, missing, strict=True)], 1),
        torch.cat([m.start + n for m, n in zip(memories, missing, strict=True)]),
    )
