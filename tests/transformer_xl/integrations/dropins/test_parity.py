"""Each family of `patch` against Hugging Face's own classes: the same outputs and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from transformer_xl.integrations import patch, unpatch

pytest.importorskip(
    "transformers", minversion="5.24", reason="make test-dropins installs it and runs these tests"
)

LENGTHS = [21, 13, 18]


@pytest.mark.parametrize("is_ragged", [False, True], ids=["full", "ragged"])
def test_outputs_and_gradients_do_not_change(models, name, is_ragged):
    case, model = models.cases[name], models.build(name)
    kwargs, valid = case.inputs(LENGTHS if is_ragged else [21] * 3)
    expected = models.results(model, kwargs, valid)
    report = patch(model)
    assert len(report.patched) == case.n_patched, str(report)
    assert not report.left_alone, str(report)
    actual = models.results(model, kwargs, valid)
    models.check_equal(actual, expected, 1e-5)
    assert report.fallbacks == 0


def test_without_a_mask(models, name):
    case, model = models.cases[name], models.build(name)
    kwargs, valid = case.inputs([21, 21])
    del kwargs["attention_mask"]
    expected = models.results(model, kwargs, valid)
    patch(model)
    models.check_equal(models.results(model, kwargs, valid), expected, 1e-5)


def test_bfloat16_is_as_exact_as_the_original(models, name):
    # All experts take part: a choice between them would be another one after rounding.
    options = {"num_experts_per_tok": 4} if name.startswith("inkling") else {}
    case, model = models.cases[name], models.build(name, **options)
    kwargs, valid = case.inputs(LENGTHS)
    models.to_bfloat16(model)
    rounded = {
        key: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in kwargs.items()
    }
    wide = {
        key: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in rounded.items()
    }
    with torch.no_grad():
        exact = models.run(copy.deepcopy(model).float(), wide)[valid]
        theirs = models.run(model, rounded)[valid].float()
        patch(model)
        ours = models.run(model, rounded)[valid].float()
    assert float((ours - exact).norm()) <= 1.5 * float((theirs - exact).norm())


def test_the_whole_family_by_name(models, name):
    case = models.cases[name]
    family = case.path[0].replace("_asr", "").replace("_loop", "")
    report = patch(family)
    assert report.patched
    assert not report.left_alone
    model = models.build(name)
    kwargs, valid = case.inputs(LENGTHS)
    actual = models.results(model, kwargs, valid)
    assert not unpatch(family).patched
    models.check_equal(actual, models.results(model, kwargs, valid), 1e-5)
