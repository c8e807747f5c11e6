"""A training step's forward and backward as CUDA graphs: captured once for each shape, then replayed.

A step of many small kernels takes as long as the host takes to launch them; a replay launches them all at once. It does
what was captured: the same kernels on the same addresses, none of the Python. `GraphedFunction` watches what it can see
of that, and runs the function by itself wherever it does not hold.
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_moe.captured_step import Batch, CapturedStep, Gradients, Recorder
from lightning_moe.integrations.peft_experts import adapter_state
from lightning_moe.integrations.torch_modules import (
    gradient_hooks_of,
    hooks_of,
    modules_of,
    tensors_of,
)
from lightning_moe.integrations.transformers_dispatch import is_capturable_hook
from lightning_moe.integrations.unsupported import Unsupported, unsupported
from lightning_moe.patch_state import is_on, patch_of

Mode = Literal["auto", True]
Kind = Literal["eager", "capture", "replay"]

# Steps of each shape that run by themselves first: kernels are compiled in them, and libraries initialized.
WARMUP_STEPS = 3
# Shapes that are captured. All share their memory; what each has for itself is its batch.
MAX_SHAPES = 8
# A replay has to take less than this part of the step's time by itself, or its memory is not worth it.
WORTH_IT = 0.97


class GraphedFunction:
    """A function of a batch that gives a loss, with forward and backward captured as CUDA graphs.

    In training it runs by itself for three steps of each shape of batch, is captured, and is replayed from then on.
    Gradients add up in `.grad` as ever. It runs by itself without gradients (validation), for other shapes, where a
    layer is due for an audit, and where something cannot be captured: then it says why, once.

    The function must be the same each time but for the tensors in the batch and the module's parameters: no branch on a
    tensor's values, no wait for the device (`.item()`), nothing that only Python does, such as logging. A number that
    changes from step to step is one of the batch's tensors. Random numbers that it draws are new at each replay;
    activation checkpointing has to be told `preserve_rng_state=False`.

    >>> import torch
    >>> from lightning_moe import GraphedFunction
    >>> model = torch.nn.Linear(4, 1)
    >>> loss = GraphedFunction(lambda batch: model(batch["inputs"]).square().mean(), model)
    >>> loss({"inputs": torch.ones(2, 4)}).backward()
    >>> model.weight.grad.shape
    torch.Size([1, 4])

    Attributes:
        reason: why nothing is captured any more, or None.

    Args:
        function: takes a mapping of tensors, and of constants (None, booleans, numbers, strings), by name. Returns the
            loss, () floating, or a tuple of tensors that begins with it, the others detached.
        module: whose parameters it trains, all of them.
        mode: `"auto"` keeps to replays where they are faster than the step by itself; True keeps to them in any case.
    """

    def __init__(self, function: Callable[[Any], Any], module: nn.Module, mode: Mode = "auto") -> None:
        self.function, self.module, self.mode = function, module, mode
        self.reason: Unsupported | None = None
        self._said: set[str] = set()
        self._recorder = Recorder()
        self._captured: dict[Any, CapturedStep] = {}
        self._warmups: Counter[Any] = Counter()
        self._gradients: Gradients | None = None
        self._state: Any = None
        self._held: list[Any] = []
        self._undecided: set[Any] = set()
        self._marks: deque[_Mark] = deque(maxlen=64)
        self._lines: list[str] = []

    def __reduce__(self) -> Any:
        """Copies and pickles begin anew."""
        return type(self), (self.function, self.module, self.mode)

    def __call__(self, batch: Batch) -> Any:
        """What the function returns."""
        if not torch.is_grad_enabled() or self.reason is not None:
            return self.function(batch)
        seen = self._look(batch)
        if isinstance(seen, Unsupported):
            (self._give_up if seen.code == "graph_ranks" else self._say)(seen)
        if isinstance(seen, Unsupported) or seen.is_by_itself:
            self._mark(None, "eager")
            return self.function(batch)
        if seen.state != self._state:  # adapters were switched, say: what is captured is of another model
            self.release()
            self._state, self._held = seen.state, seen.held
        key = tuple(
            (name, (tuple(value.shape), value.dtype, value.device) if _is_tensor(value) else value)
            for name, value in sorted(batch.items())
        )
        is_warm = self._warmups[key] >= WARMUP_STEPS
        if self.mode == "auto" and not is_warm:
            self._undecided.add(key)
        self._mark(key, "replay" if key in self._captured else "capture" if is_warm else "eager")
        if is_warm and self.reason is None and key not in self._captured:
            self._capture(key, batch)
        self._warmups[key] += 1
        captured = self._captured.get(key)
        return self.function(batch) if captured is None else captured(batch)

    def report(self) -> list[str]:
        """What was captured, and what was not and why, a line each."""
        return list(self._lines)

    def release(self) -> None:
        """Gives the memory back. What is called after that is captured anew."""
        for captured in self._captured.values():
            captured.release()
        for left in (self._captured, self._warmups, self._undecided, self._marks):
            left.clear()
        self._gradients = None
        self._recorder.release()  # PyTorch takes no pool again of which it still has a part

    def _look(self, batch: Batch) -> "Unsupported | _Seen":
        """Why this step cannot be captured, or what a graph of it relies on."""
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        for found in {device, *(tensor.device for tensor in tensors)}:  # the host's are for Python to read
            if not self._recorder.takes(found):
                return unsupported("graph_device", device=found)
        for name, value in batch.items():
            if not (isinstance(value, Tensor | bool | int | float | str) or value is None):
                return unsupported("graph_batch", name=name, what=f"a {type(value).__name__}")
            if isinstance(value, Tensor) and value.requires_grad:
                return unsupported("graph_batch", name=name, what="a tensor that wants a gradient")
        if torch.compiler.is_compiling():
            return unsupported("graph_compiled")
        if (
            torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and (ranks := torch.distributed.get_world_size()) > 1
        ):
            return unsupported("graph_ranks", world_size=ranks)
        relied_on: list[Any] = [
            torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type),
            torch.are_deterministic_algorithms_enabled(),
        ]  # fmt: skip
        held: list[Any] = []
        is_by_itself = False
        for module in modules_of(self.module):
            for hook in hooks_of(module):
                if (needs_python := getattr(hook, "needs_python", None)) is not None:
                    is_by_itself |= needs_python
                    continue
                if not (getattr(hook, "is_capturable", False) or is_capturable_hook(hook)):
                    return self._hooked(hook, module)
                held.append(hook)
            relied_on.append(module.training)
            if (adapters := adapter_state(module)) is not None:
                relied_on.append(adapters)
            if (patch := patch_of(module)) is not None:
                held.append(patch)
                relied_on.append(is_on(module))
                is_by_itself |= patch.health.audit_due
            for tensor in tensors_of(module):
                for hook in gradient_hooks_of(tensor):
                    return self._hooked(hook, module)
                relied_on += (id(tensor), tensor.data_ptr(), tensor.requires_grad)
        return _Seen(hash((*relied_on, *map(id, held))), held, is_by_itself)

    def _hooked(self, hook: Any, module: nn.Module) -> Unsupported:
        name = next(name for name, found in self.module.named_modules() if found is module)
        shown = getattr(hook, "__qualname__", type(hook).__name__)
        return unsupported("graph_hook", hook=shown, module=name or "the model")

    def _capture(self, key: Any, batch: Batch) -> None:
        if len(self._captured) >= MAX_SHAPES:
            self._say(unsupported("graph_shapes", num_shapes=MAX_SHAPES))
            return
        devices = {tensor.device for module in modules_of(self.module) for tensor in tensors_of(module)}
        own = next(value.device for value in batch.values() if isinstance(value, Tensor))
        if others := devices - {own, torch.device("cpu")}:
            self._give_up(unsupported("graph_device", device=others.pop()))
            return
        began, failure = time.perf_counter(), None
        try:
            if self._gradients is None:
                self._gradients = Gradients(self.module)
            self._captured[key] = CapturedStep(self.function, batch, self._gradients, self._recorder)
        except RuntimeError as error:
            cause = _cause(error)
            first_line = str(cause).partition("\n")[0]
            if isinstance(cause, torch.OutOfMemoryError):
                failure = unsupported("graph_memory", error=first_line)
            else:
                failure = unsupported("graph_failed", error=first_line)
            del cause
        if failure is not None:  # out of the handler, which holds on to what was allocated
            self._give_up(failure)
            return
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items() if _is_tensor(value))
        gib = self._recorder.pool_bytes() / 2**30
        self._tell(f"captured {shapes} in {time.perf_counter() - began:.1f} s; graphs have {gib:.2f} GiB to compute in")

    def _mark(self, key: Any, kind: Kind) -> None:
        """Notes that a step begins while replays are still on trial, and judges those of its shape."""
        if not self._undecided:
            return
        self._marks.append(_Mark(key, kind, self._recorder.mark()))
        steps = [(one.kind, one.event, following.event) for one, following in pairwise(self._marks) if one.key == key]
        replays, eager = ([step[1:] for step in steps if step[0] == kind] for kind in ("replay", "eager"))
        if key not in self._undecided or len(replays) < 2 or not eager:
            return
        self._undecided.discard(key)
        replay, alone = (min(self._recorder.seconds(*step) for step in found) for found in (replays, eager))
        if replay < WORTH_IT * alone:
            self._tell(f"a replay takes {replay:.3f} s, the step by itself took {alone:.3f} s")
        else:
            self._give_up(unsupported("graph_slower", replay=replay, eager=alone))

    def _give_up(self, reason: Unsupported) -> None:
        self.reason = reason
        self.release()
        self._say(reason)

    def _say(self, reason: Unsupported) -> None:
        if reason.code in self._said:
            return
        self._said.add(reason.code)
        self._lines.append(f"not captured: {reason}")
        say = rank_zero_info if self.mode == "auto" else rank_zero_warn
        say(f"CUDA graph: the step runs without one: {reason}")

    def _tell(self, line: str) -> None:
        self._lines.append(line)
        rank_zero_info(f"CUDA graph: {line}")


class _Seen(NamedTuple):
    """What a graph relies on: a digest, and what has to live for the addresses in it to be its own.

    `is_by_itself`: this step is for Python to run, as an audit's or a measurement's, and later ones may be replayed.
    """

    state: int
    held: list[Any]
    is_by_itself: bool


class _Mark(NamedTuple):
    """A step's beginning."""

    key: Any
    kind: Kind
    event: Any


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _cause(error: BaseException) -> BaseException:
    """What went wrong first: a capture that is broken raises once more as it ends."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error
