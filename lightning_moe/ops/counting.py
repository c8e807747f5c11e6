"""What backward counts of the operation's health: integers on the device, so that nobody waits for them."""

import torch
from torch import Tensor

from lightning_moe.ops.grouped import NO_KERNEL, launch

# What stands at which place in the counters, (7,) int64: backwards; routing weights of local experts; of these zero or
# below, and exactly zero; their gradients that are NaN or infinite; choices of the recomputation that the forward did
# not make; bytes that the default implementation would have saved beside.
COUNTERS = (
    "executions",
    "gates",
    "nonpositive_gates",
    "zero_gates",
    "nonfinite_gate_grads",
    "routing_flips",
    "bytes_saved",
)


def new_counters(device: torch.device) -> Tensor:
    """Counters, all zero."""
    return torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)


def count(
    counters: Tensor,
    gates: Tensor,
    grads: Tensor | None,
    inverse: Tensor,
    offsets: Tensor,
    *,
    choices: tuple[Tensor, Tensor] | None,
    bytes_saved: int,
) -> None:
    """Adds one backward to the counters. Only pairs of local experts count, those before the last offset.

    Args:
        counters: see `COUNTERS`.
        gates: (T, K).
        grads: (T, K), of the gates; None where they have none.
        inverse: (S,), the sorted row of each pair.
        offsets: (E,) int32.
        choices: (T, K) ids of experts, as backward has them and as forward had them; None where they are the same.
        bytes_saved: is added too.
    """
    options = {"choices": choices, "bytes_saved": bytes_saved}
    if launch("count", counters, counters, gates, grads, inverse, offsets, **options) is not NO_KERNEL:
        return
    is_local = (inverse < offsets[-1]).view_as(gates)
    nonfinite = flips = is_local.new_zeros(())
    if grads is not None:
        nonfinite = (~grads.isfinite() & is_local).sum()
    if choices is not None:
        now, before = choices
        flips = (~(now[:, :, None] == before[:, None, :]).any(-1) & is_local).sum()
    found = [is_local.sum(), ((gates <= 0) & is_local).sum(), ((gates == 0) & is_local).sum(), nonfinite, flips]
    counters[1:-1] += torch.stack([number.to(torch.int64) for number in found])
    counters[0] += 1
    counters[-1] += bytes_saved
