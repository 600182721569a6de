"""Triton's interpreter without its work that changes no result: tests take a third of the time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def faster_interpreter() -> Iterator[None]:
    """Interpreted kernels give the same results and errors within, in less time.

    Triton's interpreter searches all builtins of `triton.language` at each call of a device
    function in order to replace them; here it does so once per launch. It computes in int64 whether
    each sum of integers overflows; without `debug` it ignores the result, so this computation is
    left out. It forms and checks the shape of each value anew; here it keeps the shapes that it
    has seen.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    core = importlib.import_module("triton.language.core")
    builder = interpreter.interpreter_builder
    options = builder.options
    if not options.debug:
        options = dataclasses.replace(options, sanitize_overflow=False)
    block, tensor = core.block_type, core.tensor
    launch, patch_lang = _patching_once_per_launch(interpreter)
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (interpreter.GridExecutor, "__call__", launch),
            (interpreter, "_patch_lang", patch_lang),
            (builder, "options", options),
            (block, "__init__", _remembering(block.__init__, _block_key, ("element_ty",))),
            (tensor, "__init__", _remembering(tensor.__init__, _type_key, ("handle", "type"))),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _patching_once_per_launch(interpreter: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The methods of the interpreter that launch a kernel and that replace a module's builtins."""
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(fn: Any) -> Any:
        module = fn.__globals__["__name__"]
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch(fn)

    return call, patch_once


def _block_key(element_ty: Any, shape: Any) -> tuple[Any, ...]:
    return (str(element_ty), *(getattr(n, "value", n) for n in shape))


def _type_key(handle: Any, value_type: Any) -> str:
    return str(value_type)


def _remembering(
    create: Callable[..., None], key: Callable[..., Any], own: tuple[str, ...]
) -> Callable[..., None]:
    """A method `__init__` that copies the attributes of the first object with the same key.

    It calls `create` for that first object alone. The attributes `own` are the first arguments.
    """
    known: dict[Any, dict[str, Any]] = {}

    def initialise(self: Any, *args: Any) -> None:
        of = key(*args)
        if of not in known:
            create(self, *args)
            known[of] = dict(vars(self))
        else:
            vars(self).update(known[of])
            vars(self).update(zip(own, args, strict=False))

    return initialise
