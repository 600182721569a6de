"""Records are shared between processes, survive damage, and are never required."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import warnings

import pytest
import torch

from txl_kernels import BackendUnavailableError, rel_attention, rel_shift, verify
from txl_kernels.backends import verification
from txl_kernels.backends.verification import kernels, records

from .conftest import DEVICE

SHIFT = {"op": "rel_shift", "shape": (2, 20, 30), "dtype": torch.float32}


def shift(**options):
    return rel_shift(torch.randn(2, 20, 30, **options))


def files():
    return sorted(records.cache_folder().rglob("*.json"))


def test_the_next_process_reads_the_record(device, new_process, tmp_path):
    shift()
    (path,) = files()
    assert path.parent == tmp_path / "cache/transformer-xl/verified/NVIDIA_Mock_1"
    record = {"version": 1, "device": DEVICE, "kernel": "rel_shift/native/float32/forward"}
    assert json.loads(path.read_text()) == record
    new_process()
    shift()
    assert len(device) == 1


def test_forward_and_backward_have_separate_records(device, new_process):
    shift()
    shift(requires_grad=True)
    assert device == ["rel_shift/native/float32", "rel_shift/native/float32+backward"]
    assert len(files()) == 2
    new_process()
    shift()
    shift(requires_grad=True)
    assert len(device) == 2
    files()[0].unlink()
    new_process()
    shift()
    shift(requires_grad=True)
    assert len(device) == 3  # only the direction whose record is absent


def test_another_device_and_another_kernel_have_other_records(device, monkeypatch, new_process):
    shift()
    new_process()
    with monkeypatch.context() as patch:
        patch.setattr(verification, "device_name", lambda device: "NVIDIA Mock 2")
        shift()
    new_process()
    monkeypatch.setattr(kernels, "library_hash", lambda: "another build")
    shift()
    assert len(device) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"text"', '{"version": 1}', "\0\xff"])
def test_a_damaged_record_is_ignored_and_rewritten(device, new_process, content):
    shift()
    (path,) = files()
    good = path.read_text()
    path.write_text(content)
    new_process()
    with pytest.warns(RuntimeWarning, match="is damaged and is ignored: the kernel is tested"):
        shift()
    assert len(device) == 2
    assert path.read_text() == good


def test_a_record_of_another_version_is_ignored_and_rewritten(device, new_process):
    shift()
    (path,) = files()
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    new_process()
    with pytest.warns(RuntimeWarning, match="has version 2, not 1, and is ignored"):
        shift()
    assert len(device) == 2
    assert '"version": 1' in path.read_text()


def test_a_folder_that_cannot_be_written_means_one_test_per_process(
    device, new_process, monkeypatch, tmp_path
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for n in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shift()
            shift()
            rel_shift(torch.randn(2, 4, 14).double())
        assert len(device) == 2 * n
        new_process()


def test_records_of_an_image_are_read_and_never_written(device, new_process, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "share"))
    shift()
    image = records.cache_folder()
    monkeypatch.setattr(records, "image_folder", lambda: image)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    before = sorted(image.rglob("*"))
    new_process()
    shift()
    shift(requires_grad=True)
    assert len(device) == 2
    assert sorted(image.rglob("*")) == before
    assert len(files()) == 2


def test_the_user_s_folder_follows_the_standard(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.cache_folder() == tmp_path / ".cache/transformer-xl/verified"
    assert records.image_folder().parts[-3:] == ("share", "transformer-xl", "verified")


def _add(n):
    records.add(DEVICE, {f"{n}{k}": "op" for k in range(20)} | {"shared": "op"})


def test_processes_keep_each_other_s_records(device):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add, args=(n,)) for n in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(files()) == 41
    assert all(json.loads(path.read_text())["device"] == DEVICE for path in files())


def test_shipped_kernels_need_no_test(device, new_process, monkeypatch, tmp_path):
    shipped = tmp_path / "verified_kernels.json"
    shipped.write_text("{}\n")
    monkeypatch.setattr(records, "SHIPPED", shipped)
    shift()
    records.write_shipped("NVIDIA Mock 3", {files()[0].stem: "rel_shift/native/float32/forward"})
    records.write_shipped("NVIDIA Mock 3", {"0": "another"})
    assert list(json.loads(shipped.read_text())) == ["NVIDIA Mock 3"]
    assert len(json.loads(shipped.read_text())["NVIDIA Mock 3"]) == 2
    new_process()
    monkeypatch.setattr(verification, "device_name", lambda device: "NVIDIA Mock 3")
    shift()
    assert len(device) == 1
    records._shipped.cache_clear()


def test_the_kernels_of_untested_calls_are_named(device):
    with verification.untested() as kernels:
        shift()
        shift(requires_grad=True)
    assert device == []
    labels = ["rel_shift/native/float32/backward", "rel_shift/native/float32/forward"]
    assert sorted(kernels.values()) == labels
    shift(requires_grad=True)
    assert {path.stem for path in files()} == kernels.keys()


def test_the_kernels_of_untested_compiled_calls_are_named(device):
    with verification.untested() as kernels:
        torch.compile(rel_shift, fullgraph=True, backend="eager")(torch.randn(2, 20, 30))
    assert device == []
    assert set(kernels.values()) == {"rel_shift/native/float32/forward"}


def test_threads_that_call_at_once_share_one_test(device):
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for call in [threads.submit(shift) for _ in range(8)]:
            call.result()
    assert len(device) == 1


def test_the_shipped_file_is_readable():
    assert isinstance(json.loads(records.SHIPPED.read_text()), dict)


def test_nothing_is_tested_during_the_capture_of_a_cuda_graph(device, new_process, monkeypatch):
    monkeypatch.setattr(verification, "_is_capturing", lambda device: True)
    words = r"no test runs during the capture.*txl_kernels\.verify\(shapes, \*, device\)"
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match=words):
            shift()
    assert device == []
    with monkeypatch.context() as patch:
        patch.setattr(verification, "_is_capturing", lambda device: False)
        assert verify([SHIFT | {"gradients": False}], device="cpu") == []
    new_process()
    shift()
    assert len(device) == 1


def test_verify_tests_exactly_the_kernels_of_the_calls(device):
    shape = {"B": 2, "H": 2, "Tq": 20, "Tm": 5, "D": 8, "causal": True, "dtype": torch.float32}
    assert verify([shape, {**shape, "Tq": 36}, {**shape, "gradients": False}], device="cpu") == []
    assert device == ["rel_attention/native/float32+backward"]
    q, mem = (torch.randn(2, 2, n, 8, requires_grad=True) for n in (52, 37))
    bias = torch.randn(2, 8, requires_grad=True)
    r = torch.randn(1, 2, 89, 8, requires_grad=True)
    both = {"r_w_bias": bias, "r_r_bias": bias, "mem_k": mem, "mem_v": mem}
    rel_attention(q, q, q, r, causal=True, **both)
    assert len(device) == 1
    assert not torch.is_inference_mode_enabled()


def test_without_a_home_folder_every_process_tests_once(device, new_process, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    for n in (1, 2):
        shift()
        shift()
        assert len(device) == n
        new_process()


def test_a_damaged_record_does_not_matter_beside_a_good_one(device, new_process, monkeypatch):
    shift()
    (path,) = files()
    good = records.image_folder() / path.relative_to(records.cache_folder())
    good.parent.mkdir(parents=True)
    path.rename(good)
    path.touch()
    new_process()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shift()
    assert len(device) == 1
