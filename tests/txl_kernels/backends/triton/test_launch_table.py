"""The launch table: which class a device has, which rows exist, and how rows are replaced."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from txl_kernels.backends import cuda_device
from txl_kernels.backends.triton import adaptive_configs, launch_table, rel_attention_config

CUDA = torch.device("cuda")
KIB = 1024
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIMITS = {
    "sm_90": ((9, 0), 227 * KIB),
    "163KiB": ((8, 0), 163 * KIB),
    "99KiB": ((8, 6), 99 * KIB),
}


@pytest.fixture
def on(monkeypatch):
    """Makes every device one with these limits, on which Triton compiles."""

    def set_limits(capability: tuple[int, int], shared: int) -> None:
        monkeypatch.setattr(launch_table, "device_limits", lambda _device: (capability, shared))
        monkeypatch.setattr(launch_table, "interprets", lambda: False)

    return set_limits


@pytest.mark.parametrize(
    ("capability", "kib", "expected"),
    [
        ((8, 0), 163, "163KiB"),
        ((8, 6), 99, "99KiB"),
        ((8, 7), 163, "163KiB"),
        ((8, 9), 99, "99KiB"),
        ((9, 0), 227, "sm_90"),
        ((10, 0), 227, "163KiB"),
        ((12, 0), 99, "99KiB"),
        ((13, 7), 64, "99KiB"),  # unknown, with little shared memory
        ((13, 0), 256, "163KiB"),
    ],
    ids=str,
)
def test_the_class_follows_from_the_limits_of_the_device(capability, kib, expected, on):
    on(capability, kib * KIB)
    assert launch_table.launch_class(CUDA) == expected


def test_the_limits_are_those_that_torch_reports(monkeypatch):
    class Properties:
        major, minor, shared_memory_per_block_optin = 8, 9, 101376

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: Properties)
    assert launch_table.device_limits(CUDA) == ((8, 9), 101376)


def test_an_interpreted_kernel_has_its_own_class(monkeypatch):
    monkeypatch.setattr(launch_table, "interprets", lambda: True)
    assert launch_table.launch_class(torch.device("cpu")) == "interpreter"


def test_a_capability_below_8_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    reason = cuda_device.unavailable_reason.__wrapped__()
    assert reason == (
        "the CUDA and Triton kernels need compute capability 8.0 or newer, and this device has 7.5"
    )


@pytest.mark.parametrize("launch_class", [*LIMITS, "interpreter"])
def test_every_call_has_a_row_in_every_class(launch_class, on, monkeypatch):
    on(*LIMITS.get(launch_class, ((0, 0), 0)))
    if launch_class == "interpreter":
        monkeypatch.setattr(launch_table, "interprets", lambda: True)
    flags = list(itertools.product((False, True), repeat=2))
    for dtype, *sizes in itertools.product(DTYPES, (8, 41, 64, 128, 256), (64, 192), (16, 256)):
        for mask, dropout in flags:
            rel_attention_config.dkdv_config(CUDA, tuple(sizes), dtype, mask, dropout)
            rel_attention_config.dqdr_config(CUDA, tuple(sizes), dtype, mask, dropout)
            for Tq in (1, 16, 17, 512):
                rel_attention_config.forward_config(CUDA, tuple(sizes), dtype, Tq, mask, dropout)
    for dtype, widths in itertools.product(DTYPES, ([1024, 64], [41], [410])):
        adaptive_configs.product_config(CUDA, dtype, widths)
        for kernel in ("fwd", "dx", "dweight"):
            adaptive_configs.tail_config(kernel, CUDA, dtype, widths)
    for kernel in ("fwd", "dx"):
        adaptive_configs.splits(kernel, CUDA)
    assert adaptive_configs.head_options(CUDA)["BLOCK_V"] > 0


def test_every_row_belongs_to_a_class_and_to_a_kernel():
    keys = launch_table.rows()
    assert {key.launch_class for key in keys} == {*LIMITS, "interpreter"}
    assert {key.kernel for key in keys} == set(launch_table.KERNELS)


def test_tiles_of_attention_are_of_sizes_that_the_kernels_support():
    for config in launch_table.rows().values():
        if isinstance(config, launch_table.AttentionConfig):
            assert config.BLOCK_Q <= config.BLOCK_K  # the skew's gather
            assert 128 % config.BLOCK_Q == 0  # the padding of the queries in backward


def test_a_call_without_a_row_names_what_is_missing(on):
    on(*LIMITS["99KiB"])
    with pytest.raises(
        LookupError, match=r"rel_attention_fwd, class 99KiB.*bits 16, head_size 512"
    ):
        rel_attention_config.forward_config(CUDA, (512, 64, 64), torch.bfloat16, 64, False, False)


@pytest.fixture
def table(tmp_path):
    """A copy of the shipped table."""
    path = tmp_path / "launch_table.json"
    path.write_bytes(launch_table.PATH.read_bytes())
    return path


def test_replacing_a_row_keeps_all_other_lines(table):
    before = table.read_text().splitlines()
    n = next(
        n for n, line in enumerate(before) if '"rel_attention_bwd_dkdv", "class": "sm_90"' in line
    )
    row = {**json.loads(before[n].rstrip(",")), "num_stages": 7, "why": "measured"}
    launch_table.replace_rows(table, [row])
    after = table.read_text().splitlines()
    assert after[:n] + after[n + 1 :] == before[:n] + before[n + 1 :]
    assert json.loads(after[n].rstrip(",")) == row
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_replacing_a_row_by_itself_changes_nothing(table):
    before = table.read_bytes()
    launch_table.replace_rows(table, json.loads(before))
    assert table.read_bytes() == before


def test_a_row_with_a_new_key_follows_the_rows_of_its_kernel(table):
    row = {"kernel": "adaptive_products", "class": "99KiB", "bits": 8, "variant": "plain"}
    row |= {"BLOCK_ROWS": 16, "BLOCK_OUT": 16, "BLOCK_IN": 16, "num_warps": 4, "num_stages": 1}
    launch_table.replace_rows(table, [row])
    found = json.loads(table.read_text())
    assert [r for r in found if r["kernel"] == "adaptive_products"][-1] == row
    assert [r for r in found if r != row] == json.loads(launch_table.PATH.read_text())


def test_bad_rows_are_refused_and_the_table_stays(table):
    before = table.read_bytes()
    good = json.loads(before)[0]
    for bad, message in (
        ([{**good, "kernel": "attention"}], "unknown kernel"),
        ([{**good, "BLOCK_V": 64}], "fields other than"),
        ([{key: value for key, value in good.items() if key != "num_warps"}], "fields other than"),
        ([good, good], "the same key"),
    ):
        with pytest.raises(ValueError, match=message):
            launch_table.replace_rows(table, bad)
    assert table.read_bytes() == before


def test_a_table_with_two_rows_for_a_key_is_refused(table):
    row = json.loads(table.read_text())[0]
    table.write_text(json.dumps([row, {**row, "num_stages": 9}]))
    with pytest.raises(ValueError, match="two rows"):
        launch_table.read(table)
