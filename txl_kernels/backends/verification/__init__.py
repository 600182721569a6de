"""Self-verification: "auto" uses a GPU kernel only after a self-test of that kernel on that device.

A record holds the hash of the compiled kernel and the device's name (`records`). A call whose
kernels have no records is shortened to a few tiles (`calls`) and tested (`selftest`). Verdicts are
kept for the life of the process. Nothing is tested while a CUDA graph is captured or a program
exported.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from txl_kernels._register import REL_ATTENTION
from txl_kernels._register_adaptive import EMBEDDING, LOSS
from txl_kernels.errors import BackendUnavailableError
from txl_kernels.transforms import unwrapped

DEVICE_TYPES = ("cuda",)  # tests add "cpu"
# Values of the sizes that a tracer leaves open: multiples of 16 and others, many and few.
_SYMBOL_VALUES = (64, 65, 16, 5)
_FEW_QUERIES = 16  # of the native kernels on CUDA
# "" where the kernels passed, else the errors: by device and key of a call, and for calls that
# passed also by their plain arguments, so that a repeated call needs no key.
_verdicts: dict[tuple[Any, ...], str] = {}
_MOST_VERDICTS = 4096
_lock = threading.RLock()


class _Thread(threading.local):
    """Of this thread: the result for a traced program; the containers of two contexts below."""

    failure: str | None = None
    error: str | None = None
    failures: list[str] | None = None
    untested: dict[str, str] | None = None


_thread = _Thread()


def failure_of(op: str, backend: str, arguments: Sequence[Any]) -> str | None:
    """None if the kernels of this call passed a self-test, else their errors.

    The kernels without a record are tested first. In a program that `torch.compile` traces the
    test runs in the tracer, not in the program.

    Args:
        op, backend: the operator `torch.ops.txl_<backend>.<op>_fwd`.
        arguments: in the order of the operator's schema.

    Raises:
        BackendUnavailableError: no test may run here, or it failed in a distributed program.
    """
    grad, exports = torch.is_grad_enabled(), torch.compiler.is_exporting()
    if torch.compiler.is_dynamo_compiling():
        # The tracer runs both lines at once: the operator on fake tensors, the function as it is.
        getattr(torch.ops.txl_verify, op)(backend, grad, exports, *arguments)
        return _traced_failure()
    if _thread.untested is not None:
        from txl_kernels.backends.verification import calls, kernels

        plain = calls.describe(op, backend, arguments, grad)
        for part in kernels.hashes(plain, _device(arguments)):
            _thread.untested.update(part)
        return None
    call = (op, backend, grad, torch.are_deterministic_algorithms_enabled(), _plain(arguments))
    try:
        if call in _verdicts:
            return None
    except TypeError:  # symbolic sizes have no hash
        return _failure(op, backend, arguments, grad, exports)
    failure = _failure(op, backend, arguments, grad, exports)
    if failure is None:
        if len(_verdicts) >= _MOST_VERDICTS:  # a decoding loop has other lengths in every call
            for key in [key for key in _verdicts if len(key) == len(call)]:
                del _verdicts[key]
        _verdicts[call] = ""
    return failure


def _plain(value: Any) -> Any:
    """Arguments as tuples that can be compared."""
    if isinstance(value, Tensor):
        layout = (value.shape, value.stride(), value.storage_offset() % 16)
        return (value.dtype, value.device, *layout, unwrapped(value).requires_grad)
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _traced_failure() -> str | None:
    """The result of the operator that the tracer ran last."""
    if _thread.error is not None:
        raise BackendUnavailableError(_thread.error)
    return _thread.failure


# As `torch.compiler.assume_constant_result` without its import: see `backends`.
_traced_failure._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def untested() -> Iterator[dict[str, str]]:
    """Within it this thread's calls run without a self-test.

    The dict receives {hash: label} of the kernels that eager calls of "auto" launch.
    """
    before = _thread.untested
    _thread.untested = {}
    try:
        yield _thread.untested
    finally:
        _thread.untested = before


class Examined(Exception):  # noqa: N818
    """Ends a call that is made for the tests of its kernels alone."""


def stop_if_collecting() -> None:
    """Raises `Examined` within `collected`."""
    if _thread.failures is not None:
        raise Examined


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Within it this thread's calls raise `Examined` when their kernels are tested.

    The failures are added to the list.
    """
    before = _thread.failures
    _thread.failures = []
    try:
        yield _thread.failures
    finally:
        _thread.failures = before


