"""Checkpoints whose experts are in mxfp4, fused, and all else dense, such as gpt-oss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter

from lightning_moe.integrations.quantized_checkpoint import Header, joining
from lightning_moe.ops.mxfp4 import MXFP4
from lightning_moe.ops.quantized import QuantizedWeight

BLOCKS, SCALES = "_blocks", "_scales"


class MXFP4Checkpoint:
    """`....experts.gate_up_proj_blocks` (E, out, in / 32, 16) and `..._scales` (E, out, in / 32); see `Layout`."""

    format = MXFP4.name
    suffixes: tuple[str, ...] = (BLOCKS, SCALES)
    read: tuple[str, ...] = ()

    def matrix_of(self, key: str, header: Header) -> str | None:
        """The name of the weight that a tensor is of."""
        return next((key.removesuffix(suffix) for suffix in self.suffixes if key.endswith(suffix)), None)

    def check(self, name: str, headers: Mapping[str, Header], shape: tuple[int, ...], is_transposed: bool) -> None:
        """Raises ValueError if a tensor is missing, or of a shape or dtype that `MXFP4` does not take."""
        if len(shape) != 3:
            raise ValueError(f"{name} is not the experts', and is in mxfp4")
        experts, *sides = shape
        out, width = reversed(sides) if is_transposed else sides
        scales = (experts, out, width // MXFP4.block)
        for suffix, wanted in ((BLOCKS, (*scales, MXFP4.block // 2)), (SCALES, scales)):
            key = name + suffix
            if key not in headers:
                raise ValueError(f"the checkpoint lacks {key}")
            if headers[key].dtype != "U8":
                raise ValueError(f"{key} is {headers[key].dtype}, and U8 can be read")
            if headers[key].shape != wanted:
                raise ValueError(
                    f"{key} is {headers[key].shape}, and {wanted} can be read: {experts} experts of {out} x {width} in "
                    f"blocks of {MXFP4.block}"
                )

    def join(
        self, tensors: Mapping[str, Tensor], names: list[list[str]], dtype: torch.dtype, is_transposed: bool
    ) -> QuantizedWeight:
        """The weight, of the checkpoint's own tensors."""
        ((name,),) = names
        packed, scales = tensors[name + BLOCKS].flatten(-2), tensors[name + SCALES]
        experts, out, width = *packed.shape[:-1], 2 * packed.shape[-1]
        shape = (experts, width, out) if is_transposed else (experts, out, width)
        return QuantizedWeight(MXFP4(is_transposed), {"packed": packed, "scales": scales}, shape, dtype)

    def conversions(self, hf_quantizer: Any, experts: list[str]) -> list[WeightConverter]:
        """What makes the experts' parameters, which no converter does."""
        endings = sorted({".".join(name.split(".")[-2:]) for name in experts})
        return [joining([ending], ending, self, hf_quantizer) for ending in endings]
