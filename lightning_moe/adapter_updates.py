"""Did every expert's adapter move? Whole runs have been lost to adapters that never trained.

Watches the trainable factors of PEFT's adapters on experts, expert by expert: whether a gradient other than zero came,
and whether the optimizer changed the bits. Until `conclude`, nothing is read from the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.discovery import find_moe_layers
from lightning_moe.integrations.peft_experts import peft_refusal, split_a, split_b
from lightning_moe.integrations.sharding import put_at_rest, shape_of, whole, whole_gradient

# Integers as wide as a factor's elements, to compare bits by.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Unmoved:
    """An adapter on one layer's experts, some of which it did not move for.

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


def listing(unmoved: Sequence[Unmoved]) -> str:
    """Lines for people, in which parameters and layers that share their reasons share a line."""
    layers: dict[tuple[str, str, str], list[str]] = {}
    for one in unmoved:
        layers.setdefault((one.layer, one.adapter, one.reasons), []).append(one.parameter)
    lines: dict[tuple[str, str], list[str]] = {}
    for (layer, adapter, reasons), parameters in layers.items():
        lines.setdefault((reasons, f"{' and '.join(parameters)}, adapter {adapter!r}"), []).append(layer)
    return "\n".join(f"- {reasons}: {what}, in {', '.join(names)}" for (reasons, what), names in lines.items())


class _Factor:
    """One trainable factor: its experts' bits when the watch began, and which got a gradient since."""

    def __init__(self, parameter: nn.Parameter, split: Any, num_experts: int) -> None:
        self.parameter, self.split, self.num_experts = parameter, split, num_experts
        self.before = _fingerprint(self._experts())
        self.has_gradient = torch.zeros(num_experts, dtype=torch.bool, device=parameter.device)

    def note_gradient(self) -> None:
        if (gradient := whole_gradient(self.parameter)) is not None:
            size = _size(self.split(gradient, self.num_experts))
            self.has_gradient |= (size != 0) & size.isfinite()

    def verdict(self) -> tuple[Tensor, Tensor, Tensor]:
        """(E,) each: whether a gradient came, whether the bits changed, whether all is finite."""
        experts = self._experts()
        return self.has_gradient, _fingerprint(experts) != self.before, _size(experts).isfinite()

    def _experts(self) -> Tensor:
        return self.split(whole(self.parameter).detach(), self.num_experts)


def _size(experts: Tensor) -> Tensor:
    """(E,): each expert's largest element."""
    return torch.linalg.vector_norm(experts, torch.inf, dim=(1, 2))


def _fingerprint(experts: Tensor) -> Tensor:
    """(E,) int64: sums of each expert's bits, read as integers."""
    return experts.view(BITS[experts.element_size()]).sum((1, 2), dtype=torch.int64)


class AdapterWatch:
    """Watches from here on the adapters on a model's experts that train now.

    Those that FSDP1 has taken apart are left out.

    Args:
        model: holds the layers, patched or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._factors: dict[tuple[str, str, str, int], list[_Factor]] = {}
        put_at_rest(model)
        for name, wrapper, adapter in _adapters(model):
            factors = [
                _Factor(linear.weight, split, wrapper.num_experts)
                for linear, split in ((wrapper.lora_A[adapter], split_a), (wrapper.lora_B[adapter], split_b))
                if linear.weight.requires_grad and len(shape_of(linear.weight)) == 2  # not flattened by FSDP1
            ]
            if factors:
                self._factors[name, wrapper.parameter_name, adapter, wrapper.num_experts] = factors

    def __len__(self) -> int:
        """How many adapters are watched."""
        return len(self._factors)

    def note_gradients(self) -> None:
        """To be called before each optimizer step, while the gradients are there."""
        for factors in self._factors.values():
            for factor in factors:
                factor.note_gradient()

    def conclude(self) -> tuple[int, list[Unmoved]]:
        """Compares with the beginning. Waits for the device.

        Returns:
            How many experts, counted over the layers, have an adapter that did not move; and which adapters those are.
        """
        unmoved: list[Unmoved] = []
        experts: dict[str, Tensor] = {}
        for (layer, parameter, adapter, num_experts), factors in self._factors.items():
            gradients, changes, finite = map(torch.stack, zip(*(factor.verdict() for factor in factors), strict=True))
            is_finite = finite.all(0)
            moved = (gradients & changes).all(0) & is_finite
            still = (gradients & ~changes).any(0) & is_finite
            experts[layer] = ~moved | experts.get(layer, ~moved)
            figures = [int(which.sum()) for which in (~moved & ~still & is_finite, still, ~is_finite)]
            if any(figures):
                unmoved.append(Unmoved(layer, parameter, adapter, num_experts, *figures))
        return sum(int(still.sum()) for still in experts.values()), unmoved


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    if peft_refusal():
        return
    for layer in find_moe_layers(model):
        for wrapper in layer.wrappers:
            for adapter in wrapper.lora_A:
                yield layer.name.replace(".base_layer", ""), wrapper, adapter
