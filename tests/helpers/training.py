"""Short fits on the CPU, what they logged, and callbacks that fail in them."""

import csv

import pytest
import torch
from helpers.models import experts_modules, is_patched
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_moe.patch_state import patched_modules

LIGHTNING_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*predict_dataloader"),
]


def trainer(folder, *callbacks, **options):
    """Four steps on the CPU, each logged to a CSV file in the folder."""
    defaults = {
        "max_steps": 4,
        "log_every_n_steps": 1,
        "logger": CSVLogger(folder, name="", version=""),
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(callbacks=list(callbacks), default_root_dir=folder, **defaults | options)


def fit(folder, module, *callbacks, **options):
    """Fits the module as `trainer` has it; the module."""
    torch.manual_seed(0)
    trainer(folder, *callbacks, **options).fit(module)
    return module


def logged(folder, name):
    """The values of a metric in the folder's CSV file."""
    with open(folder / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def is_restored(model):
    """Whether nothing of a patch is left on a model."""
    configs = {id(module.config) for module in experts_modules(model)}
    return not patched_modules(model) and not is_patched(model) and len(configs) == 1


class Fails(Callback):
    """Raises in one hook."""

    def __init__(self, hook, error):
        def fail(*_, **__):
            raise error

        setattr(self, hook, fail)


class FailsTwice(Fails):
    """Raises again when told of its own exception."""

    def on_exception(self, *_):
        raise RuntimeError("again")
