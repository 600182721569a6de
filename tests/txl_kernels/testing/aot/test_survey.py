"""The table of inner loops: what is compared, and that growth is noticed."""

from __future__ import annotations

import pytest
import torch

from txl_kernels.testing.aot import gates, survey
from txl_kernels.testing.aot.shipped import Call, Kernel


@pytest.fixture
def surveyed(launch_product):
    kernel = Kernel(lambda _launch, _arch: gates.Gate("hopper", 0))
    call = Call(
        "product/bfloat16/64",
        lambda: launch_product(64, torch.bfloat16),
        {"_product_kernel": kernel},
    )
    (found,) = survey.survey([call], [90])
    return found


@pytest.fixture
def table(monkeypatch, tmp_path):
    monkeypatch.setattr(survey, "TABLE", tmp_path / "inner_loops.json")


def test_a_call_is_compiled_and_passes_its_gates(surveyed):
    assert surveyed.name == "product/bfloat16/64/_product_kernel/sm_90"
    assert surveyed.failures == ()
    assert surveyed.row["HGMMA"] > 0


def test_a_kernel_without_a_gate_is_an_error(launch_copy):
    call = Call("copy", lambda: launch_copy(16, 1), {})
    with pytest.raises(KeyError, match="no gate for kernel _copy_kernel"):
        list(survey.survey([call], [90]))


def test_growth_by_more_than_5_percent_is_noticed(surveyed):
    now = surveyed.row["loop"]
    assert survey.growth_failure(surveyed, {surveyed.name: {"loop": now}}) is None
    assert survey.growth_failure(surveyed, {surveyed.name: {"loop": 2 * now}}) is None
    failure = survey.growth_failure(surveyed, {surveyed.name: {"loop": now / 1.06}})
    assert failure is not None
    assert f"to {now} instructions" in failure
    assert "make model" in failure


def test_a_launch_that_is_in_no_table_is_noticed(surveyed):
    failure = survey.growth_failure(surveyed, {})
    assert failure is not None
    assert "make model" in failure


def test_the_table_comes_back_as_it_was_written(table):
    assert survey.read_table() == {}
    survey.write_table("1.0", {"b": {"loop": 3}, "a": {"loop": 2}})
    survey.write_table("2.0", {"a": {"loop": 1}})
    survey.write_table("1.0", {"a": {"loop": 7}})
    assert survey.read_table() == {"1.0": {"a": {"loop": 7}}, "2.0": {"a": {"loop": 1}}}
