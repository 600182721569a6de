"""Hugging Face's XLNet, patched: two streams, memory, segments, pre-training, generation.

Outputs are compared at all tokens, padding included, because later segments attend to its memory.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.integrations import patch, patched, report

pytest.importorskip(
    "transformers", minversion="5.24", reason="make test-dropins installs it and runs these tests"
)

B, T, N_VOCAB = 3, 13, 50


def inputs(padding: str = "none", stream: str = "content") -> dict[str, Tensor]:
    """Tokens of two segments; padding on a side or in the middle; a query stream or none.

    "query" predicts four tokens; "permutation" also excludes the predicted tokens for those that
    come before them in an order, and for themselves; with "order" all tokens are predicted in it,
    so that the first one sees no key.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, N_VOCAB, (B, T), generator=generator)
    given = {"input_ids": tokens, "token_type_ids": (torch.arange(T) > 6).long().expand(B, T)}
    mask = torch.ones(B, T)
    if padding != "none":
        index = torch.arange(T)
        begin = {"left": 0, "middle": 5, "right": 9, "row": 0}[padding]
        end = {"left": 4, "middle": 8, "right": T, "row": T}[padding]
        mask[1, (index >= begin) & (index < end)] = 0.0
        given["token_type_ids"] = torch.where(mask > 0, given["token_type_ids"], 3)
        given["attention_mask"] = mask
    if stream != "content":
        order = torch.stack([torch.randperm(T, generator=generator) for _ in range(B)])  # [B, T]
        n_known = {"query": T, "permutation": T - 4, "order": 0}[stream]
        is_excluded = (order[:, :, None] <= order[:, None]) & (order[:, None] >= n_known)
        if stream != "query":
            given["perm_mask"] = is_excluded.float()
        targets = order.argsort(1)[:, min(n_known, T - 4) :]
        given["target_mapping"] = nn.functional.one_hot(targets, T).float()
    return given


