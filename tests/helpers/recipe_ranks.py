"""A fit of the tiny recipe on one rank or several, and what its checkpoints hold."""

import warnings

import pytest
import torch
from helpers.recipe import data, module, trainer
from helpers.reference import relative_error
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lora.fault_tolerance import AtomicCheckpointIO
from lora.sharding import FullyShardStrategy
from qwen3_lora import UNHELPFUL_WARNINGS

from lightning_moe import AdapterExport, AdapterUpdateCheck, ExpertLoadMonitor, MoEGateGradCallback
from lightning_moe.integrations.sharding import is_sharded

RECIPE_WARNINGS = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in UNHELPFUL_WARNINGS),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]
HALFWAY, LAST = "step=2.ckpt", "step=4.ckpt"

STRATEGIES = {
    "auto": lambda devices: "auto",
    "ddp": lambda devices: DDPStrategy(),
    "fsdp": lambda devices: FullyShardStrategy(devices),
}


def train(folder, kind, ckpt_path=None, accelerator="cpu", several=2, **options):
    """Four steps on this rank, alone if `kind` is "auto"; a checkpoint after the second and the last."""
    warnings.simplefilter("ignore")
    devices = 1 if kind == "auto" else several
    network = module(**{"experts": True} | options)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    run = trainer(
        folder, 4, MoEGateGradCallback(), ExpertLoadMonitor(), AdapterUpdateCheck(2), AdapterExport(),
        saving, enable_checkpointing=True,
        logger=CSVLogger(folder, "", version=""), log_every_n_steps=1, strategy=STRATEGIES[kind](devices),
        accelerator=accelerator, devices=devices, use_distributed_sampler=False, gradient_clip_val=0.5,
        limit_val_batches=2, val_check_interval=2, check_val_every_n_epoch=None,
        plugins=[AtomicCheckpointIO()], precision="bf16-mixed" if options.get("dtype") == "bfloat16" else "32-true",
    )  # fmt: skip
    run.fit(network, data(batch_size=4 // devices), ckpt_path=ckpt_path)
    assert is_sharded(network) == (kind == "fsdp")


def values(checkpoint):
    """What a checkpoint has for the model and the optimizer, by name."""
    content = torch.load(checkpoint, "cpu", weights_only=True)
    state = content["optimizer_states"][0]["state"]
    moments = {f"{name}.{what}": value for name, each in state.items() for what, value in each.items()}
    return content["state_dict"] | moments


def deviation(ours, wanted):
    """The largest relative error of any value."""
    assert ours.keys() == wanted.keys()
    return max(relative_error(ours[name], value) for name, value in wanted.items())
