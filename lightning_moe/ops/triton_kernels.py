"""The Triton kernels behind grouped.py, which holds their plain PyTorch references and chooses between the two.

Imported only where a kernel runs. Each launcher takes and returns what its reference does. R rows sorted by expert,
E experts, T tokens, K top_k, I intermediate. Row and token offsets are 64-bit throughout.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from lightning_moe.ops.triton_dequantize import dequantize_fp8, dequantize_mxfp4, dequantize_nf4
from lightning_moe.ops.triton_launch import TOO_LARGE, cdiv, power_of_2, run_kernel

# The launchers, as grouped.py asks for them, and what they raise on a device that is too small.
__all__ = [
    "TOO_LARGE", "combine", "count", "dequantize_fp8", "dequantize_mxfp4", "dequantize_nf4", "gated", "gated_backward",
    "grouped_linear", "grouped_outer", "route",
]  # fmt: skip

# The tile of the grouped product: the fastest of those measured on an H100 at Qwen3-30B-A3B's shapes. By pointers, no
# GPU from Ampere on spills registers for it.
BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER = 128, 256, 64
NUM_WARPS, NUM_STAGES = 8, 4


@triton.jit
def _count_experts(experts, block, num_rows, last, E2: tl.constexpr, BR: tl.constexpr):
    """How many of a block's pairs each expert has."""
    pair = block * BR + tl.arange(0, BR)
    valid = pair < num_rows
    expert = tl.minimum(tl.maximum(tl.load(experts + pair, mask=valid, other=0).to(tl.int32), 0), last)
    invalid = tl.where(tl.arange(0, E2) == 0, tl.sum((~valid).to(tl.int32), 0), 0)
    return tl.histogram(tl.where(valid, expert, 0), E2) - invalid


@triton.jit
def _count_experts_kernel(experts, counts, num_rows, last, E2: tl.constexpr, BR: tl.constexpr):
    block = tl.program_id(0)
    tl.store(counts + block * E2 + tl.arange(0, E2), _count_experts(experts, block, num_rows, last, E2, BR))


