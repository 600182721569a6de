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

    before = {name: dict(getattr(tables, name)) for name, _ in tune.TABLES.values()}
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_timed_without_a_gpu():
    with pytest.raises(BackendUnavailableError, match="no CUDA device"):
        tune.measure("forward", SMALL, [])
