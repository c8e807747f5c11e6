"""FSDP2: the model sharded over the GPUs, a decoder layer at a time, by PyTorch's `fully_shard`.

A rank keeps its share of every parameter and gathers a layer's full weights for that layer's forward and backward.
Float32 adapters are gathered in the base's dtype; gradients are averaged in float32.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
)
from peft import PeftModel
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method


class FullyShardStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy for `shard`: every rank has batches of its own, and one file is a checkpoint.

    A file for each rank could not be resumed from without the frozen base, which checkpoints leave out.

    Args:
        num_ranks: as many as `trainer.devices` times `trainer.num_nodes`.
    """

    def __init__(self, num_ranks: int) -> None:
        super().__init__(num_ranks, tensor_parallel_size=1, save_distributed_checkpoint=False)


def check_strategy(strategy: Strategy, options: Mapping[str, Any]) -> None:
    """Whether the recipe can train under a strategy with the module's options, and checkpoints can be resumed from.

    Raises:
        ValueError: naming the option to set.
    """
    is_other = isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FullyShardStrategy)
    if is_other or isinstance(strategy, DeepSpeedStrategy | FSDPStrategy):
        raise ValueError(
            f"trainer.strategy {type(strategy).__name__} is not supported: with a frozen base and float32 adapters "
            "take lora.sharding.FullyShardStrategy, as configs/fsdp.yaml does, or ddp"
        )
    if isinstance(strategy, ModelParallelStrategy) and options["quantize"]:
        raise ValueError(
            f"model.quantize {options['quantize']} is not sharded by FSDP: each GPU holds the whole model under "
            "--trainer.strategy ddp, or shard the 16-bit one: --model.quantize null"
        )
    if isinstance(strategy, ParallelStrategy) and options["experts_on"] == "host":
        raise ValueError("model.experts_on host is for one device: set --trainer.devices 1 --trainer.strategy auto")
    if options["optimizer"] == "adamw_8bit":
        if isinstance(strategy, ModelParallelStrategy) or strategy.root_device.type != "cuda":
            raise ValueError("model.optimizer adamw_8bit is bitsandbytes', for whole adapters on a GPU: take adamw")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("model.optimizer adamw_8bit needs bitsandbytes: pip install bitsandbytes, or take adamw")


def shard(network: PeftModel, mesh: DeviceMesh) -> None:
    """Shards a model with adapters over the ranks of a mesh.

    Args:
        network: on its device, whole, the same in every rank. Its base's `losses` is an entry beside `forward`.
        mesh: of one dimension, data-parallel.
    """
    base: Any = network.get_base_model()
    policy = MixedPrecisionPolicy(param_dtype=base.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in base.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(base, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(base, "losses")


def rename_optimizer_state(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """An optimizer's state with the parameters' names for their numbers.

    One rank numbers what the optimizer has, FSDP2 all that the model has: with names either reads the other's.

    Args:
        state: as `state_dict()` of an optimizer has it, or as the strategy gathered it: empty but on the first rank.
        names: of the optimizer's parameters, in its order.
    """
    groups = state.get("param_groups", ())
    name_of = dict(zip((number for group in groups for number in group["params"]), names, strict=False))
    if not name_of:
        return state
    return {
        "state": {name_of[number]: value for number, value in state["state"].items()},
        "param_groups": [group | {"params": [name_of[number] for number in group["params"]]} for group in groups],
    }
