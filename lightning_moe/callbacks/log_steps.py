"""When callbacks log: at the batches whose values Lightning hands to its loggers."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn


def should_log(trainer: Trainer, pl_module: LightningModule, step_before_batch: int) -> bool:
    """Whether what is logged at the end of this batch reaches a logger.

    Under gradient accumulation only the micro-batch that steps does. Lightning counts every batch of a module which
    optimizes by hand.

    Args:
        trainer: runs a fit.
        pl_module: is trained.
        step_before_batch: `trainer.global_step` when the batch began.
    """
    if pl_module.automatic_optimization:
        stepped, num_batches = trainer.global_step != step_before_batch, trainer.global_step
    else:
        stepped, num_batches = True, trainer.fit_loop.total_batch_idx + 1
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return stepped and every > 0 and (num_batches % every == 0 or trainer.should_stop)


def warn_without_logger(trainer: Trainer, callback: Callback) -> None:
    """Warns that what a callback logs goes nowhere, if the Trainer has no logger."""
    if not trainer.loggers:
        rank_zero_warn(
            f"{type(callback).__name__} logs nowhere: the Trainer has no logger. Leave `logger` at its default, or "
            "give it one such as CSVLogger"
        )
