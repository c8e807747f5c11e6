"""What autograd may and must not do with the operation's saved tensors.

First order only; and backward may take the memory of what forward saved where nobody else can see it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_OWNER = "_lightning_moe_owner"
_NOTHING = nullcontext()
_measures = ContextVar("measures", default=False)


class FirstOrderOnly(torch.autograd.Function):
    """Passes a gradient through and raises when it is itself differentiated.

    `once_differentiable` would not do: where the incoming gradient is a constant it hands out gradients without a
    graph, and a gradient penalty silently lacks its term.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, incoming: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """The gradient, which now depends on the anchor, and so on every input, and on the incoming gradient."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Raises: a second derivative was asked for."""
        raise RuntimeError(
            "moe_experts has no second derivative: for a gradient penalty or a Hessian, train without the callback"
        )


class Owner:
    """Says which call of forward made a tensor, by a mark on its memory that survives what hooks do, but for a copy."""

    def __init__(self, *, has_hooks: bool) -> None:
        self.has_hooks = has_hooks

    def mark(self, tensor: Tensor) -> None:
        """Marks a tensor that this call made."""
        setattr(tensor.untyped_storage(), _OWNER, self)

    def may_overwrite(self, tensor: Tensor) -> bool:
        """Whether nobody else can see a saved tensor, once backward has it.

        Saved-tensor hooks may keep what they packed, or a copy of it. Activation checkpointing, a hook as well, has the
        tensor made again by another call, for this backward alone.
        """
        owner = getattr(tensor.untyped_storage(), _OWNER, None)
        return not self.has_hooks or (owner is not None and owner is not self)


def has_saved_tensors_hooks() -> bool:
    """Whether saved tensors go through hooks here."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("moe_experts only asks whether there are any"):
            return False
    except RuntimeError:
        return True


@contextmanager
def measuring() -> Iterator[None]:
    """Within it hooks only look at what is saved, which is then what is saved without them."""
    before = _measures.set(True)
    try:
        yield
    finally:
        _measures.reset(before)


def is_measuring() -> bool:
    """Whether this is within `measuring()`."""
    return _measures.get()


def graph_is_kept() -> bool:
    """Whether this backward may run again (retain_graph), so that what it saved must not be overwritten."""
    # Private, and has no public counterpart; read in torch 2.11 to 2.15.
    return torch._C._autograd._get_current_graph_task_keep_graph()


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Keeps autocast away; free where there is none."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _NOTHING
