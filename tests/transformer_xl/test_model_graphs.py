"""The whole model under torch.compile, torch.export, autocast and gradient checkpointing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_xl.config import ModelConfig
from transformer_xl.memory import Memory
from transformer_xl.model import Output, TransformerXL

SMALL = ModelConfig(
    vocab_size=30,
    cutoffs=(10, 20),
    div_val=2,
    n_layer=2,
    d_model=16,
    n_head=2,
    d_head=8,
    d_inner=16,
    mem_len=6,
    dropout=0.0,
    init_std=0.3,
)
DYNAMIC = torch.export.Dim.DYNAMIC


def build(**options: Any) -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(dataclasses.replace(SMALL, **options))


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 30, (batch, length), generator=torch.Generator().manual_seed(seed))


def memory_of(batch: int, length: int) -> Memory:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, batch, length, 16, generator=generator)
    return Memory(hidden, torch.arange(batch) % (length + 1))


def gradients(model: TransformerXL, output: Output) -> list[Tensor]:
    assert output.loss is not None
    return list(torch.autograd.grad(output.loss, list(model.parameters())))


@pytest.mark.slow
@pytest.mark.parametrize(  # both together are exported below
    "options", [{"clamp_len": 4}, {"same_length": True}], ids=lambda options: "-".join(options)
)
def test_limited_distances_compile_to_one_graph_at_every_length(options: dict[str, Any]) -> None:
    model = build(**options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (5, 7):
        segment, memory = tokens(2, length), memory_of(2, 6)
        due = model(segment, memory, segment).loss
        torch.testing.assert_close(compiled(segment, memory, segment).loss, due)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["documents", "checkpointing"])
def test_one_compiled_graph_serves_forward_and_backward(checkpointing: bool) -> None:
    model = build(cutoffs=(), div_val=1, gradient_checkpointing=checkpointing)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (5, 7):
        segment, memory = tokens(2, length), memory_of(2, 6)
        documents = {} if checkpointing else {"document_start": segment % 4 == 0}
        expected = model(segment, memory, segment, **documents)
        output = compiled(segment, memory, segment, **documents)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(gradients(model, output), gradients(model, expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "packed"),
    [({}, True), ({"same_length": True, "clamp_len": 4, "first_memory": "zeros"}, False)],
    ids=["documents", "clamped-window"],
)
def test_one_exported_program_serves_every_batch_and_length(
    options: dict[str, Any], packed: bool
) -> None:
    model = build(**options).eval()
    shapes: dict[str, Any] = {
        "tokens": {0: DYNAMIC, 1: DYNAMIC},
        "memory": Memory({1: DYNAMIC, 2: DYNAMIC}, {0: DYNAMIC}),  # type: ignore[arg-type]
        "targets": {0: DYNAMIC, 1: DYNAMIC},
    }
    if packed:
        shapes["document_start"] = {0: DYNAMIC, 1: DYNAMIC}

    def inputs(batch: int, length: int, memory_length: int) -> tuple[Any, dict[str, Tensor]]:
        segment = tokens(batch, length)
        documents = {"document_start": segment % 4 == 0} if packed else {}
        return (segment, memory_of(batch, memory_length), segment), documents

    program = torch.export.export(model, *inputs(3, 5, 6), dynamic_shapes=shapes).module()
    for sizes in ((3, 5, 6), (2, 9, 3), (5, 2, 20), (4, 12, 2)):
        arguments, documents = inputs(*sizes)
        expected = model(*arguments, **documents)
        torch.testing.assert_close(program(*arguments, **documents), expected)


def test_checkpointing_gives_the_same_bits() -> None:
    model, checkpointed = build(), build(gradient_checkpointing=True)
    for module in (model, checkpointed):
        module.train()
    segment, memory = tokens(2, 5), memory_of(2, 6)
    expected, output = (m(segment, memory, segment) for m in (model, checkpointed))
    assert torch.equal(output.loss, expected.loss)
    for ours, theirs in zip(
        gradients(checkpointed, output), gradients(model, expected), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_checkpointing_draws_the_same_dropout_again() -> None:
    options = {"dropout": 0.3, "dropatt": 0.3}
    results = []
    for checkpointing in (False, True):
        model = build(gradient_checkpointing=checkpointing, **options).train()
        torch.manual_seed(7)
        output = model(tokens(2, 5), memory_of(2, 6), tokens(2, 5))
        results.append((output.loss, gradients(model, output)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_checkpointing_stores_less() -> None:
    def saved_elements(checkpointing: bool) -> int:
        model = build(gradient_checkpointing=checkpointing).train()
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens(4, 40), memory_of(4, 6))
        return saved

    assert saved_elements(True) < saved_elements(False) / 2


@pytest.mark.parametrize("options", [{}, {"cutoffs": (), "div_val": 1, "pre_lnorm": True}])
def test_autocast_trains_in_bf16_and_remembers_in_float32(options: dict[str, Any]) -> None:
    model, segment = build(**options), tokens(2, 5)
    expected = model(segment, memory_of(2, 6), segment)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(segment, memory_of(2, 6), segment)
    assert output.loss.dtype == torch.float32
    assert output.memory.hidden.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.03, atol=0)
    torch.testing.assert_close(output.memory.hidden, expected.memory.hidden, rtol=0, atol=0.1)
    for gradient, parameter in zip(gradients(model, output), model.parameters(), strict=True):
        assert gradient.dtype == parameter.dtype
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_runs_and_remembers_in_it(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    output = model(tokens(2, 5), model(tokens(2, 4)).memory, tokens(2, 5))
    assert output.hidden.dtype == output.memory.hidden.dtype == dtype
    assert output.loss.isfinite()
