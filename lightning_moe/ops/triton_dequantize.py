"""The Triton kernels that make quantized weights dense; the formats' own files have their references.

Each launcher fills `out` (E, rows, columns) with the values from a first row and a first column on, and returns it.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from lightning_moe.ops.triton_launch import cdiv, run_kernel


@triton.jit
def _dequantize_nf4_kernel(
    packed, absmax, scales, nested_offsets, levels, codes, out, first_row, first_pair, num_rows, num_columns, num_pairs,
    num_groups, pairs_per_row, num_blocks, num_scales, pairs_per_expert, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    PAIRS: tl.constexpr, NESTED_BLOCK: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    # Of pairs in a row, as many as a block has: where they are a block, one absmax is loaded for all of them.
    group = tl.program_id(0) * BG + tl.arange(0, BG)
    row, first = group // num_groups, group % num_groups * PAIRS
    start = (first_row + row) * pairs_per_row + first_pair + first
    pair = tl.arange(0, PAIRS)[None, :]
    valid = row < num_rows
    mask = valid[:, None] & (first[:, None] + pair < num_pairs)
    byte = tl.load(packed + expert * pairs_per_expert + start[:, None] + pair, mask=mask, other=0).to(tl.int32)
    if ALIGNED:
        block, known = start // PAIRS, valid
    else:
        block, known = (start[:, None] + pair) // PAIRS, mask
    scale = tl.load(absmax + expert * num_blocks + block, mask=known, other=0)
    if NESTED:
        nested = expert * num_scales + block // NESTED_BLOCK
        unit = tl.load(scales + nested, mask=known, other=0.0)
        scale = tl.load(codes + scale.to(tl.int32)) * unit + tl.load(nested_offsets + nested, mask=known, other=0.0)
    if ALIGNED:
        scale = scale[:, None]
    both = tl.join(tl.load(levels + (byte >> 4)) * scale, tl.load(levels + (byte & 15)) * scale)
    dense = both.reshape(BG, 2 * PAIRS).to(out.dtype.element_ty)
    column = 2 * first[:, None] + tl.arange(0, 2 * PAIRS)[None, :]
    target = out + (expert * num_rows + row)[:, None] * num_columns + column
    tl.store(target, dense, mask=valid[:, None] & (column < num_columns))


def dequantize_nf4(
    parts: Mapping[str, Tensor],
    shape: tuple[int, ...],
    levels: Tensor,
    codes: Tensor,
    out: Tensor,
    first_row: int,
    first_column: int,
    block: int,
    nested_block: int,
) -> Tensor:
    (num_experts, num_rows, num_columns), is_nested = out.shape, "absmax_scale" in parts
    packed, absmax, at_a_time = parts["packed"], parts["absmax"], 16
    scales, offsets = (parts["absmax_scale"], parts["absmax_offset"]) if is_nested else (None, None)
    num_groups = cdiv(num_columns, block)
    run_kernel(
        _dequantize_nf4_kernel, (cdiv(num_rows * num_groups, at_a_time), num_experts), packed, absmax, scales,
        offsets, levels, codes, out, first_row, first_column // 2, num_rows, num_columns, cdiv(num_columns, 2),
        num_groups, shape[2] // 2, absmax.shape[1], scales.shape[1] if is_nested else 0, packed.shape[1],
        constants=(is_nested, shape[2] % block == 0 and first_column % block == 0, block // 2, nested_block, at_a_time),
        num_warps=1, enable_fp_fusion=False,  # nested: bitsandbytes rounds each step
    )  # fmt: skip
    return out


@triton.jit
def _row_blocks(first_column, num_rows, num_columns, num_groups, BLOCK: tl.constexpr, BG: tl.constexpr):
    """What a program makes dense: of some of an expert's rows a block each, its columns, and which of them are wanted.

    A row's values in a block share a scale.
    """
    group = tl.program_id(0) * BG + tl.arange(0, BG)
    row, block = group // num_groups, first_column // BLOCK + group % num_groups
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    valid = row < num_rows
    mask = valid[:, None] & (column >= first_column) & (column < first_column + num_columns)
    return row, block, valid, column, mask


@triton.jit
def _dequantize_fp8_kernel(
    values, scales, out, first_row, first_column, num_rows, num_columns, num_groups, rows_per_expert, row_width,
    scale_rows, scale_columns, BLOCK: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    row, block, valid, column, mask = _row_blocks(first_column, num_rows, num_columns, num_groups, BLOCK, BG)
    its_row = first_row + row
    source = values + (expert * rows_per_expert + its_row)[:, None] * row_width
    byte = tl.load(source + column, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scales + (expert * scale_rows + its_row // BLOCK) * scale_columns + block, mask=valid, other=0.0)
    # By integers, as GPUs before Ada have it: the exponent and the fraction where float32 has its own, 120 too low.
    magnitude = byte & 127
    value = (((byte & 128) << 24) | (magnitude << 20)).to(tl.float32, bitcast=True) * 2.0**120
    value = tl.where(magnitude == 127, float("nan"), value)
    dense = (value * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + (expert * num_rows + row)[:, None] * num_columns + (column - first_column), dense, mask=mask)


def dequantize_fp8(
    values: Tensor, scales: Tensor, out: Tensor, first_row: int, first_column: int, block: int
) -> Tensor:
    (num_experts, num_rows, num_columns), at_a_time = out.shape, 8
    num_groups = cdiv(first_column + num_columns, block) - first_column // block
    run_kernel(
        _dequantize_fp8_kernel, (cdiv(num_rows * num_groups, at_a_time), num_experts), values, scales, out, first_row,
        first_column, num_rows, num_columns, num_groups, *values.shape[1:], *scales.shape[1:],
        constants=(block, at_a_time), num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _e2m1(code):
    """The exponent and the fraction of four bits where float32 has its own, 126 too low."""
    return (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def _dequantize_mxfp4_kernel(
    packed, scales, out, first_row, first_column, num_rows, num_columns, num_groups, rows_per_expert, pairs_per_row,
    blocks_per_row, BLOCK: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    row, block, valid, column, mask = _row_blocks(first_column, num_rows, num_columns, num_groups, BLOCK, BG)
    its_row = expert * rows_per_expert + first_row + row
    pair = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    byte = tl.load(packed + its_row[:, None] * pairs_per_row + pair, mask=valid[:, None], other=0).to(tl.int32)
    scale = tl.load(scales + its_row * blocks_per_row + block, mask=valid, other=0).to(tl.int32)
    power = tl.where(scale == 255, float("nan"), tl.maximum(scale << 23, 1 << 22).to(tl.float32, bitcast=True))[:, None]
    both = tl.join(_e2m1(byte & 15) * power, _e2m1(byte >> 4) * power)
    dense = both.reshape(BG, BLOCK).to(out.dtype.element_ty)
    tl.store(out + (expert * num_rows + row)[:, None] * num_columns + (column - first_column), dense, mask=mask)


def dequantize_mxfp4(
    packed: Tensor, scales: Tensor, out: Tensor, first_row: int, first_column: int, block: int
) -> Tensor:
    (num_experts, num_rows, num_columns), at_a_time = out.shape, 64
    num_groups = cdiv(first_column + num_columns, block) - first_column // block
    run_kernel(
        _dequantize_mxfp4_kernel, (cdiv(num_rows * num_groups, at_a_time), num_experts), packed, scales, out,
        first_row, first_column, num_rows, num_columns, num_groups, *packed.shape[1:], scales.shape[2],
        constants=(block, at_a_time), num_warps=2,
    )  # fmt: skip
    return out
