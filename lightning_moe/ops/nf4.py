"""nf4: weights in four bits, as bitsandbytes stores them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_moe.ops.grouped import NO_KERNEL, launch
from lightning_moe.ops.quantized import Layout, parts_problem

# The quantiles of a normal distribution that the four bits stand for (Dettmers et al., QLoRA, 2023, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NF4:
    """bitsandbytes' nf4, each expert by itself: four bits a value, and the largest magnitude of each 64 of them.

    The parts, with B blocks in an expert: `packed` (E, out · in / 2) uint8, the first of two values in the high bits;
    `absmax` (E, B) float32 or, nested, uint8: codes, in units of `absmax_scale` (E, ⌈B / 256⌉), of the differences from
    `absmax_offset`, of the same shape; both float32.
    """

    name = "nf4"
    block = 64
    nested_block = 256
    bytes_per_value = 1 / 2 + 1 / 64 + 8 / (64 * 256)  # nested

    def shape_problem(self, shape: tuple[int, ...]) -> str | None:
        """Why no weight of that shape can be stored, in words; None if one can."""
        _, out, width = shape
        if out * width % self.block or width % 2:
            return f"an expert of {out} x {width} values is no whole number of blocks of {self.block}"
        return None

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """The parts of a weight of that shape, its absmax nested."""
        experts, out, width = shape
        blocks = out * width // self.block
        nested = (experts, -(-blocks // self.nested_block)), torch.float32
        return {
            "packed": ((experts, out * width // 2), torch.uint8),
            "absmax": ((experts, blocks), torch.uint8),
            "absmax_scale": nested,
            "absmax_offset": nested,
        }

    def problem(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> str | None:
        """Why these parts are no weight of that shape, in words; None if they are."""
        if problem := self.shape_problem(shape):
            return problem
        wanted = self.layout(shape)
        if "absmax" not in parts or parts["absmax"].dtype != torch.uint8:
            wanted = {"packed": wanted["packed"], "absmax": (wanted["absmax"][0], torch.float32)}
        return parts_problem(self, parts, wanted, shape)

    def dequantize(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """The values of some rows and columns of each expert, (E, rows, columns); columns begin at even ones.

        Bit for bit what bitsandbytes makes of an expert: level times absmax in float32, then rounded.
        """
        if columns.start % 2:
            raise ValueError(f"nf4: two columns share a byte, and {columns.start} is the second of its")
        out = parts["packed"].new_empty(shape[0], rows.stop - rows.start, columns.stop - columns.start, dtype=dtype)
        levels, codes = tables(out.device)
        dense = launch(
            "dequantize_nf4", parts["packed"], parts, shape, levels, codes, out, rows.start, columns.start, self.block,
            self.nested_block,
        )  # fmt: skip
        if dense is not NO_KERNEL:
            return out
        every = torch.arange(rows.start, rows.stop, device=out.device)[:, None] * shape[2]
        block = (every + torch.arange(columns.start, columns.stop, device=out.device)) // self.block
        for expert, target in enumerate(out):
            pairs = parts["packed"][expert].view(shape[1], -1)[rows, columns.start // 2 : (columns.stop + 1) // 2]
            values = levels[torch.stack([pairs >> 4, pairs & 15], -1).flatten(-2).int()][:, : target.shape[1]]
            torch.mul(values, self._absmax(parts, expert, codes)[block], out=target)
        return out

    def _absmax(self, parts: Mapping[str, Tensor], expert: int, codes: Tensor) -> Tensor:
        """(B,) float32."""
        absmax = parts["absmax"][expert]
        if absmax.dtype != torch.uint8:
            return absmax
        scale, offset = (
            parts[name][expert].repeat_interleave(self.nested_block)[: absmax.shape[0]]
            for name in ("absmax_scale", "absmax_offset")
        )
        return codes[absmax.int()] * scale + offset


@cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """What nf4's four bits stand for, (16,), and what the eight of a nested absmax do, (256,): float32."""
    # Whatever dtype, device or mode is the default as this is first called.
    with torch.inference_mode(False):
        codes = [0.0, 1.0]
        for i in range(7):  # an exponent and a fraction (Dettmers et al., 8-bit Optimizers via Block-wise Quantization)
            ends = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
            means = 10.0 ** (i - 6) * ((ends[:-1] + ends[1:]) / 2)
            codes += [*means.tolist(), *(-means).tolist()]
        options: Any = {"dtype": torch.float32, "device": device}
        return torch.tensor(NF4_LEVELS, **options), torch.tensor(sorted(codes), **options)
