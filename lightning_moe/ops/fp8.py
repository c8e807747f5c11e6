"""fp8: weights in eight bits with a scale for each block of 128 x 128, as Qwen3-30B-A3B-FP8 has them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_moe.ops.grouped import NO_KERNEL, launch
from lightning_moe.ops.quantized import Layout, parts_problem

# The largest magnitude of float8_e4m3fn.
LARGEST = 448.0


@dataclass(frozen=True)
class FP8:
    """Values in float8_e4m3fn, each times its block's scale. The last blocks of a side may be smaller.

    The parts: `values` (E, out, in) float8_e4m3fn; `scales` (E, ⌈out / 128⌉, ⌈in / 128⌉) float32, which multiply.
    """

    name = "fp8"
    block = 128
    bytes_per_value = 1 + 4 / 128**2

    def shape_problem(self, shape: tuple[int, ...]) -> str | None:
        """None: a weight of any shape can be stored."""
        return None

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """The parts of a weight of that shape."""
        experts, out, width = shape
        blocks = (experts, -(-out // self.block), -(-width // self.block))
        return {"values": (shape, torch.float8_e4m3fn), "scales": (blocks, torch.float32)}

    def problem(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> str | None:
        """Why these parts are no weight of that shape, in words; None if they are."""
        return parts_problem(self, parts, self.layout(shape), shape)

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """The values of some rows and columns of each expert, (E, rows, columns), multiplied in float32 and rounded."""
        values, scales = parts["values"], parts["scales"]
        out = values.new_empty(shape[0], rows.stop - rows.start, columns.stop - columns.start, dtype=dtype)
        codes = values.view(torch.uint8)  # which GPUs without float8, and Triton on them, take too
        dense = launch("dequantize_fp8", codes, codes, scales, out, rows.start, columns.start, self.block)
        if dense is not NO_KERNEL:
            return out
        row = torch.arange(rows.start, rows.stop, device=out.device)[:, None] // self.block
        column = torch.arange(columns.start, columns.stop, device=out.device) // self.block
        for expert, target in enumerate(out):
            torch.mul(values[expert, rows, columns].float(), scales[expert][row, column], out=target)
        return out

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantizes (E, out, in) weights expert by expert, on their device: each block's absmax becomes `LARGEST`."""
        _, out, width = weight.shape
        row, column = (torch.arange(size, device=weight.device) // self.block for size in (out, width))
        largest = torch.full((), LARGEST, device=weight.device)
        values, scales = [], []
        for expert in weight.detach():
            padded = F.pad(expert.float(), (0, -width % self.block, 0, -out % self.block))
            blocks = padded.unflatten(1, (-1, self.block)).unflatten(0, (-1, self.block))
            # No smaller than any normal number, so that a block of zeros is divided by something.
            # By a tensor: a GPU divides by a number as it multiplies by the inverse, which rounds otherwise.
            scale = (blocks.abs().amax((1, 3)) / largest).clamp_min(torch.finfo(torch.float32).tiny)
            values.append((expert.float() / scale[row[:, None], column]).to(torch.float8_e4m3fn))
            scales.append(scale)
        return {"values": torch.stack(values), "scales": torch.stack(scales)}