@triton.jit
def _route_kernel(
    experts, counts, permutation, inverse, offsets, tiles_out, chosen, num_rows, last, num_experts, num_blocks,
    num_tiles, HAS_COUNTS: tl.constexpr, HAS_TILES: tl.constexpr, COMPACTS: tl.constexpr, E2: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    every = tl.arange(0, E2)
    # The rows of each expert, of all pairs and of those before this block's.
    rows, rows_before = tl.zeros((E2,), tl.int32), tl.zeros((E2,), tl.int32)
    if HAS_COUNTS:
        for first in range(0, num_blocks, BC):
            other = first + tl.arange(0, BC)
            count = tl.load(counts + other[:, None] * E2 + every[None, :], mask=(other < num_blocks)[:, None], other=0)
            rows += tl.sum(count, 0)
            rows_before += tl.sum(tl.where((other < block)[:, None], count, 0), 0)
    else:
        for other in range(num_blocks):
            count = _count_experts(experts, other, num_rows, last, E2, BR)
            rows += count
            rows_before += tl.where(other < block, count, 0)
    ends = tl.cumsum(rows, 0)
    starts = ends - rows
    following = starts + rows_before
    for first in range(block * BR, tl.minimum(block * BR + BR, num_rows), BC):
        pair = first + tl.arange(0, BC)
        valid = pair < num_rows
        expert = tl.minimum(tl.maximum(tl.load(experts + pair, mask=valid, other=0).to(tl.int32), 0), last)
        is_its = ((expert[:, None] == every[None, :]) & valid[:, None]).to(tl.int32)
        row = tl.sum(is_its * (following[None, :] + tl.cumsum(is_its, 0) - 1), 1)
        following += tl.sum(is_its, 0)
        tl.store(inverse + pair, row.to(tl.int64), mask=valid)
        tl.store(permutation + row, pair.to(tl.int64), mask=valid)
        if COMPACTS:
            tl.store(chosen + pair, expert.to(chosen.dtype.element_ty), mask=valid)
    if block == 0:
        tl.store(offsets + every, ends, mask=every < num_experts)
    if HAS_TILES and block * BT < num_tiles:
        tiles = tl.where(every < num_experts, (rows + BM - 1) // BM, 0)
        tile_ends = tl.cumsum(tiles, 0)
        tile = block * BT + tl.arange(0, BT)
        passed = (tile_ends[None, :] <= tile[:, None]) & (every < num_experts)[None, :]
        expert = tl.sum(passed.to(tl.int32), 1)
        # Rows before the expert's first tile, counted in whole tiles, differ from its first row.
        shift = tl.where(every[None, :] == expert[:, None], (starts - (tile_ends - tiles) * BM)[None, :], 0)
        mask = tile < num_tiles
        tl.store(tiles_out + tile, tl.where(expert < num_experts, expert, -1), mask=mask)
        tl.store(tiles_out + num_tiles + tile, tile * BM + tl.sum(shift, 1), mask=mask)


@triton.jit
def _tile(tiles, COLUMNS: tl.constexpr, BN: tl.constexpr):
    """What a program of the grouped product computes: the tile of rows, its expert (negative: nothing), the column."""
    COLUMN_TILES: tl.constexpr = (COLUMNS + BN - 1) // BN
    tile = tl.program_id(0) // COLUMN_TILES
    column = tl.program_id(0) % COLUMN_TILES * BN
    return tile, tl.load(tiles + tile), column


@triton.jit
def _store_tile(out, out_stride, total, row, valid, column, COLUMNS: tl.constexpr, BN: tl.constexpr):
    columns = column + tl.arange(0, BN)
    target = out + row.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=valid[:, None] & (columns < COLUMNS)[None, :])


@triton.jit
def _grouped_linear_kernel(
    rows, rows_desc, tokens, weight_desc, small_desc, factor_desc, out, tiles, num_tiles, offsets, row_stride,
    out_stride, INNER: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, START: tl.constexpr,
    GATHER: tl.constexpr, TOP_K: tl.constexpr, IN_FIRST: tl.constexpr, FACTOR_IN_FIRST: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    tile, expert, column = _tile(tiles, COLUMNS, BN)
    if expert < 0:
        return
    first_row = tl.load(tiles + num_tiles + tile)
    row = first_row + tl.arange(0, BM)
    valid = row < tl.load(offsets + expert)
    inner = tl.arange(0, BK)
    if GATHER:
        token = tl.load(tokens + row, mask=valid, other=0).to(tl.int64) // TOP_K
        pointers = rows + token[:, None] * row_stride + inner[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, INNER, BK):
        if GATHER:
            if INNER % BK == 0:
                left = tl.load(pointers)
            else:
                left = tl.load(pointers, mask=(inner < INNER - k)[None, :], other=0.0)
            pointers += BK
        else:
            left = rows_desc.load([first_row, k])
        if IN_FIRST:
            right = weight_desc.load([expert, k, column]).reshape(BK, BN)
        else:
            right = weight_desc.load([expert, column, k]).reshape(BN, BK).T
        total = tl.dot(left, right, total)
    if RANK > 0:  # a loop of no turns is compiled too
        for k in range(0, RANK, BR):
            left = small_desc.load([first_row, k])
            if FACTOR_IN_FIRST:
                right = factor_desc.load([expert, k, column]).reshape(BR, BN)
            else:
                right = factor_desc.load([expert, column, k]).reshape(BN, BR).T
            total = tl.dot(left, right, total)
    _store_tile(out + START, out_stride, total, row, valid, column, COLUMNS, BN)


@triton.jit
def _add_product(total, left, right, has_column, INNER: tl.constexpr, IN_STRIDE: tl.constexpr, BK: tl.constexpr):
    """Adds the product of rows (BM, 1) and columns (1, BN), which are pointers to the first of their inner features."""
    inner = tl.arange(0, BK)
    lefts, rights = left + inner[None, :], right + inner[:, None] * IN_STRIDE
    for k in range(0, INNER, BK):
        is_inner = inner < INNER - k
        rows = tl.load(lefts, mask=is_inner[None, :], other=0.0)
        columns = tl.load(rights, mask=is_inner[:, None] & has_column, other=0.0)
        total = tl.dot(rows, columns, total)
        lefts += BK
        rights += BK * IN_STRIDE
    return total


@triton.jit
def _grouped_linear_pointers_kernel(
    rows, tokens, weight, small, factor, out, tiles, num_tiles, offsets, INNER: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr, START: tl.constexpr, GATHER: tl.constexpr, TOP_K: tl.constexpr, ROW_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr, WEIGHT_EXPERT: tl.constexpr, WEIGHT_IN: tl.constexpr, WEIGHT_OUT: tl.constexpr,
    SMALL_STRIDE: tl.constexpr, FACTOR_EXPERT: tl.constexpr, FACTOR_IN: tl.constexpr, FACTOR_OUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The same without descriptors. That strides are constants lets 16 bytes be loaded at once where they allow it."""
    tile, expert, column = _tile(tiles, COLUMNS, BN)
    if expert < 0:
        return
    first_row = tl.load(tiles + num_tiles + tile)
    row = first_row + tl.arange(0, BM)
    valid = row < tl.load(offsets + expert)
    # Past the expert's last row its first of this tile is read again, and not stored.
    its_row = tl.where(valid, row, first_row).to(tl.int64)
    source = tl.load(tokens + its_row).to(tl.int64) // TOP_K if GATHER else its_row
    expert, columns = expert.to(tl.int64), (column + tl.arange(0, BN)).to(tl.int64)[None, :]
    has_column = columns < COLUMNS
    total = tl.zeros((BM, BN), tl.float32)
    right = weight + expert * WEIGHT_EXPERT + columns * WEIGHT_OUT
    total = _add_product(total, rows + source[:, None] * ROW_STRIDE, right, has_column, INNER, WEIGHT_IN, BK)
    if RANK > 0:
        right = factor + expert * FACTOR_EXPERT + columns * FACTOR_OUT
        total = _add_product(total, small + its_row[:, None] * SMALL_STRIDE, right, has_column, RANK, FACTOR_IN, BR)
    _store_tile(out + START, OUT_STRIDE, total, row, valid, column, COLUMNS, BN)


def route(
    top_k_index: Tensor,
    num_experts: int,
    *,
    is_expert_parallel: bool,
    needs_tiles: bool,
    compact_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    num_rows = top_k_index.numel()
    permutation = top_k_index.new_empty(num_rows, dtype=torch.int64)
    inverse = torch.empty_like(permutation)
    offsets = top_k_index.new_empty(num_experts, dtype=torch.int32)
    num_tiles = num_rows // BLOCK_ROWS + num_experts if needs_tiles else 0
    tiles = top_k_index.new_empty(2, num_tiles, dtype=torch.int32) if needs_tiles else None
    chosen = None if compact_dtype is None else torch.empty_like(top_k_index, dtype=compact_dtype)
    last = num_experts if is_expert_parallel else num_experts - 1  # other ranks' experts are one more
    # Each block reads the counts of all, which stay few; where there are fewer still, it counts them itself.
    bins, block = max(power_of_2(last + 1), 2), max(1024, power_of_2(cdiv(num_rows, 256)))
    num_blocks, counts = max(cdiv(num_rows, block), 1), None
    if num_blocks > 32:
        counts = offsets.new_empty(num_blocks, bins)
        run_kernel(
            _count_experts_kernel, (num_blocks,), top_k_index, counts, num_rows, last, constants=(bins, block)
        )  # fmt: skip
    run_kernel(
        _route_kernel, (max(num_blocks, cdiv(num_tiles, 32)),), top_k_index, counts, permutation, inverse, offsets,
        tiles, chosen, num_rows, last, num_experts, num_blocks, num_tiles,
        constants=(counts is not None, needs_tiles, chosen is not None, bins, BLOCK_ROWS, block,
                   min(max(8192 // bins, 8), 256), 32),
    )  # fmt: skip
    return permutation, inverse, offsets, tiles, chosen


def _block(width: int, most: int) -> int:
    """A tile's width for that many columns: a power of two that tl.dot takes."""
    return min(max(power_of_2(width), 16), most)


@cache
def has_tensor_memory_accelerator(device: torch.device) -> bool:
    """Whether the device loads by descriptors, as Hopper and its successors do."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on the device."""
    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _num_stages(block_columns: int, shared_memory: int) -> int:
    """How many stages the grouped product's pipeline has, where a block may have so many bytes of shared memory.

    A stage is the 16-bit tiles of both operands. GPUs with less shared memory than Hopper and its successor for data
    centers multiply from registers, where one stage's tiles are: there is one stage more than fits.
    """
    stage = 2 * BLOCK_INNER * (BLOCK_ROWS + block_columns)
    return min(NUM_STAGES, shared_memory // stage + 1)


class _Address(NamedTuple):
    """What a descriptor asks of a tensor. It holds on to no memory."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@lru_cache(maxsize=4096)  # a model's weights stay where they are
def _descriptor_at(address: int, dtype: torch.dtype, shape: Any, strides: Any, block: Any) -> TensorDescriptor:
    return TensorDescriptor(_Address(address, dtype), list(shape), list(strides), list(block))


def _descriptor(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Of a tensor, in blocks of that shape."""
    if knobs.runtime.interpret:  # which reads the tensor itself
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))
    return _descriptor_at(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), block)


def _weight_descriptor(weight: Tensor, inner: int, columns: int) -> tuple[TensorDescriptor, bool]:
    """Of an (E, in, out) view, in blocks of that many of either side; and whether `out` is the contiguous one."""
    if not knobs.runtime.interpret:
        return _weight_descriptor_at(weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), inner, columns)
    if weight.stride(2) == 1:
        return _descriptor(weight, (1, inner, columns)), True
    return _descriptor(weight.mT, (1, columns, inner)), False


