"""MemoryMonitor: the memory figures that Lightning's DeviceStatsMonitor does not give, and the MoE layers' tape.

On CUDA they come from PyTorch's allocator; elsewhere from the process's resident memory, so that the same dashboards
work on a laptop.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from lightning_moe.discovery import MoELayer, find_moe_layers
from lightning_moe.patching import stock_code

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class LayerTape:
    """What one execution of one MoE layer kept for backward.

    Attributes:
        name: the layer's path in the model, PEFT's wrappers included in what was measured.
        num_tokens: tokens in that execution.
        num_bytes: bytes kept, parameters not counted, shared storages counted once.
        stock_num_bytes: what stock code keeps for the same execution; the same number where the layer runs it anyway,
            and None where stock code cannot run it: for want of memory, say.
        shapes: the shape of each tensor kept, views as autograd saw them.
    """

    name: str
    num_tokens: int
    num_bytes: int
    stock_num_bytes: int | None
    shapes: tuple[tuple[int, ...], ...]


@contextmanager
def measure_moe_tape(model: nn.Module) -> Iterator[list[LayerTape]]:
    """Measures, for each MoE layer that runs with gradients inside the block, what its first execution keeps.

    The layer is run on the side, on detached inputs, as it is and with stock code, and both copies thrown away; the
    model's own graph, and activation checkpointing in it, are not touched.

    Args:
        model: holds the layers, patched or not.

    Yields:
        A list that fills as layers run.
    """
    tapes: list[LayerTape] = []
    handles = []
    for layer in find_moe_layers(model):
        outermost = layer.name
        while outermost.endswith((".base_layer", "._orig_mod")):
            outermost = outermost.rpartition(".")[0]
        handles.append(_measure_first_run(layer, model.get_submodule(outermost), tapes))
    try:
        yield tapes
    finally:
        for handle in handles:
            handle.remove()


def _measure_first_run(layer: MoELayer, outermost: nn.Module, tapes: list[LayerTape]) -> RemovableHandle:
    measured = False

    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal measured
        if measured or not torch.is_grad_enabled():
            return
        measured = True
        num_bytes, shapes = _kept_by(module, args, kwargs)
        stock_num_bytes: int | None = num_bytes
        if layer.is_dispatched:
            try:
                with stock_code(layer.module):
                    stock_num_bytes, _ = _kept_by(module, args, kwargs)
            except Exception as error:  # no reason to end a training that does not run it
                stock_num_bytes = None
                rank_zero_warn(f"MemoryMonitor: stock code's tape cannot be measured: {error}")
        num_tokens = next(value.shape[0] for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        tapes.append(LayerTape(layer.name, num_tokens, num_bytes, stock_num_bytes, shapes))

    return outermost.register_forward_pre_hook(measure, with_kwargs=True)


def _kept_by(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Bytes and shapes of what a call of `module` keeps for backward."""
    kept: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:  # ZeRO-3 gives the parameters their storages while the module runs
        if tensor.untyped_storage() not in {parameter.untyped_storage() for parameter in module.parameters()}:
            kept.append(tensor)
        return tensor

    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices), saved_tensors_hooks(record, lambda tensor: tensor):
        module.forward(*_detached(args), **_detached(kwargs))  # without the hooks that others put on the module
    storages = {tensor.untyped_storage() for tensor in kept}
    return sum(storage.nbytes() for storage in storages), tuple(tuple(tensor.shape) for tensor in kept)


def _detached(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _detached(value) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_detached(value) for value in values)
    if isinstance(values, Tensor) and values.is_floating_point():
        return values.detach().requires_grad_(values.requires_grad)
    return values


def stand_first(trainer: Trainer, callback: Callback) -> None:
    """Moves a callback before the others, so that no other one's failure keeps it from cleaning up."""
    others = [other for other in trainer.callbacks if other is not callback]  # type: ignore[attr-defined]
    trainer.callbacks = [callback, *others]  # type: ignore[attr-defined]  # a new list: Lightning iterates over the old


def logs_now(trainer: Trainer, pl_module: LightningModule, step_before_batch: int) -> bool:
    """Whether what is logged at the end of this batch reaches the logger.

    Under gradient accumulation only the micro-batch that steps does; Lightning counts every one that a module which
    optimizes by hand is given.
    """
    stepped = trainer.global_step != step_before_batch or not pl_module.automatic_optimization
    connector: Any = getattr(trainer, "_logger_connector", None)
    if hasattr(connector, "should_update_logs"):
        return stepped and connector.should_update_logs
    rank_zero_warn("Lightning has no _logger_connector.should_update_logs any more: log steps are counted here")
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return stepped and every > 0 and (trainer.global_step % every == 0 or trainer.should_stop)


