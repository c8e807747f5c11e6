"""Activation offload: what checkpointed blocks keep for backward waits in pinned host memory.

Copies run on a stream of their own. A block's tensors stay on the device until the next but one begins, when their
copies are waited for: device memory belongs to the stream that computes. In backward they are asked for block by block,
last first; each is fetched while there is still enough to compute before it is used. A block that backward does not
reach is not fetched: nobody would wait for that copy, which would be written over what has its memory next.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SMALLEST_OFFLOADED_BYTES = 2**20


class ActivationOffload:
    """Brings to host memory what one model's blocks keep.

    Attributes:
        last: the block that began last, before backward; None once that has begun.
    """

    def __init__(self) -> None:
        self.last: OffloadedBlock | None = None
        self._stream: torch.cuda.Stream | None = None

    def next_block(self) -> "OffloadedBlock":
        """One execution of the block that begins now."""
        if self.last is not None:
            self.last.free_copies_before()
        self.last = OffloadedBlock(self, self.last)
        return self.last

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """That of the copies."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


class OffloadedBlock:
    """What one execution of a block keeps."""

    def __init__(self, offload: ActivationOffload, before: "OffloadedBlock | None") -> None:
        self._offload = offload
        # The graph holds a block: one that no gradient passes, or whose forward failed, is gone.
        self._before: Callable[[], OffloadedBlock | None] = (lambda: None) if before is None else weakref.ref(before)
        self._tensors: list[_Offloaded] = []

    def hooks(self) -> saved_tensors_hooks:
        """The context in which tensors that autograd saves are offloaded."""
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> "Tensor | _Offloaded":
        """Starts a tensor's copy to the host; one that is small, or not on a GPU, stays as it is."""
        if not tensor.is_cuda or tensor.nbytes < SMALLEST_OFFLOADED_BYTES:
            return tensor
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("model.offload's copies to host memory are no part of a graph")
        self._tensors.append(_Offloaded(tensor, self._offload.stream(tensor.device)))
        return self._tensors[-1]

    def unpack(self, packed: Any) -> Any:
        """The tensor, ready for the current stream."""
        if not isinstance(packed, _Offloaded):
            return packed
        self._offload.last = None
        if not packed.is_on_device:
            self.fetch()
        return packed.restore()

    def free_device_copies(self) -> None:
        """Frees the tensors on the device once they are on the host."""
        for tensor in self._tensors:
            tensor.free_device_copy()

    def fetch(self) -> None:
        """Starts the copies back to the device."""
        for tensor in self._tensors:
            if not tensor.is_on_device:
                tensor.fetch()

    def free_copies_before(self) -> None:
        """Frees the tensors of the block before on the device."""
        before = self._before()
        if before is not None:
            before.free_device_copies()

    def fetch_before(self) -> None:
        """Starts the copies of all that the block before kept."""
        before = self._before()
        if before is not None:
            before.fetch()


class _Offloaded:
    """One tensor: being copied to the host, there, or being copied back."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._on_device: Tensor | None = tensor
        self._on_host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._on_host.copy_(tensor, non_blocking=True)
        self._copied = stream.record_event()

    def free_device_copy(self) -> None:
        if self._on_device is not None:
            torch.cuda.current_stream(self._on_device.device).wait_event(self._copied)
            self._on_device = None

    @property
    def is_on_device(self) -> bool:
        return self._on_device is not None

    def fetch(self) -> None:
        self._on_device = torch.empty_like(self._on_host, device=self._stream.device, pin_memory=False)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._on_device.copy_(self._on_host, non_blocking=True)
        self._copied = self._stream.record_event()

    def restore(self) -> Tensor:
        tensor, self._on_device = self._on_device, None
        assert tensor is not None
        torch.cuda.current_stream(tensor.device).wait_event(self._copied)
        return tensor
