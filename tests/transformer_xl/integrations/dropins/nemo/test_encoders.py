"""NVIDIA NeMo's own Conformer encoders, patched and not: the same outputs, gradients and caches."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import encoders
import pytest
import torch
from torch import Tensor, nn

from transformer_xl.integrations import patch, patched, report, unpatch
from transformer_xl.integrations.adapter import adapter_of

LENGTHS = [21, 13, 18]
CASES = list(encoders.CASES)
# One encoder of each kind of mask, and both kinds of tables.
KINDS = ["full", "window", "chunked", "right_context", "local", "local-more_left"]


@pytest.mark.parametrize("is_ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_do_not_change(name, is_ragged):
    """Padded frames included: NeMo's attention is 0 there, too."""
    encoder, inputs = encoders.build(name), encoders.features(LENGTHS if is_ragged else [21] * 3)
    expected = encoders.results(encoder, inputs)
    found = patch(encoder)
    assert len(found.patched) == 3, str(found)
    assert not found.left_alone, str(found)
    actual = encoders.results(encoder, inputs)
    encoders.check_equal(actual, expected, 1e-5)
    assert not torch.equal(actual["out"], expected["out"])  # rounding: the kernels were used
    assert report(encoder).fallbacks == 0
    unpatch(encoder)
    assert torch.equal(encoders.results(encoder, inputs)["out"], expected["out"])


@pytest.mark.parametrize("name", KINDS)
def test_training_with_dropout_of_positions(name):
    options = {"dropout": 0.1, "dropout_pre_encoder": 0.1, "dropout_emb": 0.2, "dropout_att": 0.0}
    encoder, inputs = encoders.build(name, **options).train(), encoders.features(LENGTHS)
    other = patch_of(copy.deepcopy(encoder))
    results = []
    for each in (encoder, other):
        torch.manual_seed(3)
        results.append(encoders.results(each, inputs))
    encoders.check_equal(results[1], results[0], 1e-5)


@pytest.mark.parametrize("name", ["full", "full-sdpa"])
def test_dropout_of_the_attention(name):
    """With values of 1 and no last layer, the output is the sum of the kept probabilities."""
    module = encoders.build(name, dropout_att=0.5).layers[0].self_attn
    nn.init.zeros_(module.linear_v.weight)
    nn.init.ones_(module.linear_v.bias)
    nn.init.eye_(module.linear_out.weight)
    nn.init.zeros_(module.linear_out.bias)
    patch(module)
    x, table = torch.randn(2, 200, 24), torch.randn(1, 399, 24)

    def sums() -> Tensor:
        with torch.no_grad():
            return module(x, x, x, None, table)

    assert torch.allclose(sums(), torch.ones(1))
    module.train()
    torch.manual_seed(0)
    first = sums()
    assert 0.9 <= float(first.mean()) <= 1.1
    assert float(first.std()) >= 0.1
    assert not torch.equal(sums(), first)
    torch.manual_seed(0)
    assert torch.equal(sums(), first)


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_is_as_exact_as_the_original(name, how):
    encoder, inputs = encoders.build(name), encoders.features(LENGTHS)
    if how == "weights":
        encoder.bfloat16()
        inputs["audio_signal"] = inputs["audio_signal"].bfloat16()
    wide = {**inputs, "audio_signal": inputs["audio_signal"].float()}
    with torch.no_grad():
        exact = copy.deepcopy(encoder).float()(**wide)[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            theirs = encoder(**inputs)[0].float()
            patch(encoder)
            ours = encoder(**inputs)[0].float()
    assert float((ours - exact).norm()) <= 1.5 * float((theirs - exact).norm())


def blocks(encoder, signal: Tensor, lengths: Tensor):
    """The blocks of a stream with the frames that the convolutions need before them."""
    config, begin = encoder.streaming_cfg, 0
    while begin < signal.shape[2]:
        is_later = int(begin > 0)
        before = config.pre_encode_cache_size[is_later]
        end = begin + config.chunk_size[is_later]
        padded = torch.nn.functional.pad(signal[:, :, :end], (max(0, before - begin), 0))
        n_valid = (lengths.clamp(max=end) - begin).clamp(min=0) + before
        yield padded[:, :, -(before + min(end, signal.shape[2]) - begin) :], n_valid, is_later
        begin += config.shift_size[is_later]


def stream(encoder, signal: Tensor, lengths: Tensor) -> list[list[Tensor]]:
    """Output, length and caches of each block."""
    cache = encoder.get_initial_cache_state(batch_size=len(signal))
    steps = []
    for block, n_valid, is_later in blocks(encoder, signal, lengths):
        out, n, *cache = encoder.cache_aware_stream_step(
            block,
            n_valid,
            *cache,
            keep_all_outputs=False,
            drop_extra_pre_encoded=is_later * encoder.streaming_cfg.drop_extra_pre_encoded,
        )
        steps.append([out, n, *cache])
    return steps


@pytest.mark.parametrize(
    ("name", "context", "first"),
    [("chunked", [6, 2], 0), ("chunked-one_frame", [4, 0], 24), ("window-causal", [5, 0], 24)],
)
def test_a_stream_of_blocks_equals_one_pass(name, context, first):
    """NeMo fills a second block that has too few frames before it with zeros, so the frames that
    depend on it, those before `first`, are not those of one pass."""
    encoder = encoders.build(name, att_context_size=context)
    signal = torch.randn(2, 16, 8 * 40 + 1)
    lengths = torch.tensor([8 * 40 + 1, 8 * 23 + 1])
    with torch.no_grad():
        expected = stream(encoder, signal, lengths)
        patch(encoder)
        actual = stream(encoder, signal, lengths)
        whole = encoder(audio_signal=signal, length=torch.tensor([signal.shape[2]] * 2))[0]
    assert len(actual) == len(expected) > 10
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    joined = torch.cat([step[0][:1] for step in actual], 2)[:, :, first:]  # the row without padding
    expected = whole[:1, :, first : first + joined.shape[2]]
    torch.testing.assert_close(joined, expected, rtol=1e-4, atol=1e-4)
    assert report(encoder).fallbacks == 0


def test_a_stream_with_frames_that_the_cache_drops():
    encoder = encoders.build("window", att_context_size=[5, 1], **encoders.CAUSAL)
    assert encoder.streaming_cfg.cache_drop_size > 0
    signal, lengths = torch.randn(2, 16, 8 * 40 + 1), torch.tensor([8 * 40 + 1, 8 * 23 + 1])
    with torch.no_grad():
        expected = stream(encoder, signal, lengths)
        patch(encoder)
        for ours, theirs in zip(stream(encoder, signal, lengths), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def patch_of(module):
    patch(module)
    return module


def test_the_encoder_makes_no_mask_of_queries_and_keys():
    encoder = patch_of(encoders.build("chunked"))
    masks = []
    encoder.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["att_mask"]), with_kwargs=True
    )
    inputs = encoders.features([6000, 4000])  # eight minutes; a mask would have 72 MB
    with torch.no_grad():
        out, lengths = encoder(**inputs)
    assert masks[0].shape == (2, out.shape[2], 2)
    assert bool(out.isfinite().all())
    assert lengths.tolist() == [6001, 4001]


