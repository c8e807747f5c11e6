"""StepSpeed: seconds and tokens of a step, and the share of the card's arithmetic that the model's own needs."""

import time
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor


class StepSpeed(Callback):
    """Logs `speed/seconds_per_step`, `speed/tokens_per_second` and, where the card is known, `speed/mfu`.

    Over the optimizer steps since the last log, this process's own, without validation. The device is waited for at log
    steps only. `mfu` is the model FLOPs utilisation: what the model's own arithmetic needs, from `pl_module.step_flops`
    (tokens, sum of the documents' squared lengths), over what the card's datasheet promises for the model's dtype. It
    is left out, with a warning, where that fails.
    """

    def __init__(self) -> None:
        self._available: int | None = None
        self._begin(0, torch.device("cpu"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        dtype = getattr(torch, pl_module.hparams["dtype"])
        self._available = get_available_flops(pl_module.device, dtype) if pl_module.device.type == "cuda" else None
        self._begin(trainer.global_step, pl_module.device)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._stopped = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the clock on."""
        self._since += time.perf_counter() - self._stopped

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Counts the batch; logs at the Trainer's interval."""
        self._tokens += batch["input_ids"].numel()
        self._squares += batch["cu_seq_lens_q"].diff().double().square().sum()
        steps = trainer.global_step - self._step
        if not steps or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = time.perf_counter() - self._since
        figures = {
            "speed/seconds_per_step": seconds / steps,
            "speed/tokens_per_second": self._tokens / seconds,
        }
        if self._available:
            try:
                flops = pl_module.step_flops(self._tokens, int(self._squares))  # type: ignore[operator]
                figures["speed/mfu"] = flops / seconds / self._available
            except Exception as error:  # no reason to end a run
                rank_zero_warn(f"speed/mfu is left out: {error!r}")
                self._available = None
        pl_module.log_dict(figures)
        self._begin(trainer.global_step, pl_module.device)

    def _begin(self, step: int, device: torch.device) -> None:
        self._step, self._tokens, self._since, self._stopped = step, 0, time.perf_counter(), 0.0
        self._squares: Tensor = torch.zeros((), dtype=torch.float64, device=device)
