"""Which ranks count what no other one does."""

from typing import Any

from lightning_moe.integrations.lightning_strategies import is_strategy


def data_parallel_group(strategy: Any) -> Any:
    """The process group of the ranks with different batches; None for all ranks."""
    if not is_strategy(strategy, "ModelParallelStrategy"):
        return None
    return strategy.device_mesh["data_parallel"].get_group()
