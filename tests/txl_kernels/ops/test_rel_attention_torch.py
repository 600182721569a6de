"""rel_attention inside torch: autograd, autocast, opcheck, torch.compile, torch.export."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torch.utils._pytree import tree_map_only

from txl_kernels import rel_attention, rel_attention_with_lse
from txl_kernels.testing import REL_ATTENTION_CASES, RelAttentionCase
from txl_kernels.testing.rel_attention import attention_arguments

CASES = {case.name: case for case in REL_ATTENTION_CASES}


@pytest.fixture(params=["reference", "native"])
def backend(request, require_backend):
    require_backend("rel_attention", request.param, needs_grad=True)
    return request.param


GRADCHECK = [
    RelAttentionCase("causal", B=2, H=2, Tq=4, Tm=3, D=3, options={"causal": True}),
    RelAttentionCase("clamp", B=1, H=2, Tq=5, Tm=2, D=2, R=3, options={"offset": 1, "clamp": True}),
    RelAttentionCase(
        "masked",
        B=2,
        H=1,
        Tq=5,
        Tm=3,
        D=3,
        Dv=2,
        r_batch=True,
        key_start=[0, 6],
        mask=(5, 8),
        options={"window": (4, 2), "softcap": 2.0, "dropout_p": 0.2},
    ),
    RelAttentionCase(
        "placed",
        B=2,
        H=4,
        Hk=2,
        Tq=4,
        Tm=2,
        D=2,
        Dp=3,
        R=4,
        q_start=[3, -1],
        key_start=[[0, 2, 1, 0], [4, 0, 6, 1]],
        key_lens=[6, 4],
        options={"window": (4, 2), "offset": 2, "pos_scale": -0.6},
    ),
]


@pytest.mark.parametrize("case", GRADCHECK, ids=lambda case: case.name)
def test_gradcheck(backend, case):
    floats, others = case.inputs(torch.float64)
    names = list(floats)

    def call(*tensors):
        inputs = dict(zip(names, tensors, strict=True))
        out, lse = rel_attention_with_lse(**inputs, **others, **case.options, backend=backend)
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(call, tuple(floats.values()))


def test_second_derivative_of_a_kernel_raises(require_backend):
    require_backend("rel_attention", "native", needs_grad=True)
    floats, _ = RelAttentionCase("").inputs(torch.float32)
    out = rel_attention(**floats, backend="native")
    (dq,) = torch.autograd.grad(out.square().sum(), floats["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="rel_attention: no second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("name", ["transformer_xl", "everything", "everything_else"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck_forward(name, dtype, require_backend):
    require_backend("rel_attention", "native", dtype=dtype, needs_grad=True)
    arguments = attention_arguments(CASES[name], *CASES[name].inputs(dtype))
    torch.library.opcheck(
        torch.ops.txl_native.rel_attention_fwd.default, arguments, rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("needs_grad", [[True] * 8 + [False], [True, False] * 4 + [False]])
def test_opcheck_backward(needs_grad, require_backend):
    require_backend("rel_attention", "native", needs_grad=True)
    case = replace(CASES["transformer_xl"], lse_gradient=True)
    arguments = attention_arguments(case, *case.inputs(torch.float32))
    arguments = tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
    out, lse = torch.ops.txl_native.rel_attention_fwd(*arguments)
    for dlse in (lse.new_empty(0), case.dlse(torch.float32)):
        call = (case.dout(torch.float32), dlse, *arguments, out, lse, needs_grad)
        torch.library.opcheck(torch.ops.txl_native.rel_attention_bwd.default, call)


@pytest.mark.parametrize(
    ("compiler", "name"),
    [("aot_eager", "everything"), ("aot_eager", "bias"), ("inductor", "everything_else")],
)
def test_compiles_without_a_graph_break(backend, compiler, name, require_backend):
    case = CASES[name]
    require_backend("rel_attention", backend, uses=case.uses)
    floats, others = case.inputs(torch.float32)
    options = {**others, **case.options, "backend": backend}
    torch.compiler.reset()
    compiled = torch.compile(
        lambda inputs: rel_attention_with_lse(**inputs, **options), fullgraph=True, backend=compiler
    )
    out, lse = compiled(floats)
    due, due_lse = rel_attention_with_lse(**floats, **options)
    torch.testing.assert_close(out, due)
    torch.testing.assert_close(lse, due_lse)
    leaves = list(floats.values())
    douts = (case.dout(torch.float32), torch.linspace(-1, 1, lse.numel()).view_as(lse))
    torch.testing.assert_close(
        torch.autograd.grad((out, lse), leaves, douts),
        torch.autograd.grad((due, due_lse), leaves, douts),
        rtol=1e-4,
        atol=1e-4,
    )


def test_compiles_with_dropout_drawn_inside(backend):
    floats, _ = RelAttentionCase("", Tm=0).inputs(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda inputs: rel_attention(**inputs, dropout_p=0.5, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    assert not torch.equal(compiled(floats), compiled(floats))


class _Streaming(torch.nn.Module):
    """Segment and memory of any length; the Transformer-XL call with `clamp_len` 6."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.r_w_bias = torch.nn.Parameter(torch.randn(2, 8))

    def forward(self, q, k, v, mem_k, mem_v, r, q_start, key_start):
        Tq, Tk = q.shape[2], mem_k.shape[2] + k.shape[2]
        return rel_attention(
            q,
            k,
            v,
            r,
            r_w_bias=self.r_w_bias,
            mem_k=mem_k,
            mem_v=mem_v,
            q_start=q_start,
            key_start=key_start,
            offset=r.shape[2] - 1 - (Tk - Tq),
            clamp=True,
            causal=True,
            window=(mem_k.shape[2], None),
            backend=self.backend,
        )


