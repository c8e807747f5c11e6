"""A training step's forward and backward as CUDA graphs: captured once for each shape, then replayed.

A step of many small kernels takes as long as the host takes to launch them; a replay launches them all at once. It does
what was captured: the same kernels on the same addresses, none of the Python. `GraphedFunction` watches what it can see
of that, and runs the function by itself wherever it does not hold.

PyTorch's `torch.cuda.make_graphed_callables` hands out gradients that the next replay overwrites, and autograd keeps
them as `.grad` without a copy: accumulating gradients adds wrong numbers. Here backward adds to buffers.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_moe.integrations.peft_experts import adapter_state
from lightning_moe.integrations.torch_modules import (
    gradient_hooks_of,
    hooks_of,
    modules_of,
    replaced_parameters,
    tensors_of,
    trained_parameters,
)
from lightning_moe.integrations.transformers_dispatch import is_capturable_hook
from lightning_moe.integrations.unsupported import Unsupported, unsupported
from lightning_moe.patch_state import is_on, patch_of

Mode = Literal["auto", True]
Batch = Mapping[str, Any]
Outputs = tuple[Tensor, ...]
Kind = Literal["eager", "capture", "replay"]

# Steps of each shape that run by themselves first: kernels are compiled in them, and libraries initialized.
WARMUP_STEPS = 3
# Shapes that are captured. All share their memory; what each has for itself is its batch.
MAX_SHAPES = 8
# A replay has to take less than this part of the step's time by itself, or its memory is not worth it.
WORTH_IT = 0.97


# By device, what replays have used since this was last asked for.
_replayed: dict[torch.device, int] = {}


def replayed_bytes(device: torch.device) -> int:
    """The bytes that replays since the last call of this computed in, which no allocator's statistics know."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _replayed.pop(device, 0)


