"""Fault tolerance: a checkpoint on Ctrl-C and SIGTERM, atomic checkpoint files, advice when memory runs out."""

import os
import shutil
import signal
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

MIB = 2**20
SIGNALS = (signal.SIGINT, signal.SIGTERM)
OUT_OF_MEMORY_ADVICE = """out of memory. What takes less, the cheapest first:
  output_buffer_mib: 64, of MoEGateGradCallback in the configuration
  --model.checkpointing full: each layer keeps its input only
  --model.offload true: what the layers keep waits in host memory
  --data.batch_size 1, --trainer.accumulate_grad_batches N: a step in parts, each of which counts the same
  --model.quantize nf4: the frozen experts in four bits (needs bitsandbytes)
  --model.experts_on host: the frozen experts wait in host memory (one GPU)
  --model.tile_tokens 8192: the experts on so many tokens at a time, a little slower
  --data.max_length: shorter sequences"""


class CheckpointOnSignal(Callback):
    """On Ctrl-C or SIGTERM, finishes the step, saves a checkpoint to resume from exactly there, and leaves.

    The program ends with status 130 or 143 (`SystemExit`, after every teardown). A second Ctrl-C leaves at once. After
    the last step, while it validates, nothing is left to train: it saves then and ends as usual.

    All ranks leave after the same step if one is asked to; the first has the status, the others end with 0, at which
    their launcher does not end the first before it is done. A rank that fails ends those that it has started, which
    would wait for it in vain.

    Lightning 2.6.6 with `ModelCheckpoint(save_on_exception=True)` does less: SIGTERM leaves between micro-batches,
    whose gradients are lost, with status 0, and on several ranks only the first one's counts; Ctrl-C leaves within a
    step; and a rank that fails would save alone, where saving needs all of them.
    """

    def __init__(self) -> None:
        self._asked_by: int | None = None
        self._step_before_batch = 0
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the signal handlers."""
        self._asked_by = None
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the step."""
        self._step_before_batch = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and leaves, after an optimizer step, if asked to."""
        if trainer.global_step == self._step_before_batch:
            return
        if number := self._asked(trainer):
            self._save(trainer)
            raise SystemExit(128 + number if trainer.is_global_zero else 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves if asked to since the last step; restores the handlers."""
        if self._asked(trainer):
            self._save(trainer)
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores the handlers; ends the ranks that this one started, if it fails."""
        self._restore_handlers()
        if trainer.strategy.launcher is not None and not isinstance(exception, SystemExit):
            trainer.strategy.launcher.kill(signal.SIGKILL)  # one that waits for a GPU does not hear of less

    def _asked(self, trainer: Trainer) -> int:
        """The signal that any rank got, 0 for none."""
        if trainer.world_size == 1:
            return self._asked_by or 0
        number = torch.tensor(self._asked_by or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))

    def _save(self, trainer: Trainer) -> None:
        callback = trainer.checkpoint_callback
        folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else trainer.default_root_dir
        path = Path(folder or ".") / f"interrupted-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"Saved. To go on from step {trainer.global_step}: --ckpt_path {os.path.relpath(path)}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked_by is not None:
            self._restore_handlers()
            raise KeyboardInterrupt
        self._asked_by = number
        rank_zero_info(f"{signal.Signals(number).name}: saving after this step; once more to leave at once")

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is complete: a failure leaves what was there.

    Lightning's own way writes to the system's temporary folder, from where a move to another disk is a copy that can
    stop halfway.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """As Lightning's.

        Raises:
            OSError: where the checkpoint could not be written, with what is free and what to do.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        part = place.with_name(f"{place.name}.part-{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(place)
        except (OSError, RuntimeError) as error:  # torch's writer turns the first into the second
            folder = next(folder for folder in place.parents if folder.exists())
            raise OSError(
                f"the checkpoint {place} could not be written ({error}): {folder} has "
                f"{shutil.disk_usage(folder).free / MIB:,.1f} MiB free. Earlier checkpoints are as they were: make "
                "room, and go on from the last one with --ckpt_path"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As Lightning's, but no code in the file runs unless `--weights_only false` asks for it, wherever it lies."""
        return super().load_checkpoint(path, map_location, weights_only is not False)


class OutOfMemoryAdvice(Callback):
    """Where memory runs out, names the settings that take less, the cheapest first."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Prints the advice; the exception goes on."""
        if isinstance(exception, torch.OutOfMemoryError) or "can't allocate memory" in str(exception):
            warnings.warn(OUT_OF_MEMORY_ADVICE, stacklevel=2)  # by the rank that it happened to
