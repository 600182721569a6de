"""Whole encoders of ESPnet and its relatives, patched: same outputs, gradients and training."""

from __future__ import annotations

import sys
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.integrations import patch, report, unpatch

SIZES = {"linear_units": 32, "num_blocks": 2, "dropout_rate": 0.0, "positional_dropout_rate": 0.0}
LENGTHS = torch.tensor([29, 17])
MASK = torch.arange(29) < LENGTHS[:, None, None]
CONFORMER = {"macaron_style": True, "use_cnn_module": True, "input_layer": "linear"}


def espnet(load, **options) -> nn.Module:
    encoder = load("espnet.nets.pytorch_backend.conformer.encoder.Encoder")
    kinds = {"pos_enc_layer_type": "rel_pos", "selfattention_layer_type": "rel_selfattn"}
    return encoder(24, 24, 3, **SIZES, **CONFORMER, **{**kinds, **options})


def funasr(load, **options) -> nn.Module:
    encoder = load("funasr.models.conformer.encoder.ConformerEncoder")
    return encoder(24, 24, 3, rel_pos_type="latest", **SIZES, **CONFORMER, **options)


def chatterbox(load, **options) -> nn.Module:
    module = "chatterbox.models.s3gen.transformer.upsample_encoder"
    encoder = load(f"{module}.UpsampleConformerEncoder")
    return encoder(attention_heads=8, attention_dropout_rate=0.0, **SIZES, **options)


def cosyvoice(load, **options) -> nn.Module:
    for unused in ("llm.llm", "flow.flow", "hifigan.generator", "cli.model", "utils.file_utils"):
        sys.modules.setdefault(f"cosyvoice.{unused}", MagicMock())
    encoder = load("cosyvoice.transformer.encoder.ConformerEncoder")
    kinds = {
        "pos_enc_layer_type": "rel_pos_espnet",
        "causal": True,
        "cnn_module_norm": "layer_norm",
    }
    return encoder(24, 24, 3, **SIZES, **CONFORMER, **kinds, **options)


def fireredasr(load) -> nn.Module:
    encoder = load("fireredasr.models.module.conformer_encoder.ConformerEncoder")
    return encoder(80, 2, 3, 24, 0.0, 0.0, 5)


# The number of attention layers, the input size, and the arguments after the input.
ENCODERS = {
    "espnet": (espnet, 2, 24, (MASK,)),
    "funasr": (funasr, 2, 24, (LENGTHS,)),
    "chatterbox": (chatterbox, 6, 512, (LENGTHS,)),
    "cosyvoice": (cosyvoice, 2, 24, (LENGTHS,)),
    "fireredasr": (fireredasr, 2, 80, (LENGTHS,)),
}


def prepare(theirs, name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = ENCODERS[name][0](theirs.load, **options).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
        assert bool(parameter.isfinite().all()), key
    return model


def results(model: nn.Module, name: str) -> dict[str, Tensor]:
    _, _, n_feature, args = ENCODERS[name]
    x = torch.randn(2, 29, n_feature, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    out = model(x, *args)[0]
    valid = torch.arange(out.shape[1]) < (LENGTHS * out.shape[1] // 29)[:, None]
    out = out[valid]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = {f"d{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads}


@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_and_gradients_do_not_change(theirs, name):
    model = prepare(theirs, name)
    expected = results(model, name)
    found = patch(model)
    assert (len(found.patched), len(found.left_alone)) == (ENCODERS[name][1], 0), str(found)
    theirs.check_equal(results(model, name), expected, 1e-4)
    assert report(model).fallbacks == 0


def test_zero_triu_of_a_whole_encoder(theirs):
    model = prepare(theirs, "espnet", zero_triu=True)
    expected = results(model, "espnet")
    patch(model)
    theirs.check_equal(results(model, "espnet"), expected, 1e-4)


def test_legacy_encoders_are_left_alone(theirs):
    kinds = {"pos_enc_layer_type": "legacy_rel_pos"}
    model = prepare(theirs, "espnet", **kinds, selfattention_layer_type="legacy_rel_selfattn")
    expected = results(model, "espnet")
    found = patch(model)
    assert len(found.left_alone) == 2
    assert all("wraps around" in entry.reason for entry in found.left_alone)
    for key, x in results(model, "espnet").items():
        assert torch.equal(x, expected[key])


def test_masks_of_static_chunks(theirs):
    """[B, T, T]; the encoder makes it from `static_chunk_size`."""
    model = prepare(theirs, "cosyvoice", static_chunk_size=4)
    expected = results(model, "cosyvoice")
    patch(model)
    theirs.check_equal(results(model, "cosyvoice"), expected, 1e-4)
    assert report(model).fallbacks == 0


def test_a_stream_of_chunks(theirs):
    """The cache has all chunks; CosyVoice's own code raises an error with fewer."""
    model = prepare(theirs, "cosyvoice", static_chunk_size=4)
    x = torch.randn(1, 30, 24)
    with torch.no_grad():
        expected, _ = model.forward_chunk_by_chunk(x, 4)
        patch(model)
        actual, _ = model.forward_chunk_by_chunk(x, 4)
    assert not torch.equal(actual, expected)  # rounding differs, so the kernels were used
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert report(model).fallbacks == 0


def test_ranges_of_a_mask_are_computed_once_for_all_layers(theirs, monkeypatch):
    from transformer_xl.integrations import espnet as adapter

    calls, own = [], adapter.ranges_of_padding
    monkeypatch.setattr(adapter, "ranges_of_padding", lambda mask: calls.append(1) or own(mask))
    model, mask = prepare(theirs, "espnet"), MASK.clone()
    patch(model)
    model(torch.randn(2, 29, 24), mask)
    assert len(calls) == 1
    mask[:, :, 20:] = False
    expected = model(torch.randn(2, 29, 24), mask.clone())[0].shape
    assert model(torch.randn(2, 29, 24), mask)[0].shape == expected
    assert len(calls) == 3  # the mask has changed, and its copy is another one


def test_int8_weights_of_torchao(theirs):
    quantization = pytest.importorskip("torchao.quantization")
    model, x = prepare(theirs, "espnet"), torch.randn(2, 29, 24)
    patch(model)

    def is_projection(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and "attn" in path

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=is_projection)
    with torch.no_grad():
        actual, again = (model(x, MASK)[0] for _ in range(2))
        assert report(model).fallbacks == 0
        unpatch(model)
        expected = model(x, MASK)[0]
    assert torch.equal(actual, again)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_conformer_with_ctc_learns_equally(theirs):
    x = torch.randn(4, 29, 24, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(1, 6, (4, 5), generator=torch.Generator().manual_seed(3))

    def losses(is_patched: bool) -> list[float]:
        model, output = prepare(theirs, "espnet").train(), nn.Linear(24, 6)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        if is_patched:
            assert len(patch(model).patched) == 2
        optimizer = torch.optim.Adam([*model.parameters(), *output.parameters()], lr=3e-3)
        seen, lengths = [], (torch.full((4,), 29), torch.full((4,), 5))
        for _ in range(30):
            log_probs = output(model(x, None)[0]).log_softmax(-1).transpose(0, 1)
            loss = nn.functional.ctc_loss(log_probs, labels, *lengths)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(float(loss.detach()))
        return seen

    expected, actual = losses(False), losses(True)
    assert expected[-1] < 0.5 * expected[0]
    assert actual != expected
    torch.testing.assert_close(actual, expected, rtol=5e-3, atol=5e-3)
