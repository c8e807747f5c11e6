"""MoEGateGradCallback: puts the patch on when a Trainer starts, logs its health, takes it off when the Trainer ends.

Hooks only: what is patched is patching's business, what is counted is health's.
"""

import math
import os
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_moe.adapter_updates import AdapterWatch, listing
from lightning_moe.adapters.export import CHECKPOINT_KEY, describe
from lightning_moe.callbacks.memory import logs_now, stand_first
from lightning_moe.discovery import DownBias, is_expert_parallel
from lightning_moe.health import HealthCounts
from lightning_moe.integrations.sharding import left_alone, spread_refusal
from lightning_moe.metrics import GateGradHealth
from lightning_moe.ops.validation import ChunkTokens
from lightning_moe.patching import (
    PatchReport,
    check_options,
    layer_patch,
    patch_moe,
    patched_modules,
    touched_modules,
    unpatch_moe,
)

ENVIRONMENT_SWITCH = "LIGHTNING_MOE_GATEGRAD"

# An audit's relative error above this is a wrong gradient, not rounding.
AUDIT_LIMIT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class MoEGateGradCallback(Callback):
    """Takes the gate gradient of a model's MoE layers from an identity that needs no down projection's output.

    Patches in every entry point (fit, validate, test, predict and the tuner), wherever the model was built, and puts
    the model back at the end, also after an exception. Logs `gategrad/...` at the Trainer's logging interval. Stands
    first among the Trainer's callbacks, so that another one's failure cannot keep it from putting the model back.

    Attributes:
        report: what became of each MoE layer; None while nothing is patched.
        expert_load: how many (token, slot) rows each expert got since the fit began, (experts,) int64 on the CPU,
            summed over the processes, by the report's layer names. Grows when the counts are logged and at the end of
            training, stays until the next fit; layers whose calls cannot be patched are not in it, nor are those whose
            experts are spread over processes.

    Args:
        enabled: whether to patch. None reads the environment variable `LIGHTNING_MOE_GATEGRAD`, where `0` means no and
            anything else, or nothing, means yes.
        down_bias: `"exact"` runs the operation on layers whose down projection has a bias, with the bias's term added;
            `"fallback"` runs stock code on them and counts them.
        chunk_tokens: how many tokens' rows are in flight at once; see `moe_experts`.
        recompute_up: keep less and project the layer's input twice; see `moe_experts`. For a model without activation
            checkpointing.
        audit_every_n_steps: every so many optimizer steps, the gate gradient of a few tokens of one layer, each layer
            in turn, is also formed by stock code's own autograd and compared. 0 turns it off. A layer with adapters
            merges them into its weights for that.
        check_adapters_after_n_steps: after so many optimizer steps, or at the end of a shorter fit, says whether every
            trainable adapter on the experts got a gradient and changed, for every expert; logs
            `gategrad/experts_without_update` from there on. 0 turns it off.
        on_missing: what to do where no MoE layer can be patched: `"error"` or `"warn"`.

    Raises:
        MisconfigurationException: on an argument out of range, here; on a fit without a logger, in `setup`; on a model
            in which no layer can be patched, when it starts and `on_missing="error"`; on adapters of PEFT over
            quantized experts, which would train wrongly, when it starts; on a fit whose strategy has not spread the
            model over its processes, each of which would train one of its own, when it starts.
    """

    def __init__(
        self,
        enabled: bool | None = None,
        *,
        down_bias: DownBias = "exact",
        chunk_tokens: ChunkTokens = "auto",
        recompute_up: bool = False,
        audit_every_n_steps: int = 0,
        check_adapters_after_n_steps: int = 10,
        on_missing: Literal["error", "warn"] = "error",
    ) -> None:
        try:
            check_options(down_bias=down_bias, chunk_tokens=chunk_tokens)
        except ValueError as error:
            raise MisconfigurationException(f"MoEGateGradCallback: {error}") from error
        if enabled not in (None, True, False):
            raise MisconfigurationException(f"MoEGateGradCallback: enabled must be a bool or None, not {enabled!r}")
        if type(audit_every_n_steps) is not int or audit_every_n_steps < 0:
            raise MisconfigurationException(
                "MoEGateGradCallback: audit_every_n_steps must be an integer of at least 0, "
                f"not {audit_every_n_steps!r}"
            )
        if type(check_adapters_after_n_steps) is not int or not (
            check_adapters_after_n_steps >= 2 or check_adapters_after_n_steps == 0
        ):
            raise MisconfigurationException(
                "MoEGateGradCallback: check_adapters_after_n_steps must be an integer of at least 2 (in the first step "
                f"LoRA's A has no gradient yet), or 0, not {check_adapters_after_n_steps!r}"
            )
        if on_missing not in ("error", "warn"):
            raise MisconfigurationException(
                f"MoEGateGradCallback: on_missing must be 'error' or 'warn', not {on_missing!r}"
            )
        self.enabled = os.environ.get(ENVIRONMENT_SWITCH) != "0" if enabled is None else enabled
        self.down_bias = down_bias
        self.chunk_tokens = chunk_tokens
        self.recompute_up = recompute_up
        self.audit_every_n_steps = audit_every_n_steps
        self.check_adapters_after_n_steps = check_adapters_after_n_steps
        self.on_missing = on_missing
        self.report: PatchReport | None = None
        self.expert_load: dict[str, Tensor] = {}
        self._touched: list[nn.Module] = []
        self._strategy: Strategy | None = None
        self._strategys_own: Any = None
        self._hook: Any = None
        self._metric = GateGradHealth(sync_on_compute=False)
        self._micro_batches = 0
        self._step_before_batch = 0
        self._audited_step = -1
        self._adapters: AdapterWatch | None = None
        self._watched_from_step = 0
        self._experts_without_update: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Patches what is built by now."""
        if not self.enabled:
            return
        if stage == "fit" and not trainer.loggers:
            raise MisconfigurationException(
                "MoEGateGradCallback logs the identity's health and the Trainer has no logger: leave `logger` at its "
                "default, give it one such as CSVLogger, or patch without a Trainer's help: "
                "`with lightning_moe.gategrad(model): ...`"
            )
        if sum(isinstance(callback, MoEGateGradCallback) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "MoEGateGradCallback is among the Trainer's callbacks more than once: leave one"
            )
        stand_first(trainer, self)
        self._attach(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Patches what was built since `setup`; complains if there is nothing."""
        self.expert_load = {}
        self._start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_fit_start`, unless this validation is part of a fit."""
        if trainer.state.fn != "fit":
            self._start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_fit_start`."""
        self._start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_fit_start`."""
        self._start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to watch the adapters, those of a checkpoint included."""
        self._experts_without_update = None
        if self.report is not None and self.check_adapters_after_n_steps:
            self._adapters = AdapterWatch(pl_module) or None
            self._watched_from_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Asks one layer for an audit on the steps that want one."""
        step = self._step_before_batch = trainer.global_step
        every = self.audit_every_n_steps
        if self.report is None or not every or step % every or step == self._audited_step:
            return
        self._audited_step = step
        active = [patch for patch in map(layer_patch, patched_modules(pl_module)) if patch.reason is None]
        if active:
            active[step // every % len(active)].health.audit_due = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Notes which adapters have a gradient, while they are watched."""
        if self._adapters is None:
            return
        strategy = trainer.strategy  # DeepSpeed's comes by here after each micro-batch, to step in the last alone
        if not isinstance(strategy, DeepSpeedStrategy) or strategy.deepspeed_engine.is_gradient_accumulation_boundary():
            self._adapters.note_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs at the Trainer's interval; between log steps nothing is read from the device."""
        if self.report is None:
            return
        self._micro_batches += 1
        concludes = self._watched_steps(trainer) >= self.check_adapters_after_n_steps
        if concludes:
            self._conclude(trainer)
        logs = logs_now(trainer, pl_module, self._step_before_batch)
        if self._experts_without_update is not None and (concludes or logs):
            pl_module.log("gategrad/experts_without_update", float(self._experts_without_update))
        if logs:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what became of the adapters, in a fit too short to have said so; counts the last rows."""
        self._drain(trainer, pl_module)
        if self._watched_steps(trainer) >= 2:
            figure = {"gategrad/experts_without_update": float(self._conclude(trainer))}
            for logger in trainer.loggers:
                logger.log_metrics(figure, step=trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Describes PEFT's adapters, so that `python -m lightning_moe.export` needs no base model."""
        if adapters := describe(pl_module, checkpoint["state_dict"]):
            checkpoint[CHECKPOINT_KEY] = adapters

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the model back."""
        self._detach(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts the model back."""
        self._detach(pl_module)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach(pl_module)
        # A learning rate finder that fails does not give the Trainer its callbacks back: only the strategy is told.
        self._strategy = trainer.strategy
        self._strategys_own = vars(self._strategy).get("on_exception")
        self._hook = partial(self._on_strategy_exception, pl_module)
        self._strategy.on_exception = self._hook  # type: ignore[method-assign]
        try:
            self.report = patch_moe(
                pl_module, down_bias=self.down_bias, chunk_tokens=self.chunk_tokens, recompute_up=self.recompute_up
            )
        except ValueError as error:
            self._detach(pl_module)
            raise MisconfigurationException(f"MoEGateGradCallback: {error}") from error
        self._touched = touched_modules(pl_module)

    def _on_strategy_exception(self, pl_module: LightningModule, exception: BaseException) -> None:
        strategy = self._strategy
        assert strategy is not None
        self._detach(pl_module)
        strategy.on_exception(exception)

    def _detach(self, pl_module: LightningModule) -> None:
        self._adapters = None
        if self.report is not None:
            for module in (pl_module, *self._touched):  # the module may have let go of one meanwhile
                unpatch_moe(module)
            self._touched = []
            self.report = None
        if self._strategy is not None:
            hooks = vars(self._strategy)
            if hooks.get("on_exception") is self._hook:
                del hooks["on_exception"]
                if self._strategys_own is not None:
                    hooks["on_exception"] = self._strategys_own
            self._strategy = self._strategys_own = self._hook = None

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        self._attach(trainer, pl_module)
        assert self.report is not None
        self._metric.to(pl_module.device)
        self._metric.reset()
        self._micro_batches = 0
        if trainer.state.fn == "fit" and isinstance(trainer.strategy, ModelParallelStrategy):
            self._check_spread(trainer, pl_module)
        if self.report.fallback:
            rank_zero_warn(f"MoEGateGradCallback leaves some MoE layers to stock code:\n{self.report}")
        elif self.report.merging:
            rank_zero_warn(f"MoEGateGradCallback leaves some adapters to PEFT, which merges them:\n{self.report}")
        if self.report.active:
            rank_zero_info(f"MoEGateGradCallback: {len(self.report.active)} MoE layers patched")
            return
        message = (
            f"MoEGateGradCallback can patch no layer of {type(pl_module).__name__}"
            + (f":\n{self.report}\n" if self.report.layers else ", which holds no MoE layer that it knows. ")
            + 'Take the callback out, or pass on_missing="warn" to train with stock code.'
        )
        if self.on_missing == "error":
            self._detach(pl_module)
            raise MisconfigurationException(message)
        rank_zero_warn(message)

    def _check_spread(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mesh = trainer.strategy.device_mesh["data_parallel"]  # type: ignore[attr-defined]
        ranks = mesh.mesh.flatten().tolist()
        if reason := spread_refusal(pl_module, trainer.world_size, ranks):
            self._detach(pl_module)
            raise MisconfigurationException(f"MoEGateGradCallback: {reason}")
        if len(ranks) > 1 and (alone := left_alone(pl_module, ranks)):
            rank_zero_warn(f"MoEGateGradCallback: {alone}")

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.report is not None
        counts = self._drain(trainer, pl_module)
        unpatched = len(self.report.layers) - len(set(patched_modules(pl_module)))
        counts.fallback_layers += unpatched * self._micro_batches
        self._metric.update(counts, self._micro_batches)
        with self._metric.sync_context(process_group=_that_add_up(trainer.strategy, pl_module)):
            figures = self._metric.compute()
        pl_module.log_dict({f"gategrad/{name}": value.float() for name, value in figures.items()})
        self._metric.reset()
        self._micro_batches = 0
        if "audit_rel_error" in figures:
            self._judge(figures["audit_rel_error"].item(), pl_module)

    def _drain(self, trainer: Trainer, pl_module: LightningModule) -> HealthCounts:
        """Every patched layer's counts; their experts' rows, those of all processes, go into `expert_load` too."""
        counts, patched = HealthCounts(), set(patched_modules(pl_module))
        modules = {name: module for name, module in pl_module.named_modules() if module in patched}
        for module in modules.values():
            drained = layer_patch(module).health.drain(self._micro_batches)
            if is_expert_parallel(module):  # other processes have other experts by the same numbers
                drained.expert_rows = ()
            elif not drained.expert_rows:  # no backward came by: every process sums as many layers and experts
                drained.expert_rows = (torch.zeros(module.num_experts, dtype=torch.int64),)  # type: ignore[arg-type]
            counts.add(drained, self._metric.device)
        if counts.expert_rows:
            names = [name for name, module in modules.items() if not is_expert_parallel(module)]
            group = _that_add_up(trainer.strategy, pl_module)
            load = trainer.strategy.reduce(torch.cat(counts.expert_rows), group, reduce_op="sum").cpu()
            for name, rows in zip(names, load.split([rows.numel() for rows in counts.expert_rows]), strict=True):
                self.expert_load[name] = self.expert_load.get(name, 0) + rows
        return counts

    def _watched_steps(self, trainer: Trainer) -> int:
        """Optimizer steps since the adapters are watched; -1 where they are not."""
        return -1 if self._adapters is None else trainer.global_step - self._watched_from_step

    def _conclude(self, trainer: Trainer) -> int:
        assert self._adapters is not None
        self._experts_without_update, unmoved = self._adapters.conclude()
        self._adapters = None
        when = f"by step {trainer.global_step}"
        if unmoved:
            rank_zero_warn(f"MoEGateGradCallback: {when} some experts' adapters have not moved:\n{listing(unmoved)}")
        else:
            rank_zero_info(f"MoEGateGradCallback: {when} every expert's adapter has moved")
        return self._experts_without_update

    def _judge(self, audit_rel_error: float, pl_module: LightningModule) -> None:
        dtypes = {patch.dtype for patch in map(layer_patch, patched_modules(pl_module)) if patch.reason is None}
        limit = max((AUDIT_LIMIT[dtype] for dtype in dtypes if dtype is not None), default=math.inf)
        if audit_rel_error > limit:
            rank_zero_warn(
                f"MoEGateGradCallback's audit found a gate gradient that differs from stock code's by "
                f"{audit_rel_error:.2g} (relative, limit {limit:g}): something non-linear may stand between the down "
                f"projection and the gate. Train without the callback and report the model."
            )


def _that_add_up(strategy: Strategy, pl_module: LightningModule) -> Any:
    """The group of processes that count what no other one does; None for all.

    Tensor-parallel ones count the same gates, unless each has experts of its own.
    """
    if not isinstance(strategy, ModelParallelStrategy) or any(map(is_expert_parallel, patched_modules(pl_module))):
        return None
    return strategy.device_mesh["data_parallel"].get_group()
