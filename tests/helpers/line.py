"""A module of one number, and a Trainer that leaves on signals: little to import, for ranks that Lightning starts."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lora.fault_tolerance import AtomicCheckpointIO, CheckpointOnSignal


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return (self.weight - batch.float().mean()).square()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class At(Callback):
    """Calls something at the beginning of some batch."""

    def __init__(self, batch_idx, action):
        self.batch_idx, self.action = batch_idx, action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch_idx:
            self.action()


def trainer(folder, *callbacks, **options):
    options = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False} | options
    return Trainer(
        accelerator="cpu", default_root_dir=folder, plugins=[AtomicCheckpointIO()],
        callbacks=[CheckpointOnSignal(), ModelCheckpoint(folder / "kept", save_last=True), *callbacks], **options,
    )  # fmt: skip
