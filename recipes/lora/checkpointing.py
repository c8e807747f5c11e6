"""What a decoder layer keeps for backward: its recomputation, its input in host memory, its experts in tiles.

    full        a layer keeps its input and is computed again in backward
    attention   attention and norms are computed again, the experts are not: more memory, less time
    none        nothing is computed again

Each is put on the layers' `forward`; outside training the layers run as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Mode = Literal["full", "attention", "none"]

SMALLEST_OFFLOADED_BYTES = 2**20
# A layer whose input is larger computes for so long that fetching the next one early would only take memory.
LARGEST_FETCHED_EARLY_BYTES = 256 * 2**20


def enable_checkpointing(layers: nn.ModuleList, mode: Mode, offload: bool = False, tile_tokens: int = 0) -> None:
    """Has decoder layers recompute what `mode` says.

    Args:
        layers: decoder layers, whose feed-forward or MoE block is `mlp`.
        mode: what is computed again in backward.
        offload: keep the layers' inputs in pinned host memory; needs `mode="full"`.
        tile_tokens: where a sequence is longer, the `mlp` runs this many tokens at a time and once more in backward,
            so that one tile's activations exist at a time. 0 for never.

    Raises:
        ValueError: where `offload` has nothing to work on.
    """
    if offload and mode != "full":
        raise ValueError(f"model.offload keeps the layers' inputs, which only checkpointing 'full' saves, not {mode!r}")
    offloading = ActivationOffload() if offload else None
    layer: Any
    for layer in layers:
        if tile_tokens:
            layer.mlp.forward = partial(_tiled, layer.mlp.forward, tile_tokens)
        if mode == "full":
            layer.forward = partial(_recomputed, layer.forward, offloading)
        elif mode == "attention":
            for name, module in layer.named_children():
                if name != "mlp":
                    module.forward = partial(_recomputed, module.forward, None)


def _recomputed(forward: Callable[..., Any], offloading: "ActivationOffload | None", *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if offloading is None:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    with offloading.hooks():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _tiled(forward: Callable[[Tensor], Tensor], tile_tokens: int, hidden_states: Tensor) -> Tensor:
    """The same of (1, tokens, H), tile by tile."""
    if hidden_states.shape[1] <= tile_tokens or not torch.is_grad_enabled():
        return forward(hidden_states)
    tiles = hidden_states.split(tile_tokens, dim=1)
    return torch.cat([checkpoint(forward, tile, use_reentrant=False) for tile in tiles], dim=1)


class ActivationOffload:
    """Keeps saved tensors in pinned host memory until backward; copies run on a stream of their own.

    Backward asks for them in reverse order: when one is restored, the one before it is prefetched, unless it is large.
    Device memory belongs to the stream that computes: a tensor stays on the device until the next one is offloaded,
    when its copy is waited for.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: _Offloaded | None = None

    def hooks(self) -> saved_tensors_hooks:
        """The context in which saved tensors on a GPU are offloaded; others stay as they are."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> "Tensor | _Offloaded":
        if not tensor.is_cuda or tensor.numel() * tensor.element_size() < SMALLEST_OFFLOADED_BYTES:
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        if self._last is not None:
            self._last.free_device_copy()
        self._last = _Offloaded(tensor, self._stream, self._last)
        return self._last

    def _unpack(self, packed: "Tensor | _Offloaded") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._last = None
        return packed.restore()


class _Offloaded:
    """One tensor: being copied to the host, there, or being copied back."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream, before: "_Offloaded | None") -> None:
        self._stream, self._before = stream, before
        self._on_device: Tensor | None = tensor
        self._on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._on_host.copy_(tensor, non_blocking=True)
        self._copied = stream.record_event()

    def free_device_copy(self) -> None:
        """Frees the tensor on the device once it is on the host."""
        if self._on_device is not None:
            torch.cuda.current_stream(self._on_device.device).wait_event(self._copied)
            self._on_device = None

    def prefetch(self) -> None:
        """Starts the copy back to the device, unless it is there."""
        if self._on_device is not None:
            return
        self._on_device = torch.empty(self._on_host.shape, dtype=self._on_host.dtype, device=self._stream.device)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._on_device.copy_(self._on_host, non_blocking=True)
        self._copied = self._stream.record_event()

    def restore(self) -> Tensor:
        """The tensor, ready for the current stream; prefetches the one before it."""
        self.prefetch()
        tensor, self._on_device = self._on_device, None
        assert tensor is not None
        torch.cuda.current_stream(tensor.device).wait_event(self._copied)
        if self._before is not None and tensor.nbytes <= LARGEST_FETCHED_EARLY_BYTES:
            self._before.prefetch()
        self._before = None
        return tensor
