"""Frozen weights in fewer bits: the bytes they consist of, and how they become dense.

A `QuantizedWeight` stands where a weight stood, with its shape and dtype. The operation makes it dense for a product at
a time, some features at a time where that takes much memory, and nothing dense is kept. Whatever else computes with it
gets a dense copy. A format is one small object: what a weight consists of, and what its values are.

Private names of PyTorch read here, in 2.11 to 2.15: `_make_wrapper_subclass`, and the operator `_to_copy`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, Protocol, Self, TypeGuard

import torch
from torch import Tensor

# What a weight that is made dense may take at a time: so much, or this share of a GPU's memory where that is more.
WORKSPACE_BYTES = 256 * 2**20
SHARE_OF_GPU = 0.01
# The fewest features at a time: the width of a product's tile, so that results are the same bits.
MIN_FEATURES = 256


# Of parts, by name: their shapes and dtypes.
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Format(Protocol):
    """How (E, out, in) weights are stored."""

    name: str
    block: int
    bytes_per_value: float

    def shape_problem(self, shape: tuple[int, ...]) -> str | None:
        """Why no weight of that shape can be stored, in words; None if one can."""

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """The parts of a weight of that shape."""

    def problem(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> str | None:
        """Why these parts are no weight of that shape, in words; None if they are."""

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """The values of some rows and columns of each expert, (E, rows, columns)."""


def num_bytes(format: Format, shape: tuple[int, ...]) -> int:
    """Of a weight of that shape."""
    return sum(math.prod(size) * dtype.itemsize for size, dtype in format.layout(shape).values())


def parts_problem(format: Format, parts: Mapping[str, Tensor], wanted: Layout, shape: tuple[int, ...]) -> str | None:
    """Why parts are not the wanted ones, contiguous and each of a shape and a dtype, in words; None if they are."""
    if missing := wanted.keys() - parts.keys():
        return f"{format.name} lacks {', '.join(sorted(missing))}"
    for name, (size, dtype) in wanted.items():
        found = tuple(parts[name].shape), parts[name].dtype
        if found != (size, dtype):
            its = f"{format.name}'s {name} is {found[0]} in {found[1]}"
            return f"{its}, and {size} in {dtype} for {shape} in blocks of {format.block}"
        if not parts[name].is_contiguous():
            return f"{format.name}'s {name} is not contiguous"
    return None


class QuantizedWeight(Tensor):
    """Frozen (E, out, in) weights of experts in a format of fewer bits, with the shape and dtype of the dense ones.

    Copies and moves stay quantized. Any other operation computes with a dense copy; one that would change it raises.

    Attributes:
        format: how it is stored.
        parts: what it consists of, by name.

    Args:
        format: how it is stored.
        parts: what it consists of, by name; experts first.
        shape: (E, out, in); (E, in, out) for an `MXFP4` that is transposed.
        dtype: of what `dequantize` gives.

    Raises:
        ValueError: if the parts are no weight of that shape in that format.
    """

    format: Format
    parts: dict[str, Tensor]

    @staticmethod
    def __new__(cls: type[Self], *args: Any) -> "QuantizedWeight":  # noqa: D102
        format, parts, shape, dtype = args
        if problem := format.problem(parts, tuple(shape)):
            raise ValueError(problem)
        device = next(iter(parts.values())).device
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, format: Format, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.format, self.parts = format, dict(parts)

    @classmethod
    def empty(
        cls, format: Format, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> "QuantizedWeight":
        """Memory for a weight, whose values are whatever that holds."""
        layout = format.layout(shape)
        parts = {name: torch.empty(size, dtype=of, device=device) for name, (size, of) in layout.items()}
        return QuantizedWeight(format, parts, shape, dtype)

    def copy_into(self, room: "QuantizedWeight") -> "QuantizedWeight":
        """The weight in the memory of another one, on whatever device; as it is where that one has other parts."""
        if not self._has_parts_like(room):
            return self
        return self._with({name: part.copy_(self.parts[name]) for name, part in room.parts.items()})

    @property  # type: ignore[override]
    def nbytes(self) -> int:  # type: ignore[override]
        """The bytes that are held."""
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """The values of some rows and columns of each expert, (E, rows, columns); of all by default."""
        _, out, width = self.shape
        every = rows or slice(0, out), columns or slice(0, width)
        return self.format.dequantize(self.parts, tuple(self.shape), self.dtype, *every)

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        """The weight without autograd; another one in the same format may take its place."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if not self._has_parts_like(other):  # of any dtype, on any device: modules cast and move their weights so
            self._refuse("setting its data to another tensor")
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.parts = other.parts

    def share_memory_(self) -> "QuantizedWeight":
        """Moves the parts to memory that processes share."""
        for part in self.parts.values():
            part.share_memory_()
        return self

    def pin_memory(self, *_: Any) -> "QuantizedWeight":
        """A copy in page-locked memory of the host."""
        pinned = {name: torch.empty_like(part, device="cpu", pin_memory=True) for name, part in self.parts.items()}
        return self._with({name: part.copy_(self.parts[name]) for name, part in pinned.items()})

    def is_pinned(self, *_: Any) -> bool:
        """Whether all of it is in page-locked memory."""
        return all(part.is_pinned() for part in self.parts.values())

    def _is_like(self, other: Any) -> bool:
        """Whether another weight has parts like its own, the same dtype, and is on the same device."""
        return self._has_parts_like(other) and (self.dtype, self.device) == (other.dtype, other.device)

    def _has_parts_like(self, other: Any) -> TypeGuard["QuantizedWeight"]:
        """Whether another weight of the same format and shape consists of parts of the same shapes and dtypes."""
        if not isinstance(other, QuantizedWeight) or (other.format, other.shape) != (self.format, self.shape):
            return False
        mine, its = (
            {name: (part.shape, part.dtype) for name, part in weight.parts.items()} for weight in (self, other)
        )
        return mine == its

    def _refuse(self, what: str) -> NoReturn:
        # No TypeError: Python would then add to a dense copy where it was asked to add in place.
        raise RuntimeError(
            f"{what} would change a frozen weight in {self.format.name}: its bytes hold no other values. To merge "
            "adapters into it, merge them into the 16-bit model"
        )

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"QuantizedWeight({self.format.name}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            return args[0]._with({name: part.detach() for name, part in args[0].parts.items()})
        if func is aten.clone.default:
            return args[0]._with({name: part.clone() for name, part in args[0].parts.items()})
        if func is aten._to_copy.default:
            to = {name: kwargs[name] for name in ("device", "non_blocking") if name in kwargs}
            parts = {name: part.to(copy=True, **to) for name, part in args[0].parts.items()}
            return args[0]._with(parts, kwargs.get("dtype"))
        if func is aten.copy_.default and isinstance(args[0], cls):
            target, source = args[:2]
            if target._is_like(source):
                for name, part in target.parts.items():
                    part.copy_(source.parts[name])
                return target
            if torch.equal(target.dequantize(), source.to(target.dtype)):  # as DDP has the first rank's copied to all
                return target
        if func is aten.set_.source_Tensor and isinstance(args[0], cls) and args[0]._is_like(args[1]):
            args[0].parts = args[1].parts  # as parametrizations, and so PEFT's merged path, have it
            return args[0]
        if func is aten.split.Tensor:
            raise NotImplementedError(
                f"a weight in {args[0].format.name} is not sharded, as fully_shard would: its parts would be dense. "
                "Train on one GPU or with DDP"
            )
        changed = [kwargs.get("out"), args[:1] if func.overloadpacket.__name__.endswith("_") else None]
        _each_quantized(changed, lambda weight: weight._refuse(func.__name__))
        return func(*_each_quantized(args, cls.dequantize), **_each_quantized(kwargs, cls.dequantize))

    def _with(self, parts: dict[str, Tensor], dtype: torch.dtype | None = None) -> "QuantizedWeight":
        return QuantizedWeight(self.format, parts, tuple(self.shape), dtype or self.dtype)


