"""Names are unique, shapes are those of the presets, selection finds cases by their names."""

from __future__ import annotations

import pytest
import torch

from benchmarks import registry
from transformer_xl.config import load_preset


def test_names_are_unique():
    names = [
        case.name
        for case in (*registry.timed_cases(), *registry.memory_cases(), *registry.long_cases())
    ]
    assert len(set(names)) == len(names)


def test_every_case_is_found_by_its_name():
    for case in (*registry.timed_cases(), *registry.memory_cases(), *registry.long_cases()):
        assert registry.case(case.name) == case
    with pytest.raises(ValueError, match="did you mean 'model/enwik8_base_4layers/float32"):
        registry.case("model/enwik8_base_4layers/float32/evaluation")


def test_selection_by_part_of_the_name_or_pattern():
    cases = registry.timed_cases()
    assert {case.shape.name for case in registry.select(cases, ["wt103_base"])} == {
        "wt103_base_train",
        "wt103_base_softmax",
        "wt103_base_embedding",
    }
    both = registry.select(cases, ["wt103*/float32/forward", "evaluate"])
    assert {case.name.split("/")[0] for case in both} == {"rel_attention", "model"}
    assert registry.select(cases, ["nothing"]) == []


def test_shapes_are_those_of_the_published_runs():
    shapes = {shape.name: shape for shape in registry.attention_shapes()}
    sizes = {name: (s.B, s.H, s.Tq, s.Tm, s.D, s.causal) for name, s in shapes.items()}
    assert sizes == {
        "enwik8_base_train": (4, 8, 512, 512, 64, True),
        "parakeet_2min": (1, 8, 1500, 0, 64, False),
        "wt103_base_train": (2, 10, 150, 150, 41, True),
        "enwik8_large_eval": (1, 8, 128, 3800, 128, True),
    }
    assert load_preset("wt103_base").model.d_head == shapes["wt103_base_train"].D


def test_inkling_small_has_the_layers_of_its_published_configuration():
    layers = (registry.INKLING_GLOBAL, registry.INKLING_SLIDING)
    sizes = [(s.B, s.H, s.Hk, s.Tq, s.D, s.d_rel, s.rel_extent, s.window) for s in layers]
    shared = (1, 32, 8, 2048, 128, 16)
    assert sizes == [(*shared, 1024, None), (*shared, 512, 511)]
    cases = registry.select(registry.timed_cases(), ["inkling_small"])
    assert {case.dtype for case in cases} == {torch.float32}


def test_the_model_is_the_base_models_layer_four_times():
    (shape,) = registry.model_shapes()
    config = shape.config
    assert (config.n_layer, config.d_model, config.n_head, config.d_head) == (4, 512, 8, 64)
    assert (config.d_inner, config.mem_len, shape.tgt_len, shape.batch_size) == (2048, 512, 512, 4)


def test_softmaxes_are_those_of_the_published_models():
    sizes = {s.name: (s.N, s.d, s.V, s.cutoffs, s.div_val) for s in registry.softmax_shapes()}
    assert sizes == {
        "wt103_base_softmax": (2048, 410, 267_735, (20_000, 40_000, 200_000), 1),
        "wt103_large_softmax": (2048, 1024, 267_735, (20_000, 40_000, 200_000), 4),
        "lm1b_large_softmax": (512, 1280, 793_470, (60_000, 100_000, 640_000), 4),
    }


def test_embeddings_are_those_of_the_published_models():
    sizes = {s.name: (s.N, s.d, s.sizes, s.div_val) for s in registry.embedding_shapes()}
    clusters = (20_000, 20_000, 160_000, 67_735)
    assert sizes == {
        "wt103_base_embedding": (2048, 410, clusters, 1),
        "wt103_large_embedding": (2048, 1024, clusters, 4),
    }


def test_both_dtypes_are_timed_everywhere():
    shapes = (
        *registry.attention_shapes(),
        *registry.softmax_shapes(),
        *registry.embedding_shapes(),
        *registry.model_shapes(),
    )
    for shape in shapes:
        cases = registry.select(registry.timed_cases(), [f"/{shape.name}/"])
        dtypes = {case.dtype for case in cases}
        assert dtypes == {torch.float32, torch.bfloat16}
