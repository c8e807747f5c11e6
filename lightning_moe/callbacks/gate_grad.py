"""MoEGateGradCallback: patches when a Trainer starts, logs the identity's health, restores when the Trainer ends.

Hooks only: what is patched is patching's business, what is counted is health's.
"""

import math
import os
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_moe.callbacks.log_steps import should_log, warn_without_logger
from lightning_moe.callbacks.ranks import data_parallel_group
from lightning_moe.callbacks.restoring import stand_in_front
from lightning_moe.health import HealthCounts
from lightning_moe.integrations.lightning_strategies import is_strategy
from lightning_moe.integrations.sharding import check_sharded, unsynced_parameters
from lightning_moe.integrations.transformers_dispatch import is_expert_parallel
from lightning_moe.metrics import GateGradHealth
from lightning_moe.patch_report import PatchReport
from lightning_moe.patch_state import DownBias, LayerPatch, PatchOptions, patch_of, patched_modules
from lightning_moe.patching import check_options, patch_moe, touched_modules, unpatch_moe

ENVIRONMENT_SWITCH = "LIGHTNING_MOE_GATEGRAD"

# An audit's relative error above this is a wrong gradient, not rounding.
AUDIT_LIMIT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class MoEGateGradCallback(Callback):
    """Computes the gate gradient of a model's MoE layers by an identity that needs no output of the down projection.

    Patches in every entry point (fit, validate, test, predict and the tuner), wherever the model was built, and fully
    restores the model at the end, also after an exception. Logs health metrics as `gategrad/*` at the Trainer's logging
    interval. A *gate* is the routing weight of one token for one of its experts.

    Attributes:
        report: what became of each MoE layer; None while nothing is patched.

    Args:
        enabled: whether to patch. None reads the environment variable `LIGHTNING_MOE_GATEGRAD`, where `0` means no and
            anything else, or nothing, means yes.
        down_bias: `"exact"` runs the operation on layers whose `down_proj` has a bias, with the bias's term added;
            `"fallback"` runs the default implementation on them and counts them.
        output_buffer_mib: bounds the buffer of the experts' outputs, in MiB; see `moe_experts`.
        recompute_gate_up: save less and project the layer's input twice; see `moe_experts`. For a model without
            activation checkpointing.
        audit_every_n_steps: every so many optimizer steps, the gate gradient of a few tokens of one layer, each layer
            in turn, is also computed by the default implementation's own autograd and compared. 0 turns it off. A layer
            with adapters merges them into its weights for that.
        on_missing: what to do where no MoE layer can be patched: `"error"` or `"warn"`.

    Raises:
        MisconfigurationException: on an argument out of range, here. When an entry point starts: on a model in which no
            layer can be patched, with `on_missing="error"`; on adapters of PEFT over quantized experts, which would
            train wrongly; on a fit whose strategy has not sharded the model, so that each rank would train its own.
    """

    def __init__(
        self,
        enabled: bool | None = None,
        *,
        down_bias: DownBias = "exact",
        output_buffer_mib: float = 512,
        recompute_gate_up: bool = False,
        audit_every_n_steps: int = 0,
        on_missing: Literal["error", "warn"] = "error",
    ) -> None:
        try:
            check_options(PatchOptions(down_bias, output_buffer_mib, recompute_gate_up))
        except ValueError as error:
            raise MisconfigurationException(f"MoEGateGradCallback: {error}") from error
        if enabled not in (None, True, False):
            raise MisconfigurationException(f"MoEGateGradCallback: enabled must be a bool or None, not {enabled!r}")
        if type(audit_every_n_steps) is not int or audit_every_n_steps < 0:
            raise MisconfigurationException(
                "MoEGateGradCallback: audit_every_n_steps must be an integer of at least 0, "
                f"not {audit_every_n_steps!r}"
            )
        if on_missing not in ("error", "warn"):
            raise MisconfigurationException(
                f"MoEGateGradCallback: on_missing must be 'error' or 'warn', not {on_missing!r}"
            )
        self.enabled = os.environ.get(ENVIRONMENT_SWITCH) != "0" if enabled is None else enabled
        self.down_bias = down_bias
        self.output_buffer_mib = output_buffer_mib
        self.recompute_gate_up = recompute_gate_up
        self.audit_every_n_steps = audit_every_n_steps
        self.on_missing = on_missing
        self.report: PatchReport | None = None
        self._touched: list[nn.Module] = []
        self._metric = GateGradHealth(sync_on_compute=False)
        self._micro_batches = 0
        self._step_before_batch = 0
        self._audited_step = -1
        self._audited: LayerPatch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Patches what is built by now."""
        if not self.enabled:
            return
        if sum(isinstance(callback, MoEGateGradCallback) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "MoEGateGradCallback is among the Trainer's callbacks more than once: leave one"
            )
        if stage == "fit":
            warn_without_logger(trainer, self)
        # What is built between `setup` and the start of a fit is patched then.
        stand_in_front(
            trainer, self, start=partial(self._start, trainer, pl_module), restore=partial(self._detach, pl_module)
        )
        self._attach(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Patches what was built since `setup`, unless this validation is part of a fit."""
        if trainer.state.fn != "fit":
            self._start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Patches what was built since `setup`."""
        self._start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Patches what was built since `setup`."""
        self._start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Asks one layer for an audit on the steps that want one."""
        step = self._step_before_batch = trainer.global_step
        every = self.audit_every_n_steps
        if self.report is None or not every or step % every or step == self._audited_step:
            return
        self._audited_step = step
        active = [patch for patch in _patches(pl_module) if patch.reason is None]
        if active:
            self._audited = active[step // every % len(active)]
            self._audited.health.audit_due = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs at the Trainer's interval; between log steps nothing is read from the device."""
        if self.report is None:
            return
        self._micro_batches += 1
        if self._audited is not None:  # its routing weights may need no gradient: then there is nothing to audit
            self._audited.health.audit_due = False
            self._audited = None
        if should_log(trainer, pl_module, self._step_before_batch):
            self._log(trainer, pl_module)

    def _attach(self, pl_module: LightningModule) -> None:
        self._detach(pl_module)
        try:
            self.report = patch_moe(
                pl_module,
                down_bias=self.down_bias,
                output_buffer_mib=self.output_buffer_mib,
                recompute_gate_up=self.recompute_gate_up,
            )
        except ValueError as error:
            raise MisconfigurationException(f"MoEGateGradCallback: {error}") from error
        self._touched = touched_modules(pl_module)

    def _detach(self, pl_module: LightningModule) -> None:
        if self.report is not None:
            for module in (pl_module, *self._touched):  # the module may have let go of one meanwhile
                unpatch_moe(module)
            self._touched = []
            self.report = None

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        self._attach(pl_module)
        assert self.report is not None
        self._metric.to(pl_module.device)
        self._metric.reset()
        self._micro_batches = 0
        if trainer.state.fn == "fit" and is_strategy(trainer.strategy, "ModelParallelStrategy"):
            self._check_sharded(trainer, pl_module)
        if self.report.fallback:
            rank_zero_warn(f"Some MoE layers run the default implementation:\n{self.report}")
        elif self.report.merging:
            rank_zero_warn(f"PEFT merges some adapters on experts:\n{self.report}")
        elif self.report:
            rank_zero_info(f"MoEGateGradCallback:\n{self.report}")
        if self.report.active:
            return
        message = (
            f"MoEGateGradCallback can patch no layer of {type(pl_module).__name__}"
            + (f":\n{self.report}\n" if self.report else ", in which it finds no MoE layer. ")
            + 'Take the callback out, or pass on_missing="warn" to train with the default implementation.'
        )
        if self.on_missing == "error":
            raise MisconfigurationException(message)
        rank_zero_warn(message)

    def _check_sharded(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mesh = trainer.strategy.device_mesh["data_parallel"]  # type: ignore[attr-defined]
        ranks = mesh.mesh.flatten().tolist()
        if reason := check_sharded(pl_module, trainer.world_size, ranks):
            raise MisconfigurationException(f"MoEGateGradCallback: {reason}")
        if len(ranks) > 1 and (unsynced := unsynced_parameters(pl_module, ranks)):
            rank_zero_warn(f"MoEGateGradCallback: {unsynced}")

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.report is not None
        counts, patches = HealthCounts(), _patches(pl_module)
        for patch in patches:
            counts.add(patch.health.drain(self._micro_batches), self._metric.device)
        counts.fallback_layers += (len(self.report) - len(patches)) * self._micro_batches
        self._metric.update(counts, self._micro_batches)
        with self._metric.sync_context(process_group=_summed_over(trainer.strategy, pl_module)):
            metrics = self._metric.compute()
        pl_module.log_dict({f"gategrad/{name}": value.float() for name, value in metrics.items()})
        self._metric.reset()
        self._micro_batches = 0
        if "audit_rel_error" in metrics:
            self._judge(metrics["audit_rel_error"].item(), patches)

    def _judge(self, audit_rel_error: float, patches: list[LayerPatch]) -> None:
        dtypes = {patch.dtype for patch in patches if patch.reason is None}
        limit = max((AUDIT_LIMIT[dtype] for dtype in dtypes if dtype is not None), default=math.inf)
        if audit_rel_error > limit:
            rank_zero_warn(
                "MoEGateGradCallback's audit found a gate gradient that differs from the default implementation's by "
                f"{audit_rel_error:.2g} (relative, limit {limit:g}): something non-linear may stand between the down "
                f"projection and the routing weight. Train without the callback and report the model."
            )


def _patches(model: nn.Module) -> list[LayerPatch]:
    return [patch for module in patched_modules(model) if (patch := patch_of(module)) is not None]


def _summed_over(strategy: Strategy, model: nn.Module) -> Any:
    """The process group over which counts add up; None for all ranks.

    Tensor-parallel ranks count the same gates, unless each has experts of its own.
    """
    if any(map(is_expert_parallel, patched_modules(model))):
        return None
    return data_parallel_group(strategy)
