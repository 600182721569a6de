"""Raises an error if a model has changed since its results were cached."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from txl_kernels.torch_private import changes, parameters_of

if TYPE_CHECKING:
    from transformer_xl.model import TransformerXL


class ModelGuard:
    """The lengths and the weights of a model at the creation of this object.

    `check` raises ValueError if they have changed. It does not notice changes of a weight through
    its `.data`, nor, inside a program of `torch.compile`, any change of weights.

    Fused optimizers do not count their changes in the tensors, as other operators do. Therefore a
    hook on all optimizers sets `_was_trained` after a step of one that has a weight of the model.
    """

    def __init__(self, model: TransformerXL) -> None:
        self.model = model
        self.lengths = lengths(model)
        self._weights = self._state()
        self._was_trained = False
        _notice_steps(weakref.ref(self))

    def check(self, model: TransformerXL) -> None:
        """Raises ValueError unless this is the guarded model, unchanged, in evaluation mode and
        without gradients."""
        if model is not self.model:
            raise ValueError("memory: expected a window of this model, got one of another model")
        if torch.is_grad_enabled():
            raise ValueError(
                "memory: a KeyValueWindow carries no gradient; use torch.no_grad(), or a Memory"
            )
        if model.training:
            raise ValueError("memory: with a KeyValueWindow the model must be in eval() mode")
        for (name, before), now in zip(self.lengths.items(), lengths(model).values(), strict=True):
            if now != before:
                raise ValueError(
                    f"memory: the window was created with {name} {before}, the model now has "
                    f"{now}; create another window after set_lengths"
                )
        self.check_weights()

    def check_weights(self) -> None:
        """Raises ValueError if a weight has changed or was replaced."""
        if torch.compiler.is_compiling():
            return
        if self._was_trained or self._state() != self._weights:
            raise ValueError(
                "memory: the weights of the model have changed since the window was created; "
                "create another one"
            )

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets `_was_trained` if an optimizer that made a step has a weight of the model."""
        own = {id(parameter) for parameter in parameters_of(self.model)}
        trained = (id(p) for group in optimizer.param_groups for p in group["params"])
        self._was_trained = self._was_trained or not own.isdisjoint(trained)

    def _state(self) -> list[Any]:
        """Equal as long as every parameter is the same tensor and no operator changes it."""
        parameters = parameters_of(self.model)
        # Not all subclasses of tensors have an address.
        addresses = [p.data_ptr() for p in parameters if type(p) in (Tensor, torch.nn.Parameter)]
        versions = [changes(p) for p in parameters if not p.is_inference()]
        return [*map(id, parameters), *addresses, *versions]


def lengths(model: TransformerXL) -> dict[str, int]:
    """The lengths that decide which keys and positions a token attends to, by name."""
    clamp_len = model.clamp_len if model.clamp_len > 0 else -1  # all of them mean no clamp
    return {
        "mem_len": model.mem_len,
        "clamp_len": clamp_len,
        "same_length": model.same_length,
    }


def _notice_steps(guard: weakref.ref[ModelGuard]) -> None:
    """Calls `after_step` after each step of an optimizer for as long as the guard exists."""

    def hook(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if (existing := guard()) is not None:
            existing.after_step(optimizer)

    handle = register_optimizer_step_post_hook(hook)
    weakref.finalize(guard(), handle.remove)
