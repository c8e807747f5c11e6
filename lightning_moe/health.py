"""Health: counters of the identity in each patched layer, without host synchronisation.

The operation counts in its backward; where the default implementation runs, hooks on the gradients of a layer's output
and routing weights do. So it happens once per backward: activation checkpointing runs a forward twice, a backward once.
Counts stay on the layer's device until `LayerHealth.drain`. A *gate* is one routing weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_moe.integrations.torch_modules import is_fake
from lightning_moe.ops.counting import COUNTERS

DefaultExperts = Callable[[Tensor, Tensor, Tensor], Tensor]

NUM_AUDITED_TOKENS = 8

# What is counted where the default implementation runs, in this order in a tensor.
_FALLBACK_COUNTERS = (
    "fallback_layers",
    "bias_fallback_layers",
    "gates",
    "nonpositive_gates",
    "zero_gates",
    "nonfinite_gate_grads",
)


@dataclass
class HealthCounts:
    """What one or more layers counted since they were last drained; integers unless said otherwise.

    Attributes:
        gates: routing weights of the layer's local experts, seen in a backward.
        nonpositive_gates: of these, zero or below.
        zero_gates: of these, exactly zero.
        nonfinite_gate_grads: gate gradients that are NaN or infinite.
        routing_flips: (token, slot) choices that the recomputation of activation checkpointing made in backward and
            forward had not made for that token, where the operation ran; with `use_reentrant=False` only.
        active_layers: backwards of layers that ran the operation.
        fallback_layers: backwards of layers that ran the default implementation.
        bias_fallback_layers: of these, because of a `down_proj` bias.
        activation_bytes_saved: bytes that the default implementation would have saved for these backwards, and the
            operation did not.
        audit_rel_error: the largest relative error that an audit found, () float32; NaN where none was made.
    """

    gates: Tensor | int = 0
    nonpositive_gates: Tensor | int = 0
    zero_gates: Tensor | int = 0
    nonfinite_gate_grads: Tensor | int = 0
    routing_flips: Tensor | int = 0
    active_layers: Tensor | int = 0
    fallback_layers: Tensor | int = 0
    bias_fallback_layers: Tensor | int = 0
    activation_bytes_saved: Tensor | int = 0
    audit_rel_error: Tensor | float = float("nan")

    def add(self, other: "HealthCounts", device: torch.device) -> None:
        """Adds another layer's counts, moved to `device` without waiting for them."""
        for name in (field.name for field in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(theirs, Tensor):
                theirs = theirs.to(device, non_blocking=True)
            if name == "audit_rel_error":
                theirs = torch.fmax(torch.as_tensor(mine, device=device), torch.as_tensor(theirs, device=device))
                setattr(self, name, theirs)
            else:
                setattr(self, name, mine + theirs)


class LayerHealth:
    """The counters of one layer. They are added to in place: in a CUDA graph, too, each replay counts.

    Attributes:
        audit_due: set to have the layer's next backward audited; cleared by that backward. Compiled ones are not.
        probe: in whose gradient the compiled operation counts, see `ops.operator`; None where it never runs.
    """

    def __init__(self) -> None:
        self.audit_due = False
        self._audit_rel_error: Tensor | float = math.nan
        self._operation: Tensor | None = None
        self._fallback: Tensor | None = None
        self.probe: Tensor | None = None

    def counters(self, like: Tensor) -> Tensor | None:
        """What the operation is to count in, on the device of a tensor; None for a fake tensor, which nobody counts."""
        if is_fake(like):
            return None
        self._operation = _on_device(self._operation, like.device, len(COUNTERS))
        return self._operation

    def drain(self, micro_batches: int) -> HealthCounts:
        """Hands over the counts and starts again from zero.

        Args:
            micro_batches: since the last time. A layer that runs more than once in one, such as on parts of a sequence,
                is one layer all the same.
        """
        counts = HealthCounts(audit_rel_error=self._audit_rel_error)
        self._audit_rel_error = math.nan
        if self._fallback is not None:
            found = dict(zip(_FALLBACK_COUNTERS, self._fallback.clone(), strict=True))
            self._fallback.zero_()
            for name, count in found.items():
                setattr(counts, name, count.clamp(max=micro_batches) if name.endswith("_layers") else count)
        drained = []
        if self._operation is not None:
            drained.append(self._operation.clone())
            self._operation.zero_()  # the same tensor, which a graph under way may hold
        if self.probe is not None and self.probe.grad is not None:
            drained.append(self.probe.grad.to(torch.int64))
            self.probe.grad.zero_()
        if drained:
            found = dict(zip(COUNTERS, torch.stack(drained).sum(0), strict=True))
            counts.active_layers = found.pop("executions").clamp(max=micro_batches)
            counts.activation_bytes_saved = found.pop("bytes_saved")
            for name, count in found.items():
                setattr(counts, name, getattr(counts, name) + count)
        return counts

    def watch_fallback(
        self,
        output: Tensor,
        top_k_index: Tensor,
        routing_weights: Tensor,
        *,
        num_experts: int,
        bias_fallback: bool = False,
    ) -> None:
        """Counts one execution of the default implementation, once its backward runs.

        Args:
            output: (T, H), the layer's output.
            top_k_index: (T, K) integer, each token's experts. Ids of `num_experts` and above are non-local.
            routing_weights: (T, K), that it was computed from, used nowhere else.
            num_experts: that the layer holds.
            bias_fallback: whether a `down_proj` bias was the reason for the default implementation.
        """
        if not output.requires_grad:
            return
        values = routing_weights.detach()
        counters = self._fallback = _on_device(self._fallback, output.device, len(_FALLBACK_COUNTERS))

        def count_execution(_: Tensor) -> None:
            local = top_k_index.long() < num_experts
            counters[0] += 1
            counters[1] += bias_fallback
            counters[2:5] += torch.stack([local.sum(), ((values <= 0) & local).sum(), ((values == 0) & local).sum()])

        def count_gradient(grad: Tensor) -> None:
            counters[5] += (~grad.isfinite()).sum()

        output.register_hook(count_execution)
        if routing_weights.requires_grad:
            routing_weights.register_hook(count_gradient)

    def audit(
        self,
        default: DefaultExperts,
        hidden_states: Tensor,
        top_k_index: Tensor,
        routing_weights: Tensor,
        output: Tensor,
    ) -> None:
        """Compares the gate gradient of a few tokens with the default implementation's autograd, once backward runs.

        Args:
            default: the layer's default implementation, (T, H), (T, K), (T, K) to (T, H).
            hidden_states: (T, H).
            top_k_index: (T, K).
            routing_weights: (T, K), that `output` was computed from, used nowhere else.
            output: (T, H), the layer's output.
        """
        if not (routing_weights.requires_grad and output.requires_grad and hidden_states.shape[0]):
            return
        num_tokens = hidden_states.shape[0]
        count = min(NUM_AUDITED_TOKENS, num_tokens)
        # In integers: the default dtype may be one that rounds the last token past the end.
        tokens = torch.arange(count, device=routing_weights.device) * (num_tokens - 1) // max(count - 1, 1)
        keep = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)  # hidden from activation checkpointing
        with torch.enable_grad(), keep:
            sampled_weights = routing_weights.detach()[tokens].requires_grad_()
            sampled = default(hidden_states.detach()[tokens], top_k_index[tokens], sampled_weights)
        expected: list[Tensor] = []

        def differentiate_default(grad: Tensor) -> None:
            expected[:] = torch.autograd.grad(
                sampled, sampled_weights, grad[tokens].to(sampled.dtype), retain_graph=True
            )

        def compare(grad: Tensor) -> None:
            want = expected.pop().float()
            scale = torch.linalg.vector_norm(want).clamp_min(torch.finfo(torch.float32).tiny)
            error = torch.linalg.vector_norm(grad[tokens].float() - want) / scale
            self.audit_due = False
            previous = torch.as_tensor(self._audit_rel_error, device=error.device)
            self._audit_rel_error = torch.fmax(previous, error.nan_to_num(nan=torch.inf))

        output.register_hook(differentiate_default)
        routing_weights.register_hook(compare)


def _on_device(counters: Tensor | None, device: torch.device, size: int) -> Tensor:
    """The counters, or where there are none on the device, new ones."""
    if counters is None or counters.device != device:
        return torch.zeros(size, dtype=torch.int64, device=device)
    return counters
