"""What every callback here that changes a model needs: a way back that no other callback can block."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy


def restore_at_end(trainer: Trainer, owner: Callback, restore: Callable[[], None]) -> None:
    """Has a function called when the Trainer's entry point ends, by whichever way.

    Args:
        trainer: runs.
        owner: has one such function; a later one takes its place.
        restore: puts the model back.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = next((callback for callback in callbacks if isinstance(callback, _Restoring)), None)
    (found or _Restoring(trainer)).functions[owner] = restore


class _Restoring(Callback):
    """Stands before all other callbacks for as long as the entry point runs.

    An exception stops Lightning's loop over the callbacks, and so does a callback that raises in its own `on_exception`
    or `teardown`. A learning rate finder that fails has taken the callbacks away from the Trainer: there only the
    strategy is told.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.functions: dict[Callback, Callable[[], None]] = {}
        self._trainer = trainer
        self._strategy: Strategy = trainer.strategy
        self._strategys_own = vars(self._strategy).get("on_exception")
        self._hook = self._on_strategy_exception
        self._strategy.on_exception = self._hook  # type: ignore[method-assign]
        # A new list: Lightning iterates over the old one.
        trainer.callbacks = [self, *trainer.callbacks]  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores."""
        self._restore()

    def _on_strategy_exception(self, exception: BaseException) -> Any:
        self._restore()
        self._strategy.on_exception(exception)

    def _restore(self) -> None:
        """Calls the functions and leaves the Trainer as it was; does nothing the second time."""
        others = [callback for callback in self._trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        self._trainer.callbacks = others  # type: ignore[attr-defined]
        hooks = vars(self._strategy)
        if hooks.get("on_exception") is self._hook:
            del hooks["on_exception"]
            if self._strategys_own is not None:
                hooks["on_exception"] = self._strategys_own
        while self.functions:
            self.functions.popitem()[1]()