@pytest.mark.parametrize("name", KINDS)
def test_one_compiled_graph(name):
    encoder, inputs = encoders.build(name), encoders.features(LENGTHS)
    expected = encoders.results(encoder, inputs)
    patch(encoder)
    actual = encoders.results(torch.compile(encoder, fullgraph=True, backend="aot_eager"), inputs)
    encoders.check_equal(
        {k.replace("_orig_mod.", ""): x for k, x in actual.items()}, expected, 1e-5
    )


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_pickles_are_patched(name):
    encoder, inputs = patch_of(encoders.build(name)), encoders.features(LENGTHS)
    expected = encoders.results(encoder, inputs)
    for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert len(report(again).patched) == 3
        assert type(again).__qualname__ == "ConformerEncoder"
        assert torch.equal(encoders.results(again, inputs)["out"], expected["out"])


@pytest.mark.parametrize("call", ["patch(model)", 'patch("nemo")'])
@pytest.mark.parametrize("name", ["chunked", "local"])
def test_the_row_of_the_readme(name, call):
    readme = Path(__file__).resolve().parents[5] / "README.md"
    assert f"`{call}`" in next(line for line in readme.open(encoding="utf-8") if '"nemo"' in line)
    encoder, inputs = encoders.build(name), encoders.features(LENGTHS)
    expected = encoders.results(encoder, inputs)
    # The two attentions and the masks of the model, or the four classes of the family.
    n_patched = 3 if "model" in call else 4
    assert len(eval(call, {"patch": patch, "model": encoder}).patched) == n_patched
    actual = encoders.results(encoder, inputs)
    assert report(encoder).fallbacks == 0
    encoders.check_equal(actual, expected, 1e-5)
    assert not torch.equal(actual["out"], expected["out"])
    assert not unpatch(encoder if "model" in call else "nemo").patched
    assert adapter_of(encoder.layers[0].self_attn) is None
    assert torch.equal(encoders.results(encoder, inputs)["out"], expected["out"])


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing(name):
    encoder, inputs = encoders.build(name), encoders.features(LENGTHS)
    expected = encoders.results(encoder, inputs)
    patch(encoder)
    for layer in encoder.layers:
        own = layer.forward
        layer.forward = lambda own=own, **options: torch.utils.checkpoint.checkpoint(
            own, use_reentrant=False, **options
        )
    encoders.check_equal(encoders.results(encoder, inputs), expected, 1e-5)
    assert report(encoder).fallbacks == 0


def test_within_a_block():
    encoder = encoders.build("full")
    with patched(encoder):
        assert len(report(encoder).patched) == 3
    assert not report(encoder).patched
