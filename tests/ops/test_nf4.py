"""Tests of nf4: each value by its definition, parts that do not fit, and the tables."""

import pytest
import torch
from helpers.quantized import quantized
from helpers.reference import relative_error

from lightning_moe.ops import nf4
from lightning_moe.ops.nf4 import NF4, NF4_LEVELS
from lightning_moe.ops.quantized import QuantizedWeight

SHAPE = (3, 48, 160)  # 120 blocks: nested they are one scale's
LONG = (2, 128, 192)  # 384 blocks, of two scales


def by_definition(weight):
    """Each value as its level times its block's absmax, one at a time, in float32."""
    experts, out, width = weight.shape
    values = torch.empty(experts, out * width)
    for e in range(experts):
        pairs = weight.parts["packed"][e].tolist()
        for i in range(out * width):
            level = pairs[i // 2] >> 4 if i % 2 == 0 else pairs[i // 2] & 15
            absmax, block = weight.parts["absmax"][e], i // 64
            size = absmax[block]
            if absmax.dtype == torch.uint8:
                units = nf4.tables(torch.device("cpu"))[1][absmax[block].item()]
                scale, offset = (weight.parts[name][e, block // 256] for name in ("absmax_scale", "absmax_offset"))
                size = units * scale + offset
            values[e, i] = torch.tensor(NF4_LEVELS[level]) * size
    return values.view(weight.shape).to(weight.dtype)


@pytest.mark.parametrize("shape", [SHAPE, LONG])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_levels_times_absmax(dtype, nested, shape):
    weight = quantized(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), nested=nested)
    dense = weight.dequantize()
    assert dense.dtype == dtype
    assert torch.equal(dense, by_definition(weight))


def test_values_are_near_those_that_were_quantized():
    """nf4 with blocks of 64 is 9.2 % off a normal distribution, in root mean square."""
    weight = torch.randn(4, 128, 128, generator=torch.Generator().manual_seed(0))
    dense = quantized(weight, nested=True).dequantize()
    assert relative_error(dense, weight) == pytest.approx(0.092, abs=0.005)
    for wrong in (torch.zeros_like(dense), dense.roll(1, 0), dense.roll(1, 2), -dense):
        assert relative_error(wrong, weight) > 0.5


@pytest.mark.parametrize("nested", [False, True])
def test_some_rows_and_columns_have_the_values_of_all(nested):
    weight = quantized(torch.randn(SHAPE), nested=nested)
    dense = weight.dequantize()
    for rows, columns in [(slice(8, 24), slice(0, 160)), (slice(0, 48), slice(62, 130)), (slice(5, 6), slice(2, 7))]:
        assert torch.equal(weight.dequantize(rows, columns), dense[:, rows, columns])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts.pop("absmax_scale"), "lacks absmax_scale"),
        (lambda parts: parts.update(packed=parts["packed"][:, 1:]), r"packed is \(3, 3839\)"),
        (
            lambda parts: parts.update(absmax=parts["absmax"][:, ::2]),
            r"absmax is \(3, 60\).* \(3, 120\) .* of 64",
        ),
        (lambda parts: parts.update(absmax_offset=parts["absmax_offset"][0]), "absmax_offset is"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, words):
    parts = dict(quantized(torch.randn(SHAPE)).parts)
    change(parts)
    with pytest.raises(ValueError, match=words):
        QuantizedWeight(NF4(), parts, SHAPE, torch.float32)


def test_blocks_that_straddle_experts_are_refused():
    with pytest.raises(ValueError, match="an expert of 3 x 32 values is no whole number of blocks of 64"):
        QuantizedWeight(NF4(), {}, (2, 3, 32), torch.float32)


def test_columns_begin_where_a_byte_does():
    with pytest.raises(ValueError, match="two columns share a byte, and 3 is the second"):
        quantized(torch.randn(SHAPE)).dequantize(columns=slice(3, 9))


def test_the_tables_do_not_depend_on_the_default_dtype_and_device():
    expected = nf4.tables(torch.device("cpu"))
    nf4.tables.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            made = nf4.tables(torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
        nf4.tables.cache_clear()
    assert all(map(torch.equal, made, expected))
    assert not any(table.is_inference() for table in made)
