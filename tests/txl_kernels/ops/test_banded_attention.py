"""Near and far keys computed apart are the dense formula, forward and backward."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import BackendUnavailableError, banded_attention, rel_attention
from txl_kernels.ops import flash_attention

B, H, T, R, D, Dv = 2, 4, 70, 21, 8, 5


def inputs(dtype=torch.float64, *, Hk=H, Dp=None, T=T, biases=True, requires_grad=True):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return x.requires_grad_(requires_grad)

    # q has the layout of a projection.
    tensors = {"q": random(B, T, H, D).transpose(1, 2), "k": random(B, Hk, T, D)}
    tensors |= {"v": random(B, Hk, T, Dv), "r": random(1, 1 if Dp else H, R, Dp or D)}
    if biases:
        tensors |= {"r_w_bias": random(H, D), "r_r_bias": random(H, Dp or D)}
    if Dp:
        tensors["q_pos"] = random(B, H, T, Dp)
    return tensors


def dense(tensors, **options):
    return rel_attention(**tensors, **options, offset=R - 1, causal=True, backend="reference")


def error(actual, due):
    actual, due = actual.detach().double(), due.detach().double()
    return float((actual - due).abs().max() / due.abs().max())


def gradients(out, tensors, dout):
    return torch.autograd.grad(out, list(tensors.values()), dout, retain_graph=True)


CASES = {
    "plain": ({}, {}),
    "no_biases": ({"biases": False}, {}),
    "groups": ({"Hk": 2}, {"scale": 0.5}),
    "inkling": ({"Hk": 1, "Dp": 3}, {"scale": 0.1, "pos_scale": 1.0}),
    "clamp": ({}, {"clamp": True, "pos_scale": -0.3}),
    "clamp_q_pos": ({"Hk": 2, "Dp": 11}, {"clamp": True, "pos_scale": 0.7}),
    "no_biases_clamp": ({"biases": False}, {"clamp": True}),
    "scale_below_0": ({}, {"clamp": True, "scale": -0.4}),
    "scale_0": ({}, {"scale": 0.0, "pos_scale": 0.5}),
    "no_far_keys": ({"T": R}, {"clamp": True}),
    "one_far_key": ({"T": R + 1}, {"clamp": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_it_equals_the_dense_formula(backend, case, require_backend):
    """To a few roundings; the reference gets an explicit `far`, so it computes two parts, too."""
    require_backend("rel_attention", backend, dtype=torch.float64, needs_grad=True)
    sizes, options = CASES[case]
    tensors = inputs(**sizes)
    far = (flash_attention.forward, flash_attention.backward)
    out = banded_attention(**tensors, **options, backend=backend, far=far)
    due = dense(tensors, **options)
    assert error(out, due) < 5e-15
    dout = torch.randn_like(due)
    grads = gradients(out, tensors, dout), gradients(due, tensors, dout)
    for name, actual, expected in zip(tensors, *grads, strict=True):
        if expected.count_nonzero() == 0:  # those of q and k with a scale of 0
            assert actual.count_nonzero() == 0, name
        else:
            assert error(actual, expected) < 1e-14, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_as_exact_as_one_kernel_in_other_dtypes(dtype, require_backend):
    require_backend("rel_attention", "native", dtype=dtype, needs_grad=True)
    tensors = inputs(dtype, Hk=2, Dp=3)
    options = {"clamp": True, "pos_scale": 0.5}
    out = banded_attention(**tensors, **options, backend="native")
    single = rel_attention(**tensors, **options, offset=R - 1, causal=True, backend="native")
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    due = dense(wide, **options)
    dout = torch.randn_like(out)
    floor = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert error(out, due) <= 2 * error(single, due) + floor
    grads = [gradients(x, tensors, dout) for x in (out, single)]
    grads.append(gradients(due, wide, dout.double()))
    for name, actual, one, expected in zip(tensors, *grads, strict=True):
        assert actual.dtype == one.dtype
        assert error(actual, expected) <= 2 * error(one, expected) + 2 * floor, name


def test_far_gets_the_merged_out_and_lse(require_backend):
    """And content queries with their bias, the first keys, the scale."""
    require_backend("rel_attention", "native", needs_grad=True)
    tensors = inputs(torch.float32, Hk=2)
    seen = {}

    def forward(q, k, v, scale):
        seen["forward"] = (q, k, v, scale)
        return flash_attention.forward(q, k, v, scale)

    def backward(dout, q, k, v, out, lse, scale):
        seen["backward"] = (out, lse)
        return flash_attention.backward(dout, q, k, v, out, lse, scale)

    out = banded_attention(**tensors, scale=0.3, far=(forward, backward), backend="native")
    out.sum().backward()
    q, k, v, scale = seen["forward"]
    bias = tensors["r_w_bias"][:, None]
    assert scale == 0.3
    assert torch.equal(q, tensors["q"][:, :, R:] + bias)
    assert torch.equal(k, tensors["k"][:, :, : T - R])
    assert torch.equal(v, tensors["v"][:, :, : T - R])
    merged, lse = seen["backward"]
    assert torch.equal(merged, out[:, :, R:])
    assert lse.is_contiguous()
    # The merged one counts the near keys, too.
    assert (lse > flash_attention.forward(q, k, v, scale)[1]).all()


class Banded(torch.nn.Module):
    def forward(self, q, k, v, r):
        return banded_attention(q, k, v, r, clamp=True, backend="native")


def test_one_graph_forward_and_backward(require_backend):
    require_backend("rel_attention", "native", needs_grad=True)
    tensors = inputs(torch.float32, Hk=2, biases=False)
    compiled = torch.compile(Banded(), fullgraph=True, backend="aot_eager")
    results = [f(**tensors) for f in (compiled, Banded())]
    torch.testing.assert_close(*results)
    dout = torch.randn_like(results[0])
    torch.testing.assert_close(*(gradients(out, tensors, dout) for out in results))


def test_an_exported_program_accepts_other_lengths(require_backend):
    require_backend("rel_attention", "native")
    sizes = {"Hk": 2, "biases": False, "requires_grad": False}
    length = {2: torch.export.Dim("T", min=2 * R, max=4096)}
    program = torch.export.export(
        Banded(), tuple(inputs(torch.float32, **sizes).values()), dynamic_shapes=(*[length] * 3, {})
    )
    longer = inputs(torch.float32, T=T + 30, **sizes).values()
    torch.testing.assert_close(program.module()(*longer), Banded()(*longer))


def test_a_second_derivative_exists_on_the_reference_only(require_backend):
    require_backend("rel_attention", "native", dtype=torch.float64, needs_grad=True)
    tensors = inputs()

    def second(backend):
        out = banded_attention(**tensors, clamp=True, backend=backend)
        (dr,) = torch.autograd.grad(out.sum(), tensors["r_r_bias"], create_graph=True)
        return torch.autograd.grad(dr.sum(), tensors["k"])[0]

    assert second("reference").abs().max() > 0
    with pytest.raises(RuntimeError, match=r"^banded_attention: no second derivative"):
        second("native")


def test_without_gradients_the_result_is_the_same(require_backend):
    require_backend("rel_attention", "native")
    tensors = inputs(torch.float32)
    with torch.no_grad():
        out = banded_attention(**tensors, backend="native")
    assert not out.requires_grad
    assert torch.equal(out, banded_attention(**tensors, backend="native"))


def test_autocast_casts_as_rel_attention_does(require_backend):
    require_backend("rel_attention", "native", dtype=torch.bfloat16, needs_grad=True)
    tensors = inputs(torch.float32, Hk=2)
    lower = {n: x if "bias" in n else x.bfloat16() for n, x in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = banded_attention(**tensors, clamp=True, backend="native")
        out.float().sum().backward()
    assert torch.equal(out, banded_attention(**lower, clamp=True, backend="native"))
    assert tensors["k"].grad.dtype == torch.float32


def test_no_batch_gives_no_output(require_backend):
    require_backend("rel_attention", "native", needs_grad=True)
    tensors = {n: x[:0] if n in ("q", "k", "v") else x for n, x in inputs(torch.float32).items()}
    out = banded_attention(**tensors, clamp=True, backend="native")
    assert out.shape == (0, H, T, Dv)
    assert (gradients(out, tensors, torch.ones_like(out))[3] == 0).all()


OTHERS = {"mem_k": None, "dropout_p": 0.1, "softcap": 20.0, "window": (5, None), "mask": None}
BAD = [
    *(({name: x}, ValueError, f"{name} is not supported") for name, x in OTHERS.items()),
    ({"windw": 3}, TypeError, "unexpected keyword argument 'windw'"),
    ({"far": max}, TypeError, r"far must be a pair of functions \(forward, backward\), got"),
    ({"far": (max, 3)}, TypeError, "far must be a pair of functions"),
    ({"clamp": 1}, TypeError, "clamp must be True or False, got 1"),
    ({"q": torch.zeros(B, H, 9, D)}, ValueError, r"k must have shape \[2, Hk, 9, 8\], got"),
    ({"k": torch.zeros(B, 3, T, D)}, ValueError, "a multiple of k's 3 heads"),
    ({"r": torch.zeros(3, H, R, D)}, ValueError, r"r must have shape \[1 or 2, 1 or 4, R, Dp\]"),
    ({"r": torch.zeros(1, H, 0, D)}, ValueError, "r must have at least one row"),
    ({"q_pos": torch.zeros(B, H, T, 3)}, ValueError, r"r must have shape .* 3\], got"),
    ({"scale": torch.inf}, ValueError, "scale must be finite, got inf"),
    ({"pos_scale": torch.nan}, ValueError, "pos_scale must be finite, got nan"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_arguments_are_named(change, kind, message):
    tensors = inputs(torch.float32, requires_grad=False)
    if "k" in change:
        tensors["v"] = torch.zeros(B, 3, T, Dv)
    with pytest.raises(kind, match=f"^banded_attention.*{message}"):
        banded_attention(**{**tensors, **change})


def test_a_wrong_result_of_far_is_named(require_backend):
    require_backend("rel_attention", "native")

    def forward(q, k, v, scale):
        out, lse = flash_attention.forward(q, k, v, scale)
        return out.transpose(1, 2), lse

    tensors, far = inputs(torch.float32, requires_grad=False), (forward, flash_attention.backward)
    with pytest.raises(ValueError, match=r"must return out of shape \[2, 4, 49, 5\], got"):
        banded_attention(**tensors, far=far, backend="native")


def test_transforms_run_on_the_reference_or_are_refused(require_backend):
    require_backend("rel_attention", "native")
    tensors = inputs(torch.float32, requires_grad=False)
    far = (flash_attention.forward, flash_attention.backward)

    def loss(q, **options):
        return banded_attention(**{**tensors, "q": q}, **options).sum()

    with pytest.raises(BackendUnavailableError, match=r"torch\.func"):
        torch.func.grad(lambda q: loss(q, far=far))(tensors["q"])
    q = tensors["q"].clone().requires_grad_()
    (due,) = torch.autograd.grad(loss(q, backend="native"), q)
    torch.testing.assert_close(torch.func.grad(loss)(tensors["q"]), due)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cuda", torch.float32, "torch has no flash attention for torch.float32 on cuda"),
        ("mps", torch.float16, "torch has no flash attention on mps"),
        ("cuda", torch.bfloat16, None),
    ],
)
def test_where_torch_has_no_flash_attention(device, dtype, reason):
    assert flash_attention.unsupported_reason(torch.device(device), dtype) == reason
