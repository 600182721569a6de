"""Candidates of the configuration table: which are tried, how they are ranked."""

from __future__ import annotations

import pytest
import torch

from txl_kernels.errors import BackendUnavailableError
from txl_kernels.testing.aot import tune
from txl_kernels.testing.aot.shipped_attention import Attention

SMALL = Attention(B=1, H=2, Tq=256, Tm=256, backward=False)


def test_no_candidate_rotates_rows_longer_than_its_columns():
    for table in tune.TABLES:
        for config in tune.configurations(table):
            rows, columns = config.BLOCK_Q, config.BLOCK_K
            if table == "dkdv":
                rows, columns = columns, rows
            assert rows <= columns


def test_sound_candidates_come_first_and_the_table_is_as_before():
    from txl_kernels.backends.triton import rel_attention_config as tables

    before = {each.table: dict(getattr(tables, each.table)) for each in tune.TABLES.values()}
    # 128 × 128 with 4 warps holds twice what fits in registers.
    greedy, sound = tables.Config(128, 128, 4, 1), tables.Config(64, 64, 4, 2)
    ranked = tune.rank("forward", SMALL, 90, [greedy, sound])
    assert [each.config for each in ranked] == [sound, greedy]
    assert ranked[0].failures == ()
    assert "spilled" in ranked[1].failures[0]
    assert {name: dict(getattr(tables, name)) for name in before} == before


def test_what_does_not_compile_is_no_candidate():
    from txl_kernels.backends.triton.rel_attention_config import Config

    (found,) = tune.rank("forward", SMALL, 90, [Config(48, 64, 4, 1)])  # no power of 2
    assert found.failures
    assert found.seconds == float("inf")


def tables_of(path):
    found = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), found)
    return {each.table: dict(found[each.table]) for each in tune.TABLES.values()}


def test_every_table_of_the_source_can_be_tuned():
    from txl_kernels.backends.triton import rel_attention_config as tables

    named = {name for name, value in vars(tables).items() if name.isupper() and type(value) is dict}
    assert {each.table for each in tune.TABLES.values()} == named


@pytest.mark.parametrize("table", tune.TABLES)
def test_a_candidate_is_tried_by_a_call_that_its_table_configures(table):
    """A row that no other table has: the kernel's launch must be of that tile."""
    from txl_kernels.backends.triton.rel_attention_config import Config
    from txl_kernels.testing.aot import shipped, shipped_attention

    odd, tuned = Config(16, 16, 2, 5), tune.TABLES[table]
    attention = Attention(B=1, H=2, Tq=256, Tm=256)
    call = shipped_attention.call("tune", tuned.of(attention), tuned.part)
    with tune.configured(tuned.table, tune.key_of(attention, 90), odd):
        recorded = shipped.launches(call, 90)
    (launch,) = [x.launches[0] for x in recorded if x.launches[0].name == tuned.kernel]
    sizes = (launch.constexprs["BLOCK_Q"], launch.constexprs["BLOCK_K"])
    assert (*sizes, launch.options.num_warps, launch.options.num_stages) == odd


@pytest.mark.parametrize("table", tune.TABLES)
@pytest.mark.parametrize("arch", [80, 90])
def test_a_row_is_written_in_place_and_nothing_else_changes(table, arch, tmp_path):
    path, name = tmp_path / "rel_attention_config.py", tune.TABLES[table].table
    path.write_text(tune.source().read_text(encoding="utf-8"), encoding="utf-8")
    before = tables_of(path)
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    best = tune.Candidate((16, 128, 4, 7), 1e-3, ())
    tune.write(table, SMALL, arch, best, path)
    key = (f"sm_{arch}", True, 64)
    after = tables_of(path)
    # What is chosen with one burden is the choice with more, where those have no row of their own.
    heirs = (name, "FORWARD_OVERBURDENED") if name == "FORWARD_BURDENED" else (name,)
    assert tuple(after[name][key]) == best.config
    section = tune.source().read_text(encoding="utf-8").partition(f"\n{name}: ")[2]
    is_new = f'("sm_{arch}", True, 64)' not in section.partition("\n}\n")[0]
    for heir in heirs:
        before[heir].pop(key, None), after[heir].pop(key)
    assert after == before
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) == n_lines + is_new
    row = tune.row(table, SMALL, arch, best)
    assert f"    {row.removeprefix(name + ': ')}\n" in text


def test_a_row_that_is_not_there_is_added_and_a_wrong_one_refused(tmp_path):
    path = tmp_path / "rel_attention_config.py"
    path.write_text("FORWARD: dict = {\n    1: 2,\n}\n", encoding="utf-8")
    tune.write("forward", SMALL, 90, tune.Candidate((16, 16, 4, 1), 1.0, ()), path)
    row = '    ("sm_90", True, 64): Config(16, 16, 4, 1),\n'
    assert path.read_text(encoding="utf-8") == f"FORWARD: dict = {{\n    1: 2,\n{row}}}\n"
    with pytest.raises(ValueError, match="breaks a gate: it spills"):
        tune.write("forward", SMALL, 90, tune.Candidate((16, 16, 4, 1), 1.0, ("it spills",)), path)
    with pytest.raises(ValueError, match="holds no table BACKWARD_DKDV"):
        tune.write("dkdv", SMALL, 90, tune.Candidate((16, 16, 4, 1), 1.0, ()), path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_timed_without_a_gpu():
    with pytest.raises(BackendUnavailableError, match="no CUDA device"):
        tune.measure("forward", SMALL, [])
