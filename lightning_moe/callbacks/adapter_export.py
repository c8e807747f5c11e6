"""AdapterExport: writes a LoRA adapter's folders at the end of a fit, and describes the adapter in checkpoints."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_moe.adapters.export import Layout, check_export, describe_adapters, export_adapter
from lightning_moe.adapters.files import CHECKPOINT_KEY
from lightning_moe.adapters.reference_logits import ReferenceLogits
from lightning_moe.discovery import find_moe_layers
from lightning_moe.integrations.lightning_strategies import is_strategy
from lightning_moe.integrations.sharding import is_sharded
from lightning_moe.integrations.transformers_dispatch import is_expert_parallel
from lightning_moe.integrations.transformers_experts import is_decorated


class AdapterExport(Callback):
    """Writes the adapter in `trainer.log_dir`, or `default_root_dir`, when a fit has ended without an exception.

    The folder of the fused layout, as PEFT writes it, is `adapter`, that of the other `adapter_per_expert`; where an
    earlier run has taken a name, `-1` and so on is added. Checkpoints get a description of the adapter, so that
    `python -m lightning_moe export CHECKPOINT FOLDER` needs no base model. Where each rank holds the whole model, the
    trained model's logits for a few fixed tokens are kept in each adapter's folder, for `verify_adapter`.

    Attributes:
        folders: what was written, by layout; empty before the end of a fit.

    Args:
        layouts: `fused`, `per_expert` or both; see `export_adapter`.

    Raises:
        MisconfigurationException: on a layout that does not exist, here; on a fit of a model without a LoRA adapter, or
            with one that a layout cannot hold, when it starts.
    """

    def __init__(self, layouts: Sequence[Layout] = ("fused",)) -> None:
        if isinstance(layouts, str) or not set(layouts) <= set(get_args(Layout)):
            raise MisconfigurationException(
                f"AdapterExport: layouts must be a list of {', '.join(get_args(Layout))}, not {layouts!r}"
            )
        self.layouts = tuple(dict.fromkeys(layouts))
        self.folders: dict[str, Path] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier fit."""
        self.folders = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that there is an adapter, and that the layouts can hold it."""
        try:
            for layout in self.layouts:
                check_export(pl_module, layout)
        except ValueError as error:
            raise MisconfigurationException(f"AdapterExport: {error}") from error

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Describes PEFT's adapters in the checkpoint."""
        if adapters := describe_adapters(pl_module, checkpoint["state_dict"]):
            checkpoint[CHECKPOINT_KEY] = adapters

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the folders; every rank gives its share of a sharded adapter."""
        parent = Path(trainer.log_dir or trainer.default_root_dir)  # asked of every rank, or it hangs
        if not (trainer.is_global_zero or is_sharded(pl_module)):
            return
        for layout in self.layouts:
            self.folders[layout] = _free(parent / ("adapter" if layout == "fused" else f"adapter_{layout}"))
            export_adapter(pl_module, self.folders[layout], layout)
            rank_zero_info(f"AdapterExport: {layout} adapter in {self.folders[layout]}")
        if self.folders:
            self._keep_logits(trainer, pl_module)

    def _keep_logits(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The trained model's logits, beside each adapter. Failing here costs the logits only."""
        if not _computes_alone(trainer, pl_module):
            rank_zero_info(
                "AdapterExport: the trained model's logits are not kept, since it may take all ranks to compute them: "
                "the adapter cannot be verified"
            )
            return
        try:
            with trainer.precision_plugin.forward_context():
                logits = ReferenceLogits.compute(pl_module)
            for folder in self.folders.values():
                logits.save(folder)
        except Exception as error:  # of a model that is not ours to know
            rank_zero_warn(
                "AdapterExport: the adapter is written, but the trained model's logits could not be kept, so it cannot "
                f"be verified: {error!r}"
            )


def _computes_alone(trainer: Trainer, model: LightningModule) -> bool:
    """Whether one rank's forward waits for no other."""
    if not is_strategy(trainer.strategy, "DDPStrategy", "SingleDeviceStrategy") or is_sharded(model):
        return False
    layers: list[Any] = [layer.module for layer in find_moe_layers(model)]
    return not any(is_decorated(layer) and is_expert_parallel(layer) for layer in layers)


def _free(folder: Path) -> Path:
    """The folder, or with a number if it is there already."""
    names = (folder if number == 0 else folder.with_name(f"{folder.name}-{number}") for number in count())
    return next(name for name in names if not name.exists())