def _failure(
    op: str, backend: str, arguments: Sequence[Any], grad: bool, exports: bool
) -> str | None:
    from txl_kernels.backends.verification import calls

    device = _device(arguments)
    for symbol in _symbol_values(backend, arguments):
        call = calls.describe(op, backend, arguments, grad, symbol)
        key = device, calls.key(call)
        verdict = _verdicts.get(key)
        if verdict is None:
            with _lock:
                verdict = _verdicts.get(key)
                if verdict is None:
                    verdict = _verdicts[key] = _examined(call, device, exports)
        if verdict:
            if _thread.failures is not None:
                _thread.failures.append(verdict)
            return verdict
    return None


def _symbol_values(backend: str, arguments: Sequence[Any]) -> tuple[int, ...]:
    """The values to try for symbolic sizes; one if there are none."""
    tensors = (x for x in tree_leaves(list(arguments)) if isinstance(x, Tensor))
    if not any(isinstance(size, torch.SymInt) for x in tensors for size in x.shape):
        return (0,)
    few_only = backend == "native" and _device(arguments).type == "cuda"
    return tuple(n for n in _SYMBOL_VALUES if n <= _FEW_QUERIES or not few_only)


def _device(arguments: Sequence[Any]) -> torch.device:
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def device_name(device: torch.device) -> str:
    """The name under which records of this device are kept."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _examined(call: Any, device: torch.device, exports: bool) -> str:
    """ "" if all kernels have records or pass the test, else the errors.

    Raises:
        BackendUnavailableError: see `failure_of`.
    """
    from txl_kernels.backends.verification import kernels, records, selftest

    name = device_name(device)
    try:
        forward, backward = selftest.in_clean_thread(lambda: kernels.hashes(call, device), device)
    except Exception as error:
        return _reported(call, name, error)
    found = {**forward, **backward}
    if all(records.is_verified(name, kernel_hash) for kernel_hash in found):
        return ""
    if exports or _is_capturing(device):
        during = "torch.export" if exports else "the capture of a CUDA graph"
        raise BackendUnavailableError(
            f"{call.label}: its kernels were not tested on {name}, and no test runs during "
            f"{during}: call txl_kernels.verify(shapes, *, device) before"
        )
    _warn_of_unchecked_version(call.backend)
    try:
        selftest.in_clean_thread(lambda: _test(call, device, found), device)
    except Exception as error:
        return _reported(call, name, error)
    records.add(name, found)
    return ""


def _test(call: Any, device: torch.device, needed: dict[str, str]) -> None:
    """Tests the shortest problem that launches all the kernels `needed`."""
    from txl_kernels.backends.verification import calls, kernels, selftest

    for problem, limit in calls.problems(call):
        forward, backward = kernels.hashes(problem, device, limit)
        covers = needed.keys() <= {**forward, **backward}.keys()
        if covers or problem is call or call.backend == "native":
            with kernels.limited(limit):
                selftest.check(problem, device)
            return


def _reported(call: Any, name: str, error: Exception) -> str:
    """Warns of a failed test, or raises in a distributed program."""
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    message = f"the {call.backend} kernels failed their self-test on {name}: {kind}{error}"
    if _is_distributed():
        raise BackendUnavailableError(
            f"{call.op}: {message}; in a distributed program all processes must use the same "
            "kernels, so none is replaced: pass another backend= in all of them"
        ) from error
    warnings.warn(
        f"{call.op}: {message}; the next backend is used instead", RuntimeWarning, stacklevel=2
    )
    return message


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_distributed() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


@functools.cache
def _warn_of_unchecked_version(backend: str) -> None:
    from txl_kernels.backends import triton

    reason = triton.unchecked_version() if backend == "triton" else None
    if reason is not None:
        warnings.warn(reason, RuntimeWarning, stacklevel=2)


def _register(op: str, schema: str) -> None:
    """An operator that `torch.compile` runs on fake tensors while it traces.

    It is composite and returns nothing: later passes leave it out of their graphs. Where a program
    keeps it (`torch.export` with strict=True), it does nothing on real tensors.
    """
    operator = f"txl_verify::{op}"
    torch.library.define(operator, f"(str backend, bool grad, bool exports, {schema}) -> ()")

    def check(backend: str, grad: bool, exports: bool, *arguments: Any) -> None:
        if not isinstance(arguments[0], FakeTensor):
            return
        _thread.failure = _thread.error = None
        try:
            _thread.failure = _failure(op, backend, arguments, grad, exports)
        except BackendUnavailableError as error:
            _thread.error = str(error)

    torch.library.impl(operator, "CompositeImplicitAutograd", check)


_register("rel_attention", REL_ATTENTION)
_register("rel_shift", "Tensor x, SymInt n_keys, SymInt offset")
_register("adaptive_nll", LOSS)
_register("adaptive_loss", f"{LOSS}, bool mean, bool[] needs_grad")
_register("adaptive_embedding", EMBEDDING)
