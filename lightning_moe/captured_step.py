"""How a step is captured in CUDA graphs and replayed: the recording, its batch, its gradients, its memory.

`cuda_graph.py` decides when. Forward and backward are a graph each, so that backward takes the loss's gradient as it
comes and adds to gradients that are there. PyTorch's `torch.cuda.make_graphed_callables` hands out gradients that the
next replay overwrites, and autograd keeps them as `.grad` without a copy: accumulated, they are wrong numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.integrations.torch_modules import replaced_parameters, trained_parameters

Batch = Mapping[str, Any]
Outputs = tuple[Tensor, ...]

# By device, what replays have used since this was last asked for.
_replayed: dict[torch.device, int] = {}


def replayed_bytes(device: torch.device) -> int:
    """The bytes that replays since the last call of this computed in, which no allocator's statistics know."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _replayed.pop(device, 0)


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


class Gradients:
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


class CapturedStep:
    """Forward and backward for one shape of batch."""

    def __init__(
        self, function: Callable[[Batch], Any], batch: Batch, gradients: Gradients, recorder: Recorder
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
        if type(self._outputs) is not tuple or not all(isinstance(output, Tensor) for output in self._outputs):
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
    def forward(ctx: Any, anchor: Tensor, captured: CapturedStep) -> Outputs:  # type: ignore[override]
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
