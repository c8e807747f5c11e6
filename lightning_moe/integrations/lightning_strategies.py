"""Lightning's strategies under both of its names, `lightning.pytorch` and `pytorch_lightning`: copies of one source.

A Trainer of either calls our callbacks' hooks, whose base is `lightning.pytorch`'s; only its strategies are of classes
of its own.
"""

from typing import Literal

StrategyName = Literal["DDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "SingleDeviceStrategy"]


def is_strategy(strategy: object, *names: StrategyName) -> bool:
    """Whether a Trainer's strategy is one of those classes of Lightning's, or of a subclass."""
    return any(
        found.__name__ in names and found.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
        for found in type(strategy).__mro__
    )