@pytest.mark.parametrize("strict", [False, True], ids=["tracing", "strict"])
def test_exports_with_dynamic_lengths(backend, strict):
    def inputs(Tq, Tm, R):
        q, k, v = (torch.randn(2, 2, Tq, 8) for _ in range(3))
        mem_k, mem_v = (torch.randn(2, 2, Tm, 8) for _ in range(2))
        starts = torch.arange(2 * Tq).view(2, Tq) % 5
        return q, k, v, mem_k, mem_v, torch.randn(1, 2, R, 8), torch.tensor([9, 2]), starts

    Tq, Tm, R = Dim("Tq", min=2, max=4096), Dim("Tm", min=2, max=4096), Dim("R", min=2, max=4096)
    lengths = ({2: Tq}, {2: Tq}, {2: Tq}, {2: Tm}, {2: Tm}, {2: R}, None, {1: Tq})
    module = _Streaming(backend)
    program = torch.export.export(module, inputs(5, 9, 7), dynamic_shapes=lengths, strict=strict)
    for sizes in [(5, 9, 7), (3, 20, 11), (17, 2, 4)]:
        call = inputs(*sizes)
        torch.testing.assert_close(program.module()(*call), module(*call))


def test_compiles_once_for_any_length(backend):
    """One graph for the first lengths, one for all others."""
    counter = CompileCounter()
    torch.compiler.reset()
    module = torch.compile(_Streaming(backend), backend=counter)
    with torch.no_grad():
        for Tq, Tm in ((5, 9), (6, 11), (9, 30), (7, 14)):
            tensors = [torch.randn(2, 2, T, 8) for T in (Tq, Tq, Tq, Tm, Tm)]
            tensors.append(torch.randn(1, 2, Tq + Tm, 8))
            module(*tensors, torch.tensor([Tm, 3]), torch.zeros(2, Tq, dtype=torch.int64))
    assert counter.frame_count == 2


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_what_the_contract_names(backend, lower):
    floats, _ = CASES["transformer_xl"].inputs(torch.float32)
    cast = {n: x.to(lower) if "bias" not in n else x for n, x in floats.items()}
    with torch.autocast("cpu", lower):
        out, lse = rel_attention_with_lse(**floats, causal=True, backend=backend)
    due, due_lse = rel_attention_with_lse(**cast, causal=True, backend=backend)
    assert out.dtype == lower
    assert torch.equal(out, due)
    assert torch.equal(lse, due_lse)
    out.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in floats.values())


def test_autocast_leaves_float64_alone(backend):
    floats, _ = RelAttentionCase("").inputs(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = rel_attention(**floats, backend=backend)
    assert torch.equal(out, rel_attention(**floats, backend=backend))


def test_saves_nothing_that_grows_with_queries_times_keys(require_backend):
    require_backend("rel_attention", "native", needs_grad=True)
    case = RelAttentionCase("", B=1, H=2, Tq=100, Tm=200, D=8)
    floats, _ = case.inputs(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        rel_attention(**floats, causal=True, dropout_p=0.1, backend="native")
    assert saved
    assert max(x.numel() for x in saved) < case.Tq * (case.Tm + case.Tq)
