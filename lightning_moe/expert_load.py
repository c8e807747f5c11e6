"""Expert load: how many rows each expert of a model gets, counted in training steps, and a heat map of it.

Counting hangs on the gradient of a layer's output, so it happens once per backward: activation checkpointing runs a
forward twice, a backward once. It needs no patch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_moe.discovery import find_moe_layers
from lightning_moe.integrations.transformers_dispatch import is_expert_parallel
from lightning_moe.integrations.transformers_experts import is_decorated, is_registered


class ExpertLoadCounter:
    """Counts the (token, slot) rows of each expert from here on, on the layers' devices; `remove` ends it.

    Layers whose experts are spread over ranks are left out, and those whose calls are not known (outside of
    Transformers' registry and not registered).

    Args:
        model: holds the layers, patched or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[str, _CountRows] = {}
        self._handles = []
        for layer in find_moe_layers(model):
            module: Any = layer.module
            if (is_decorated(module) or is_registered(module)) and not is_expert_parallel(module):
                hook = self._layers[layer.shown_name] = _CountRows(module.num_experts)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def drain(self, device: torch.device) -> dict[str, Tensor]:
        """Hands over the counts and starts again from zero.

        Args:
            device: where the counts go, without waiting for them.

        Returns:
            (experts,) int64 for each layer, by its name without PEFT's wrappers; zeros where no backward came by.
        """
        return {name: layer.drain(device) for name, layer in self._layers.items()}

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _CountRows:
    """A forward hook that counts one layer's rows. An object, so that copies of the model count by themselves.

    Attributes:
        rows: (experts,) int64, added to in place: in a CUDA graph, too, each replay counts. None before the first call.
    """

    is_capturable = True

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.rows: Tensor | None = None

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not output.requires_grad:
            return
        top_k_index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        if self.rows is None or self.rows.device != output.device:
            self.rows = torch.zeros(self.num_experts, dtype=torch.int64, device=output.device)
        rows = self.rows

        def count(_: Tensor) -> None:
            rows.add_(count_rows(top_k_index, self.num_experts))

        output.register_hook(count)

    def drain(self, device: torch.device) -> Tensor:
        if self.rows is None:
            return torch.zeros(self.num_experts, dtype=torch.int64, device=device)
        rows = self.rows.clone()
        self.rows.zero_()
        return rows.to(device, non_blocking=True)


def count_rows(top_k_index: Tensor, num_experts: int) -> Tensor:
    """How many of (T, K) ids name each expert, (num_experts,) int64; ids above are left out.

    `torch.bincount` would have the host wait for a GPU, `torch.histc` is not deterministic there.
    """
    experts = top_k_index.flatten().long().clamp(max=num_experts)
    rows = experts.new_zeros(num_experts + 1)
    return rows.scatter_add_(0, experts, torch.ones_like(experts))[:num_experts]


def plot_expert_load(expert_load: Mapping[str, Tensor]) -> Any:
    """A heat map: each expert's rows over its layer's mean, as a matplotlib figure.

    Args:
        expert_load: (experts,) int64 rows, by layer; at least one.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    smallest = torch.finfo(torch.float64).tiny
    over_mean = [rows.double() / rows.double().mean().clamp_min(smallest) for rows in expert_load.values()]
    picture = pad_sequence(over_mean, batch_first=True, padding_value=torch.nan)
    figure = Figure(figsize=(9, max(3.5, min(9.0, 1.5 + 0.15 * len(over_mean)))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")  # where a layer has fewer experts
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, picture.nan_to_num().max().item()))
    image = axes.imshow(picture.numpy(), norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="rows over the layer's mean")
    axes.set(title="Load of the experts, whole fit", xlabel="expert", ylabel="MoE layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure
