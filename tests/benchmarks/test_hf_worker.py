"""Hugging Face's TransfoXL behind its pipe: the same model as ours, and clear errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import registry
from benchmarks.cases import PeerUnavailableError
from benchmarks.cases.model import HF, HF_BF16, ModelCase, Run
from benchmarks.peers import hf

TINY = registry.model_shapes()[0].tiny()


@pytest.fixture
def environment():
    try:
        hf.interpreter()
    except PeerUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def worker(environment):
    model = Run(TINY, torch.float32, "auto").model
    with hf.HuggingFaceWorker(model, TINY.config, TINY.tokens(), lr=1e-3, clip=0.25) as running:
        yield running


@pytest.mark.slow
def test_worker_answers_and_survives_its_errors(worker):
    for bf16 in (False, True):
        assert worker.ask("train_step", bf16=bf16)["seconds"] > 0
        assert worker.ask("evaluate", bf16=bf16)["seconds"] > 0
    with pytest.raises(RuntimeError, match="worker, evaluate: TypeError"):
        worker.ask("evaluate", float16=True)
    losses = worker.ask("check", bf16=False)["losses"]
    assert len(losses) == 2
    worker.close()
    with pytest.raises(RuntimeError, match="ended"):
        worker.ask("evaluate", bf16=False)


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_the_worker_computes_our_model():
    ModelCase(TINY, torch.float32, "train_step").check(HF)
    ModelCase(TINY, torch.bfloat16, "train_step").check(HF_BF16)


def test_without_its_environment_the_peer_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_VENV", str(tmp_path))
    with pytest.raises(PeerUnavailableError, match="make bench-hf-env"):
        hf.interpreter()


def test_only_models_that_hugging_face_has_are_converted():
    assert hf.config(TINY.config)["cutoffs"] == []
    with pytest.raises(ValueError, match="untie_r"):
        hf.config(dataclasses.replace(TINY.config, untie_r=False))


def test_names_of_parameters():
    names = set(hf.state_dict(Run(TINY, torch.float32, "auto").model.state_dict()))
    assert "transformer.layers.0.dec_attn.layer_norm.weight" in names
    assert "transformer.layers.3.pos_ff.layer_norm.bias" in names
    assert "crit.out_layers.0.bias" in names
