"""What the MoE layers of a model really save for backward, measured beside what the default implementation saves."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from lightning_moe.discovery import MoELayer, find_moe_layers
from lightning_moe.integrations.peft_experts import enclosing_names
from lightning_moe.ops.autograd import measuring
from lightning_moe.ops.quantized import QuantizedWeight
from lightning_moe.patch_state import default_implementation


@dataclass(frozen=True)
class SavedActivations:
    """What one execution of one MoE layer saved for backward.

    Attributes:
        name: the layer's path in the model; PEFT's wrappers around it are included in what was measured.
        num_tokens: tokens in that execution.
        num_bytes: bytes saved, parameters not counted, shared storages counted once.
        baseline_num_bytes: what the default implementation saves for the same execution; the same number where the
            layer runs it anyway, and None where it cannot run, such as for want of memory.
        shapes: the shape of each tensor saved, views as autograd saw them.
    """

    name: str
    num_tokens: int
    num_bytes: int
    baseline_num_bytes: int | None
    shapes: tuple[tuple[int, ...], ...]


@contextmanager
def measure_moe_activations(model: nn.Module) -> Iterator[list[SavedActivations]]:
    """Measures, for each MoE layer that runs with gradients inside the block, what its first execution saves.

    The layer is run on the side, on detached inputs, as it is and with the default implementation, and both results
    are thrown away. The model's own graph, and activation checkpointing in it, are not touched.

    Args:
        model: holds the layers, patched or not.

    Yields:
        A list that fills as layers run.
    """
    measured: list[SavedActivations] = []
    handles = []
    for layer in find_moe_layers(model):
        *_, outermost = (layer.name, *enclosing_names(layer.name))
        handles.append(_measure_first_run(layer, model.get_submodule(outermost), measured))
    try:
        yield measured
    finally:
        for handle in handles:
            handle.remove()


def _measure_first_run(layer: MoELayer, outermost: nn.Module, measured: list[SavedActivations]) -> RemovableHandle:
    is_measured = False

    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal is_measured
        if is_measured or not torch.is_grad_enabled():
            return
        is_measured = True
        measure.needs_python = False  # type: ignore[attr-defined]
        num_bytes, shapes = _saved_by(module, args, kwargs)
        baseline: int | None = num_bytes
        if layer.is_dispatched:
            try:
                with default_implementation(layer.module):
                    baseline, _ = _saved_by(module, args, kwargs)
            except Exception as error:  # no reason to end a training that does not run it
                baseline = None
                rank_zero_warn(f"the default implementation's activations cannot be measured: {error}")
        num_tokens = next(value.shape[0] for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        measured.append(SavedActivations(layer.name, num_tokens, num_bytes, baseline, shapes))

    measure.needs_python = True  # type: ignore[attr-defined]  # for one step, which is no part of a CUDA graph
    return outermost.register_forward_pre_hook(measure, with_kwargs=True)


def _saved_by(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Bytes and shapes of what a call of `module` saves for backward."""
    saved: list[tuple[Any, tuple[int, ...]]] = []  # not the tensors, which hold the graph that would hold them

    def record(tensor: Tensor) -> None:  # ZeRO-3 gives the parameters their storages while the module runs
        own = {parameter.untyped_storage() for parameter in module.parameters()}
        if not isinstance(tensor, QuantizedWeight) and tensor.untyped_storage() not in own:
            saved.append((tensor.untyped_storage(), tuple(tensor.shape)))

    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices), measuring(), saved_tensors_hooks(record, lambda nothing: nothing):
        module.forward(*_detached(args), **_detached(kwargs))  # without the hooks that others put on the module
    storages = {storage for storage, _ in saved}
    return sum(storage.nbytes() for storage in storages), tuple(shape for _, shape in saved)


def _detached(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _detached(value) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_detached(value) for value in values)
    if isinstance(values, Tensor) and values.is_floating_point():
        return values.detach().requires_grad_(values.requires_grad)
    return values
