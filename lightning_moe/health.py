"""Health: what each patched layer's tensors say about the identity, counted without host synchronisation.

Counting hangs on the gradients of a layer's output and gates, so it happens once per backward: activation checkpointing
runs a forward twice, a backward once. Counts live on the layer's device until `LayerHealth.drain` takes them.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

StockExperts = Callable[[Tensor, Tensor, Tensor], Tensor]

NUM_AUDITED_TOKENS = 8


@dataclass
class HealthCounts:
    """What one or more layers counted since they were last drained; integers unless said otherwise.

    Attributes:
        gates: gates of the layer's own experts, seen in a backward.
        nonpositive_gates: of these, zero or below.
        zero_gates: of these, exactly zero.
        nonfinite_gate_grads: gate gradients that are NaN or infinite.
        active_layers: backwards of layers whose gate gradient came from the identity.
        fallback_layers: backwards of layers that ran stock code.
        bias_fallback_layers: of these, because of a down bias.
        tape_bytes_saved: bytes that stock code would have kept for these backwards and the operation did not.
        audit_rel_error: the largest relative error that an audit found, () float32; NaN where none was made.
        expert_rows: for each layer, the (token, slot) rows that its experts got, (experts,) int64. A layer that
            no backward came by has no entry.
    """

    gates: Tensor | int = 0
    nonpositive_gates: Tensor | int = 0
    zero_gates: Tensor | int = 0
    nonfinite_gate_grads: Tensor | int = 0
    active_layers: int = 0
    fallback_layers: int = 0
    bias_fallback_layers: int = 0
    tape_bytes_saved: int = 0
    audit_rel_error: Tensor | float = float("nan")
    expert_rows: tuple[Tensor, ...] = ()

    def add(self, other: "HealthCounts", device: torch.device) -> None:
        """Adds another layer's counts, moved to `device` without waiting for them."""
        for name in (field.name for field in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(theirs, Tensor):
                theirs = theirs.to(device, non_blocking=True)
            elif isinstance(theirs, tuple):
                theirs = tuple(rows.to(device, non_blocking=True) for rows in theirs)
            if name == "audit_rel_error":
                theirs = torch.fmax(torch.as_tensor(mine, device=device), torch.as_tensor(theirs, device=device))
                setattr(self, name, theirs)
            else:
                setattr(self, name, mine + theirs)


class LayerHealth:
    """The counters of one layer.

    Attributes:
        audit_due: set to have the layer's next backward audited; cleared by that backward.
    """

    def __init__(self) -> None:
        self.audit_due = False
        self._counts = HealthCounts()

    def drain(self, micro_batches: int) -> HealthCounts:
        """Hands over the counts and starts again from zero.

        Args:
            micro_batches: since the last time. A layer that runs more than once in one, such as on parts of a sequence,
                is one layer all the same.
        """
        counts, self._counts = self._counts, HealthCounts()
        for name in ("active_layers", "fallback_layers", "bias_fallback_layers"):
            setattr(counts, name, min(getattr(counts, name), micro_batches))
        return counts

    def watch(
        self,
        output: Tensor,
        top_k_index: Tensor,
        gates: Tensor,
        *,
        num_experts: int,
        active: bool,
        bias_fallback: bool = False,
        tape_bytes_saved: int = 0,
    ) -> None:
        """Counts one execution of the layer, once its backward runs.

        Args:
            output: (T, H), the layer's output.
            top_k_index: (T, K) integer, each token's experts. Ids of `num_experts` and above are other processes'.
            gates: (T, K), the gates that it was computed from, used nowhere else.
            num_experts: that the layer holds.
            active: whether the operation computed it, rather than stock code.
            bias_fallback: whether a down bias was the reason for stock code.
            tape_bytes_saved: bytes that stock code would have kept and this execution did not.
        """
        if not output.requires_grad:
            return
        values = gates.detach()

        def count_execution(_: Tensor) -> None:
            counts = self._counts
            counts.active_layers += active
            counts.fallback_layers += not active
            counts.bias_fallback_layers += bias_fallback
            counts.tape_bytes_saved += tape_bytes_saved
            own = top_k_index.long() < num_experts
            counts.gates = counts.gates + own.sum()
            counts.nonpositive_gates = counts.nonpositive_gates + ((values <= 0) & own).sum()
            counts.zero_gates = counts.zero_gates + ((values == 0) & own).sum()
            rows = _count_rows(top_k_index, num_experts)
            counts.expert_rows = (rows + counts.expert_rows[0] if counts.expert_rows else rows,)

        def count_gradient(grad: Tensor) -> None:
            self._counts.nonfinite_gate_grads = self._counts.nonfinite_gate_grads + (~grad.isfinite()).sum()

        output.register_hook(count_execution)
        if gates.requires_grad:
            gates.register_hook(count_gradient)

    def audit(
        self, stock: StockExperts, hidden_states: Tensor, top_k_index: Tensor, gates: Tensor, output: Tensor
    ) -> None:
        """Compares the gates' gradient with stock code's own autograd, for a few tokens, once backward runs.

        Args:
            stock: the layer's stock code, (T, H), (T, K), (T, K) to (T, H).
            hidden_states: (T, H).
            top_k_index: (T, K).
            gates: (T, K), the gates that `output` was computed from, used nowhere else.
            output: (T, H), the layer's output.
        """
        if not (gates.requires_grad and output.requires_grad and hidden_states.shape[0]):
            return
        num_tokens = hidden_states.shape[0]
        count = min(NUM_AUDITED_TOKENS, num_tokens)
        # In integers: the default dtype may be one that rounds the last token past the end.
        tokens = torch.arange(count, device=gates.device) * (num_tokens - 1) // max(count - 1, 1)
        keep = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)  # hidden from activation checkpointing
        with torch.enable_grad(), keep:
            sampled_gates = gates.detach()[tokens].requires_grad_()
            sampled = stock(hidden_states.detach()[tokens], top_k_index[tokens], sampled_gates)
        expected: list[Tensor] = []

        def form_the_long_way(grad: Tensor) -> None:
            expected[:] = torch.autograd.grad(sampled, sampled_gates, grad[tokens].to(sampled.dtype), retain_graph=True)

        def compare(grad: Tensor) -> None:
            want = expected.pop().float()
            scale = torch.linalg.vector_norm(want).clamp_min(torch.finfo(torch.float32).tiny)
            error = torch.linalg.vector_norm(grad[tokens].float() - want) / scale
            self.audit_due = False
            previous = torch.as_tensor(self._counts.audit_rel_error, device=error.device)
            self._counts.audit_rel_error = torch.fmax(previous, error.nan_to_num(nan=torch.inf))

        output.register_hook(form_the_long_way)
        gates.register_hook(compare)


def _count_rows(top_k_index: Tensor, num_experts: int) -> Tensor:
    """How many of (T, K) ids name each expert, (num_experts,) int64; ids above are left out.

    `torch.bincount` would have the host wait for a GPU, `torch.histc` is not deterministic there.
    """
    experts = top_k_index.flatten().long().clamp(max=num_experts)
    rows = experts.new_zeros(num_experts + 1)
    return rows.scatter_add_(0, experts, torch.ones_like(experts))[:num_experts]
