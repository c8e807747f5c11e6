"""Sharding: whether what trains is sharded over the ranks that train it, and full tensors out of their shards.

Under Lightning's ModelParallelStrategy only what `configure_model` has sharded has its gradients averaged; a mesh of
one rank shards nothing, and silently trains unsynchronized replicas.

DeepSpeed's ZeRO-3 leaves a parameter without elements while no module that holds it runs, and has its shape in
`ds_shape`; at each stage of ZeRO the gradients are the optimizer's, and `.grad` is None. Its names read here, in
deepspeed 0.19.8: `ds_id`, `ds_shape`, `_hp_mapping`.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_moe.integrations.unsupported import Unsupported, unsupported

SHOWN = 3


def is_sharded(model: nn.Module) -> bool:
    """Whether a model has parameters that are sharded over ranks, or made to be."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def check_sharded(model: nn.Module, world_size: int, data_parallel: Collection[int]) -> Unsupported | None:
    """Why ranks would train unsynchronized replicas: nothing of the model is sharded over them; None if some is.

    Args:
        model: as the strategy trains it.
        world_size: how many ranks train.
        data_parallel: this rank and those that have other batches.
    """
    if world_size == 1 or any(_is_sharded_over(parameter, data_parallel) for parameter in model.parameters()):
        return None
    num_sharing = max((len(_ranks(parameter)) for parameter in model.parameters()), default=0)
    how = {0: "is not sharded", 1: "is sharded over a mesh of one rank"}.get(
        num_sharing, "is sharded over the wrong ranks"
    )
    return unsupported("not_sharded", world_size=world_size, how=how)


def unsynced_parameters(model: nn.Module, data_parallel: Collection[int]) -> str | None:
    """A warning that names the trained parameters whose gradients no rank shares; None if there are none.

    Args:
        model: as a strategy trains it that averages nothing by itself.
        data_parallel: see `check_sharded`.
    """
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not _is_sharded_over(parameter, data_parallel)
    ]
    if not names:
        return None
    named = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return (
        f"no rank shares the gradients of {named}: they will differ between the ranks, unless you average them "
        "yourself. Call fully_shard on the module that holds them, at last on the whole model"
    )


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 has left gathered since a forward without a backward, such as a validation's."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor, or a sharded one gathered: then every rank has to call this, in the same order."""
    if hasattr(tensor, "ds_id"):
        import deepspeed  # which made it what it is

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_grad(parameter: nn.Parameter) -> Tensor | None:
    """A parameter's gradient before an optimizer step, gathered as by `full_tensor`; None where there is none."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # of ZeRO 3; of 1 and 2
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    return None if parameter.grad is None else full_tensor(parameter.grad)


def full_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter when it is gathered, as far as it says so."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _is_sharded_over(parameter: Tensor, data_parallel: Collection[int]) -> bool:
    ranks = _ranks(parameter)
    return len(ranks) > 1 and set(data_parallel) <= ranks


def _ranks(parameter: Tensor) -> set[int]:
    """Over which a parameter is sharded; empty where it is not."""
    return set(parameter.device_mesh.mesh.flatten().tolist()) if isinstance(parameter, DTensor) else set()