def may_stay_dense(weight: Tensor) -> bool:
    """Whether a quantized weight may be made dense once, as a whole, for two products of a backward."""
    if not isinstance(weight, QuantizedWeight):
        return False
    return weight.numel() * weight.dtype.itemsize <= workspace_bytes(memory_of(weight.device))


def workspace_bytes(memory: int) -> int:
    """What a weight may be made dense to at a time, of so many bytes of a GPU; 0 for no GPU."""
    return max(WORKSPACE_BYTES, int(SHARE_OF_GPU * memory))


def memory_of(device: torch.device) -> int:
    """The bytes of a GPU that PyTorch may have; 0 of another device."""
    if device.type != "cuda":
        return 0
    given = torch.cuda.get_per_process_memory_fraction(device)
    return int(given * torch.cuda.get_device_properties(device).total_memory)


def _each_quantized(arguments: Any, function: Callable[["QuantizedWeight"], Any]) -> Any:
    """Arguments with what a function makes of each quantized weight among them, also of those in lists."""
    if isinstance(arguments, (list, tuple)):
        return [_each_quantized(one, function) for one in arguments]
    if isinstance(arguments, dict):
        return {name: _each_quantized(one, function) for name, one in arguments.items()}
    return function(arguments) if isinstance(arguments, QuantizedWeight) else arguments


def features_in(num_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """How many of the features `out` of a view (E, in, out) so many bytes hold: whole tiles, at least one."""
    experts, width, _ = shape
    return max(num_bytes // (experts * width * dtype.itemsize) // MIN_FEATURES, 1) * MIN_FEATURES


@dataclass(frozen=True)
class QuantizedView:
    """A quantized weight as a product takes it.

    Attributes:
        weight: as it is stored.
        is_transposed: whether the view is (E, in, out) of (E, out, in).
    """

    weight: QuantizedWeight
    is_transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the view, (E, in, out)."""
        experts, *sides = self.weight.shape
        return (experts, *(reversed(sides) if self.is_transposed else sides))

    @property
    def mT(self) -> "QuantizedView":  # noqa: N802
        """What takes a gradient back."""
        return QuantizedView(self.weight, not self.is_transposed)

    @cached_property
    def features_at_a_time(self) -> int:
        """How many of `out` the workspace holds: whole tiles, at least one."""
        return features_in(workspace_bytes(memory_of(self.weight.device)), self.shape, self.weight.dtype)

    def dense(self, features: slice) -> Tensor:
        """(E, in, features)."""
        return (
            self.weight.dequantize(rows=features).mT if self.is_transposed else self.weight.dequantize(None, features)
        )
