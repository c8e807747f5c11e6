"""ExpertLoadMonitor: logs how evenly the experts are loaded, on any run, patched or not, and draws a heat map."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_moe.callbacks.log_steps import should_log, warn_without_logger
from lightning_moe.callbacks.ranks import data_parallel_group
from lightning_moe.callbacks.restoring import stand_in_front
from lightning_moe.expert_load import ExpertLoadCounter, plot_expert_load
from lightning_moe.metrics import ExpertLoad


class ExpertLoadMonitor(Callback):
    """Counts the rows, (token, slot) pairs, that each expert gets in training.

    Logs at the Trainer's logging interval, summed over ranks since the last log:

    - `moe/load_max_over_mean`: of the layer where it is largest, the rows of its most loaded expert over their mean.
    - `moe/idle_experts`: experts, over all layers, that got no row.

    At the end of a fit it writes a heat map of the whole fit, `expert_load.png` in `trainer.log_dir`, if matplotlib is
    installed. Layers whose experts are spread over ranks (expert parallelism) are left out.

    Attributes:
        expert_load: the rows of each expert since the fit began, (experts,) int64 on the CPU, summed over ranks, by
            layer. Grows when metrics are logged and at the end of training; stays until the next fit.
        heat_map: where the heat map is; None before the end of a fit.
    """

    def __init__(self) -> None:
        self.expert_load: dict[str, Tensor] = {}
        self.heat_map: Path | None = None
        self._counter: ExpertLoadCounter | None = None
        self._metric = ExpertLoad(sync_on_compute=False)
        self._step_before_batch = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier fit."""
        if stage == "fit":
            warn_without_logger(trainer, self)
            self.expert_load, self.heat_map = {}, None
            stand_in_front(trainer, self, restore=self._stop)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting."""
        self._counter = ExpertLoadCounter(pl_module)
        self._metric.to(pl_module.device)
        self._metric.reset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the step."""
        self._step_before_batch = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs at the Trainer's interval; between log steps nothing is read from the device."""
        if should_log(trainer, pl_module, self._step_before_batch):
            self._metric.update(self._drain(trainer))
            pl_module.log_dict({f"moe/{name}": value.float() for name, value in self._metric.compute().items()})
            self._metric.reset()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the last rows and draws the heat map."""
        self._drain(trainer)
        self._stop()
        folder = trainer.log_dir  # asked of every rank, or it hangs
        if folder is None or not trainer.is_global_zero or not self.expert_load:
            return
        path = Path(folder) / "expert_load.png"
        try:
            figure = plot_expert_load(self.expert_load)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=130)
        except (ImportError, OSError) as error:
            rank_zero_warn(f"ExpertLoadMonitor draws no heat map: {error}")
        else:
            self.heat_map = path

    def _drain(self, trainer: Trainer) -> list[Tensor]:
        """The rows of each layer since the last time, summed over ranks; added to `expert_load`."""
        if self._counter is None:
            return []
        rows = self._counter.drain(self._metric.device)
        if not rows:
            return []
        group = data_parallel_group(trainer.strategy)
        summed = trainer.strategy.reduce(torch.cat(list(rows.values())), group, reduce_op="sum")
        sizes = [part.numel() for part in rows.values()]
        for name, part in zip(rows, summed.cpu().split(sizes), strict=True):
            self.expert_load[name] = self.expert_load.get(name, 0) + part
        return list(summed.split(sizes))

    def _stop(self) -> None:
        if self._counter is not None:
            self._counter.remove()
            self._counter = None
