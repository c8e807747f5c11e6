"""Checkpoints that bitsandbytes quantized to nf4, one matrix for each expert: the layout, and linear layers in nf4.

Read in Transformers 5.17 to 5.24: `Bnb4BitHfQuantizer.get_weight_conversions`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from lightning_moe.integrations.bitsandbytes_nf4 import COMPANIONS, FP4_QUANT_STATE, QUANT_STATE, check_matrix, fuse
from lightning_moe.integrations.quantized_checkpoint import Header
from lightning_moe.ops.nf4 import NF4
from lightning_moe.ops.quantized import QuantizedWeight

COMPANION = re.compile(rf"(.+)\.({'|'.join(map(re.escape, COMPANIONS))})")


class NF4Checkpoint:
    """`....gate_proj.weight` with its bytes, `....gate_proj.weight.absmax` and more beside it; see `Layout`."""

    format = NF4.name
    suffixes: tuple[str, ...] = ("", *(f".{each}" for each in COMPANIONS))
    read: tuple[str, ...] = (f".{QUANT_STATE}", f".{FP4_QUANT_STATE}")

    def matrix_of(self, key: str, header: Header) -> str | None:
        """The name of the matrix that a tensor beside its bytes is of."""
        companion = COMPANION.fullmatch(key)
        return companion and companion[1]

    def check(self, name: str, headers: Mapping[str, Header], shape: tuple[int, ...], is_transposed: bool) -> None:
        """Raises ValueError if a tensor is missing, or it is in another format."""
        states = {name + suffix: headers[name + suffix].value for suffix in self.read if name + suffix in headers}
        check_matrix(name, headers, states)  # type: ignore[arg-type]

    def join(
        self, tensors: Mapping[str, Tensor], names: list[list[str]], dtype: torch.dtype, is_transposed: bool
    ) -> QuantizedWeight:
        """The weight, of the checkpoint's bytes."""
        return fuse(tensors, names, dtype)

    def conversions(self, hf_quantizer: Any, experts: list[str]) -> list[WeightConverter]:
        """Linear layers in nf4, by bitsandbytes' own."""
        if hf_quantizer.linear is None:
            return []
        converters = hf_quantizer.linear.get_weight_conversions()
        for converter in converters:
            converter.operations.append(DenseElsewhere())
        return converters


class DenseElsewhere(ConversionOps):
    """Follows bitsandbytes' operation: what is not a linear layer's in nf4 is dense, in the model's dtype.

    Such as a router that was a linear layer where the checkpoint was made.
    """

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The weight by name, from a list where the checkpoint has it dense."""
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit

        name = kwargs["full_layer_name"]
        ((key, value),) = input_dict.items()
        if isinstance(value, list):
            dense = value[0]
        elif isinstance(kwargs["model"].get_submodule(name.rpartition(".")[0]), Linear4bit):
            return input_dict
        else:
            dense = dequantize_4bit(value.data, value.quant_state)
        return {key: dense.to(kwargs["model"].get_parameter_or_buffer(name).dtype)}
