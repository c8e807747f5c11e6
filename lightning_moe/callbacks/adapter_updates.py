"""AdapterUpdateCheck: says whether every expert's adapter got a gradient and changed."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_moe.adapter_updates import AdapterUpdates, format_report
from lightning_moe.callbacks.log_steps import should_log, warn_without_logger
from lightning_moe.integrations.lightning_strategies import is_strategy


class AdapterUpdateCheck(Callback):
    """Checks once in a fit that every trainable adapter on experts was updated, for every expert.

    Warns with layers, parameters and reasons where one was not. Logs `adapters/experts_not_updated` from then on: how
    many experts, over all layers, have an adapter that was not updated by the checked step.

    Args:
        after_n_steps: after so many optimizer steps, or at the end of a shorter fit of at least two.

    Raises:
        MisconfigurationException: on fewer than two steps.
    """

    def __init__(self, after_n_steps: int = 10) -> None:
        if type(after_n_steps) is not int or after_n_steps < 2:
            raise MisconfigurationException(
                "AdapterUpdateCheck: after_n_steps must be an integer of at least 2 (in the first step LoRA's A has no "
                f"gradient yet), not {after_n_steps!r}"
            )
        self.after_n_steps = after_n_steps
        self._updates: AdapterUpdates | None = None
        self._first_step = self._step_before_batch = 0
        self._experts_not_updated: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warns where there is no logger."""
        if stage == "fit":
            warn_without_logger(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to track the adapters, those of a checkpoint included."""
        self._experts_not_updated = None
        self._updates = AdapterUpdates(pl_module) or None
        self._first_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the step."""
        self._step_before_batch = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Notes which adapters have a gradient, while they are tracked."""
        if self._updates is None:
            return
        strategy: Any = trainer.strategy  # DeepSpeed's calls this after each micro-batch, and steps in the last alone
        is_deepspeed = is_strategy(strategy, "DeepSpeedStrategy")
        if not is_deepspeed or strategy.deepspeed_engine.is_gradient_accumulation_boundary():
            self._updates.note_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Concludes after the last of the steps; logs at the Trainer's interval."""
        concludes = self._updates is not None and trainer.global_step - self._first_step >= self.after_n_steps
        if concludes:
            self._conclude(trainer)
        if self._experts_not_updated is not None and (
            concludes or should_log(trainer, pl_module, self._step_before_batch)
        ):
            pl_module.log("adapters/experts_not_updated", float(self._experts_not_updated))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Concludes in a fit that was shorter."""
        if self._updates is not None and trainer.global_step - self._first_step >= 2:
            metrics = {"adapters/experts_not_updated": float(self._conclude(trainer))}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        self._updates = None

    def _conclude(self, trainer: Trainer) -> int:
        assert self._updates is not None
        self._experts_not_updated, not_updated = self._updates.conclude()
        self._updates = None
        when = f"by step {trainer.global_step}"
        if not_updated:
            report = format_report(not_updated)
            rank_zero_warn(f"AdapterUpdateCheck: {when} some experts' adapters were not updated:\n{report}")
        else:
            rank_zero_info(f"AdapterUpdateCheck: {when} every expert's adapter was updated")
        return self._experts_not_updated
