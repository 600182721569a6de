"""DecoderLayer: the places of the norms, documents, dropout."""

from __future__ import annotations

import torch

from transformer_xl.nn import DecoderLayer


def layer(**options: object) -> DecoderLayer:
    torch.manual_seed(0)
    return DecoderLayer(8, 2, 4, 16, **options)  # type: ignore[arg-type]


def test_norms_follow_the_residual_sums() -> None:
    module, x, layer_memory = layer(), torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    attended = module.attn_layer_norm(x + module.dec_attn(x, layer_memory))
    expected = module.ff_layer_norm(attended + module.pos_ff(attended))
    torch.testing.assert_close(module(x, layer_memory), expected)


def test_pre_lnorm_normalises_inputs_and_memory() -> None:
    module, x, layer_memory = layer(pre_lnorm=True), torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    norm = module.attn_layer_norm
    attended = x + module.dec_attn(norm(x), norm(layer_memory))
    expected = attended + module.pos_ff(module.ff_layer_norm(attended))
    torch.testing.assert_close(module(x, layer_memory), expected)
    torch.testing.assert_close(module(x), module(x, layer_memory[:, :0]))


def test_documents_are_separate() -> None:
    module, x, layer_memory = layer(), torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    document_start = torch.tensor([False, False, True, False, False]).expand(2, 5)
    limit = torch.tensor([2, 7])  # of each row, in addition to the documents
    out = module(x, layer_memory, key_start=limit, document_start=document_start)
    torch.testing.assert_close(out[:1, :2], module(x[:1, :2], layer_memory[:1, 2:]))
    torch.testing.assert_close(out[:1, 2:], module(x[:1, 2:]))
    torch.testing.assert_close(out[1:, 3:], module(x[1:, 3:]))


def test_dropout_is_on_in_training_only() -> None:
    module, x = layer(dropout=0.5), torch.randn(2, 3, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
