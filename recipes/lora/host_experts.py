"""Frozen experts in host memory: a layer's are on the device while it computes, and its neighbour's on their way.

The copies run on a stream of their own, beside the layer before: in forward the next layer's, in backward, where
checkpointing computes a layer again, those of the layer that is below it. Two layers' experts are on the device at
most. Device memory of a copy belongs to the stream of the copies, which waits for what computes before it copies into
it again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_moe import QuantizedWeight


class HostExperts:
    """The experts' weights of a model's layers, which wait in host memory.

    Attributes:
        num_bytes: of the weights on the host.

    Args:
        blocks: of each layer, what its experts are in. Parameters of three dimensions are the experts' weights; those
            that do not train are brought to the host, page-locked where the device is a GPU.
        device: where they compute.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._on_host = [_Weights(block) for block in blocks]
        for weights in self._on_host:
            weights.replace([on_host(weight, device) for weight in weights.tensors])
        self.num_bytes = sum(weight.nbytes for weights in self._on_host for weight in weights.tensors)
        self._on_device: dict[int, tuple[list[nn.Parameter], torch.cuda.Event | None]] = {}
        self._last, self._step = 0, 1

    @contextmanager
    def on_device(self, layer: int) -> Iterator[None]:
        """A layer's weights are on the device within, and its neighbour's on their way there."""
        if self._stream is not None and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("model.experts_on host copies weights to the device, which is no part of a graph")
        neighbour = self._neighbour(layer)
        self._on_device = {at: copies for at, copies in self._on_device.items() if at in (layer, neighbour)}
        self._copy(layer)
        weights, copied = self._on_device[layer]
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        self._copy(neighbour)
        self._on_host[layer].put(weights)
        try:
            yield
        finally:
            self._on_host[layer].put(self._on_host[layer].tensors)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """The model is without these weights within: it may be moved, and they stay."""
        nothing = nn.Parameter(torch.empty(0), requires_grad=False)
        for weights in self._on_host:
            weights.put([nothing] * len(weights.tensors))
        try:
            yield
        finally:
            for weights in self._on_host:
                weights.put(weights.tensors)

    def _neighbour(self, layer: int) -> int:
        """The layer that computes next: in the direction so far, and at an end back."""
        last = len(self._on_host) - 1
        if layer != self._last:
            self._step = 1 if layer > self._last else -1
        if layer in (0, last):
            self._step = 1 if layer == 0 else -1
        self._last = layer
        return min(max(layer + self._step, 0), last)

    def _copy(self, layer: int) -> None:
        """Starts a layer's copy to the device, unless it is there."""
        if layer in self._on_device:
            return
        if self._stream is None:
            self._on_device[layer] = self._on_host[layer].copies(self._device), None
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            weights = self._on_host[layer].copies(self._device)
        self._on_device[layer] = weights, self._stream.record_event()


class _Weights:
    """The experts' weights of one block, as they are on the host."""

    def __init__(self, block: nn.Module) -> None:
        self._places = [
            (module, name)
            for module in block.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3 and not parameter.requires_grad
        ]
        self.tensors: list[nn.Parameter] = [getattr(module, name) for module, name in self._places]

    def replace(self, tensors: list[nn.Parameter]) -> None:
        """These are the weights on the host from now on."""
        self.tensors = tensors
        self.put(tensors)

    def put(self, tensors: list[nn.Parameter]) -> None:
        """Has the modules compute with other tensors."""
        for (module, name), tensor in zip(self._places, tensors, strict=True):
            setattr(module, name, tensor)

    def copies(self, device: torch.device) -> list[nn.Parameter]:
        """Of the weights, on another device or this one."""
        moved = (weight.detach().to(device, non_blocking=True, copy=True) for weight in self.tensors)
        return [nn.Parameter(weight, requires_grad=False) for weight in moved]


def on_host(weight: Tensor, device: torch.device) -> nn.Parameter:
    """A weight, frozen now, in host memory, from where it can be copied to the device while that computes."""
    weight = weight.detach()
    if device.type != "cuda":
        weight = weight.cpu()
    elif not weight.is_pinned():
        weight = weight.pin_memory() if isinstance(weight, QuantizedWeight) else _pinned(weight)
    return nn.Parameter(weight, requires_grad=False)


def _pinned(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, device="cpu", pin_memory=True).copy_(weight)  # without a copy in other memory


def keep_on_host(layers: nn.ModuleList, device: torch.device) -> HostExperts:
    """Has decoder layers compute with experts that wait in host memory.

    Args:
        layers: decoder layers, whose MoE block is `mlp`. One without frozen experts stays as it is.
        device: where they compute.
    """
    blocks = _blocks(layers)
    experts = HostExperts(blocks, device)
    for number, block in enumerate(blocks):
        block.forward = partial(_with_experts, experts, number, block.forward)
    return experts


def move_but_experts(model: PreTrainedModel, device: torch.device) -> None:
    """Moves a model to a device, and its experts' weights, which are frozen, to where they can be copied from."""
    layers = model.get_decoder().layers
    for layer in layers:
        layer.mlp.requires_grad_(False)
    with HostExperts(_blocks(layers), device).left_out():
        model.to(device)  # type: ignore[arg-type]


def _blocks(layers: Iterable[nn.Module]) -> list[Any]:
    blocks: list[Any] = [layer.mlp for layer in layers]
    return [block for block in blocks if _Weights(block).tensors]


def _with_experts(experts: HostExperts, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with experts.on_device(number):
        return forward(*args, **kwargs)
