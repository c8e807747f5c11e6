"""CUDAGraphCallback: has a LightningModule's loss captured and replayed for the length of a fit."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_moe.callbacks.restoring import stand_in_front
from lightning_moe.cuda_graph import GraphedFunction, Mode


class CUDAGraphCallback(Callback):
    """Captures a training step's forward and backward as CUDA graphs and replays them.

    A step on few tokens takes as long as the host takes to launch its kernels; a replay launches all of them at once.

    The module has what is captured in a method of its own, which `training_step` calls:

    >>> from lightning.pytorch import LightningModule
    >>> from lightning_moe import CUDAGraphCallback, MoEGateGradCallback
    >>> class Module(LightningModule):
    ...     def loss(self, batch):  # a mapping of tensors to the loss, () floating
    ...         return self.model(**batch).loss
    ...
    ...     def training_step(self, batch, batch_idx):
    ...         loss = self.loss(batch)
    ...         self.log("train/loss", loss)  # not in `loss`, whose Python a replay leaves out
    ...         return loss
    >>> callbacks = [MoEGateGradCallback(), CUDAGraphCallback(method="loss")]

    `GraphedFunction` says what may stand in the method, and when it is run by itself. The optimizer, clipping, the
    schedule, and the accumulation of gradients are as without it. At the end of the fit, also after an exception, the
    method is the module's own again and the graphs' memory is given back.

    Attributes:
        graphed: the captured method; None outside of a fit. Its report stays in `lines`.
        lines: what was captured, and what was not and why, a line each.

    Args:
        method: its name.
        mode: `"auto"` keeps to replays where they are faster than the step by itself; True keeps to them in any case.

    Raises:
        MisconfigurationException: on another mode; when a fit starts, on a module without that method.
    """

    def __init__(self, method: str = "loss", mode: Mode = "auto") -> None:
        if mode != "auto" and mode is not True:
            raise MisconfigurationException(f"CUDAGraphCallback: mode must be 'auto' or True, not {mode!r}")
        self.method, self.mode = method, mode
        self.graphed: GraphedFunction | None = None
        self.lines: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the graphs between the module and its method."""
        if stage != "fit":
            return
        function = getattr(pl_module, self.method, None)
        if not callable(function) or isinstance(function, nn.Module):
            raise MisconfigurationException(
                f"CUDAGraphCallback: {type(pl_module).__name__} has no method {self.method!r}: put what makes the loss "
                "of a batch into one, or name it: CUDAGraphCallback(method=...)"
            )
        self.lines = []
        graphed = self.graphed = GraphedFunction(function, pl_module, self.mode)
        own: dict[str, Any] = {name: value for name, value in vars(pl_module).items() if name == self.method}
        setattr(pl_module, self.method, graphed)

        def restore() -> None:
            if vars(pl_module).get(self.method) is graphed:
                delattr(pl_module, self.method)
                for name, value in own.items():
                    setattr(pl_module, name, value)
            self.lines, self.graphed = graphed.report(), None
            graphed.release()

        stand_in_front(trainer, self, restore=restore)
