"""The CUDA kernels emulated on the CPU, one thread per CUDA thread, under sanitizers.

The tests check results and extreme arguments, and that the sanitizers report planted errors.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

from txl_kernels import rel_attention_with_lse
from txl_kernels.backends.reference.rel_shift import rel_shift
from txl_kernels.testing import DECODE_CASES, check_rel_attention_output

CASES = {case.name: case for case in DECODE_CASES}
# These cases cover every exchange between threads: one and four queries per warp, shared and
# separate keys of warps, one split and several, memory and segment, each head size.
THREADED = ("one_query", "five_queries", "long_memory", "head_256_values_40", "everything")
MASK = torch.arange(32) % 3 > 0
IN_FLOAT16 = ("one_query", "nine_queries", "head_41", "long_memory", "everything")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")


@pytest.mark.parametrize("name", CASES)
def test_attention_is_within_the_error_budget(name, emulations):
    check_rel_attention_output(CASES[name], torch.float32, emulations("address").attend)


@pytest.mark.parametrize("name", IN_FLOAT16)  # bfloat16, every case: test_cuda_glue.py
def test_float16_attention_is_within_the_error_budget(name, emulations):
    check_rel_attention_output(CASES[name], torch.float16, emulations("address").attend)


@pytest.mark.parametrize("name", THREADED)
def test_threads_never_race(name, emulations):
    check_rel_attention_output(CASES[name], torch.float32, emulations("thread").attend)


def inputs(case="two_queries", dtype=torch.float32):
    floats, _ = CASES[case].inputs(dtype)
    return {name: tensor.detach() for name, tensor in floats.items()} | {"causal": True}


@pytest.mark.parametrize("wide", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_wild_lengths_read_nothing_outside(wide, emulations):
    largest = torch.iinfo(wide).max
    for start, end in ((-largest, largest), (largest, -largest), (3, largest), (-7, 5)):
        lengths = {
            "key_start": torch.tensor([start, 2], dtype=wide),
            "key_lens": torch.tensor([end, 3], dtype=wide),
        }
        out, lse = emulations("address").attend(**inputs(), **lengths)
        dead = min(end, 32) <= max(start, 0)
        assert torch.equal(lse[0].isneginf(), torch.full_like(lse[0], dead, dtype=torch.bool))
        assert out.isfinite().all()


LARGE = [  # the emulation reads numbers as doubles, which hold these exactly
    {"window": (2**62, 2**61), "chunk": (16, 2**60)},
    {"chunk": (3, 2**62, -(2**62))},
    {"chunk": (2**62, 0, -3)},
    {"chunk": (2**61, 1, 2**61 - 1024)},
    {"offset": 2**62},
    {"offset": -(2**63), "clamp": True},
]


@pytest.mark.parametrize("options", LARGE, ids=str)
def test_large_integers_are_exact(options, emulations):
    call = {**inputs("five_queries"), **options}
    expected = rel_attention_with_lse(**call, backend="reference")
    for a, b in zip(emulations("address").attend(**call), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "value"),
    [({}, torch.inf), ({"softcap": 3.0}, torch.nan), ({"mask": MASK}, torch.nan)],
    ids=["plain", "softcap", "mask"],
)
def test_masked_keys_are_never_read(options, value, emulations):
    call = inputs() | options
    lengths = {"key_start": torch.tensor([4, 0]), "key_lens": torch.tensor([32, 30])}
    due = emulations("address").attend(**call, **lengths)
    for name in ("mem_k", "mem_v"):
        call[name] = call[name].clone()
        call[name][0, :, :4] = value
    for name in ("k", "v"):
        call[name] = call[name].clone()
        call[name][1] = value
    actual = emulations("address").attend(**call, **lengths)
    assert all(torch.equal(a, b) for a, b in zip(actual, due, strict=True))


def test_a_cache_is_computed_like_its_valid_keys(emulations):
    q, k, v, r = (torch.randn(1, 1, T, 8) for T in (1, 300, 300, 300))
    k[:, :, 170:], v[:, :, 170:] = torch.nan, torch.nan
    filled = {"q_start": torch.tensor([169]), "key_lens": torch.tensor([170])}
    attend = emulations("address").attend
    # Row 299 of r is distance 0; the same bits, since the valid keys have the same splits.
    actual = attend(q=q, k=k, v=v, r=r, causal=True, offset=0, **filled)
    expected = attend(q=q, k=k[:, :, :170], v=v[:, :, :170], r=r, causal=True, offset=130)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", ["q", "k", "r"])
def test_a_nan_is_no_row_without_keys(name, emulations):
    call = inputs("one_query")
    call[name] = torch.full_like(call[name], float("nan"))
    out, lse = emulations("address").attend(**call)
    assert out.isnan().all()
    assert lse.isnan().all()


def test_float32_biases_are_accepted_beside_16_bit_inputs(emulations):
    call = inputs(dtype=torch.bfloat16)
    wide = {name: call.pop(name).float() for name in ("r_w_bias", "r_r_bias")}
    same = {name: bias.bfloat16() for name, bias in wide.items()}
    attend = emulations("address").attend
    for a, b in zip(attend(**call, **wide), attend(**call, **same), strict=True):
        assert torch.equal(a, b)


def test_each_run_gives_the_same_bits(emulations):
    call = inputs("long_memory")
    first = emulations("thread").attend(**call)
    for a, b in zip(first, emulations("thread").attend(**call), strict=True):
        assert torch.equal(a, b)


SHIFTS = [  # rows, Tq, columns before and after, offset
    (6, 3, 9, 9, 2),
    (7, 7, 100, 61, 6),
    (5, 5, 61, 300, 20),
    (4, 2, 40, 40, -3),
    (4, 2, 5, 3, 1),
    (3, 3, 200, 200, 2**50),
    (3, 3, 200, 200, -(2**50)),
    (2, 1, 1, 1, 0),
    (9, 3, 130, 67, 64),
]
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("size", WORDS)
@pytest.mark.parametrize("shape", SHIFTS, ids=str)
def test_the_shift_copies_every_element_size_at_every_alignment(shape, size, emulations):
    n, Tq, R, n_keys, offset = shape
    for into, backward in ((0, False), (1, True)):
        n_src, n_dst = (n_keys, R) if backward else (R, n_keys)
        x = torch.randint(-30000, 30000, (into + n * n_src,), dtype=WORDS[size])
        numbers = {
            "n": n,
            "Tq": Tq,
            "n_src": n_src,
            "n_dst": n_dst,
            "bytes": size,
            "step": 1 if backward else -1,
            "base": -offset if backward else offset,
            "bytes_into_src": into * size,
            "bytes_into_dst": into * size,
        }
        results = emulations("address").run(numbers, {"src": x})
        shifted = torch.frombuffer(bytearray(results), dtype=WORDS[size]).view(n, n_dst)
        rows = x[into:].double().view(n // Tq, Tq, n_src)
        assert torch.equal(shifted.double(), shifted_rows(rows, n_dst, offset, backward))


def shifted_rows(rows, n_dst, offset, backward):
    if not backward:
        return rel_shift(rows, n_dst, offset).reshape(-1, n_dst)
    x = torch.zeros(*rows.shape[:-1], n_dst, dtype=rows.dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(rel_shift(x, rows.shape[-1], offset), x, rows)
    return grad.reshape(-1, n_dst)


PLANTS = {
    # sanitizer, file, its text, the replacement, the expected report
    "a race": (
        "thread",
        "rel_attention_decode.cuh",
        "if (lane == 0) stats[warp][a] =",
        "if (lane == 0) stats[0][a] =",
        "data race",
    ),
    "a missing barrier": (
        "thread",
        "rel_attention_decode.cuh",
        "  __syncthreads();\n",
        "",
        "data race",
    ),
    "a write outside": (
        "address",
        "rel_attention_decode.cuh",
        "reinterpret_cast<Stats*>(args.split_stats)[run] =",
        "reinterpret_cast<Stats*>(args.split_stats)[run + 1] =",
        "heap-buffer-overflow",
    ),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_error_is_reported(plant, altered_emulation, tmp_path, csrc):
    sanitizer, name, text, planted, report = PLANTS[plant]
    source = tmp_path / "cuda"
    shutil.copytree(csrc / "cuda", source)
    code = (source / name).read_text(encoding="utf-8")
    assert code.count(text) == 1, f"{name} no longer has one {text!r}"
    (source / name).write_text(code.replace(text, planted), encoding="utf-8")
    with pytest.raises(subprocess.CalledProcessError) as error:
        altered_emulation(source / "rel_attention_decode.cu", sanitizer).attend(
            **inputs("long_memory")
        )
    assert report in error.value.stderr


def test_the_emulation_stays_small(csrc):
    emulation = csrc.parent / "tests" / "csrc" / "cuda_emulation"
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in emulation.iterdir())
    assert lines <= 200
