"""FSDP2: the model spread over the GPUs, a decoder layer at a time, by PyTorch's `fully_shard`.

A process keeps its share of every parameter and gathers a layer's whole weights for that layer's forward and backward.
What trains is kept in float32, so that the optimizer steps on it, and gathered in the model's own dtype; gradients are
averaged in float32.
"""

from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from peft import PeftModel
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method


def check_strategy(strategy: Strategy) -> None:
    """Whether the recipe can train under a strategy, and its checkpoints can be resumed from.

    Raises:
        ValueError: naming the option to set.
    """
    if isinstance(strategy, DeepSpeedStrategy | FSDPStrategy):
        raise ValueError(
            f"trainer.strategy {type(strategy).__name__} steps on parameters of its own making, and the recipe on "
            "float32 copies that it would not know of: take lightning.pytorch.strategies.ModelParallelStrategy, as "
            "configs/qwen3_30b_a3b_fsdp.yaml does, or ddp"
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if strategy._tensor_parallel_size != 1:
        raise ValueError(
            "trainer.strategy would have processes share a batch, and the recipe gives each one of its own: set "
            "tensor_parallel_size 1, and data_parallel_size to the number of devices"
        )
    if strategy._save_distributed_checkpoint:
        raise ValueError(
            "trainer.strategy saves a file for each process, which cannot be resumed from without the frozen base: "
            "set save_distributed_checkpoint false, and one file holds the adapter"
        )


def shard(network: PeftModel, mesh: DeviceMesh) -> None:
    """Spreads a model with adapters over the processes of a mesh.

    Args:
        network: on its device, whole, the same in every process. Its base's `losses` is an entry beside `forward`.
        mesh: of one dimension, data-parallel.
    """
    base: Any = network.get_base_model()
    policy = MixedPrecisionPolicy(param_dtype=base.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(base, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(base, "losses")
