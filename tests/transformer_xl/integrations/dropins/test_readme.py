"""The rows of README.md under "Your model → one line" that name a family of Hugging Face's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from transformer_xl.integrations import patch, report, unpatch
from transformer_xl.integrations.families import FAMILIES

README = Path(__file__).resolve().parents[4] / "README.md"
ROWS = [
    row
    for row in re.findall(r'patch\("\w+"\)', README.read_text(encoding="utf-8"))
    if FAMILIES[row.split('"')[1]][0].library == "transformers"
]
CASE_OF = {"inkling": "inkling-sdpa", "parakeet": "parakeet-sdpa"}
CASE_OF["wav2vec2_conformer"] = "wav2vec2_conformer-sdpa"


@pytest.mark.parametrize("row", ROWS)
def test_a_row_patches_its_models(models, row):
    family = row.split('"')[1]
    name = CASE_OF.get(family, family)
    case = models.cases[name]
    kwargs, valid = case.inputs([13, 9])
    model = models.build(name)
    expected = models.results(model, kwargs, valid)
    assert eval(row, {"patch": patch}).patched
    models.check_equal(models.results(model, kwargs, valid), expected, 1e-5)
    unpatch(family)
    assert eval("patch(model)", {"patch": patch, "model": model}).patched
    models.check_equal(models.results(model, kwargs, valid), expected, 1e-5)
    assert report(model).fallbacks == 0
