"""mxfp4: weights in four bits with a power of two for each 32 of a row, as gpt-oss's checkpoints have them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_moe.ops.grouped import NO_KERNEL, launch
from lightning_moe.ops.quantized import Layout, parts_problem

# What the lower three of the four bits stand for (E2M1, OCP Microscaling Formats 1.0); the fourth is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_EXPONENT = 2  # of those
# Of the scales' bytes.
BIAS, NOT_A_NUMBER = 127, 255


@dataclass(frozen=True)
class MXFP4:
    """Four bits a value, times a power of two for each 32 values of a row.

    The parts: `packed` (E, out, in / 2) uint8, the first of two values in the low bits; `scales` (E, out, in / 32)
    uint8: the exponent + 127. A weight that is `is_transposed` has the same parts.

    Attributes:
        is_transposed: whether the weight is (E, in, out), as gpt-oss's modules have it, and not (E, out, in).
    """

    is_transposed: bool = False

    name = "mxfp4"
    block = 32
    bytes_per_value = 1 / 2 + 1 / 32

    def shape_problem(self, shape: tuple[int, ...]) -> str | None:
        """Why no weight of that shape can be stored, in words; None if one can."""
        width = shape[1] if self.is_transposed else shape[2]
        return f"rows of {width} values are no whole number of blocks of {self.block}" if width % self.block else None

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """The parts of a weight of that shape."""
        experts, out, width = (shape[0], shape[2], shape[1]) if self.is_transposed else shape
        return {
            "packed": ((experts, out, width // 2), torch.uint8),
            "scales": ((experts, out, width // self.block), torch.uint8),
        }

    def problem(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> str | None:
        """Why these parts are no weight of that shape, in words; None if they are."""
        return self.shape_problem(shape) or parts_problem(self, parts, self.layout(shape), shape)

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """The values of some rows and columns of each expert, (E, rows, columns), multiplied in float32 and rounded.

        If `is_transposed`, a transposed view of what is made.
        """
        if self.is_transposed:
            return MXFP4().dequantize(parts, (shape[0], shape[2], shape[1]), dtype, columns, rows).mT
        packed, scales = parts["packed"], parts["scales"]
        out = packed.new_empty(shape[0], rows.stop - rows.start, columns.stop - columns.start, dtype=dtype)
        dense = launch("dequantize_mxfp4", packed, packed, scales, out, rows.start, columns.start, self.block)
        if dense is not NO_KERNEL:
            return out
        values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float32, device=out.device)
        block = torch.arange(columns.start, columns.stop, device=out.device) // self.block
        first = columns.start % 2  # of two values in a byte
        for expert, target in enumerate(out):
            pairs = packed[expert, rows, columns.start // 2 : (columns.stop + 1) // 2]
            codes = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)[:, first : first + target.shape[1]]
            torch.mul(values[codes.int()], powers(scales[expert, rows])[:, block], out=target)
        return out

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantizes weights expert by expert, on their device: each value to the nearest, of two as near to the even.

        A block's scale brings its absmax to between 4 and 8, of which what exceeds 6 becomes 6. A block that is not
        finite becomes NaN.
        """
        middles = torch.tensor(E2M1, dtype=torch.float32, device=weight.device)
        middles = (middles[1:] + middles[:-1]) / 2
        middles[1::2] = middles[1::2].nextafter(middles.new_zeros(()))  # those that the even one above is as near to
        packed, scales = [], []
        for expert in weight.detach():
            blocks = (expert.mT if self.is_transposed else expert).float().unflatten(1, (-1, self.block))
            absmax = blocks.abs().amax(-1)
            exponent = absmax.frexp().exponent - 1 - LARGEST_EXPONENT
            scale = torch.where(absmax.isfinite(), (exponent + BIAS).clamp(0, 254), NOT_A_NUMBER).to(torch.uint8)
            values = (blocks / powers(scale)[..., None]).flatten(1).contiguous()
            codes = torch.bucketize(values.abs(), middles, out_int32=True) | (values.signbit().int() << 3)
            packed.append((codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8))
            scales.append(scale)
        return {"packed": torch.stack(packed), "scales": torch.stack(scales)}


def powers(scales: Tensor) -> Tensor:
    """What scales stand for, float32, made of its bits: 0 is a subnormal number, and 255 is none (NaN)."""
    made = (scales.int() << 23).clamp_min(1 << 22).view(torch.float32)
    return made.masked_fill(scales == NOT_A_NUMBER, torch.nan)
