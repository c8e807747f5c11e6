"""What bitsandbytes makes of a weight in nf4, in memory or in a checkpoint, as the parts of an `ops.nf4.NF4`.

Read in bitsandbytes 0.50: the attributes of its `QuantState`, and the tensors that one is saved as.
"""

import importlib.util
import json
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_moe.ops.nf4 import NF4, NF4_LEVELS, tables
from lightning_moe.ops.quantized import QuantizedWeight

# Where the checkpoint says what is no tensor: the type, block sizes, the shape, the offset.
QUANT_STATE = "quant_state.bitsandbytes__nf4"
FP4_QUANT_STATE = "quant_state.bitsandbytes__fp4"
NESTED = ("nested_absmax", "nested_quant_map")
# What a checkpoint may have beside a matrix's bytes, after their name and a dot.
COMPANIONS = ("absmax", "quant_map", *NESTED, QUANT_STATE, FP4_QUANT_STATE)


class Matrix(NamedTuple):
    """An (out, in) matrix in nf4.

    Attributes:
        packed: the bytes, (out · in / 2,).
        absmax: of each block, (B,), float32; or, nested, uint8.
        codes: what an absmax in uint8 stands for, (256,) float32.
        scale: of each 256 absmax in uint8, float32.
        offset: of every absmax in uint8, a float32 scalar.
    """

    packed: Tensor
    absmax: Tensor
    codes: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None


def check_installed() -> None:
    """Raises ModuleNotFoundError, with the remedy, where bitsandbytes is not there."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            "nf4 weights are made by bitsandbytes, which is not installed: pip install bitsandbytes (the extra "
            "lightning_moe[quantized])",
            name="bitsandbytes",
        )


def encode(weight: Tensor) -> dict[str, Tensor]:
    """Quantizes (E, out, in) weights expert by expert, on their device, with nested absmax."""
    from bitsandbytes.functional import quantize_4bit

    experts = []
    for expert in weight.detach():
        packed, state = quantize_4bit(
            expert.contiguous(), blocksize=NF4.block, compress_statistics=True, quant_type=NF4.name
        )
        experts.append([Matrix(packed.flatten(), state.absmax, state.state2.code, state.state2.absmax, state.offset)])
    return parts_of(experts)


def check_matrix(name: str, names: Container[str], states: Mapping[str, Tensor]) -> None:
    """Whether a checkpoint's matrix can be read, without its values.

    Args:
        name: of the matrix, as in `fuse`.
        names: of all tensors.
        states: the tensors that say how matrices are quantized, by name.

    Raises:
        ValueError: with a name, if a tensor is missing or it is in another format.
    """
    state = _read_state(states, name)
    companions = ("absmax", "quant_map", *(NESTED if "nested_blocksize" in state else ()))
    for key in (name, *(f"{name}.{each}" for each in companions)):
        if key not in names:
            raise ValueError(f"the checkpoint lacks {key}")


def fuse(tensors: Mapping[str, Tensor], names: list[list[str]], dtype: torch.dtype) -> QuantizedWeight:
    """The weight of experts that a checkpoint has in nf4 one by one; every value as bitsandbytes would compute it.

    Bytes and absmax are joined as they are, and nested absmax stay nested where no scale would belong to two matrices,
    or to other codes than bitsandbytes' own. Otherwise they are computed: 4 bytes a block instead of 1.

    Args:
        tensors: of the checkpoint, by name, on one device.
        names: for each expert, of the matrices that are joined along the rows, such as `....experts.3.gate_proj.weight`
            and `....experts.3.up_proj.weight`. Each has companions, as `....gate_proj.weight.absmax`.
        dtype: of what the weight is made dense to.

    Raises:
        ValueError: with a name, if a tensor is missing, or the matrices are in another format or of other shapes than
            the first expert's.
    """
    states = [[_read_state(tensors, name) for name in expert] for expert in names]
    shapes = [state["shape"] for state in states[0]]
    for expert, its_states in zip(names, states, strict=True):
        for name, state, shape in zip(expert, its_states, shapes, strict=True):
            if state["shape"] != shape or shape[1] != shapes[0][1]:
                raise ValueError(f"{name} is {state['shape']}, and cannot be fused with {names[0]}: {shapes}")
    experts = [
        [_read_matrix(tensors, name, state) for name, state in zip(*both, strict=True)]
        for both in zip(names, states, strict=True)
    ]
    shape = (len(names), sum(out for out, _ in shapes), shapes[0][1])
    return QuantizedWeight(NF4(), parts_of(experts), shape, dtype)


def parts_of(experts: list[list[Matrix]]) -> dict[str, Tensor]:
    """The parts of a weight, of each expert's matrices, which are joined along the rows."""
    parts = {"packed": torch.stack([torch.cat([matrix.packed for matrix in matrices]) for matrices in experts])}
    if all(map(_stay_nested, experts)):
        each = {
            "absmax": lambda matrix: matrix.absmax,
            "absmax_scale": lambda matrix: matrix.scale,
            "absmax_offset": lambda matrix: matrix.offset.expand_as(matrix.scale),
        }
    else:
        each = {"absmax": _computed_absmax}
    for name, part in each.items():
        parts[name] = torch.stack([torch.cat([part(matrix) for matrix in matrices]) for matrices in experts])
    return parts


