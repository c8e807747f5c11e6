"""Metrics: torchmetrics classes fed by plain counts; they know neither a Trainer nor a model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric

from lightning_moe.health import HealthCounts

_SUMS = (
    "gates",
    "nonpositive_gates",
    "zero_gates",
    "nonfinite_gate_grads",
    "routing_flips",
    "active_layers",
    "fallback_layers",
    "bias_fallback_layers",
    "activation_bytes_saved",
    "micro_batches",
)


class GateGradHealth(Metric):
    """The health of the gate-gradient identity over the micro-batches since the last reset.

    States are int64 sums over ranks, which count exactly where float32 ends at 2^24, and one maximum.

    >>> from lightning_moe import GateGradHealth
    >>> from lightning_moe.health import HealthCounts
    >>> health = GateGradHealth()
    >>> health.update(HealthCounts(gates=8, nonpositive_gates=2, active_layers=4), micro_batches=2)
    >>> {name: value.item() for name, value in health.compute().items() if "nonpositive" in name or "active" in name}
    {'active_layers': 2.0, 'nonpositive_gates': 2, 'nonpositive_fraction': 0.25}
    """

    full_state_update = False
    micro_batches: Tensor
    audit_rel_error: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in _SUMS:
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("audit_rel_error", torch.tensor(-1.0), dist_reduce_fx="max")

    def update(self, counts: HealthCounts, micro_batches: int) -> None:
        """Adds counts.

        Args:
            counts: what the layers counted.
            micro_batches: over how many micro-batches they counted it.
        """
        for name in _SUMS[:-1]:
            setattr(self, name, getattr(self, name) + getattr(counts, name))
        self.micro_batches = self.micro_batches + micro_batches
        error = torch.as_tensor(counts.audit_rel_error, device=self.audit_rel_error.device)
        self.audit_rel_error = torch.fmax(self.audit_rel_error, error.to(torch.float32))

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name.

        Layers are per micro-batch: those whose backward ran, so a layer that needed no gradient is in neither number.
        Gates, gradients and routing flips are counts over all micro-batches and ranks. `activations_mib_saved` is per
        micro-batch, MiB. `audit_rel_error` is the largest found, and absent where no audit was made; Lightning then
        logs the last one again.
        """
        sums = {name: getattr(self, name) for name in _SUMS}
        micro_batches = sums["micro_batches"].clamp_min(1)
        metrics = {
            "active_layers": sums["active_layers"] / micro_batches,
            "fallback_layers": sums["fallback_layers"] / micro_batches,
            "bias_fallback_layers": sums["bias_fallback_layers"] / micro_batches,
            "nonpositive_gates": sums["nonpositive_gates"],
            "nonpositive_fraction": sums["nonpositive_gates"] / sums["gates"].clamp_min(1),
            "zero_gates": sums["zero_gates"],
            "nonfinite_gate_grads": sums["nonfinite_gate_grads"],
            "routing_flips": sums["routing_flips"],
            "activations_mib_saved": sums["activation_bytes_saved"] / micro_batches / 2**20,
        }
        if self.audit_rel_error >= 0:
            metrics["audit_rel_error"] = self.audit_rel_error
        return metrics


class ExpertLoad(Metric):
    """How evenly the layers' experts are loaded, over the updates since the last reset.

    The state is an int64 sum over ranks.

    >>> import torch
    >>> from lightning_moe import ExpertLoad
    >>> load = ExpertLoad()
    >>> load.update([torch.tensor([6, 2, 0, 0]), torch.tensor([1, 1])])
    >>> {name: value.item() for name, value in load.compute().items()}
    {'load_max_over_mean': 3.0, 'idle_experts': 2}
    """

    full_state_update = False
    rows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # (layers, experts); negative for experts that a layer lacks beside the largest, and no rows before an update.
        self.add_state("rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, rows: Sequence[Tensor]) -> None:
        """Adds the (token, slot) rows that the experts of each layer got.

        Args:
            rows: (experts,) int64 for each layer, the same layers in each update and rank.
        """
        if rows:
            self.rows = self.rows + pad_sequence(list(rows), batch_first=True, padding_value=-1)

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name; none before an update.

        `load_max_over_mean` is, of the layer where it is largest, the rows of the most loaded expert over the mean of
        all, 0 where no layer has rows. `idle_experts` counts the experts of all layers that got none.
        """
        if not self.rows.ndim:
            return {}
        rows, exists = self.rows.clamp_min(0), self.rows >= 0
        load = rows.amax(1) * exists.sum(1) / rows.sum(1).clamp_min(1)
        return {"load_max_over_mean": load.max(), "idle_experts": (self.rows == 0).sum()}
