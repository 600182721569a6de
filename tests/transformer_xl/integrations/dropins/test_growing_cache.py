"""A DynamicCache whose keys and values grow in place, against the library's own concatenation."""

from __future__ import annotations

import copy

import pytest
import torch

from transformer_xl.integrations import growing_cache, patch, unpatch

pytest.importorskip(
    "transformers", minversion="5.24", reason="make test-dropins installs it and runs these tests"
)

WINDOW = 6


def make_cache(models, window: int = WINDOW):
    """One sliding and one full layer."""
    from transformers.cache_utils import DynamicCache

    config = models.build("inkling-sdpa", sliding_window_size=window).config
    return DynamicCache(config=config)


def tokens(T: int, seed: int, B: int = 2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, 3, T, 4, generator=generator) for _ in range(2))


def assert_equal(ours, theirs) -> None:
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)
        assert mine.get_seq_length() == other.get_seq_length()
        assert mine.get_mask_sizes(2) == other.get_mask_sizes(2)


def extend(ours, theirs, blocks, seed: int = 0) -> None:
    """Adds the same blocks of tokens to both caches, which must stay equal."""
    for n, T in enumerate(blocks):
        for layer in (0, 1):
            k, v = tokens(T, seed + 2 * n + layer)
            actual = growing_cache.update(ours, k, v, layer, {})
            expected = theirs.update(k, v, layer)
            for x, y in zip(actual, expected, strict=True):
                assert torch.equal(x, y)
        assert_equal(ours, theirs)


@pytest.mark.parametrize("window", [1, 2, WINDOW])
@torch.no_grad()
def test_blocks_of_tokens(models, window):
    extend(make_cache(models, window), make_cache(models, window), [9, *[1] * 30, 4, 1, 40, 1])


@torch.no_grad()
def test_tokens_are_written_in_place(models):
    cache = make_cache(models)
    for T in (9, 1):
        for layer in (0, 1):
            growing_cache.update(cache, *tokens(T, 0), layer, {})
    before = [layer.keys.untyped_storage().data_ptr() for layer in cache.layers]
    for layer in (0, 1):
        growing_cache.update(cache, *tokens(1, 0), layer, {})
    assert [layer.keys.untyped_storage().data_ptr() for layer in cache.layers] == before


@torch.no_grad()
def test_tensors_that_a_caller_keeps_do_not_change(models):
    """A copy, a cropped cache and one with tensors of another continue on their own."""
    from transformers.cache_utils import DynamicLayer

    ours, theirs = make_cache(models, 50), make_cache(models, 50)
    extend(ours, theirs, [9, 1, 1])
    kept = [layer.keys for layer in ours.layers]
    values = [x.clone() for x in kept]
    deep, deep_theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
    fork, fork_theirs = make_cache(models, 50), make_cache(models, 50)
    extend(fork, fork_theirs, [11])
    for mine, other in ((fork, ours), (fork_theirs, theirs)):
        for layer, source in zip(mine.layers, other.layers, strict=True):
            layer.keys, layer.values = source.keys, source.values
    extend(ours, theirs, [1, 1], seed=50)
    extend(fork, fork_theirs, [1, 2], seed=60)
    extend(deep, deep_theirs, [2, 1], seed=70)
    longer = [(layer.keys, layer.keys.clone()) for layer in ours.layers]
    for layer in (ours.layers[1], theirs.layers[1]):
        DynamicLayer.crop(layer, -3)
    extend(ours, theirs, [1, 1], seed=80)
    ours.batch_select_indices(torch.tensor([1, 0]))
    theirs.batch_select_indices(torch.tensor([1, 0]))
    extend(ours, theirs, [1, 1], seed=90)
    extend(fork, fork_theirs, [1], seed=95)
    assert all(torch.equal(x, y) for x, y in zip(kept, values, strict=True))
    assert all(torch.equal(x, y) for x, y in longer)
    ours.reset()
    theirs.reset()
    extend(ours, theirs, [3, 1])


def test_gradients_and_inference_mode(models):
    ours, theirs = make_cache(models), make_cache(models)
    with torch.inference_mode():
        extend(ours, theirs, [9, 1, 1])
    with torch.no_grad():
        extend(ours, theirs, [1, 1])
    k, v = (x.requires_grad_() for x in tokens(1, 5))
    full, _ = growing_cache.update(ours, k, v, 1, {})
    assert full.requires_grad
    full[:, :, -1].sum().backward()
    assert bool((k.grad == 1).all())


@torch.no_grad()
def test_a_patched_model_continues_the_cache_of_its_original(models):
    model, kwargs, _ = models.prepare("inkling-sdpa", (21, 21))
    other = make_cache(models)
    caches = make_cache(models), make_cache(models)
    outputs = []
    for n, cache in enumerate((*caches, other)):
        parts = kwargs["input_ids"].split([9, 1, 1, 1, 9], 1)
        for step, part in enumerate(parts):
            if n == 1 or (n == 2 and step % 2):
                patch(model)
            out = models.run(model, {"input_ids": part, "cache": cache, "use_cache": True})
            unpatch(model)
        outputs.append(out)
        torch.testing.assert_close(cache.layers[1].keys, caches[0].layers[1].keys)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-4)
