"""MemoryMonitor: the memory metrics that Lightning's DeviceStatsMonitor does not give, and the MoE layers' activations.

On CUDA they come from PyTorch's allocator; elsewhere from the process's resident memory, so that the same dashboards
work on a laptop.
"""

import math
from contextlib import ExitStack
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_moe.callbacks.log_steps import should_log, warn_without_logger
from lightning_moe.callbacks.restoring import stand_in_front
from lightning_moe.captured_step import replayed_bytes
from lightning_moe.saved_activations import SavedActivations, measure_moe_activations

MIB, GIB = 2**20, 2**30


class MemoryMonitor(Callback):
    """Logs a training's memory at the Trainer's logging interval, each metric the maximum over ranks.

    - `memory/allocated_gib`: held after the interval's last step.
    - `memory/peak_allocated_gib`: the most that was held at any time in the interval.
    - `memory/peak_reserved_gib`: the most that the allocator had taken from the device.
    - `memory/step_peak_gib`: the largest difference between a step's peak and what was held when it began.
    - `memory/moe_activations_mib`: what the MoE layers saved for backward on the chosen step, all together, and
      `memory/moe_activations_baseline_mib`: what the default implementation would have saved, NaN where it cannot run.

    GiB are 2^30 bytes. On CUDA the allocator's peak counters are reset at each training step. Elsewhere the metrics
    are the process's resident memory, sampled before and after forward, backward and step; reserved is the same.

    Attributes:
        activations: what each MoE layer saved on the chosen step; empty before it.

    Args:
        measure_activations_at_step: the optimizer step, from 0, on which each MoE layer is run on the side to measure
            what it saves; a run that resumes after it measures at once. None leaves that out.

    Raises:
        MisconfigurationException: on an argument out of range.
    """

    def __init__(self, measure_activations_at_step: int | None = None) -> None:
        step = measure_activations_at_step
        if step is not None and (type(step) is not int or step < 0):
            raise MisconfigurationException(
                f"MemoryMonitor: measure_activations_at_step must be None or an integer of at least 0, not {step!r}"
            )
        self.measure_activations_at_step = step
        self.activations: list[SavedActivations] = []
        self._measurement = ExitStack()
        self._held = self._step_peak = self._step_rise = self._peak = self._peak_reserved = 0
        self._step_before_batch = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier fit."""
        if stage != "fit":
            return
        warn_without_logger(trainer, self)
        stand_in_front(trainer, self, restore=self._measurement.close)
        self.activations = []
        self._step_rise = self._peak = self._peak_reserved = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes what is held."""
        self._step_before_batch = trainer.global_step
        device = pl_module.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            replayed_bytes(device)
        self._held = self._step_peak = _allocated(device)
        step = self.measure_activations_at_step
        if step is not None and trainer.global_step >= step and not self.activations:
            self.activations = self._measurement.enter_context(measure_moe_activations(pl_module))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Samples where there is no allocator to ask; the most is saved here."""
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
            replayed = self._held + replayed_bytes(pl_module.device)
            self._step_peak = max(torch.cuda.max_memory_allocated(pl_module.device), replayed)
            reserved = torch.cuda.max_memory_reserved(pl_module.device)
        self._peak = max(self._peak, self._step_peak)
        self._peak_reserved = max(self._peak_reserved, reserved)
        self._step_rise = max(self._step_rise, self._step_peak - self._held)
        if not should_log(trainer, pl_module, self._step_before_batch):
            return
        metrics = {
            "memory/allocated_gib": _allocated(pl_module.device) / GIB,
            "memory/peak_allocated_gib": self._peak / GIB,
            "memory/peak_reserved_gib": self._peak_reserved / GIB,
            "memory/step_peak_gib": self._step_rise / GIB,
        }
        if self.activations:
            metrics["memory/moe_activations_mib"] = sum(layer.num_bytes for layer in self.activations) / MIB
            baseline = [layer.baseline_num_bytes for layer in self.activations]
            known = [math.nan if num_bytes is None else num_bytes for num_bytes in baseline]
            metrics["memory/moe_activations_baseline_mib"] = sum(known) / MIB
        pl_module.log_dict(metrics, sync_dist=True, reduce_fx="max")
        self._peak = self._peak_reserved = self._step_rise = 0

    def _sample(self, device: torch.device) -> None:
        if device.type != "cuda":
            self._step_peak = max(self._step_peak, _allocated(device))


def _allocated(device: torch.device) -> int:
    """Bytes held now: by PyTorch's allocator on CUDA, else the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
