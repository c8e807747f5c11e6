"""StepRecorder: each step's loss, seconds and memory in a JSON file, without waiting for the device in between."""

import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepRecorder(Callback):
    """Writes `losses`, `seconds`, `peak_gib` and `above_gib`, a list over the steps each, at the end of a fit.

    On CUDA, seconds lie between events on the device's own timeline, and losses are read at the end: the host waits for
    the device once. (Lightning's ThroughputMonitor waits at every step, and a logger that logs every step does.) Memory
    is the allocator's: the most that was held in a step, and that above what was held when the step began; the maximum
    over the ranks. Elsewhere memory is the process's resident memory, sampled as backward begins.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._losses: list[torch.Tensor] = []
        self._marks: list[Any] = []
        self._held: list[int] = []
        self._peaks: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._mark(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes what is held."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._held.append(_peak(pl_module))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Samples memory, for want of a peak where there is no allocator to ask."""
        self._peaks.append(max(self._held[-1], _peak(pl_module)))  # resident memory may shrink within a step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the step's numbers, the loss left on its device."""
        self._peaks[-1] = max(self._peaks[-1], _peak(pl_module))
        self._losses.append(outputs["train/loss"].detach())
        self._mark(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for the device and writes the file."""
        peaks, held = torch.tensor([self._peaks, self._held], dtype=torch.float64, device=pl_module.device) / 2**30
        memory = trainer.strategy.reduce(torch.stack([peaks, peaks - held]), reduce_op="max")
        losses = torch.stack(self._losses).tolist()
        steps = zip(self._marks[:-1], self._marks[1:], strict=True)
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
            seconds = [start.elapsed_time(end) / 1e3 for start, end in steps]
        else:
            seconds = [end - start for start, end in steps]
        if trainer.is_global_zero:
            peak, above = memory.tolist()  # type: ignore[union-attr]
            numbers = {"losses": losses, "seconds": seconds, "peak_gib": peak, "above_gib": above}
            self._path.write_text(json.dumps(numbers))

    def _mark(self, pl_module: LightningModule) -> None:
        if pl_module.device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record()


def _peak(pl_module: LightningModule) -> int:
    if pl_module.device.type == "cuda":
        return torch.cuda.max_memory_allocated(pl_module.device)
    return psutil.Process().memory_info().rss
