"""Tests of mxfp4: each value by its definition, Transformers' own values, encoding, and parts that do not fit."""

import pytest
import torch
from helpers.quantized import encoded
from helpers.reference import relative_error
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lightning_moe.ops.mxfp4 import E2M1, MXFP4, powers
from lightning_moe.ops.quantized import QuantizedWeight

SHAPE = (3, 48, 160)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def mxfp4(shape, dtype=torch.float32):
    return encoded(MXFP4(), torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


def e2m1(code):
    """What four bits stand for: a sign, two bits of exponent, one of fraction."""
    sign, exponent, fraction = -1 if code & 8 else 1, code >> 1 & 3, code & 1
    return sign * (fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2 ** (exponent - 1))


def by_definition(weight):
    """Each value times its block's power of two, one at a time."""
    experts, out, width = weight.shape
    values = torch.empty(weight.shape)
    packed, scales = (weight.parts[name].tolist() for name in ("packed", "scales"))
    for e in range(experts):
        for i in range(out):
            for j in range(width):
                byte = packed[e][i][j // 2]
                values[e, i, j] = e2m1(byte >> 4 if j % 2 else byte & 15) * 2.0 ** (scales[e][i][j // 32] - 127)
    return values.to(weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_times_a_power_of_two(dtype):
    weight = mxfp4(SHAPE, dtype)
    dense = weight.dequantize()
    assert dense.dtype == dtype
    assert torch.equal(dense, by_definition(weight))


def every_code_and_scale():
    """(1, 255, 512): in each row every pair of codes, and one scale; 255 stands for no number."""
    codes = torch.arange(256, dtype=torch.uint8)
    return {"packed": codes.repeat(1, 255, 1), "scales": codes[:255].view(1, 255, 1).repeat(1, 1, 16)}


def test_every_code_and_scale_is_read():
    weight = QuantizedWeight(MXFP4(), every_code_and_scale(), (1, 255, 512), torch.float64)
    values = torch.tensor([e2m1(code) for code in range(16)], dtype=torch.float64)
    assert values[:8].tolist() == list(E2M1)
    codes = weight.parts["packed"]
    pairs = torch.stack([values[(codes & 15).int()], values[(codes >> 4).int()]], -1).flatten(-2)
    expected = pairs * torch.exp2(torch.arange(255, dtype=torch.float64) - 127)[:, None]
    assert torch.equal(weight.dequantize(), expected.float().double())
    assert powers(torch.tensor([255], dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_transformers_own(dtype):
    """At every scale that is a number: 255, which the standard has stand for none, it takes for an exponent of 128."""
    parts = every_code_and_scale()
    weight = QuantizedWeight(MXFP4(is_transposed=True), parts, (1, 512, 255), dtype)
    blocks = parts["packed"].unflatten(-1, (-1, 16))
    expected, dense = convert_moe_packed_tensors(blocks, parts["scales"], dtype=dtype), weight.dequantize()
    assert expected.shape == dense.shape
    assert torch.equal(dense, expected)
    assert torch.equal(dense.signbit(), expected.signbit())
    other = convert_moe_packed_tensors(blocks.flip(-1), parts["scales"], dtype=dtype)
    assert not torch.equal(other[..., 127], dense[..., 127])


def test_a_transposed_weight_is_a_view_of_the_same_parts():
    weight = torch.randn(2, 96, 64)
    mine, other = encoded(MXFP4(is_transposed=True), weight), encoded(MXFP4(), weight.mT)
    assert all(torch.equal(part, other.parts[name]) for name, part in mine.parts.items())
    assert tuple(mine.shape) == (2, 96, 64)
    dense = mine.dequantize()
    assert torch.equal(dense, other.dequantize().mT)
    assert dense.mT.is_contiguous()
    assert not torch.equal(dense, encoded(MXFP4(), weight).dequantize())


def test_values_are_near_those_that_were_quantized():
    """mxfp4 is 11.5 % off a normal distribution, in root mean square."""
    weight = torch.randn(4, 256, 256, generator=torch.Generator().manual_seed(0))
    for format in (MXFP4(), MXFP4(is_transposed=True)):
        dense = encoded(format, weight).dequantize()
        assert relative_error(dense, weight) == pytest.approx(0.115, abs=0.002)
        for wrong in (torch.zeros_like(dense), dense.roll(1, 0), dense.roll(1, 1), dense.roll(1, 2), -dense):
            assert relative_error(wrong, weight) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-120, -3, 0, 100])
def test_each_value_is_the_nearest_of_two_as_near_the_even_one(exponent, dtype):
    """In the middle between any two, just below and just above; what lies past the largest becomes the largest."""
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    above, below = ([value * (1 + sign * 2**-7) for value in middles] for sign in (1, -1))
    values = torch.tensor([*middles, *above, *below, 7.75, 6.5, 0.1])
    expected = torch.tensor([*even, *E2M1[1:], *E2M1[:-1], 6.0, 6.0, 0.0])
    weight = torch.zeros(1, 2, 32)
    weight[0, 0, : len(values)], weight[0, 1, : len(values)] = values, -values
    made = encoded(MXFP4(), (weight * 2.0**exponent).to(dtype))
    dense = made.dequantize()[0, :, : len(values)].float() / 2.0**exponent
    assert torch.equal(dense, torch.stack([expected, -expected]))
    assert made.parts["scales"].tolist() == [[[exponent + 127], [exponent + 127]]]


def test_the_sixteen_are_encoded_as_they_are_and_blocks_have_scales_of_their_own():
    values = torch.tensor([*E2M1, *(-value for value in E2M1)]).repeat(2)
    exponents = torch.tensor([-126.0, -30, 0, 5, 90])
    weight = (values * torch.exp2(exponents)[:, None]).flatten().view(1, 1, -1)
    made = encoded(MXFP4(), weight)
    assert made.parts["scales"].flatten().tolist() == [1, 97, 127, 132, 217]
    assert torch.equal(made.dequantize(), weight)
    assert torch.equal(made.dequantize().signbit(), weight.signbit())


def test_zeros_stay_zeros_the_smallest_are_not_divided_by_zero_and_what_is_no_number_stays_none():
    weight = torch.zeros(1, 4, 32)
    weight[0, 1] = 1e-44
    weight[0, 2, 3], weight[0, 3, 3] = float("inf"), float("nan")
    dense = encoded(MXFP4(), weight).dequantize()
    assert not dense[0, :2].any()
    assert dense[0, 2:].isnan().all()


def test_what_was_encoded_is_encoded_the_same_again():
    weight = mxfp4(SHAPE, torch.bfloat16)
    again = encoded(MXFP4(), weight.dequantize())
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("is_transposed", [False, True])
def test_some_rows_and_columns_have_the_values_of_all(is_transposed):
    weight = encoded(MXFP4(is_transposed), torch.randn(3, 96, 160))
    dense = weight.dequantize()
    for rows, columns in [(slice(8, 24), slice(0, 160)), (slice(0, 96), slice(62, 130)), (slice(5, 6), slice(3, 8))]:
        assert torch.equal(weight.dequantize(rows, columns), dense[:, rows, columns])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts.pop("scales"), "mxfp4 lacks scales"),
        (lambda parts: parts.update(packed=parts["packed"][:, 1:]), r"packed is \(3, 47, 80\)"),
        (lambda parts: parts.update(packed=parts["packed"].int()), "packed is .* in torch.int32, and .* torch.uint8"),
        (
            lambda parts: parts.update(scales=parts["scales"][..., :4]),
            r"scales is \(3, 48, 4\).* \(3, 48, 5\) .* of 32",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(change, words):
    parts = dict(mxfp4(SHAPE).parts)
    change(parts)
    with pytest.raises(ValueError, match=words):
        QuantizedWeight(MXFP4(), parts, SHAPE, torch.float32)


def test_parts_of_the_other_layout_are_refused():
    with pytest.raises(
        ValueError, match=r"packed is \(3, 48, 80\).* \(3, 160, 24\)|rows of 48 values are no whole number"
    ):
        QuantizedWeight(MXFP4(is_transposed=True), mxfp4(SHAPE).parts, SHAPE, torch.float32)


def test_blocks_that_straddle_rows_are_refused():
    with pytest.raises(ValueError, match="rows of 48 values are no whole number of blocks of 32"):
        QuantizedWeight(MXFP4(), {}, (2, 32, 48), torch.float32)
