"""Calls of NeMo's attention outside of an encoder, its adapters, and calls that run the original
code."""

from __future__ import annotations

import contextlib
import sys

import encoders
import pytest
import torch

from transformer_xl.integrations import patch, report, unpatch
from transformer_xl.integrations.nemo_masks import ATTENTIONS

B, T, D_MODEL, H = 3, 21, 24, 3


def attention(kind: str = "", context: tuple[int, int] | None = None, **options):
    torch.manual_seed(0)
    made = getattr(sys.modules[ATTENTIONS], f"RelPositionMultiHeadAttention{kind}")
    if context is not None:
        options["att_context_size"] = list(context)
    biases = {"pos_bias_u": None, "pos_bias_v": None}
    module = made(n_head=H, n_feat=D_MODEL, dropout_rate=0.0, **biases, **options)
    return encoders.with_random_weights(module).eval()


def both(module, *args, **kwargs):
    """The results of the original and of the patched module, and all gradients, in two lists."""
    results = []
    for function in (unpatch, patch):
        function(module)
        module.zero_grad()
        out = module(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        (first * torch.linspace(-1, 1, first.numel()).view_as(first)).sum().backward()
        grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        results.append([*(out if isinstance(out, tuple) else [out]), *grads])
    assert len(results[1]) == len(results[0])
    return results


def hidden(length: int = T):
    return torch.randn(B, length, D_MODEL)


def close(pair) -> None:
    torch.testing.assert_close(pair[1], pair[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_pytorch_sdpa", [False, True], ids=["eager", "sdpa"])
@pytest.mark.parametrize("has_mask", [True, False], ids=["mask", "no_mask"])
def test_any_mask_and_queries_without_keys(has_mask, use_pytorch_sdpa):
    module = attention(use_pytorch_sdpa=use_pytorch_sdpa)
    mask = torch.rand(B, T, T) < 0.4  # True = masked out
    mask[1, 5:9] = True
    x = hidden()
    pair = both(module, x, x, x, mask if has_mask else None, torch.randn(1, 2 * T - 1, D_MODEL))
    close(pair)
    if has_mask:
        torch.testing.assert_close(pair[1][0][1, 5:9], module.linear_out.bias.expand(4, -1))
    assert report(module).fallbacks == 0


def test_tables_of_each_row_of_the_batch():
    x = hidden()
    close(both(attention(), x, x, x, None, torch.randn(B, 2 * T - 1, D_MODEL)))


@pytest.mark.parametrize("drop", [0, 2])
def test_a_cache_is_returned_where_one_is_given(drop):
    module, x, cache = attention(), hidden(), torch.randn(B, 7, D_MODEL)
    module.cache_drop_size = drop
    mask = torch.rand(B, T, T + 7) < 0.4
    pair = both(module, x, x, x, mask, torch.randn(1, 2 * (T + 7) - 1, D_MODEL), cache=cache)
    close(pair)
    assert pair[1][1].shape == (B, max(7, T - drop), D_MODEL)


def test_a_short_table_runs_the_original_code():
    module, x = attention(), hidden()
    close(both(module, x, x, x, None, torch.randn(1, 2 * T - 3, D_MODEL)))
    assert "fewer rows than there are distances" in str(report(module))


# With (1, 1) and less NeMo's own forward raises.
CONTEXTS = [(left, right) for left in range(6) for right in range(6) if max(left, right) > 1]


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
def test_local_attention_with_every_context(context):
    """NeMo shifts the position scores of an asymmetric context; so does the patched class."""
    module, x = attention("Longformer", context), hidden()
    pad_mask = torch.rand(B, T) < 0.3
    close(both(module, x, x, x, pad_mask, torch.randn(1, sum(context) + 1, D_MODEL)))
    assert report(module).fallbacks == 0


def test_local_attention_longer_than_the_audio():
    module, x = attention("Longformer", (64, 64)), hidden()
    close(both(module, x, x, x, torch.zeros(B, T).bool(), torch.randn(1, 129, D_MODEL)))


def test_local_attention_with_an_empty_cache_runs_the_original_code():
    module, x = attention("Longformer", (4, 4)), hidden()
    module.cache_drop_size = 0
    empty = torch.zeros(B, 0, D_MODEL)
    pad_mask = torch.zeros(B, T, dtype=torch.bool)
    close(both(module, x, x, x, pad_mask, torch.randn(1, 9, D_MODEL), cache=empty))
    assert "a cache is given to the local attention" in str(report(module))


def test_global_tokens_are_left_alone():
    encoder = encoders.build("local", global_tokens=1)
    found = patch(encoder)
    assert len(found.left_alone) == 2
    assert "global tokens" in str(found)


def test_an_encoder_with_absolute_positions_is_left_alone():
    found = patch(encoders.build("full", self_attention_model="abs_pos"))
    assert [entry.reason for entry in found.left_alone] == ["its self_attention_model is 'abs_pos'"]


def test_an_encoder_with_its_own_forward_makes_bool_masks():
    class Other(encoders.load().ConformerEncoder):
        def forward_internal(self, *args, **options):
            return super().forward_internal(*args, **options)

    encoder, inputs = encoders.build("chunked"), encoders.features([T, 13])
    expected = encoders.results(encoder, inputs)
    encoder.__class__ = Other
    found = patch(encoder)
    assert "another forward_internal" in str(found)
    assert len(found.patched) == 2
    encoders.check_equal(encoders.results(encoder, inputs), expected, 1e-5)
    assert report(encoder).fallbacks == 0


def test_an_encoder_with_one_foreign_layer_makes_bool_masks():
    encoder, inputs = encoders.build("chunked"), encoders.features([T, 13])
    expected = encoders.results(encoder, inputs)
    patch(encoder)
    unpatch(encoder.layers[1].self_attn)
    encoders.check_equal(encoders.results(encoder, inputs), expected, 1e-5)
    assert "not all of its attention layers are patched" in str(report(encoder))


def configured(name: str, **options):
    """An encoder with the configuration that `change_attention_model` reads."""
    from omegaconf import OmegaConf

    encoder = encoders.build(name, **options)
    same = {"n_heads": H, "d_model": D_MODEL, "dropout": 0.0, "dropout_att": 0.0}
    same |= {"dropout_emb": 0.0, "pos_emb_max_len": 64}
    encoder._cfg = OmegaConf.create(same)
    return encoder


def test_another_attention_model_is_patched_again():
    encoder, inputs = configured("full"), encoders.features([T, 13])
    patch(encoder)
    encoder.change_attention_model("rel_pos_local_attn", [4, 4])
    found = report(encoder)
    assert [entry.reason for entry in found.left_alone] == ["not patched", "not patched"]
    expected = encoders.results(encoder, inputs)
    assert len(patch(encoder).patched) == 3
    encoders.check_equal(encoders.results(encoder, inputs), expected, 1e-5)
    encoder.change_attention_model("rel_pos", [-1, -1])
    whole = encoders.results(
        encoder, inputs
    )  # makes bool masks for attentions that are not patched
    patch(encoder)
    encoders.check_equal(encoders.results(encoder, inputs), whole, 1e-5)


@pytest.mark.parametrize("proj_dim", [None, 12])
def test_attention_adapters_of_nemo(proj_dim):
    from nemo.collections.asr.parts.submodules.adapters import (
        multi_head_attention_adapter_module as adapters,
    )

    library = encoders.load()
    encoder, inputs = encoders.build("chunked"), encoders.features([T, 13])
    for layer in encoder.layers:
        config = adapters.RelPositionMultiHeadAttentionAdapterConfig
        layer.set_accepted_adapter_types([config._target_])
        layer.add_adapter("mha", config(n_head=H, n_feat=D_MODEL, proj_dim=proj_dim))
        layer.set_enabled_adapters("mha", enabled=True)
    assert isinstance(encoder, library.ConformerEncoder)
    encoders.with_random_weights(encoder)
    expected = encoders.results(encoder, inputs)
    assert len(patch(encoder).patched) == 5
    encoders.check_equal(encoders.results(encoder, inputs), expected, 1e-5)
    assert any("adapter" in name for name in expected)
    assert report(encoder).fallbacks == 0


def test_tracing_runs_the_original_code():
    encoder, inputs = encoders.build("chunked"), encoders.features([T, 13])
    expected = encoder(**inputs)[0]
    patch(encoder)

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, signal, length):
            return self.encoder.forward_internal(signal, length)

    traced = torch.jit.trace(Positional(), tuple(inputs.values()), check_trace=False)
    assert "txl" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*inputs.values())[0], expected, rtol=1e-4, atol=1e-4)
    assert "traced for TorchScript" in str(report(encoder))


