"""Sharding: whether what trains is spread over the processes that train it, and whole tensors out of their shards.

Under Lightning's ModelParallelStrategy no gradient is averaged but by what `configure_model` has spread; a mesh of one
process spreads nothing, and the processes train models of their own in silence.

DeepSpeed's ZeRO-3 leaves a parameter without elements while no module that holds it runs, and has its shape in
`ds_shape`; at each stage of ZeRO the gradients are the optimizer's, and `.grad` is None.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

SHOWN = 3


def is_sharded(model: nn.Module) -> bool:
    """Whether a model has parameters that are spread over processes, or made to be."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def spread_refusal(model: nn.Module, world_size: int, data_parallel: Collection[int]) -> str | None:
    """Why the processes would train models of their own: nothing of the model is spread over them; None if some is.

    Args:
        model: as the strategy trains it.
        world_size: how many processes train.
        data_parallel: the ranks of this process and of those that have other batches.
    """
    if world_size == 1 or any(_spread(parameter, data_parallel) for parameter in model.parameters()):
        return None
    num_sharing = max((len(_ranks(parameter)) for parameter in model.parameters()), default=0)
    how = {0: "is not sharded", 1: "is sharded over a mesh of one process"}.get(
        num_sharing, "is sharded over the wrong processes"
    )
    return (
        f"{world_size} processes train, and the model {how}: each would train one of its own, without a word. "
        f"Give the strategy ModelParallelStrategy(data_parallel_size={world_size}, tensor_parallel_size=1), whose "
        'default is one data-parallel process for each node, and shard over device_mesh["data_parallel"] in '
        "configure_model"
    )


def left_alone(model: nn.Module, data_parallel: Collection[int]) -> str | None:
    """Names the trained parameters that the processes do not share; None if there are none.

    Args:
        model: as a strategy trains it that averages nothing by itself.
        data_parallel: see `spread_refusal`.
    """
    alone = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not _spread(parameter, data_parallel)
    ]
    if not alone:
        return None
    named = ", ".join(alone[:SHOWN]) + (f" and {len(alone) - SHOWN} more" if len(alone) > SHOWN else "")
    return (
        f"no process shares the gradients of {named}: they will differ between the processes, unless you average them "
        "yourself. Call fully_shard on the module that holds them, at last on the whole model"
    )


def put_at_rest(model: nn.Module) -> None:
    """Frees what FSDP2 has left gathered since a forward without a backward, such as a validation's.

    The parameters that the model has then are those that it keeps.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor, or a sharded one gathered: then every process has to come by here, in the same order."""
    if hasattr(tensor, "ds_id"):
        import deepspeed  # which made it what it is

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradient(parameter: nn.Parameter) -> Tensor | None:
    """A parameter's gradient before an optimizer step, gathered as in `whole`; None where there is none."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # of ZeRO 3; of 1 and 2
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    return None if parameter.grad is None else whole(parameter.grad)


def shape_of(parameter: Any) -> torch.Size:
    """The shape that a parameter has when it is whole, as far as it says so."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _spread(parameter: Tensor, data_parallel: Collection[int]) -> bool:
    ranks = _ranks(parameter)
    return len(ranks) > 1 and set(data_parallel) <= ranks


def _ranks(parameter: Tensor) -> set[int]:
    """Of the processes that a parameter is spread over; empty where it is not."""
    return set(parameter.device_mesh.mesh.flatten().tolist()) if isinstance(parameter, DTensor) else set()
