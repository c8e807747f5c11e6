"""Tests of fp8: each value by its definition, Transformers' own values, encoding, and parts that do not fit."""

import pytest
import torch
from helpers.quantized import encoded
from helpers.reference import relative_error
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from lightning_moe.ops.fp8 import FP8
from lightning_moe.ops.quantized import QuantizedWeight

SHAPE = (2, 130, 200)  # the last blocks of both sides are smaller
WHOLE = (3, 256, 384)


def fp8(shape, dtype=torch.float32):
    return encoded(FP8(), torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


def float8(code):
    """What eight bits stand for: a sign, four bits of exponent, three of fraction."""
    sign, exponent, fraction = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    return sign * (fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2 ** (exponent - 7))


def by_definition(weight):
    """Each value times its block's scale, one at a time, in float32."""
    experts, out, width = weight.shape
    codes, values = weight.parts["values"].view(torch.uint8).tolist(), torch.empty(weight.shape)
    for e in range(experts):
        for i in range(out):
            for j in range(width):
                values[e, i, j] = torch.tensor(float8(codes[e][i][j])) * weight.parts["scales"][e, i // 128, j // 128]
    return values.to(weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_times_their_blocks_scale(dtype):
    weight = fp8(SHAPE, dtype)
    dense = weight.dequantize()
    assert dense.dtype == dtype
    assert torch.equal(dense, by_definition(weight))


def test_every_code_is_read():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 2, 128)
    parts = {"values": codes.view(torch.float8_e4m3fn), "scales": torch.ones(1, 1, 1)}
    weight = QuantizedWeight(FP8(), parts, codes.shape, torch.float32)
    assert torch.equal(weight.dequantize().nan_to_num(7), by_definition(weight).nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_transformers_own(dtype):
    """It multiplies in float32 and rounds once, too. It takes nothing but whole blocks."""
    weight = fp8(WHOLE, dtype)
    dequantize = Fp8Dequantize(None)._dequantize_one
    dense = weight.dequantize()
    for expert, values, scales in zip(dense, weight.parts["values"], weight.parts["scales"], strict=True):
        assert torch.equal(dequantize(values, scales, dtype), expert)
        assert not torch.equal(dequantize(values, scales.flip(0), dtype), expert)


def test_values_are_near_those_that_were_quantized():
    """fp8 with blocks of 128 is 2.6 % off a normal distribution, in root mean square."""
    weight = torch.randn(4, 256, 256, generator=torch.Generator().manual_seed(0))
    dense = encoded(FP8(), weight).dequantize()
    assert relative_error(dense, weight) == pytest.approx(0.026, abs=0.001)
    for wrong in (torch.zeros_like(dense), dense.roll(1, 0), dense.roll(1, 1), dense.roll(1, 2), -dense):
        assert relative_error(wrong, weight) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blocks_largest_magnitude_becomes_the_largest_there_is(dtype):
    """Blocks of very different sizes, of zeros, and of the smallest numbers."""
    sizes = torch.tensor([[1e-3, 1.0, 1e30], [0.0, 1e-44, 1e4]])
    weight = fp8((1, 256, 384)).dequantize() * sizes.repeat_interleave(128, 0).repeat_interleave(128, 1)
    made = encoded(FP8(), weight.to(dtype))
    values = made.parts["values"].float().view(2, 128, 3, 128).abs().amax((1, 3))
    assert values[0].tolist() == [448.0] * 3
    assert values[1, 2] == 448
    dense = made.dequantize().view(2, 128, 3, 128)
    assert not dense[1, :, 0].any()
    assert dense.isfinite().all()
    for row, column in [(0, 0), (0, 1), (0, 2), (1, 2)]:
        expected = weight.to(dtype).view(2, 128, 3, 128)[row, :, column]
        assert relative_error(dense[row, :, column], expected) < 0.03


def test_what_was_encoded_is_encoded_the_same_again():
    weight = fp8(SHAPE)
    again = encoded(FP8(), weight.dequantize())
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_some_rows_and_columns_have_the_values_of_all():
    weight = fp8(WHOLE)
    dense = weight.dequantize()
    for rows, columns in [
        (slice(8, 200), slice(0, 384)),
        (slice(0, 256), slice(61, 130)),
        (slice(128, 129), slice(5, 6)),
    ]:
        assert torch.equal(weight.dequantize(rows, columns), dense[:, rows, columns])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts.pop("scales"), "fp8 lacks scales"),
        (lambda parts: parts.update(values=parts["values"][:, 1:]), r"values is \(2, 129, 200\)"),
        (
            lambda parts: parts.update(values=parts["values"].view(torch.uint8)),
            "values is .* in torch.uint8, and .*float8",
        ),
        (lambda parts: parts.update(scales=parts["scales"][:, :1]), r"scales is \(2, 1, 2\).* \(2, 2, 2\) .* of 128"),
        (lambda parts: parts.update(scales=parts["scales"].mT.contiguous().mT), "scales is not contiguous"),
        (lambda parts: parts.update(scales=parts["scales"].bfloat16()), "scales is .* in torch.bfloat16"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, words):
    parts = dict(fp8(SHAPE).parts)
    change(parts)
    with pytest.raises(ValueError, match=words):
        QuantizedWeight(FP8(), parts, SHAPE, torch.float32)
