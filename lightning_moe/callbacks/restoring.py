"""For callbacks that change a model: a start before the other callbacks, and a way back that none of them can block."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy


def stand_in_front(
    trainer: Trainer, owner: Callback, *, restore: Callable[[], None], start: Callable[[], None] | None = None
) -> None:
    """Has functions of a callback called before every other callback's hooks, wherever it stands among them.

    To be called in `setup`. The Trainer's own list is as it was when its entry point has ended.

    Args:
        trainer: runs.
        owner: the callback; what it gave before is replaced.
        restore: called when the entry point ends, by whichever way; may be called more than once.
        start: called when a fit starts.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    front = next((callback for callback in callbacks if isinstance(callback, _Front)), None)
    (front or _Front(trainer)).functions[owner] = _Functions(start, restore)


class _Functions(NamedTuple):
    start: Callable[[], None] | None
    restore: Callable[[], None]


class _Front(Callback):
    """Stands before all other callbacks for as long as the entry point runs.

    An exception stops Lightning's loop over the callbacks, and so does a callback that raises in its own `on_exception`
    or `teardown`. A learning rate finder runs its search when a fit starts; one that fails has taken the callbacks away
    from the Trainer: there only the strategy is told.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.functions: dict[Callback, _Functions] = {}
        self._trainer = trainer
        self._strategy: Strategy = trainer.strategy
        self._strategys_own = vars(self._strategy).get("on_exception")
        self._hook = self._on_strategy_exception
        self._strategy.on_exception = self._hook  # type: ignore[method-assign]
        # A new list: Lightning iterates over the old one.
        trainer.callbacks = [self, *trainer.callbacks]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts."""
        for functions in self.functions.values():
            if functions.start is not None:
                functions.start()

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
            self.functions.popitem()[1].restore()
