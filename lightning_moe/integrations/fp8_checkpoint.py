"""Checkpoints in fp8 with a scale for each block, one matrix for each expert, such as Qwen3-30B-A3B-FP8.

The experts keep their bytes. Linear layers that are in fp8 too become dense, each as soon as its tensors are read.

Read in Transformers 5.17 to 5.24: `Fp8Dequantize`, whose values linear layers get.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from lightning_moe.integrations.quantized_checkpoint import Header
from lightning_moe.ops.fp8 import FP8
from lightning_moe.ops.quantized import QuantizedWeight

SCALE = "_scale_inv"  # it multiplies, whatever its name says
VALUES_DTYPE = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16")
PATTERN, SCALE_PATTERN = "weight$", f"weight{SCALE}"


class FP8Checkpoint:
    """`....gate_proj.weight` (out, in) and `....gate_proj.weight_scale_inv`, a scale for each block; see `Layout`."""

    format = FP8.name
    suffixes: tuple[str, ...] = ("", SCALE)
    read: tuple[str, ...] = ()

    def matrix_of(self, key: str, header: Header) -> str | None:
        """The name of the matrix that a tensor is of: its values by their dtype, its scales by their name."""
        if header.dtype == VALUES_DTYPE:
            return key
        return key.removesuffix(SCALE) if key.endswith(SCALE) else None

    def check(self, name: str, headers: Mapping[str, Header], shape: tuple[int, ...], is_transposed: bool) -> None:
        """Raises ValueError if a tensor is missing, or of a shape or dtype that `FP8` does not take."""
        for key in (name, name + SCALE):
            if key not in headers:
                raise ValueError(f"the checkpoint lacks {key}")
        values, scales = headers[name], headers[name + SCALE]
        if values.dtype != VALUES_DTYPE:
            raise ValueError(f"{name} is {values.dtype}, and {VALUES_DTYPE} can be read")
        if scales.dtype not in SCALE_DTYPES:
            raise ValueError(f"{name}{SCALE} is {scales.dtype}, and {', '.join(SCALE_DTYPES)} can be read")
        if len(values.shape) != 2:
            raise ValueError(f"{name} is {values.shape}, and one matrix for each expert can be read")
        out, width = values.shape
        blocks = -(-out // FP8.block), -(-width // FP8.block)
        if scales.shape != blocks:
            raise ValueError(
                f"{name}{SCALE} is {scales.shape}, and {blocks} can be read: one scale for each block of "
                f"{FP8.block} x {FP8.block} of ({out}, {width})"
            )
        if len(shape) == 2 and values.shape != shape:
            raise ValueError(f"{name} is {values.shape} in the checkpoint, {shape} in the model")
        if len(shape) == 3 and out < shape[1] and out % FP8.block:
            raise ValueError(
                f"{name} has {out} rows, and is joined with another matrix: a block of {FP8.block} rows is of both"
            )

    def join(
        self, tensors: Mapping[str, Tensor], names: list[list[str]], dtype: torch.dtype, is_transposed: bool
    ) -> QuantizedWeight:
        """The weight, of the checkpoint's bytes and its scales in float32."""
        values, scales = (
            torch.cat([tensors[name + suffix] for expert in names for name in expert]).unflatten(0, (len(names), -1))
            for suffix in self.suffixes
        )
        return QuantizedWeight(FP8(), {"values": values, "scales": scales.float()}, tuple(values.shape), dtype)

    def conversions(self, hf_quantizer: Any, experts: list[str]) -> list[WeightConverter]:
        """What makes linear layers dense."""
        return [WeightConverter([SCALE_PATTERN, PATTERN], "weight", [MakeDense(hf_quantizer)])]


class MakeDense(ConversionOps):
    """Makes a matrix in fp8 dense, in the model's dtype; what is dense already has that dtype too.

    Args:
        hf_quantizer: that the model is loaded with.
    """

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, _: Any) -> Self:  # Transformers copies it for each tensor
        return self

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The weight by name, in place of lists of one tensor for each pattern."""
        name = kwargs["full_layer_name"]
        dtype = kwargs["model"].get_parameter_or_buffer(name).dtype
        (weight,) = input_dict.pop(PATTERN)
        if SCALE_PATTERN in input_dict:
            (scales,) = input_dict.pop(SCALE_PATTERN)
            # Transformers 5.17 has read the values into the model's dtype, which holds them all.
            parts = {"values": weight.to(torch.float8_e4m3fn)[None], "scales": scales.float()[None]}
            weight = QuantizedWeight(FP8(), parts, (1, *weight.shape), dtype).dequantize()[0]
        return {name: weight.to(dtype)}
