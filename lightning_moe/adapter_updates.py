"""Adapter updates: did every expert's adapter train? Whole runs have been lost to adapters that never did.

Tracks the trainable factors of PEFT's adapters on experts, expert by expert: whether a gradient other than zero came,
and whether the optimizer changed the bits. Until `conclude`, nothing is read from the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.discovery import find_moe_layers
from lightning_moe.integrations.peft_experts import split_a, split_b, unsupported_layout
from lightning_moe.integrations.sharding import full_grad, full_shape, full_tensor, reshard

# Integers as wide as a factor's elements, to compare bits by.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class NotUpdated:
    """An adapter on one layer's experts that was not updated for some of them.

    Attributes:
        layer: the experts module's path in the model, PEFT's wrappers left out.
        parameter: the parameter that is adapted.
        adapter: PEFT's name of the adapter.
        num_experts: E.
        without_gradient: experts for which a trainable factor got no finite gradient other than zero.
        unchanged: experts for which one did and has the bits that it had; the others' reason may follow from that.
        nonfinite: experts of which a factor holds NaN or infinity.
    """

    layer: str
    parameter: str
    adapter: str
    num_experts: int
    without_gradient: int
    unchanged: int
    nonfinite: int = 0

    @property
    def reasons(self) -> str:
        """How many experts, why, and what an engineer should look for."""
        found = []
        if self.without_gradient:
            found.append(
                f"{self.without_gradient} of {self.num_experts} experts without a gradient (too few tokens went there, "
                "the adapter is not active, or the loss does not depend on it)"
            )
        if self.unchanged:
            found.append(
                f"{self.unchanged} of {self.num_experts} experts with a gradient but unchanged (is the adapter in the "
                "optimizer, its learning rate above 0 and large enough for its dtype?)"
            )
        if self.nonfinite:
            found.append(f"{self.nonfinite} of {self.num_experts} experts hold NaN or infinity")
        return "; ".join(found)


def format_report(not_updated: Sequence[NotUpdated]) -> str:
    """Lines for people, in which parameters and layers that share their reasons share a line."""
    layers: dict[tuple[str, str, str], list[str]] = {}
    for one in not_updated:
        layers.setdefault((one.layer, one.adapter, one.reasons), []).append(one.parameter)
    lines: dict[tuple[str, str], list[str]] = {}
    for (layer, adapter, reasons), parameters in layers.items():
        lines.setdefault((reasons, f"{' and '.join(parameters)}, adapter {adapter!r}"), []).append(layer)
    return "\n".join(f"- {reasons}: {what}, in {', '.join(names)}" for (reasons, what), names in lines.items())


class _Factor:
    """One trainable factor: its experts' bits at the beginning, and which got a gradient since."""

    def __init__(self, parameter: nn.Parameter, split: Any, num_experts: int) -> None:
        self.parameter, self.split, self.num_experts = parameter, split, num_experts
        self.before = _fingerprint(self._experts())
        self.has_gradient = torch.zeros(num_experts, dtype=torch.bool, device=parameter.device)

    def note_gradient(self) -> None:
        if (gradient := full_grad(self.parameter)) is not None:
            size = _size(self.split(gradient, self.num_experts))
            self.has_gradient |= (size != 0) & size.isfinite()

    def verdict(self) -> tuple[Tensor, Tensor, Tensor]:
        """(E,) each: whether a gradient came, whether the bits changed, whether all is finite."""
        experts = self._experts()
        return self.has_gradient, _fingerprint(experts) != self.before, _size(experts).isfinite()

    def _experts(self) -> Tensor:
        return self.split(full_tensor(self.parameter).detach(), self.num_experts)


def _size(experts: Tensor) -> Tensor:
    """(E,): each expert's largest element."""
    return torch.linalg.vector_norm(experts, torch.inf, dim=(1, 2))


def _fingerprint(experts: Tensor) -> Tensor:
    """(E,) int64: sums of each expert's bits, read as integers."""
    return experts.view(BITS[experts.element_size()]).sum((1, 2), dtype=torch.int64)


class AdapterUpdates:
    """Tracks from here on the adapters on a model's experts that train now.

    Those that FSDP1 has flattened are left out.

    Args:
        model: holds the layers, patched or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._factors: dict[tuple[str, str, str, int], list[_Factor]] = {}
        reshard(model)
        for name, wrapper, adapter in _adapters(model):
            factors = [
                _Factor(linear.weight, split, wrapper.num_experts)
                for linear, split in ((wrapper.lora_A[adapter], split_a), (wrapper.lora_B[adapter], split_b))
                if linear.weight.requires_grad and len(full_shape(linear.weight)) == 2  # not flattened by FSDP1
            ]
            if factors:
                self._factors[name, wrapper.parameter_name, adapter, wrapper.num_experts] = factors

    def __len__(self) -> int:
        """How many adapters are tracked."""
        return len(self._factors)

    def note_gradients(self) -> None:
        """To be called before each optimizer step, while the gradients are there."""
        for factors in self._factors.values():
            for factor in factors:
                factor.note_gradient()

    def conclude(self) -> tuple[int, list[NotUpdated]]:
        """Compares with the beginning. Waits for the device.

        Returns:
            How many experts, counted over the layers, have an adapter that was not updated, and those adapters.
        """
        not_updated: list[NotUpdated] = []
        experts: dict[str, Tensor] = {}
        for (layer, parameter, adapter, num_experts), factors in self._factors.items():
            gradients, changes, finite = map(torch.stack, zip(*(factor.verdict() for factor in factors), strict=True))
            is_finite = finite.all(0)
            updated = (gradients & changes).all(0) & is_finite
            unchanged = (gradients & ~changes).any(0) & is_finite
            experts[layer] = ~updated | experts.get(layer, ~updated)
            counts = [int(which.sum()) for which in (~updated & ~unchanged & is_finite, unchanged, ~is_finite)]
            if any(counts):
                not_updated.append(NotUpdated(layer, parameter, adapter, num_experts, *counts))
        return sum(int(which.sum()) for which in experts.values()), not_updated


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    if unsupported_layout():
        return
    for layer in find_moe_layers(model):
        for wrapper in layer.wrappers:
            for adapter in wrapper.lora_A:
                yield layer.shown_name, wrapper, adapter