def _stay_nested(matrices: list[Matrix]) -> bool:
    """Whether an expert's nested absmax can be joined as they are."""
    codes = tables(matrices[0].packed.device)[1]
    own = all(matrix.codes is not None and torch.equal(matrix.codes, codes) for matrix in matrices)
    return own and not any(matrix.absmax.numel() % NF4.nested_block for matrix in matrices[:-1])


def _computed_absmax(matrix: Matrix) -> Tensor:
    """(B,) float32."""
    if matrix.codes is None or matrix.scale is None or matrix.offset is None:
        return matrix.absmax
    scale = matrix.scale.repeat_interleave(NF4.nested_block)[: matrix.absmax.numel()]
    return matrix.codes[matrix.absmax.int()] * scale + matrix.offset


def _read_state(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """What a checkpoint says of a matrix beside its tensors. Raises ValueError where that is not nf4."""
    if f"{name}.{FP4_QUANT_STATE}" in tensors:
        raise ValueError(f"{name} is not in nf4: the checkpoint has {name}.{FP4_QUANT_STATE}")
    state = json.loads(bytes(_tensor(tensors, f"{name}.{QUANT_STATE}").tolist()))
    for field, wanted in (("quant_type", NF4.name), ("blocksize", NF4.block)):
        if state.get(field) != wanted:
            raise ValueError(f"{name}: {field} is {state.get(field)}, and {wanted} can be read")
    if "nested_blocksize" in state and state["nested_blocksize"] != NF4.nested_block:
        raise ValueError(f"{name}: nested_blocksize is {state['nested_blocksize']}, and {NF4.nested_block} can be read")
    state["shape"] = tuple(state["shape"])
    if problem := NF4().shape_problem((1, *state["shape"])):
        raise ValueError(f"{name}: {problem}")
    return state


def _read_matrix(tensors: Mapping[str, Tensor], name: str, state: Mapping[str, Any]) -> Matrix:
    levels = _tensor(tensors, f"{name}.quant_map")
    if levels.tolist() != torch.tensor(NF4_LEVELS).tolist():
        raise ValueError(f"{name}: its quant_map is not nf4's")
    packed, absmax = (_tensor(tensors, key).flatten() for key in (name, f"{name}.absmax"))
    packed = packed.view(torch.uint8)  # checkpoints may have other types over the same bytes
    out, width = state["shape"]
    if (packed.numel(), absmax.numel()) != (out * width // 2, out * width // NF4.block):
        raise ValueError(f"{name}: {packed.numel()} bytes and {absmax.numel()} absmax are no ({out}, {width}) in nf4")
    if absmax.dtype != torch.uint8:
        return Matrix(packed, absmax.float())
    codes, scale = (_tensor(tensors, f"{name}.nested_{key}") for key in ("quant_map", "absmax"))
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
    return Matrix(packed, absmax, codes.float(), scale.float(), offset)


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the checkpoint lacks {name}")
    return tensors[name]
