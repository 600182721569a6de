"""The conventions of the patched families, written out in a few lines, against their adapters."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.integrations import (
    hugging_face,
    inkling,
    inkling2,
    nemotron_streaming,
    parakeet,
    position_tables,
    subsampling,
    wav2vec2_bert,
    wav2vec2_conformer,
)
from txl_kernels.torch_private import FakeTensorMode

B, T, H, D = 2, 11, 4, 8
VALID = torch.arange(T) < torch.tensor([[T], [7]])


class Module(nn.Module):
    """A module with the given attributes; `linear` names linear layers with their widths."""

    def __init__(self, linear: dict[str, tuple[int, int]], **attributes: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (n_in, n_out) in linear.items():
            setattr(self, name, nn.Linear(n_in, n_out, bias=False))
        for name, value in attributes.items():
            setattr(self, name, value)


def heads(x: Tensor, n: int = H) -> Tensor:
    return x.unflatten(2, (n, -1)).transpose(1, 2)


def distances(Tq: int = T, Tk: int = T) -> Tensor:
    """[Tq, Tk]: from query i back to key j; the last query is at the last key."""
    return torch.arange(Tq)[:, None] + Tk - Tq - torch.arange(Tk)


def attend(scores: Tensor, mask: Tensor, v: Tensor) -> Tensor:
    probs = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    return (probs @ v).transpose(1, 2).flatten(2)


def test_relative_scores_of_conformers():
    """The rows of the table go from the farthest key on the left to the farthest on the right."""
    names = ("linear_q", "linear_k", "linear_v", "linear_out", "linear_pos")
    module = Module(
        dict.fromkeys(names, (H * D, H * D)),
        head_size=D,
        num_heads=H,
        scaling=D**-0.5,
        dropout=nn.Dropout(0.0),
        pos_bias_u=torch.randn(H, D),
        pos_bias_v=torch.randn(H, D),
    )
    x, table = torch.randn(B, T, H * D), torch.randn(1, 2 * T - 1, H * D)
    q, k, v = wav2vec2_conformer.project_qkv(module, x)
    r = heads(module.linear_pos(table))[0]  # [H, 2T - 1, D]
    row = r[:, T - 1 - distances()]  # [H, T, T, D]
    positions = torch.einsum("bhid,hijd->bhij", q + module.pos_bias_v[:, None], row)
    scores = ((q + module.pos_bias_u[:, None]) @ k.mT + positions) * D**-0.5
    expected = module.linear_out(attend(scores, VALID[:, None, None], v))
    ranges = hugging_face.ranges_of_padding(VALID)
    out, _ = wav2vec2_conformer.attention(module, x, ranges, table)
    torch.testing.assert_close(out, expected)


def test_clamped_distances_of_wav2vec2_bert():
    left, right = 5, 2
    names = ("linear_q", "linear_k", "linear_v", "linear_out")
    module = Module(
        dict.fromkeys(names, (H * D, H * D)),
        head_size=D,
        scaling=D**-0.5,
        dropout=nn.Dropout(0.0),
        left_max_position_embeddings=left,
        right_max_position_embeddings=right,
        distance_embedding=nn.Embedding(left + right + 1, D),
    )
    x = torch.randn(B, T, H * D)
    q, k, v = wav2vec2_conformer.project_qkv(module, x)
    row = module.distance_embedding((-distances()).clamp(-left, right) + left)
    scores = (q @ k.mT + torch.einsum("bhid,ijd->bhij", q, row)) * D**-0.5
    expected = module.linear_out(attend(scores, torch.ones(T, T, dtype=torch.bool), v))
    torch.testing.assert_close(wav2vec2_bert.attention(module, x)[0], expected)


def inkling_module(is_sliding: bool, R: int) -> Module:
    widths = {"q_proj": H * D, "k_proj": H * D // 2, "v_proj": H * D // 2, "r_proj": H * 3}
    same = types.SimpleNamespace(log_scaling_n_floor=4, log_scaling_alpha=0.1)
    return Module(
        {**{name: (24, n) for name, n in widths.items()}, "o_proj": (H * D, 24)},
        head_dim=D,
        num_heads=H,
        is_sliding=is_sliding,
        sliding_window=R if is_sliding else None,
        rel_extent=R,
        scaling=1 / D,
        attention_dropout=0.0,
        config=same,
        q_norm=nn.RMSNorm(D),
        k_norm=nn.RMSNorm(D),
        k_sconv=lambda x, **_: x,
        v_sconv=lambda x, **_: x,
        rel_logits_proj=types.SimpleNamespace(proj=torch.randn(3, R)),
    )


@pytest.mark.parametrize("is_sliding", [True, False], ids=["sliding", "global"])
def test_content_dependent_bias_of_inkling(is_sliding):
    R = 5
    module, x = inkling_module(is_sliding, R), torch.randn(B, T, 24)
    q, k = module.q_norm(heads(module.q_proj(x))), module.k_norm(heads(module.k_proj(x), H // 2))
    k, v = (y.repeat_interleave(2, 1) for y in (k, heads(module.v_proj(x), H // 2)))
    d = distances()
    bias = (heads(module.r_proj(x)) @ module.rel_logits_proj.proj).gather(
        3, d.clamp(0, R - 1).expand(B, H, T, T)
    )
    bias = bias.masked_fill((d < 0) | (d >= R), 0.0)
    if not is_sliding:
        tau = 1 + 0.1 * ((torch.arange(T) + 1) / 4).clamp(min=1).log()[:, None]
        q, bias = q * tau, bias * tau
    valid = VALID.flip(1)  # padding at the left
    mask = (d >= 0) & ((d < R) | (not is_sliding)) & valid[:, None, None]
    expected = module.o_proj(attend(q @ k.mT / D + bias, mask, v))
    out, _ = inkling.attention(module, x, hugging_face.ranges_of_padding(valid))
    torch.testing.assert_close(out, expected)


def test_sinks_of_inkling2():
    R, module, x = 5, inkling_module(False, 5), torch.randn(B, T, 24)
    proj = torch.randn(3, R)
    module.layer_idx, module.sink_proj = 0, nn.Linear(24, H, bias=False)
    project = {name: getattr(module, f"{name}_proj") for name in "qkvo"}
    for name in "qkvo":
        delattr(module, f"{name}_proj")
    module.q_proj = lambda x, ids: heads(project["q"](x))
    module.k_proj = lambda x, **_: heads(project["k"](x), H // 2)
    module.v_proj = lambda x, **_: heads(project["v"](x), H // 2)
    module.o_proj = lambda out, x: project["o"](out)
    module.relative_position_bias = types.SimpleNamespace(
        linear=module.r_proj, norm=lambda rel, ids: rel, proj=proj
    )
    q, k, v = (heads(project[n](x), m) for n, m in (("q", H), ("k", H // 2), ("v", H // 2)))
    k, v = (y.repeat_interleave(2, 1) for y in (k, v))
    d = distances()
    bias = (heads(module.r_proj(x)) @ proj).gather(3, d.clamp(0, R - 1).expand(B, H, T, T))
    scores = q @ k.mT / D + bias.masked_fill((d < 0) | (d >= R), 0.0)
    sink = module.sink_proj(x).transpose(1, 2)[..., None]
    scores = torch.cat([scores.masked_fill(d < 0, -torch.inf), sink], -1)
    expected = project["o"]((scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2))
    out, _ = inkling2.attention(module, x, None, None, None, 0, position_ids=None)
    torch.testing.assert_close(out, expected)


def test_chunks_of_nemotron_streaming_and_rows_without_keys():
    size, left, first_key, Tk = 3, 1, 4, T + 5
    query = (torch.arange(T) + Tk - T + first_key)[:, None] // size
    key = (torch.arange(Tk) + first_key) // size
    sees = (query - key >= 0) & (query - key <= left)
    ends = torch.tensor([Tk, 6])
    sees = sees & (torch.arange(Tk) < ends[:, None, None])  # [B, T, Tk]
    ranges = torch.stack([torch.zeros_like(ends), ends])
    found = nemotron_streaming._sees_nothing(ranges, (size, left, first_key), T, Tk)
    assert torch.equal(found[:, 0], ~sees.any(-1))
    assert bool(found.any())


def test_ranges_of_masks():
    ranges = hugging_face.ranges_of_padding(torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0]]))
    assert ranges.tolist() == [[1, 0, 0], [3, 1, 0]]
    assert hugging_face.ranges_of_padding(torch.tensor([[1, 0, 1]])) is None
    positions = torch.tensor([[3, 4, 0, 1, 2, 0]])
    ranges = hugging_face.ranges_of_documents(positions, 2)
    assert ranges[0].tolist() == [[0, 0, 2, 2, 2, 5]] * 2
    assert bool((ranges[1] == 6).all())
    assert parakeet.ranges_of_valid(VALID)[1].tolist() == [[T] * T, [7] * 7 + [0] * (T - 7)]


def test_a_projected_table_is_kept_until_something_changes():
    layer, table = nn.Linear(4, 4, bias=False), torch.randn(1, 20, 4)
    with torch.no_grad():
        first = position_tables.project(layer, table[:, 2:9], 2)
        assert position_tables.project(layer, table[:, 2:9], 2) is first
        assert position_tables.project(layer, table[:, 3:10], 2) is not first
        first = position_tables.project(layer, table[:, 2:9], 2)
        for change in (lambda: layer.weight.mul_(2), lambda: table.add_(1), lambda: layer.half()):
            change()
            again = position_tables.project(layer, table[:, 2:9].to(layer.weight.dtype), 2)
            assert again is not first
            first = again
    table = table.half()
    assert position_tables.project(layer, table, 2).requires_grad


def test_a_weight_that_is_no_parameter_is_noticed():
    """FSDP with use_orig_params=False makes weights plain attributes during the forward."""
    layer, table = nn.Linear(4, 4), torch.randn(1, 7, 4)
    for name in ("weight", "bias"):
        value = getattr(layer, name).detach()
        delattr(layer, name)
        setattr(layer, name, value)
    with torch.no_grad():
        first = position_tables.project(layer, table, 2)
        assert position_tables.project(layer, table, 2) is first
        for value in (layer.weight, layer.bias):
            value.mul_(2.0)
            expected = layer(table).view(1, 7, 2, 2).transpose(1, 2)
            assert torch.equal(position_tables.project(layer, table, 2), expected)


def test_nothing_is_kept_in_a_process_group(tmp_path):
    """FSDP may put new values at the address of the old ones, with the same version."""
    layer, table = nn.Linear(4, 4), torch.randn(1, 7, 4)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        with torch.no_grad():
            first = position_tables.project(layer, table, 2)
            assert position_tables.project(layer, table, 2) is not first
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_is_kept_in_a_cuda_graph_nor_for_another_stream(monkeypatch):
    layer, table = nn.Linear(4, 4), torch.randn(1, 7, 4)
    is_capturing, stream = False, "first"
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: is_capturing)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: stream)
    with torch.no_grad():
        first = position_tables.project(layer, table, 2)
        is_capturing = True
        assert position_tables.project(layer, table, 2) is not first
        is_capturing = False
        assert position_tables.project(layer, table, 2) is first
        stream = "second"
        assert position_tables.project(layer, table, 2) is not first


def test_no_mask_is_read_while_a_cuda_graph_is_captured(monkeypatch):
    """Masks of all pairs are made instead, by the library."""
    x, padding, numbers = torch.randn(B, T, H), torch.ones(B, T), torch.zeros(B, 1, T, T)
    ids = torch.arange(T).expand(B, -1)
    config = types.SimpleNamespace()
    causal = hugging_face.causal_ranges(lambda **options: "causal")
    bidirectional = hugging_face.bidirectional_ranges(lambda **options: "bidirectional")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    assert causal(config, x, padding) is None
    assert causal(config, x, None, None, ids) is None
    assert bidirectional(config, x, padding) is None
    assert hugging_face.as_bool(numbers).dtype == torch.bool
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "__bool__", None)
    assert causal(config, x, padding) == "causal"
    assert causal(config, x, None, None, ids).shape == (2, B, T)
    assert bidirectional(config, x, padding) == "bidirectional"
    assert "numbers" in hugging_face.unserved(Module({}, config=config), numbers, {})
    assert hugging_face.as_bool(numbers) is numbers


def test_values_of_fake_and_of_batched_tensors_are_not_read():
    layer, tables = nn.Linear(4, 4), torch.randn(3, 1, 7, 4)
    expected = [position_tables.project(layer, table, 2) for table in tables]
    with torch.no_grad():
        batched = torch.vmap(lambda table: position_tables.project(layer, table, 2))(tables)
    torch.testing.assert_close(batched, torch.stack(expected))
    causal = hugging_face.causal_ranges(lambda **options: "causal")
    with FakeTensorMode():
        x, padding = torch.empty(B, T, H), torch.ones(B, T)
        assert causal(types.SimpleNamespace(), x, padding) == "causal"


@pytest.mark.parametrize(("counted_from", "n_floor"), [(3, 7), (3, 8), (torch.tensor(3), 8)])
def test_tau_is_left_out_where_it_is_one(counted_from, n_floor):
    config = types.SimpleNamespace(log_scaling_n_floor=n_floor, log_scaling_alpha=0.1)
    tau = inkling._tau(config, torch.arange(5) + counted_from)
    assert bool((tau == 1).all()) == (n_floor == 8)
    is_computed = isinstance(counted_from, Tensor) or n_floor == 7
    assert inkling._has_tau(config, counted_from, 5) == is_computed
    config.log_scaling_n_floor = None
    assert not inkling._has_tau(config, counted_from, 5)


def test_the_position_table_of_inkling_is_kept_until_its_parameter_changes():
    owner = nn.Module()
    owner.proj = nn.Parameter(torch.randn(3, 5))
    assert inkling.position_table(owner).requires_grad
    with torch.no_grad():
        table = inkling.position_table(owner)
        assert inkling.position_table(owner) is table
        assert table.is_contiguous()
        for m in range(5):
            assert torch.equal(table[0, 0, m], owner.proj[:, 4 - m])
        owner.proj.mul_(2)
        assert torch.equal(inkling.position_table(owner), 2 * table)


class Subsampling(nn.Module):
    """Three convolutions with stride 2, each followed by a mask of the valid frames."""

    num_layers = 3

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(n, 4, 3, stride=2, padding=1) for n in (1, 4, 4))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        x, lengths = features[:, None], None if mask is None else mask.sum(-1)
        for layer in self.layers:
            x = layer(x).relu()
            if lengths is not None:
                lengths = (lengths - 1) // 2 + 1
                x = x * (torch.arange(x.shape[2]) < lengths[:, None])[:, None, :, None]
        return x.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("n_frame", [1, 8, 63, 161])
def test_subsampling_in_chunks_equals_one_pass(n_frame):
    module, features = Subsampling(), torch.randn(B, n_frame, 8)
    lengths = torch.tensor([[n_frame], [n_frame // 3]])
    for mask in (None, (torch.arange(n_frame) < lengths).long()):
        expected = module(features, mask)
        out = subsampling.in_chunks(Subsampling.forward, module, features, mask, chunk=3)
        torch.testing.assert_close(out, expected)


def test_a_function_with_other_helpers_leaves_the_function_as_it_was():
    def replacement(own):
        return lambda x: own(x) + 1

    changed = hugging_face.with_helpers(_decorated, {"_helper": replacement})
    assert (changed(3), _decorated(3)) == (("decorated", 7), ("decorated", 6))
    with pytest.raises(ValueError, match="_decorated does not call missing"):
        hugging_face.with_helpers(_decorated, {"missing": replacement})


def _helper(x: int) -> int:
    return 2 * x


def _decorator(function):
    import functools

    @functools.wraps(function)
    def wrapper(*args):
        return ("decorated", function(*args))

    return wrapper


@_decorator
def _decorated(x: int) -> int:
    return _helper(x)