def test_float16_autocast_is_left(monkeypatch):
    """NeMo's own context replaces it, and the input is float32 within it."""
    module, dtypes, entered = attention(), [], []

    @contextlib.contextmanager
    def context():
        entered.append(True)
        yield

    monkeypatch.setattr(sys.modules[ATTENTIONS], "avoid_float16_autocast_context", context)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: not device)
    patch(module)
    module.linear_q.register_forward_hook(lambda m, args, out: dtypes.append(args[0].dtype))
    x = hidden().half()
    module(x, x, x, None, torch.randn(1, 2 * T - 1, D_MODEL))
    assert dtypes == [torch.float32]
    assert entered == [True]


def test_a_cache_of_another_length_than_the_encoder_expects():
    encoder = patch_of(encoders.build("chunked"))
    channel, time, lengths = encoder.get_initial_cache_state(batch_size=1)
    with pytest.raises(ValueError, match="expected 11 frames in the cache and the block together"):
        encoder(
            audio_signal=torch.randn(1, 16, 8 * 6 + 1),
            length=torch.tensor([49]),
            cache_last_channel=channel[:, :, :3],
            cache_last_time=time,
            cache_last_channel_len=lengths,
        )


def patch_of(module):
    patch(module)
    return module


def test_int8_weights_of_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    encoder, inputs = patch_of(encoders.build("chunked")), encoders.features([T, 13])

    def is_projection(module: torch.nn.Module, path: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "attn" in path

    quantization.quantize_(encoder, quantization.Int8WeightOnlyConfig(), filter_fn=is_projection)
    with torch.no_grad():
        actual = encoder(**inputs)[0]
        unpatch(encoder)
        expected = encoder(**inputs)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["full", "local-more_left"])
def test_export(name):
    encoder, inputs = patch_of(encoders.build(name)), encoders.features([T, T])
    with torch.no_grad():
        expected = encoder(**inputs)[0]
        program = torch.export.export(encoder, (), inputs, strict=False)
    assert "rel_attention" in str(program.graph)
    actual = program.module()(**inputs)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