class MemoryMonitor(Callback):
    """Logs a training's memory at the Trainer's logging interval, each figure the maximum over the processes.

    - `memory/allocated_gib`: held after the interval's last step.
    - `memory/peak_allocated_gib`: the most that was held at any time in the interval.
    - `memory/peak_reserved_gib`: the most that the allocator had taken from the device.
    - `memory/step_peak_gib`: the largest difference between a step's peak and what was held when it began.
    - `memory/moe_tape_mib`: what the MoE layers kept for backward on the chosen step, all together, and
      `memory/moe_tape_stock_mib`: what stock code would have kept, NaN where it cannot run.

    GiB are 2^30 bytes. On CUDA the allocator's peak counters are reset at each training step. Elsewhere the figures
    are the process's resident memory, sampled before and after forward, backward and step; reserved is the same.

    Attributes:
        tape: what each MoE layer kept on the chosen step; empty before it.

    Args:
        tape_at_step: the optimizer step, from 0, on which each MoE layer is run on the side to measure its tape; a run
            that resumes after it measures at once. None leaves that out.

    Raises:
        MisconfigurationException: on an argument out of range, here; on a fit without a logger, in `setup`.
    """

    def __init__(self, tape_at_step: int | None = None) -> None:
        if tape_at_step is not None and (type(tape_at_step) is not int or tape_at_step < 0):
            raise MisconfigurationException(
                f"MemoryMonitor: tape_at_step must be None or an integer of at least 0, not {tape_at_step!r}"
            )
        self.tape_at_step = tape_at_step
        self.tape: list[LayerTape] = []
        self._measurement = ExitStack()
        self._held = self._step_peak = self._step_rise = self._peak = self._peak_reserved = 0
        self._step_before_batch = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a fit whose figures would go nowhere; forgets an earlier one."""
        if stage != "fit":
            return
        if not trainer.loggers:
            raise MisconfigurationException(
                "MemoryMonitor has nowhere to log to: give the Trainer a logger such as CSVLogger, or leave this out"
            )
        stand_first(trainer, self)
        self.tape = []
        self._step_rise = self._peak = self._peak_reserved = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes what is held."""
        self._step_before_batch = trainer.global_step
        device = pl_module.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._held = self._step_peak = _allocated(device)
        if self.tape_at_step is not None and trainer.global_step >= self.tape_at_step and not self.tape:
            self.tape = self._measurement.enter_context(measure_moe_tape(pl_module))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Samples where there is no allocator to ask; the tape is at its longest here."""
        self._sample(pl_module.device)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples where there is no allocator to ask."""
        self._sample(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the step's peak and logs at the Trainer's interval."""
        self._measurement.close()
        self._sample(pl_module.device)
        reserved = self._step_peak
        if pl_module.device.type == "cuda":
            self._step_peak = torch.cuda.max_memory_allocated(pl_module.device)
            reserved = torch.cuda.max_memory_reserved(pl_module.device)
        self._peak = max(self._peak, self._step_peak)
        self._peak_reserved = max(self._peak_reserved, reserved)
        self._step_rise = max(self._step_rise, self._step_peak - self._held)
        if not logs_now(trainer, pl_module, self._step_before_batch):
            return
        figures = {
            "memory/allocated_gib": _allocated(pl_module.device) / GIB,
            "memory/peak_allocated_gib": self._peak / GIB,
            "memory/peak_reserved_gib": self._peak_reserved / GIB,
            "memory/step_peak_gib": self._step_rise / GIB,
        }
        if self.tape:
            figures["memory/moe_tape_mib"] = sum(layer.num_bytes for layer in self.tape) / MIB
            stock = [math.nan if layer.stock_num_bytes is None else layer.stock_num_bytes for layer in self.tape]
            figures["memory/moe_tape_stock_mib"] = sum(stock) / MIB
        pl_module.log_dict(figures, sync_dist=True, reduce_fx="max")
        self._peak = self._peak_reserved = self._step_rise = 0

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the measurement's hooks off."""
        self._measurement.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the measurement's hooks off."""
        self._measurement.close()

    def _sample(self, device: torch.device) -> None:
        if device.type != "cuda":
            self._step_peak = max(self._step_peak, _allocated(device))


def _allocated(device: torch.device) -> int:
    """Bytes held now: by PyTorch's allocator on CUDA, else the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
