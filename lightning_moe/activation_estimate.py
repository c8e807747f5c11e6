"""How many bytes one execution of an experts module saves for backward, estimated from its shapes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_moe.integrations.transformers_experts import read_spec


@dataclass(frozen=True)
class ActivationEstimate:
    """Bytes that one execution saves for backward, the layer's input and its weights not counted.

    Attributes:
        baseline_per_row: by Transformers' grouped_mm, for each (token, slot) row.
        saved_per_row: by the operation, for each row.
        baseline_merged: by grouped_mm, whatever the rows: the weights that PEFT merges its adapters into.
    """

    baseline_per_row: int
    saved_per_row: int
    baseline_merged: int = 0


def estimate_activations(module: nn.Module, ranks: Mapping[str, int], *, recompute_gate_up: bool) -> ActivationEstimate:
    """Estimates what a layer saves where its input and routing weights need gradients.

    The activation's share is measured by running it on one row; the rest follows from the shapes.

    Args:
        module: the experts module.
        ranks: of the unmerged adapters, by the name of the parameter that they adapt.
        recompute_gate_up: see `moe_experts`.
    """
    spec = read_spec(module)
    weights = spec.weights(module)
    up, down = weights.gate_up_proj, weights.down_proj
    in_axis, out_axis = (1, 2) if spec.is_transposed else (2, 1)
    hidden, width, intermediate = up.shape[in_axis], up.shape[out_axis], down.shape[in_axis]
    size = down.element_size()

    storages: set[torch.UntypedStorage] = set()

    def record(tensor: Tensor) -> Tensor:
        storages.add(tensor.untyped_storage())
        return tensor

    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(record, lambda tensor: tensor):
        spec.activation(torch.zeros(1, width, dtype=down.dtype, device=down.device, requires_grad=True))
    routing = 2 * torch.long.itemsize + size
    adapts_up, adapts_down = spec.up_name in ranks, "down_proj" in ranks
    trained_rows = (up.requires_grad or adapts_up) * hidden + (down.requires_grad or adapts_down) * intermediate
    projected = 0 if recompute_gate_up else width + ranks.get(spec.up_name, 0)
    experts = torch.long.itemsize if spec.has_bias else 0  # the bias's term needs them by slot
    return ActivationEstimate(
        baseline_per_row=sum(storage.nbytes() for storage in storages) + (hidden + trained_rows) * size + routing,
        saved_per_row=projected * size + routing + experts,
        baseline_merged=(adapts_up * up.numel() + adapts_down * down.numel()) * size,
    )
