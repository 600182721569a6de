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

from txl_kernels._namespaces import VERIFY
from txl_kernels._schemas import ATTENTION, EMBEDDING, LOSS
from txl_kernels.errors import BackendUnavailableError
from txl_kernels.torch_private import FakeTensor, constant_in_traces
from txl_kernels.transforms import is_exporting

DEVICE_TYPES = ("cuda",)  # tests add "cpu"
# By device and key of a call, and by device and the hashes of the kernels: "" where the kernels
# passed, else the errors.
_verdicts: dict[tuple[Any, ...], str] = {}
# Eager calls whose kernels passed, in a form that costs a few microseconds.
_passed_calls: set[tuple[Any, ...]] = set()
_MOST_CALLS = 4096  # a decoding loop has other lengths in every call
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_NUMBERS = frozenset((type(None), bool, int, float))
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
    grad, exports = torch.is_grad_enabled(), is_exporting()
    if torch.compiler.is_dynamo_compiling():
        # The tracer runs both lines at once: the operator on fake tensors, the function as it is.
        _verifier(op)(backend, grad, exports, *arguments)
        return _traced_failure()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        call = (op, backend, grad, is_deterministic, arguments[0].device, _layout(arguments))
        if call in _passed_calls and _thread.untested is None:
            return None
    except (TypeError, RuntimeError):  # see `_layout`
        return _failure(op, backend, arguments, grad, exports)
    failure = _failure(op, backend, arguments, grad, exports)
    if failure is None and _thread.untested is None:
        if len(_passed_calls) >= _MOST_CALLS:
            _passed_calls.clear()
        _passed_calls.add(call)
    return failure


def _layout(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """All properties of eager arguments that decide which kernels run, as a tuple.

    Raises:
        TypeError, RuntimeError: a tensor has no memory of its own, or a size is open.
    """
    parts: list[Any] = []
    add = parts.append
    for x in arguments:
        kind = type(x)
        if kind in _NUMBERS:
            add(x)
        elif kind in _TENSORS:
            add((x.dtype, x.shape, x.stride(), x.data_ptr() & 15, x.requires_grad))
        elif kind in (list, tuple):
            add(_layout(x))
        else:
            raise TypeError(f"no memory in {kind}")
    return tuple(parts)


def _verifier(op: str) -> Any:
    """The operator that tests the kernels of `op` while `torch.compile` traces."""
    operators = VERIFY
    return {
        "rel_attention": operators.rel_attention,
        "rel_shift": operators.rel_shift,
        "adaptive_nll": operators.adaptive_nll,
        "adaptive_loss": operators.adaptive_loss,
        "adaptive_embedding": operators.adaptive_embedding,
    }[op]


@constant_in_traces
def _traced_failure() -> str | None:
    """The result of the operator that the tracer ran last."""
    if _thread.error is not None:
        raise BackendUnavailableError(_thread.error)
    return _thread.failure


@contextlib.contextmanager
def _within(name: str, container: Any) -> Iterator[Any]:
    before = getattr(_thread, name)
    setattr(_thread, name, container)
    try:
        yield container
    finally:
        setattr(_thread, name, before)


def untested() -> contextlib.AbstractContextManager[dict[str, str]]:
    """Within it this thread's calls run without a self-test.

    The dict receives {hash: label} of the kernels that calls of "auto" launch.
    """
    return _within("untested", {})


class Examined(Exception):  # noqa: N818
    """Ends a call that is made for the tests of its kernels alone."""


def stop_if_collecting() -> None:
    """Raises `Examined` within `collected`."""
    if _thread.failures is not None:
        raise Examined


def collected() -> contextlib.AbstractContextManager[list[str]]:
    """Within it this thread's calls raise `Examined` when their kernels are tested.

    The failures are added to the list.
    """
    return _within("failures", [])


def _failure(
    op: str, backend: str, arguments: Sequence[Any], grad: bool, exports: bool
) -> str | None:
    from txl_kernels.backends.verification import calls, kernels, selftest

    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for call in calls.descriptions(op, backend, arguments, grad):
        if _thread.untested is not None:
            hashes = functools.partial(kernels.hashes, call, device)
            for part in selftest.in_clean_thread(hashes, device):
                _thread.untested.update(part)
            continue
        key = device, calls.key(call)
        verdict = _verdicts.get(key)
        if verdict is None:
            with _lock:
                verdict = _verdicts.get(key)
                if verdict is None:
                    verdict = _verdicts[key] = _examined(call, device, exports)
        if verdict:
            if _is_distributed():
                raise BackendUnavailableError(
                    f"{op}: {verdict}; in a distributed program all processes must use the same "
                    "kernels, so none is replaced: pass another backend= in all of them"
                )
            if _thread.failures is not None:
                _thread.failures.append(verdict)
            return verdict
    return None


@functools.cache
def device_name(device: torch.device) -> str:
    """The name under which records of this device are kept."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _examined(call: Any, device: torch.device, exports: bool) -> str:
    """ "" if all kernels have records or pass the test, else the errors.

    Raises:
        BackendUnavailableError: no test may run here.
    """
    from txl_kernels.backends.verification import kernels, records, selftest

    name = device_name(device)
    try:
        forward, backward = selftest.in_clean_thread(lambda: kernels.hashes(call, device), device)
    except Exception as error:
        return _reported(call, name, error)
    found = {**forward, **backward}
    launched = device, frozenset(found)
    if launched in _verdicts:
        return _verdicts[launched]
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
        _verdicts[launched] = _reported(call, name, error)
        return _verdicts[launched]
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
    """The message of a failed test, of which it warns unless the caller raises it."""
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    message = f"the {call.backend} kernels failed their self-test on {name}: {kind}{error}"
    if not _is_distributed():
        text = f"{call.op}: {message}; the next backend is used instead"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
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
    operator = f"{VERIFY.name}::{op}"
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


_register("rel_attention", ATTENTION)
_register("rel_shift", "Tensor x, SymInt n_keys, SymInt offset")
_register("adaptive_nll", LOSS)
_register("adaptive_loss", f"{LOSS}, bool mean, bool[] needs_grad")
_register("adaptive_embedding", EMBEDDING)
