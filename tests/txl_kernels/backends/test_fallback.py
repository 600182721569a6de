"""A fallback to the reference that costs much time or memory warns once, and never in a trace."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import txl_kernels
from txl_kernels import (
    adaptive_embedding,
    adaptive_topk,
    rel_attention,
    rel_attention_with_lse,
    rel_shift,
)
from txl_kernels.backends import fallback, native
from txl_kernels.backends.native_installation import with_command
from txl_kernels.backends.reference import rel_attention as reference

NOT_BUILT = "no compiler was found when txl_kernels was installed"
# 64 heads, 1,024 queries and keys: exactly 256 MiB of scores in float32.
H, T = 64, 1024


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(fallback, "_warned", set())


@pytest.fixture
def not_built(monkeypatch):
    reason = with_command(NOT_BUILT)
    monkeypatch.setattr(native, "unavailable_reason", lambda: reason)


@pytest.fixture
def run_nothing(monkeypatch):
    """Large calls return at once."""
    monkeypatch.setattr(reference, "rel_attention", lambda q, *_, **__: (q, None))


def warnings_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if w.category is RuntimeWarning]


def attend(n_keys=T, dtype=torch.float32, **options):
    q, k = (torch.zeros(1).to(dtype).expand(1, H, n, 1) for n in (T, n_keys))
    options = {"bias": torch.zeros(1), **options}
    return rel_attention(q, k, k, k, **options)


def small(**options):
    x = torch.zeros(1, 1, 2, 4)
    return rel_attention(x, x, x, x, **options)


def test_large_scores_warn_once_per_reason(require_backend, run_nothing):
    require_backend("rel_attention", "native")
    (message,) = warnings_of(lambda: attend(T + 1))
    assert message.startswith("rel_attention runs on the plain PyTorch reference")
    assert "256 MiB of scores, because native does not support bias yet" in message
    assert warnings_of(lambda: attend(T + 2)) == []
    (message,) = warnings_of(lambda: attend(T + 1, bias=None, dead_rows="uniform"))
    assert "dead_rows='uniform'" in message


def test_another_size_is_not_another_reason(require_backend, run_nothing):
    require_backend("rel_attention", "native")

    def heads_of(D):
        q = torch.zeros(1).expand(1, H, T, D)
        k = torch.zeros(1).expand(1, H, T + 1, D)
        return rel_attention(q, k, k, k)

    assert len(warnings_of(lambda: heads_of(257))) == 1
    assert warnings_of(lambda: heads_of(300)) == []


@pytest.mark.parametrize(
    ("n_keys", "dtype", "expected"),
    [
        (T, torch.float32, 0),
        (T + 1, torch.float32, 1),
        (T + 1, torch.float16, 1),
        (T // 2, torch.float64, 0),
        (T // 2 + 1, torch.float64, 1),
    ],
)
def test_scores_count_4_bytes_or_8(run_nothing, require_backend, n_keys, dtype, expected):
    require_backend("rel_attention", "native", dtype=dtype)
    assert len(warnings_of(lambda: attend(n_keys, dtype))) == expected


def test_a_named_reference_never_warns(run_nothing, not_built):
    assert warnings_of(lambda: attend(T + 1, backend="reference")) == []


@pytest.mark.parametrize(
    "call",
    [
        small,
        lambda: rel_shift(torch.zeros(2, 3)),
        lambda: adaptive_embedding(torch.zeros(1, dtype=torch.int64), [torch.zeros(2, 2)], [None]),
    ],
)
def test_kernels_that_are_not_built_warn_at_any_size(not_built, call):
    (message,) = warnings_of(call)
    assert NOT_BUILT in message
    assert message.endswith(f": {native.build_command()}")
    assert message.count(native.build_command()) == 1
    assert warnings_of(call) == []
    assert warnings_of(small) == []  # the reason is the same


def test_an_op_without_kernels_does_not_warn(not_built):
    hidden, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    assert warnings_of(lambda: adaptive_topk(hidden, weight, [], 1, cutoffs=())) == []


@pytest.mark.parametrize(
    "call",
    [
        small,
        lambda: rel_shift(torch.zeros(2, 3)),
        lambda: rel_attention_with_lse(*[torch.zeros(1, 1, 2, 4)] * 4),
    ],
)
def test_the_warning_points_at_the_caller(not_built, call):
    with pytest.warns(RuntimeWarning) as caught:
        call()
    assert caught[0].filename == __file__


def test_no_trace_and_no_compilation_warns(not_built):
    x = torch.zeros(1, 1, 2, 4)

    def attention(x):
        return rel_attention(x, x, x, x)

    class Module(torch.nn.Module):
        def forward(self, x):
            return attention(x)

    def on_fake_tensors():
        with torch._subclasses.fake_tensor.FakeTensorMode():
            attention(torch.zeros(1, 1, 2, 4))

    torch.compiler.reset()
    for trace in (
        lambda: torch.compile(attention, backend="eager", fullgraph=True)(x),
        lambda: torch.export.export(Module(), (x,)),
        lambda: torch.jit.trace(attention, x, check_trace=False),
        lambda: make_fx(attention)(x),
        lambda: rel_shift(x.to("meta")),
        on_fake_tensors,
    ):
        assert warnings_of(trace) == []
    assert len(warnings_of(lambda: attention(x))) == 1


def test_the_reason_is_told_where_the_reference_answers():
    assert txl_kernels.resolve("rel_attention", backend="reference", device="cpu").reason is None
    for device, uses in (("cpu", ["bias"]), ("cuda", ["bias"]), ("xpu", [])):
        backend, reason = txl_kernels.resolve("rel_attention", device=device, uses=uses)
        assert backend == "reference"
        assert reason
