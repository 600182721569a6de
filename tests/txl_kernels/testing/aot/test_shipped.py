"""Shipped kernels hold their gates and their inner loops do not grow unnoticed.

Here a part of what is shipped; `make gates` compiles all of it, and with a second Triton too.
"""

from __future__ import annotations

import pytest

from txl_kernels.testing.aot import shipped, survey

CALLS = [call for call in shipped.shipped_calls() if call.in_ci]


@pytest.mark.parametrize("arch", shipped.ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_gates_hold_and_inner_loops_have_not_grown(call, arch):
    table = survey.read_table().get(survey.triton_version())
    if table is None:
        pytest.skip(f"the table holds Triton {', '.join(survey.read_table())} alone")
    failures = []
    for found in survey.survey([call], [arch]):
        grown = survey.growth_failure(found, table)
        failures += [f"{found.name}: {why}" for why in (*found.failures, grown) if why]
    assert not failures, "\n".join(failures)


def test_names_are_unique():
    names = [call.name for call in shipped.shipped_calls()]
    assert len(names) == len(set(names))


def test_both_architectures_and_precisions_are_in_ci():
    kinds = {call.name.split("/")[1] for call in CALLS}
    assert {"bfloat16", "float32"} <= kinds
