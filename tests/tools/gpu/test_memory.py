"""The stage "memory" on a CPU at tiny shapes, and its capture with a fake CUDA graph."""

from __future__ import annotations

import contextlib

import pytest
import torch

from benchmarks.cases.rel_attention import SDPA_BIAS, AttentionCase
from tools.gpu import memory
from tools.gpu.stages import Context

CPU = torch.device("cpu")


@pytest.fixture
def context():
    return Context({}, lambda: None, lambda: 100.0, CPU, {})


def test_every_call_runs_and_failures_are_notes(context, monkeypatch):
    right = AttentionCase.contender

    def contender(case, name):
        if name == SDPA_BIAS:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return right(case, name)

    monkeypatch.setattr(AttentionCase, "contender", contender)
    memory.run(context)
    peaks = context.results["peak_mib"]
    assert set(peaks) == {*memory.SHAPES, "wt103_large"}
    assert peaks["train_d64"]["ours"] == 0.0
    assert peaks["train_d64"][SDPA_BIAS] == "OutOfMemoryError: CUDA out of memory."
    assert context.results["graph_difference"] == 0.0
    assert "sdpa+bias OutOfMemoryError" in context.results["summary"][1]


def test_a_replay_that_ignores_its_batch_fails(context, monkeypatch):
    monkeypatch.setattr(memory, "captured", lambda step, device: lambda: None)
    with pytest.raises(AssertionError, match=r"a replayed training step differs by 1\.0e\+00"):
        memory.run(context)


def test_the_step_runs_before_it_is_captured(monkeypatch):
    events = []

    class Stream:
        def wait_stream(self, other):
            events.append("wait")

    class Graph:
        def replay(self):
            events.append("replay")

    @contextlib.contextmanager
    def capture(graph):
        events.append("capture")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    memory.captured(lambda: events.append("step"), torch.device("cuda"))()
    assert events == ["wait", "step", "step", "wait", "capture", "step", "replay"]
