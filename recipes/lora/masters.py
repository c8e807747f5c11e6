"""float32 copies of what trains in 16 bits, which the optimizer steps in its place.

A step of 1e-4 is lost on a bfloat16 weight of 0.05, and a second moment that decays by 0.1 % never decays in bfloat16.
The model keeps its 16-bit adapters, so that nothing is cast where they are used. In one process
the gradients of many micro-batches add up in float32 too; several average the model's own, in 16 bits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def by_name(optimizer_state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """An optimizer's state with the parameters' names for their numbers.

    One process numbers what the optimizer has, FSDP all that the model has: with names either reads the other's.

    Args:
        optimizer_state: as `state_dict()` of an optimizer has it, or as the strategy gathered it: empty but in one
            process.
        names: of the optimizer's parameters, in its order.
    """
    numbers = [number for group in optimizer_state.get("param_groups", ()) for number in group["params"]]
    if not numbers:
        return optimizer_state
    name_of = dict(zip(numbers, names, strict=True))
    return {
        "state": {name_of[number]: value for number, value in optimizer_state["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[number] for number in group["params"]]}
            for group in optimizer_state["param_groups"]
        ],
    }


class Masters:
    """The optimizer's parameters: each the model's own, or a float32 copy of one that has fewer bits.

    Args:
        parameters: what trains, by name.
        saved: float32 values of an earlier run, by name; they take the place of the rounded ones.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
        self.by_name: dict[str, nn.Parameter] = {}
        self._rounded: list[Tensor] = []
        self._masters: list[Tensor] = []
        for name, parameter in parameters.items():
            master = parameter
            if parameter.dtype in (torch.bfloat16, torch.float16):
                value = saved.get(name, parameter.detach()).to(parameter.device, torch.float32, copy=True)
                master = nn.Parameter(value)
                parameter.grad = None  # of a run that was stopped within a step
                self._rounded.append(parameter)
                self._masters.append(master)
            self.by_name[name] = master

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Takes up float32 values where there are some, by name."""
        for name in self.by_name.keys() & saved.keys():
            self.by_name[name].copy_(saved[name])

    def before_backward(self) -> None:
        """Clears the model's gradients, of which the copies have the sum."""
        for parameter in self._rounded:
            parameter.grad = None

    @torch.no_grad()
    def after_backward(self) -> None:
        """Adds a micro-batch's gradients to the copies', as float32; the model keeps the sum, rounded, to look at."""
        for parameter, master in zip(self._rounded, self._masters, strict=True):
            if parameter.grad is not None:
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
            parameter.grad = None if master.grad is None else master.grad.to(parameter.dtype)

    def take_gradients(self) -> None:
        """Moves the gradients to the copies, as float32, where they are not there yet."""
        for parameter, master in zip(self._rounded, self._masters, strict=True):
            if master.grad is None and parameter.grad is not None:
                master.grad = parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def after_step(self) -> None:
        """Gives the model the copies' values, rounded; frees gradients, which Lightning would hold until backward."""
        for parameter in self.by_name.values():
            parameter.grad = None
        if self._rounded:
            torch._foreach_copy_(self._rounded, self._masters)
