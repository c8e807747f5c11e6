"""Counts what a computation on the meta device would allocate: the most at a time, by what it is for.

Private names of PyTorch read here, in 2.13: `_python_dispatch`, whose `TorchDispatchMode` sees each operation.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What PyTorch's allocator on a GPU rounds each tensor up to.
GRAIN = 512


class AllocationCounter(TorchDispatchMode):
    """Follows the storages that operations make, from the operation that returns one until nothing holds it.

    What was there before is not counted.

    Attributes:
        live: bytes that are held, by tag.
        peak: the most of them at a time.
        at_peak: `live` at that time.
        moment: what was being computed then.
        traffic: bytes that were ever allocated.

    Args:
        tag: of what is allocated outside `tagged`.
    """

    def __init__(self, tag: str) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak, self.at_peak, self.moment = 0, Counter(self.live), "forward"
        self.traffic = 0
        self._tag, self._moment = tag, self.moment
        self._known: dict[int, Any] = {}

    @contextmanager
    def tagged(self, tag: str) -> Iterator[None]:
        """What is allocated within is for that."""
        self._tag, before = tag, self._tag
        try:
            yield
        finally:
            self._tag = before

    @contextmanager
    def during(self, moment: str) -> Iterator[None]:
        """Names what is computed within."""
        self._moment, before = moment, self._moment
        try:
            yield
        finally:
            self._moment = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        made = [tensor.untyped_storage() for tensor in _tensors(outputs)]
        if new := [storage for storage in made if id(storage) not in self._known]:
            given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
            for storage in new:
                if id(storage) not in given and id(storage) not in self._known:
                    self._add(storage)
            self._note()
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, tag, size = id(storage), self._tag, -(-storage.nbytes() // GRAIN) * GRAIN
        self.live[tag] += size
        self.traffic += size

        def free(_: Any) -> None:
            self.live[tag] -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, free)

    def _note(self) -> None:
        if (total := self.live.total()) > self.peak:
            self.peak, self.at_peak, self.moment = total, Counter(self.live), self._moment


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Those in an operation's arguments or results."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