@lru_cache(maxsize=4096)
def _weight_descriptor_at(
    address: int, dtype: torch.dtype, shape: Any, strides: Any, inner: int, columns: int
) -> tuple[TensorDescriptor, bool]:
    layout = shape, strides, (1, inner, columns)
    in_first = strides[2] == 1
    if not in_first:  # as that of the transposed view, which this saves the host from making
        layout = tuple((first, third, second) for first, second, third in layout)
    return _descriptor_at(address, dtype, *layout), in_first


def grouped_linear(
    rows: Tensor,
    weight: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    *,
    tokens: Tensor | None = None,
    top_k: int = 1,
    low_rank: tuple[Tensor, Tensor] | None = None,
    into: tuple[Tensor, int] | None = None,
    pointers: bool | None = None,
) -> Tensor:
    """By descriptors or, with `pointers`, without them; the device decides where that is None."""
    num_rows = rows.shape[0] if tokens is None else tokens.shape[0]
    (_, inner, columns), num_tiles = weight.shape, tiles.shape[1]
    out, start = into or (rows.new_empty(num_rows, columns), 0)
    if num_rows == 0:
        return out
    device, block_columns = rows.device, _block(columns, BLOCK_COLUMNS)
    small, factor = low_rank or (None, None)
    rank, block_rank = (0, 16) if small is None else (small.shape[1], _block(small.shape[1], BLOCK_INNER))
    grid = (num_tiles * cdiv(columns, block_columns),)
    product = inner, columns, rank, start, tokens is not None, top_k
    block = BLOCK_ROWS, block_columns, BLOCK_INNER, block_rank
    num_warps = NUM_WARPS if block_columns > 64 else NUM_WARPS // 2
    num_stages = _num_stages(block_columns, _shared_memory(device))
    if pointers is None:
        pointers = not has_tensor_memory_accelerator(device)
    if pointers:
        factor_strides = (0, 0, 0, 0) if small is None else (small.stride(0), *factor.stride())
        run_kernel(
            _grouped_linear_pointers_kernel, grid, rows, tokens, weight, small, factor, out, tiles, num_tiles, offsets,
            constants=(*product, rows.stride(0), out.stride(0), *weight.stride(), *factor_strides, *block),
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        return out
    weight_desc, in_first = _weight_descriptor(weight, BLOCK_INNER, block_columns)
    # Each descriptor is encoded anew at each launch, by the host: none that the kernel does not read.
    rows_desc = small_desc = factor_desc = None
    factor_in_first = True
    if tokens is None:
        rows_desc = _descriptor(rows, (BLOCK_ROWS, BLOCK_INNER))
    if small is not None:
        small_desc = _descriptor(small, (BLOCK_ROWS, block_rank))
        factor_desc, factor_in_first = _weight_descriptor(factor, block_rank, block_columns)
    run_kernel(
        _grouped_linear_kernel, grid, rows, rows_desc, tokens, weight_desc, small_desc, factor_desc, out, tiles,
        num_tiles, offsets, rows.stride(0), out.stride(0),
        constants=(*product, in_first, factor_in_first, *block), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


# Of a product over rows: features of the wide side and rows at a time; warps and stages.
OUTER = 128, 64, 4, 4
# The rows that a program works through, at least: where an expert has more, others take them, piece by piece, so that
# an expert with many times the mean does not keep the device waiting.
OUTER_PIECE = 2048


@triton.jit
def _later_pieces(offsets, piece_rows, num_experts, E2: tl.constexpr):
    """How many pieces of rows each expert has after its first."""
    expert = tl.arange(0, E2)
    known = expert < num_experts
    ends = tl.load(offsets + expert, mask=known, other=0)
    starts = tl.load(offsets + expert - 1, mask=known & (expert > 0), other=0)
    return tl.maximum((ends - starts + piece_rows - 1) // piece_rows - 1, 0)


@triton.jit
def _grouped_outer_kernel(
    wide, tokens, narrow, out, later_out, offsets, wide_stride, narrow_stride, out_expert, out_wide, out_narrow, WIDE,
    NARROW, piece_rows, num_later, num_experts, GATHER: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, E2: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BW + tl.arange(0, BW)
    small = tl.program_id(2) * BN + tl.arange(0, BN)
    program = tl.program_id(1)
    # Later pieces come first: they are the largest.
    if program < num_later:
        later = _later_pieces(offsets, piece_rows, num_experts, E2)
        expert = tl.sum((tl.cumsum(later, 0) <= program).to(tl.int32), 0)
        piece = program - tl.sum(tl.where(tl.arange(0, E2) < expert, later, 0), 0) + 1
        target = later_out + program.to(tl.int64) * out_expert
    else:
        expert = program - num_later
        piece = 0
        target = out + expert.to(tl.int64) * out_expert
    known = expert < num_experts  # or the experts have fewer pieces than they might
    start = tl.load(offsets + expert - 1, mask=known & (expert > 0), other=0) + piece * piece_rows
    end = tl.minimum(tl.load(offsets + expert, mask=known, other=0), start + piece_rows)
    total = tl.zeros((BW, BN), tl.float32)
    for first in range(start, end, BR):
        row = first + tl.arange(0, BR)
        valid = row < end
        source = tl.load(tokens + row, mask=valid, other=0).to(tl.int64) if GATHER else row.to(tl.int64)
        left = tl.load(
            wide + source[:, None] * wide_stride + column[None, :],
            mask=valid[:, None] & (column < WIDE)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            narrow + row.to(tl.int64)[:, None] * narrow_stride + small[None, :],
            mask=valid[:, None] & (small < NARROW)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(left.T, right, total)
    target += column[:, None] * out_wide + small[None, :] * out_narrow
    tl.store(target, total, mask=(column < WIDE)[:, None] & (small < NARROW)[None, :])


@triton.jit
def _add_later_pieces_kernel(out, later_out, offsets, size, piece_rows, num_experts, E2: tl.constexpr, B: tl.constexpr):
    expert = tl.program_id(1)
    later = _later_pieces(offsets, piece_rows, num_experts, E2)
    num_its = tl.sum(tl.where(tl.arange(0, E2) == expert, later, 0), 0)
    if num_its > 0:
        at = tl.program_id(0) * B + tl.arange(0, B)
        mask = at < size
        target = out + expert.to(tl.int64) * size + at
        source = later_out + tl.sum(tl.where(tl.arange(0, E2) < expert, later, 0), 0).to(tl.int64) * size + at
        total = tl.load(target, mask=mask, other=0.0)
        for _ in range(num_its):
            total += tl.load(source, mask=mask, other=0.0)
            source += size
        tl.store(target, total, mask=mask)


def grouped_outer(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    *,
    left_tokens: Tensor | None,
    right_tokens: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    wide, narrow, tokens, is_turned = left, right, left_tokens, False
    if right_tokens is not None or (left_tokens is None and left.shape[1] < right.shape[1]):
        assert left_tokens is None, "the kernel gathers one side's rows"
        wide, narrow, tokens, is_turned = right, left, right_tokens, True
    num_experts, num_rows, width, rank = offsets.shape[0], narrow.shape[0], wide.shape[1], narrow.shape[1]
    # No more later pieces than experts: they take no more memory than the result.
    piece_rows = max(OUTER_PIECE, cdiv(num_rows, num_experts))
    num_later = max(num_rows - 1, 0) // piece_rows
    out = left.new_empty(num_experts, left.shape[1], right.shape[1], dtype=torch.float32)
    later_out = left.new_empty(num_later, left.shape[1], right.shape[1], dtype=torch.float32) if num_later else out
    view = out.mT if is_turned else out
    block, experts_block = _block(rank, 64), power_of_2(num_experts)
    features, rows, num_warps, num_stages = OUTER
    run_kernel(
        _grouped_outer_kernel, (cdiv(width, features), num_later + num_experts, cdiv(rank, block)), wide,
        offsets if tokens is None else tokens, narrow, out, later_out, offsets, wide.stride(0), narrow.stride(0),
        *view.stride(), width, rank, piece_rows, num_later, num_experts,
        constants=(tokens is not None, features, block, rows, experts_block),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if num_later:
        size, at_a_time = out.stride(0), 4096
        run_kernel(
            _add_later_pieces_kernel, (cdiv(size, at_a_time), num_experts), out, later_out, offsets, size, piece_rows,
            num_experts, constants=(experts_block, at_a_time),
        )  # fmt: skip
    return out.to(out_dtype)


@triton.jit
def _activation(gate, KIND: tl.constexpr):
    """The activation of the gate half and its derivative, float32."""
    if KIND == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid + value * (1 - sigmoid)
    elif KIND == "gelu":
        cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        value = gate * cdf
        slope = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    else:
        cubic = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        tanh = 2 * tl.sigmoid(2 * cubic) - 1
        value = 0.5 * gate * (1 + tanh)
        rise = 0.7978845608028654 * (1 + 0.134145 * gate * gate)
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * rise
    return value, slope


@triton.jit
def _gated_kernel(pre, out, num_rows, I: tl.constexpr, KIND: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr):
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    wide = row.to(tl.int64)[:, None]
    for i in tl.static_range(0, I, BI):
        column = i + tl.arange(0, BI)[None, :]
        mask = (row < num_rows)[:, None] & (column < I)
        gate = tl.load(pre + wide * (2 * I) + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(pre + wide * (2 * I) + I + column, mask=mask, other=0.0).to(tl.float32)
        value, _ = _activation(gate, KIND)
        tl.store(out + wide * I + column, (value * up).to(out.dtype.element_ty), mask=mask)


def gated(pre_activation: Tensor, kind: str) -> Tensor:
    num_rows, width = pre_activation.shape
    out = pre_activation.new_empty(num_rows, width // 2)
    if num_rows:
        block = min(1024, power_of_2(width // 2))
        grid, constants = (cdiv(num_rows, 4),), (width // 2, kind, 4, block)
        run_kernel(_gated_kernel, grid, pre_activation, out, num_rows, constants=constants)
    return out


@triton.jit
def _gated_backward_kernel(
    grad, pre, grad_pre, row_weights, inner, pairs, num_rows, I: tl.constexpr, KIND: tl.constexpr,
    NEEDS: tl.constexpr, HAS_PAIRS: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    valid = row < num_rows
    wide = row.to(tl.int64)[:, None]
    pair = row
    if HAS_PAIRS:
        pair = tl.load(pairs + row, mask=valid, other=0)
    scale = tl.load(row_weights + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
    dot = tl.zeros((BR,), tl.float32)
    for i in tl.static_range(0, I, BI):
        column = i + tl.arange(0, BI)[None, :]
        mask = valid[:, None] & (column < I)
        source = pre + wide * (2 * I) + column
        gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(source + I, mask=mask, other=0.0).to(tl.float32)
        unscaled = tl.load(grad + wide * I + column, mask=mask, other=0.0).to(tl.float32)
        value, slope = _activation(gate, KIND)
        activated = value * up
        dot += tl.sum(activated * unscaled, 1)
        through = unscaled * scale
        target = grad_pre + wide * (2 * I) + column
        tl.store(target, (through * up * slope).to(grad_pre.dtype.element_ty), mask=mask)
        tl.store(target + I, (through * value).to(grad_pre.dtype.element_ty), mask=mask)
        if NEEDS is not None:
            kept = activated if NEEDS == "a" else activated * scale
            tl.store(grad + wide * I + column, kept.to(grad.dtype.element_ty), mask=mask)
    tl.store(inner + pair, dot.to(inner.dtype.element_ty), mask=valid)


def gated_backward(
    pre_activation: Tensor,
    grad_unscaled: Tensor,
    row_weights: Tensor,
    kind: str,
    *,
    needs: str | None,
    overwrite: bool,
    pairs: Tensor | None = None,
    inner_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    num_rows, intermediate = grad_unscaled.shape
    grad = pre_activation if overwrite else torch.empty_like(pre_activation)
    inner = row_weights.new_empty(row_weights.shape, dtype=inner_dtype)
    if num_rows:
        block = min(1024, power_of_2(intermediate))
        run_kernel(
            _gated_backward_kernel, (cdiv(num_rows, 2),), grad_unscaled, pre_activation, grad, row_weights, inner,
            pairs, num_rows, constants=(intermediate, kind, needs, pairs is not None, 2, block), num_warps=8,
        )  # fmt: skip
    return grad, inner, grad_unscaled if needs else None


@triton.jit
def _combine_kernel(
    rows, inverse, routing_weights, out, num_tokens, start, columns, row_stride, out_stride,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    valid = token < num_tokens
    mask = valid[:, None] & (column < columns)
    total = tl.zeros((BT, BC), tl.float32)
    for slot in tl.static_range(K):
        pair = token.to(tl.int64) * K + slot
        row = tl.load(inverse + pair, mask=valid, other=0).to(tl.int64)
        value = tl.load(rows + row[:, None] * row_stride + column, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(routing_weights + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
        total += value
    target = out + token.to(tl.int64)[:, None] * out_stride + start + column
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


def combine(rows: Tensor, inverse: Tensor, routing_weights: Tensor | None, out: Tensor, start: int = 0) -> None:
    (num_tokens, top_k), columns = inverse.shape, rows.shape[1]
    if num_tokens == 0:
        return
    block = min(512, power_of_2(columns))
    grid = (cdiv(num_tokens, 4), cdiv(columns, block))
    run_kernel(
        _combine_kernel, grid, rows, inverse, routing_weights, out, num_tokens, start, columns, rows.stride(0),
        out.stride(0), constants=(top_k, routing_weights is not None, 4, block),
    )  # fmt: skip


@triton.jit(do_not_specialize=["bytes_saved"])
def _count_kernel(
    counters, gates, grads, inverse, offsets, chosen, chosen_before, bytes_saved: tl.int64, num_pairs, num_experts,
    K: tl.constexpr, HAS_GRADS: tl.constexpr, COMPARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pair < num_pairs
    is_local = valid & (tl.load(inverse + pair, mask=valid, other=0) < tl.load(offsets + num_experts - 1))
    gate = tl.load(gates + pair, mask=is_local, other=1.0).to(tl.float32)
    tl.atomic_add(counters + 1, tl.sum(is_local.to(tl.int64), 0))
    tl.atomic_add(counters + 2, tl.sum((gate <= 0).to(tl.int64), 0))
    tl.atomic_add(counters + 3, tl.sum((gate == 0).to(tl.int64), 0))
    if HAS_GRADS:
        grad = tl.load(grads + pair, mask=is_local, other=0.0).to(tl.float32)
        is_finite = tl.abs(grad) < float("inf")
        tl.atomic_add(counters + 4, tl.sum((~is_finite).to(tl.int64), 0))
    if COMPARES:
        mine = tl.load(chosen + pair, mask=is_local, other=0)
        is_known = ~is_local
        for slot in tl.static_range(K):
            is_known |= tl.load(chosen_before + pair // K * K + slot, mask=is_local, other=0) == mine
        tl.atomic_add(counters + 5, tl.sum((~is_known).to(tl.int64), 0))
    if tl.program_id(0) == 0:
        tl.atomic_add(counters, tl.full((), 1, tl.int64))
        tl.atomic_add(counters + 6, bytes_saved)


def count(
    counters: Tensor,
    gates: Tensor,
    grads: Tensor | None,
    inverse: Tensor,
    offsets: Tensor,
    *,
    choices: tuple[Tensor, Tensor] | None,
    bytes_saved: int,
) -> None:
    num_pairs = gates.numel()
    chosen, chosen_before = choices or (None, None)
    run_kernel(
        _count_kernel, (max(cdiv(num_pairs, 1024), 1),), counters, gates, grads, inverse, offsets, chosen,
        chosen_before, bytes_saved, num_pairs, offsets.shape[0],
        constants=(gates.shape[1], grads is not None, choices is not None, 1024),
    )  # fmt: skip