class GraphedFunction:
    """A function of a batch that gives a loss, with forward and backward captured as CUDA graphs.

    In training it runs by itself for three steps of each shape of batch, is captured, and is replayed from then on.
    Gradients add up in `.grad` as ever. It runs by itself without gradients (validation), for other shapes, where a
    layer is due for an audit, and where something cannot be captured: then it says why, once.

    The function must be the same each time but for the tensors in the batch and the module's parameters: no branch on a
    tensor's values, no wait for the device (`.item()`), nothing that only Python does, such as logging. A number that
    changes from step to step is one of the batch's tensors. Random numbers that it draws are new at each replay;
    activation checkpointing has to be told `preserve_rng_state=False`.

        loss = GraphedFunction(self.loss, self.model)     # loss(batch) -> (), or a tuple that begins with it
        loss({"input_ids": ..., "labels": ...}).backward()

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
        self._captured: dict[Any, _Captured] = {}
        self._warmups: Counter[Any] = Counter()
        self._gradients: _Gradients | None = None
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
        if isinstance(seen, Unsupported) or seen.is_audited:
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
        is_audited = False
        for module in modules_of(self.module):
            for hook in hooks_of(module):
                if not (getattr(hook, "is_capturable", False) or is_capturable_hook(hook)):
                    return self._hooked(hook, module)
                held.append(hook)
            relied_on.append(module.training)
            if (adapters := adapter_state(module)) is not None:
                relied_on.append(adapters)
            if (patch := patch_of(module)) is not None:
                held.append(patch)
                relied_on.append(is_on(module))
                is_audited |= patch.health.audit_due
            for tensor in tensors_of(module):
                for hook in gradient_hooks_of(tensor):
                    return self._hooked(hook, module)
                relied_on += (id(tensor), tensor.data_ptr(), tensor.requires_grad)
        return _Seen(hash((*relied_on, *map(id, held))), held, is_audited)

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
                self._gradients = _Gradients(self.module)
            self._captured[key] = _Captured(self.function, batch, self._gradients, self._recorder)
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


class Recorder:
    """PyTorch's capture, one pool of memory for all that it records, and the device's clock."""

    def __init__(self) -> None:
        self._pool: Any = None

    def takes(self, device: torch.device) -> bool:
        """Whether the device has graphs, and is the current one, whose work is recorded."""
        return device.type == "cuda" and device.index in (None, torch.cuda.current_device())

    def record(self, run: Callable[[], None]) -> Any:
        """A graph of what `run` launches, to be replayed. Nothing is computed yet."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Another thread, such as a loader's that pins memory, may go on meanwhile.
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), capture:  # a failure leaves another stream current
                run()
        except BaseException:  # and random numbers to a graph that there is not
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph

    def release(self) -> None:
        """Lets go of the pool, whose graphs are gone."""
        if self._pool is not None:
            self._pool = None
            torch.cuda.empty_cache()

    def pool_bytes(self) -> int:
        """What the graphs compute in, which between replays the allocator takes for free."""
        return sum(
            segment["total_size"] - segment["allocated_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == self._pool
        )

    def mark(self) -> Any:
        """A point in the device's work."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two points; waits for the second."""
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class _Seen(NamedTuple):
    """What a graph relies on: a digest, and what has to live for the addresses in it to be its own."""

    state: int
    held: list[Any]
    is_audited: bool


class _Mark(NamedTuple):
    """A step's beginning."""

    key: Any
    kind: Kind
    event: Any


class _Gradients:
    """The gradients that graphs add to, which all share: parts of one buffer for each dtype, cleared in one go.

    What is captured computes with leaves of its own in the parameters' memory: the parameters' own may belong to a loss
    of an earlier step that somebody still holds, and to its stream.

    Attributes:
        step: whose saved activations the graphs' memory holds; None after its backward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.step: object = None
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._flat: dict[Any, Tensor] = {}
        self._buffers: list[Tensor] = []
        sizes: Counter[Any] = Counter()
        for parameter in self.parameters:
            sizes[parameter.dtype, parameter.device] += parameter.numel()
        for (dtype, device), size in sizes.items():
            self._flat[dtype, device] = torch.zeros(size, dtype=dtype, device=device)
        left = dict(self._flat)
        self.leaves: list[nn.Parameter] = []
        for parameter in self.parameters:
            kind = parameter.dtype, parameter.device
            # As autograd lays a gradient out: like its parameter, where that has no gaps.
            strides = torch.empty_like(parameter, device="meta").stride()
            buffer, left[kind] = left[kind][: parameter.numel()], left[kind][parameter.numel() :]
            buffer = buffer.as_strided(parameter.shape, strides)
            leaf = nn.Parameter(parameter.detach())
            leaf.grad = buffer
            self._buffers.append(buffer)
            self.leaves.append(leaf)
        leaf_of = dict(zip(map(id, self.parameters), self.leaves, strict=True))
        self._places = []
        for owner in module.modules():
            own = {n: leaf_of[id(p)] for n, p in owner.named_parameters(recurse=False, remove_duplicate=False)
                   if p.requires_grad}  # fmt: skip
            if own:
                self._places.append((owner, own))

    @contextmanager
    def with_leaves(self) -> Iterator[None]:
        """Has the module compute with the leaves."""
        with ExitStack() as stack:
            for owner, leaves in self._places:
                stack.enter_context(replaced_parameters(owner, leaves))
            yield

    def put_in_place(self) -> None:
        """Has each parameter's `.grad` be its buffer, with the value that it had; zero where it had none."""
        if all(parameter.grad is None for parameter in self.parameters):
            for flat in self._flat.values():
                flat.zero_()
        else:
            for parameter, buffer in zip(self.parameters, self._buffers, strict=True):
                if parameter.grad is None:
                    buffer.zero_()
                elif parameter.grad is not buffer:
                    buffer.copy_(parameter.grad)
        for parameter, buffer in zip(self.parameters, self._buffers, strict=True):
            parameter.grad = buffer


class _Captured:
    """Forward and backward for one shape of batch."""

    def __init__(
        self, function: Callable[[Batch], Any], batch: Batch, gradients: _Gradients, recorder: Recorder
    ) -> None:
        self._function, self._gradients = function, gradients
        self._batch = {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in batch.items()}
        device = next(value.device for value in self._batch.values() if isinstance(value, Tensor))
        self._grad_loss = torch.ones((), device=device)
        self._anchor = torch.empty(0, device=device, requires_grad=True)
        self._outputs: Outputs = ()
        self._is_single = False
        self._used: set[Tensor] = set()
        self._forward = recorder.record(self._run_forward)
        self._backward = recorder.record(self._run_backward)
        outputs: Outputs = self._outputs
        self._outputs = tuple(output.detach() for output in outputs)
        self._bytes = recorder.pool_bytes()

    def __call__(self, batch: Batch) -> Any:
        """Replays forward; backward is replayed when it is asked for."""
        for name, value in batch.items():
            if isinstance(value, Tensor):
                self._batch[name].copy_(value)
        self._gradients.step = object()
        outputs = _Replay.apply(self._anchor, self)
        return outputs[0] if self._is_single else outputs

    def replay_forward(self) -> tuple[object, Outputs]:
        """The step, and its outputs, which the next one leaves alone."""
        self._forward.replay()
        device = self._anchor.device
        _replayed[device] = max(_replayed.get(device, 0), self._bytes)
        return self._gradients.step, tuple(output.detach().clone() for output in self._outputs)

    def replay_backward(self, step: object, grad_loss: Tensor) -> None:
        """Adds to the parameters' gradients."""
        gradients = self._gradients
        if step is not gradients.step:
            raise RuntimeError(
                "a captured step has one backward, before the next step begins: what it saved is overwritten. Train "
                "without the CUDA graph to have more"
            )
        gradients.step = None
        self._grad_loss.copy_(grad_loss)
        had_none = [parameter.grad is None for parameter in gradients.parameters]
        gradients.put_in_place()
        self._backward.replay()
        for parameter, leaf, is_new in zip(gradients.parameters, gradients.leaves, had_none, strict=True):
            if is_new and leaf not in self._used:
                parameter.grad = None

    def release(self) -> None:
        """Gives the graphs back."""
        self._outputs = ()
        for graph in (self._forward, self._backward):
            graph.reset()

    def _run_forward(self) -> None:
        with self._gradients.with_leaves(), _own_casts():
            outputs = self._function(self._batch)
        self._is_single = isinstance(outputs, Tensor)
        self._outputs = (outputs,) if self._is_single else outputs
        self._check_outputs()

    def _check_outputs(self) -> None:
        if type(self._outputs) is not tuple or not all(map(_is_tensor, self._outputs)):
            raise RuntimeError("it returns neither the loss nor a tuple of tensors that begins with it")
        loss, *others = self._outputs
        if any(output.requires_grad for output in others):
            raise RuntimeError("beside the loss it returns a tensor that wants a gradient: detach it, or add it")
        leaves = set(map(id, self._gradients.leaves))
        if any(id(parameter) not in leaves for parameter in trained_parameters(loss)):
            raise RuntimeError("it trains a parameter that it does not read from the module")

    def _run_backward(self) -> None:
        self._used.clear()
        hooks = [leaf.register_post_accumulate_grad_hook(self._used.add) for leaf in self._gradients.leaves]
        try:
            # Activation checkpointing computes with the leaves again. Autocast is for forward.
            autocast = torch.autocast(self._anchor.device.type, enabled=False)
            with self._gradients.with_leaves(), _own_casts(), autocast:
                torch.autograd.backward(self._outputs[0], self._grad_loss.to(self._outputs[0].dtype))
        finally:
            for hook in hooks:
                hook.remove()


class _Replay(torch.autograd.Function):
    """Replays forward now and backward when it is asked for."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, captured: _Captured) -> Outputs:  # type: ignore[override]
        ctx.captured = captured
        ctx.step, outputs = captured.replay_forward()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[None, None]:  # type: ignore[override]
        ctx.captured.replay_backward(ctx.step, grad_loss)
        return None, None


@contextmanager
def _own_casts() -> Iterator[None]:
    """Has autocast cast what is captured in it, and leave nothing of that: casts are cached as long as it is on."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _cause(error: BaseException) -> BaseException:
    """What went wrong first: a capture that is broken raises once more as it ends."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error
