"""StepRecorder: each step's loss, seconds and memory in a JSON file, without waiting for the device in between."""

import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

GIB = 2**30


class StepRecorder(Callback):
    """Writes `losses`, `seconds`, `peak_gib` and `above_gib`, a list over the steps each, at the end of a fit.

    On CUDA, seconds lie between events on the device's own timeline, and losses are read at the end: the host waits for
    the device once. (Lightning's ThroughputMonitor waits at every step, and a logger that logs every step does.) Memory
    is the allocator's: the most that was held in a step, and that above what was held when the step began; the maximum
    over the ranks. Elsewhere memory is the process's resident memory, sampled before and after backward.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._losses: list[Tensor] = []
        self._marks: list[Any] = []
        self._memory: list[tuple[int, int]] = []
        self._held = self._peak = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._marks.append(_mark(pl_module.device))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes what is held."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._held = self._peak = _peak(pl_module.device)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Samples memory."""
        self._peak = max(self._peak, _peak(pl_module.device))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the step's numbers, the loss left on its device."""
        self._peak = max(self._peak, _peak(pl_module.device))
        self._memory.append((self._peak, self._peak - self._held))
        self._losses.append(outputs["train/loss"].detach())
        self._marks.append(_mark(pl_module.device))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for the device and writes the file."""
        bytes_ = torch.tensor(self._memory, dtype=torch.float64, device=pl_module.device)
        peak, above = (trainer.strategy.reduce(bytes_, reduce_op="max") / GIB).T.tolist()  # type: ignore[union-attr]
        losses = torch.stack(self._losses).tolist()
        if trainer.is_global_zero:
            seconds = [_seconds(start, end) for start, end in zip(self._marks[:-1], self._marks[1:], strict=True)]
            numbers = {"losses": losses, "seconds": seconds, "peak_gib": peak, "above_gib": above}
            self._path.write_text(json.dumps(numbers))


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
