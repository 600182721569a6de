"""Configurations: presets, overrides, and what each bad value is answered with."""

from __future__ import annotations

import dataclasses
import json

import pytest

from transformer_xl.config import (
    ModelConfig,
    RunConfig,
    from_dict,
    load_preset,
    override,
    preset_names,
)
from transformer_xl.config_fields import section_from_dict, to_dict

PUBLISHED = ("enwik8_base", "enwik8_large", "text8_base", "text8_large")
PUBLISHED += ("wt103_base", "wt103_large", "lm1b_base", "lm1b_large")


@pytest.fixture
def demo() -> RunConfig:
    return load_preset("demo")


def test_every_published_run_and_our_own_have_a_preset() -> None:
    assert set(preset_names()) == {*PUBLISHED, "ptb", "wt2", "demo"}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_survives_json(name: str) -> None:
    config = load_preset(name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_presets_hold_the_published_hyper_parameters() -> None:
    large = load_preset("wt103_large")
    assert (large.model.n_layer, large.model.d_model, large.model.d_inner) == (18, 1024, 4096)
    assert large.model.cutoffs == (20_000, 40_000, 200_000)
    assert (large.train.batch_size, large.train.tgt_len, large.train.warmup_step) == (
        128,
        384,
        16_000,
    )
    assert (large.evaluate.mem_len, large.evaluate.clamp_len) == (1600, 1000)
    assert large.evaluate.same_length


def test_override_reads_text_as_the_type_of_the_field(demo: RunConfig) -> None:
    changes = {
        "train.lr": "1e-3",
        "train.max_step": "2_000",
        "train.compile": "true",
        "model.d_embed": "64",
        "model.cutoffs": "16, 128",
        "model.tie_projs": "false,true,true",
        "model.sample_softmax": "0",
        "data.path": "none",
        "evaluate.split": "valid",
    }
    changed = override(demo, changes)
    assert (changed.train.lr, changed.train.max_step, changed.train.compile) == (1e-3, 2000, True)
    assert (changed.model.d_embed, changed.model.cutoffs) == (64, (16, 128))
    assert changed.model.tie_projs == (False, True, True)
    assert changed.model.sample_softmax == 0
    assert (changed.data.path, changed.evaluate.split) == (None, "valid")
    assert demo == load_preset("demo")


def test_an_empty_list_is_read_from_text(demo: RunConfig) -> None:
    assert override(demo, {"model.cutoffs": "()"}).model.cutoffs == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.leraning_rate": 1}, "unknown field of train 'leraning_rate'"),
        ({"train.warmup_steps": 1}, "did you mean 'warmup_step'"),
        ({"trian.lr": 1}, "unknown section 'trian'; did you mean 'train'"),
        ({"lr": 1}, "unknown field 'lr': expected SECTION.FIELD, such as train.lr"),
        ({"train.lr": "fast"}, "train.lr: expected float, got 'fast'"),
        ({"train.max_step": 1.5}, "train.max_step: expected int, got 1.5"),
        ({"train.max_step": True}, "train.max_step: expected int, got True"),
        ({"train.scheduler": "cosin"}, "did you mean 'cosine'"),
        ({"model.same_length": 1}, "model.same_length: expected bool, got 1"),
        ({"model.cutoffs": 7}, "model.cutoffs: expected a list of int, got 7"),
        ({"model.cutoffs": "300"}, r"cutoffs: expected tokens rising inside \(0, 256\)"),
        ({"model.n_layer": 0}, "n_layer: expected a positive integer, got 0"),
        ({"model.mem_len": -1}, "mem_len: expected 0 or more"),
        ({"model.dropout": 1.0}, r"dropout: expected a probability in \[0, 1\)"),
        ({"model.attn_type": 2}, "not there yet"),
        ({"model.div_val": 2}, "div_val: expected 1 where there are no cutoffs"),
        (
            {"model.sample_softmax": 8, "model.cutoffs": [16]},
            "sample_softmax: expected -1 where there are cutoffs, got 8",
        ),
        ({"model.sample_softmax": "many"}, "model.sample_softmax: expected int, got 'many'"),
        ({"model.tie_projs": [True, True]}, r"tie_projs: expected \(\) or 1 bools"),
        ({"evaluate.mem_len": 0}, "same_length: expected mem_len > 0"),
        ({"train.batch_size": 0}, "batch_size: expected a positive integer, got 0"),
        ({"train.clip": -1.0}, "clip: expected 0 or more"),
    ],
)
def test_a_bad_override_names_the_field(
    demo: RunConfig, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        override(demo, change)


def test_an_unknown_preset_gets_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="unknown preset 'wt103base'; did you mean 'wt103_base'"):
        load_preset("wt103base")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size is missing"):
        from_dict({"model": {}, "data": {"name": "text"}})
    with pytest.raises(ValueError, match="train: expected fields, got 3"):
        from_dict({"model": {"vocab_size": 5}, "data": {"name": "text"}, "train": 3})


def test_a_section_alone_is_read_and_frozen() -> None:
    model = section_from_dict(ModelConfig, {"vocab_size": 30, "cutoffs": [10, 20], "div_val": 2})
    assert [model.embed_width(k) for k in range(3)] == [512, 256, 128]
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.n_layer = 3  # type: ignore[misc]