def everything(
    model: nn.Module, kwargs: dict[str, Tensor], compiled: Any = None
) -> dict[str, Tensor]:
    """Hidden states of all tokens, the memory, and the gradients of all parameters."""
    model.zero_grad()
    out = (model if compiled is None else compiled)(**kwargs)
    hidden = out.last_hidden_state
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    memory = {f"memory {i}": x for i, x in enumerate(out.mems or ())}
    assert not any(x.requires_grad for x in memory.values())
    grads = {f"d{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"out": hidden.detach(), **memory, **grads}


def check(models, model: nn.Module, kwargs: dict[str, Tensor]) -> None:
    expected = everything(model, kwargs)
    with patched(model) as found:
        assert len(found.patched) == 3
        models.check_equal(everything(model, kwargs), expected, 1e-5)
        assert report(model).fallbacks == 0, str(report(model))


@pytest.mark.parametrize("stream", ["content", "query", "permutation"])
@pytest.mark.parametrize("padding", ["none", "left", "middle", "right"])
def test_streams_and_padding(models, padding, stream):
    check(models, models.build("xlnet"), inputs(padding, stream))


@pytest.mark.parametrize(
    ("padding", "stream"), [("left", "order"), ("row", "query"), ("row", "permutation")]
)
def test_a_query_without_keys_gets_the_mean_of_the_values(models, padding, stream):
    """The result does not depend on its scores. The original has a gradient for them nevertheless,
    since it adds -1e30 to a score that this number rounds away."""
    model, kwargs = models.build("xlnet", n_layer=1), inputs(padding, stream)
    expected = everything(model, kwargs)
    patch(model)
    actual = everything(model, kwargs)
    same = ("out", "dlayer.0.rel_attn.v", "dlayer.0.rel_attn.o", "dlayer.0.ff.layer_1.weight")
    models.check_equal(*({name: x[name] for name in same} for x in (actual, expected)), 1e-5)
    for name in ("q", "k", "r"):
        x, y = (found[f"dlayer.0.rel_attn.{name}"] for found in (actual, expected))
        assert bool(x.isfinite().all())
        assert not torch.allclose(x, y, rtol=1e-2)


@pytest.mark.parametrize("n_memory", [0, 5, 20])
@pytest.mark.parametrize("options", [{}, {"same_length": True}], ids=["all", "same_length"])
def test_causal_attention(models, options, n_memory):
    model = models.build("xlnet", attn_type="uni", **options)
    kwargs = inputs("none", "query")
    if n_memory:
        kwargs["mems"] = [torch.randn(n_memory, B, 24) for _ in range(2)]
    check(models, model, kwargs)


def test_halves_of_the_batch_with_opposite_distances(models):
    kwargs = {name: x[:2] for name, x in inputs("left", "permutation").items()}
    check(models, models.build("xlnet", bi_data=True), kwargs)


@pytest.mark.parametrize("reuse_len", [None, 6])
@pytest.mark.parametrize("mem_len", [7, 16, None])
@pytest.mark.parametrize("padding", ["none", "left", "right", "row"])
def test_segment_by_segment_with_memory(models, padding, mem_len, reuse_len):
    model = models.build("xlnet", mem_len=mem_len, reuse_len=reuse_len)

    def outputs() -> list[Tensor]:
        mems, results = None, []
        for kind in (padding, "none", padding):
            out = model(**inputs(kind), mems=mems, use_mems=True)
            mems = out.mems
            results += [out.last_hidden_state, *mems]
        return results

    with torch.no_grad():
        expected = outputs()
        patch(model)
        actual = outputs()
    for x, y in zip(actual, expected, strict=True):
        assert float((x - y).norm()) <= 2e-5 * float(y.norm())
    assert report(model).fallbacks == 0


def test_no_mask_of_all_pairs_without_a_permutation(models):
    model = models.build("xlnet")
    seen: list[Tensor | None] = []
    patch(model)
    model.layer[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(
            kwargs[name] for name in ("attn_mask_h", "attn_mask_g", "seg_mat")
        ),
        with_kwargs=True,
    )
    model(**inputs("left", "query"))
    model(**inputs("none", "query"))
    assert [None if x is None else tuple(x.shape) for x in seen] == [
        *((2, B), (2, B), (T, B, 3)),
        *(None, None, (T, B, 2)),
    ]


def language_model(models, **options: object) -> nn.Module:
    from transformers import XLNetLMHeadModel

    encoder = models.build("xlnet", **options)
    model = XLNetLMHeadModel(encoder.config)
    model.transformer.load_state_dict(encoder.state_dict())
    return model.eval()


def test_steps_of_pretraining_are_equal(models):
    """Permutations, targets and memory, as in XLNet's training, without dropout."""

    def train(is_patched: bool) -> dict[str, Tensor]:
        model = language_model(models, reuse_len=6).train()
        if is_patched:
            patch(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        mems, results = None, {}
        for step in range(3):
            kwargs = inputs("left", "permutation")
            labels = torch.randint(
                1, N_VOCAB, (B, 4), generator=torch.Generator().manual_seed(step)
            )
            out = model(**kwargs, labels=labels, mems=mems, use_mems=True)
            out.loss.backward()
            results[f"loss {step}"], mems = out.loss.detach(), out.mems
            results |= {f"d{n} {step}": p.grad.clone() for n, p in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
        assert report(model).fallbacks == 0
        return results

    expected = train(False)
    assert expected["loss 0"] != expected["loss 2"]
    models.check_equal(train(True), expected, 1e-4)


def test_greedy_tokens_are_equal(models):
    model = language_model(models)
    tokens = inputs()["input_ids"]
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    for use_mems in (False, True):
        expected = model.generate(tokens, use_mems=use_mems, **options)
        with patched(model):
            actual = model.generate(tokens, use_mems=use_mems, **options)
            assert report(model).fallbacks == 0
        assert expected.shape == (B, T + 20)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("stream", ["content", "permutation"])
def test_autocast_of_both_streams(models, stream):
    """The original accepts two streams in bfloat16 under autocast only."""
    model = models.build("xlnet")
    kwargs = inputs("left", stream)
    with torch.no_grad():
        exact = models.run(model, kwargs)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = models.run(model, kwargs)
            patch(model)
            ours = models.run(model, kwargs)
    assert float((ours - exact).norm()) <= 1.5 * float((theirs - exact).norm())
    assert report(model).fallbacks == 0


def test_dropout_draws_the_same_numbers_outside_the_attention(models):
    """Without dropout of the probabilities, all others draw what the original draws."""
    model = models.build("xlnet", dropout=0.3).train()
    kwargs = inputs("left", "query")
    first: list[Tensor] = []
    handle = model.layer[0].register_forward_pre_hook(
        lambda module, args, kwargs: first.extend([*args, kwargs["r"]]), with_kwargs=True
    )
    for change in (lambda: None, lambda: patch(model)):
        change()
        torch.manual_seed(3)
        out = models.run(model, kwargs)
        assert bool(out.isfinite().all())
    handle.remove()
    for expected, actual in zip(first[:3], first[3:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not torch.equal(first[2][:, 0], first[2][:, 1])  # positions differ between rows


def test_calls_that_run_the_original_code(models):
    model, causal = models.build("xlnet"), models.build("xlnet", attn_type="uni")
    kwargs, row = inputs("left", "query"), {k: x[:1] for k, x in inputs("right").items()}
    expected = model(**kwargs, output_attentions=True).attentions
    patch(model), patch(causal)
    torch.testing.assert_close(model(**kwargs, output_attentions=True).attentions, expected)
    assert "attention weights are requested" in str(report(model))
    causal(**row)
    assert "attn_type is 'uni' and a mask is given" in str(report(causal))
    assert "made dense masks" in str(report(causal))
    for wrong in ({}, {**kwargs, "inputs_embeds": torch.randn(B, T, 24)}):
        with pytest.raises(ValueError, match="You"):
            model(**wrong)


def test_other_arguments_and_returned_values(models):
    model = models.build("xlnet")
    kwargs = inputs("left", "query")
    kwargs["input_mask"] = 1.0 - kwargs.pop("attention_mask")
    kwargs["inputs_embeds"] = model.word_embedding(kwargs.pop("input_ids")).detach()
    options = {"output_hidden_states": True, "use_mems": False}
    expected = model(**kwargs, **options)
    as_tuple = model(**kwargs, return_dict=False)
    patch(model)
    actual = model(**kwargs, **options)
    assert actual.mems is None
    assert list(actual) == list(expected)
    torch.testing.assert_close(actual.hidden_states, expected.hidden_states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(**kwargs, return_dict=False), as_tuple, rtol=1e-4, atol=1e-4)
    assert report(model).fallbacks == 0


@pytest.mark.parametrize("kind", ["plain", "padding", "permutation", "causal", "segments"])
def test_one_compiled_graph(models, kind):
    """With segments, whose number the trace cannot read, the graph is that of the original code."""
    model = models.build("xlnet", attn_type="uni" if kind == "causal" else "bi")
    kwargs = inputs(
        "left" if kind == "padding" else "none", "permutation" if kind == "permutation" else "query"
    )
    if kind != "segments":
        del kwargs["token_type_ids"]
    expected = everything(model, kwargs)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    patch(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    models.check_equal(everything(model, kwargs, compiled), expected, 1e-5)
    assert ("rel_attention" in graphs[0]) == (kind != "segments")


def test_export(models):
    model, kwargs = models.build("xlnet"), inputs("left", "query")
    del kwargs["token_type_ids"]
    with torch.no_grad():
        expected = models.run(model, kwargs)
        patch(model)
        program = torch.export.export(model, (), kwargs, strict=False)
        actual = models.run(program.module(), kwargs)
    assert "rel_attention" in str(program.graph)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_copies_and_saved_models(models, tmp_path):
    model, kwargs = language_model(models), inputs("left", "permutation")
    expected = model(**kwargs).logits
    patch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(report(other).patched) == 3
        torch.testing.assert_close(other(**kwargs).logits, model(**kwargs).logits)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not report(loaded).patched
    torch.testing.assert_close(loaded(**kwargs).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_table_is_projected_once_for_equal_calls_without_gradients(models, monkeypatch):
    from transformer_xl.integrations import xlnet

    model, kwargs, projected = models.build("xlnet"), inputs(), []
    own = xlnet._heads
    monkeypatch.setattr(xlnet, "_heads", lambda x, w: projected.append(w) or own(x, w))
    patch(model)
    weight = model.layer[0].rel_attn.r
    with torch.no_grad():
        first = models.run(model, kwargs)
        assert torch.equal(models.run(model, kwargs), first)
        assert sum(w is weight for w in projected) == 1
        weight.mul_(2.0)
        assert not torch.equal(models.run(model, kwargs), first)
    assert models.results(model, kwargs, torch.ones(B, T).bool())["dlayer.0.rel_attn.r"].any()
