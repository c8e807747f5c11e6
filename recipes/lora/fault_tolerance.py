"""Fault tolerance: a checkpoint on Ctrl-C and SIGTERM, atomic checkpoint files, advice when memory runs out."""

import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_moe import MoEGateGradCallback
from lora.checkpointing import kept_bytes

MIB, GIB = 2**20, 2**30
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TILE_TOKENS, OUTPUT_BUFFER_MIB = 8192, 64


class CheckpointOnSignal(Callback):
    """On Ctrl-C or SIGTERM, finishes the step, saves a checkpoint to resume from exactly there, and leaves.

    The program ends with status 130 or 143 (`SystemExit`, after every teardown). A second Ctrl-C leaves at once. After
    the last step, while it validates, nothing is left to train: it saves then and ends as usual. Outside the main
    thread signals are left to Lightning. Before training it checks that there is room for checkpoints.

    All ranks leave after the same step if one is asked to; the first has the status, the others end with 0, at which
    their launcher does not end the first before it is done. A rank that fails ends those that it has started, which
    would wait for it in vain.

    Lightning 2.6.6 with `ModelCheckpoint(save_on_exception=True)` does less: SIGTERM leaves between micro-batches,
    whose gradients are lost, with status 0, and on several ranks only the first one's counts; Ctrl-C leaves within a
    step; and a rank that fails would save alone, where saving needs all of them.

    Raises:
        MisconfigurationException: where the checkpoints' folder cannot be written to, or has no room for one.
    """

    def __init__(self) -> None:
        self._asked_by: int | None = None
        self._step_before_batch = 0
        self._handlers: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks for room."""
        if trainer.is_global_zero:
            trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            check_room(checkpoint_folder(trainer), 3 * 4 * trained)  # float32 values and AdamW's two moments

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the signal handlers."""
        self._asked_by = None
        if threading.current_thread() is threading.main_thread():
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
        path = checkpoint_folder(trainer) / f"interrupted-step={trainer.global_step}.ckpt"
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


def checkpoint_folder(trainer: Trainer) -> Path:
    """Where the run's checkpoints go."""
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and callback.dirpath:
        return Path(callback.dirpath)
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"


def check_room(folder: Path, num_bytes: int) -> None:
    """Whether a folder takes a file, and so many bytes.

    Raises:
        MisconfigurationException: saying what is wrong and the remedy.
    """
    remedy = "set trainer.default_root_dir and the loggers' save_dir to another folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".room-{os.getpid()}"
        probe.write_bytes(b"room")
        probe.unlink()
    except OSError as error:
        raise MisconfigurationException(f"checkpoints cannot be written to {folder}: {error}. {remedy}") from error
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise MisconfigurationException(
            f"a checkpoint takes about {num_bytes / MIB:,.0f} MiB and {folder} has {free / MIB:,.0f} MiB free: "
            f"make room, or {remedy}"
        )


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
            written = part.stat().st_size if part.exists() else 0
            folder = next(folder for folder in place.parents if folder.exists())
            raise OSError(
                f"the checkpoint {place} could not be written ({error}): {written / MIB:,.1f} MiB went in, "
                f"{folder} has {shutil.disk_usage(folder).free / MIB:,.1f} MiB free. Earlier checkpoints are as they "
                "were: make room, and go on from the last one with --ckpt_path"
            ) from error
        finally:
            if part.exists():
                part.unlink()

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As Lightning's, but no code in the file runs unless `--weights_only false` asks for it, wherever it lies."""
        return super().load_checkpoint(path, map_location, weights_only is not False)


class OutOfMemoryAdvice(Callback):
    """Where memory runs out, says how much there was and which settings to change, the cheapest first."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Prints the advice; the exception goes on."""
        if isinstance(exception, torch.OutOfMemoryError) or "can't allocate memory" in str(exception):
            rank = f"rank {trainer.global_rank}, " * (trainer.world_size > 1)
            lines = [f"{rank}out of memory. {_measured(pl_module.device)}", *advice(trainer, pl_module)]
            warnings.warn("\n".join(lines), stacklevel=2)  # by the rank that it happened to


def _measured(device: torch.device) -> str:
    if device.type != "cuda":
        memory = psutil.virtual_memory()
        resident = psutil.Process().memory_info().rss
        return f"Resident {resident / GIB:.2f} GiB, free {memory.available / GIB:.2f} of {memory.total / GIB:.2f} GiB"
    held, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    total = torch.cuda.mem_get_info(device)[1]
    return f"Peak {held / GIB:.2f} GiB allocated, {reserved / GIB:.2f} reserved, of {total / GIB:.2f}"


def advice(trainer: Trainer, pl_module: LightningModule) -> Iterator[str]:
    """Settings that are not yet as lean as they can be, a line each: the option, and what it does."""
    options, data = pl_module.hparams, trainer.datamodule  # type: ignore[attr-defined]
    tokens = data.max_length * data.batch_size
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MoEGateGradCallback):
            if not callback.enabled:
                yield "  unset LIGHTNING_MOE_GATEGRAD: the callback is off"
            elif callback.output_buffer_mib > OUTPUT_BUFFER_MIB:
                yield f"  output_buffer_mib: {OUTPUT_BUFFER_MIB}, of MoEGateGradCallback in the configuration"
    if options["liger"] is False:
        yield "  --model.liger null: norms and rotary embedding without float32 copies"
    mode, offload = pl_module.checkpointing  # type: ignore[misc]
    if mode != "full" and not offload:
        yield "  --model.checkpointing full: each layer keeps its input only"
    if not offload and pl_module.device.type == "cuda":
        network: Any = pl_module.network
        kept = kept_bytes(network.get_base_model().config, "full", getattr(torch, options["dtype"]))
        yield f"  --model.offload true: the layers' inputs, {tokens * kept / MIB:,.0f} MiB, to the host"
    if data.batch_size > 1:
        yield (
            f"  --data.batch_size 1, --trainer.accumulate_grad_batches {data.batch_size}: a step in parts, each of "
            "which counts the same, however many tokens it has"
        )
    if tokens > TILE_TOKENS and not 0 < options["tile_tokens"] <= TILE_TOKENS:
        yield f"  --model.tile_tokens {TILE_TOKENS}: the experts on so many tokens at a time, a little slower"
    yield f"  --data.max_length {data.max_length // 2}: shorter sequences"
    if pl_module.device.type == "cuda":
        reserved = torch.cuda.memory_reserved(pl_module.device) - torch.cuda.memory_allocated(pl_module.device)
        if reserved > 2 * GIB:
            yield f"  PYTORCH_ALLOC_CONF=expandable_segments:True: {reserved / GIB:.1f} GiB are in pieces"
