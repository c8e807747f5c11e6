"""Which ranks count what no other one does."""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy


def data_parallel_group(strategy: Strategy) -> Any:
    """The process group of the ranks with different batches; None for all ranks."""
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    return strategy.device_mesh["data_parallel"].get_group()
