"""Tests of the building blocks against plain loops and float64 autograd."""

import pytest
import torch
import torch.nn.functional as F
from helpers.reference import FLOAT32_TOLERANCE, gpt_oss_interleaved, relative_error, relu_squared

from lightning_moe.ops import grouped as kernels
from lightning_moe.ops.grouped import (
    activate,
    activation_backward,
    combine,
    gelu_gated,
    gelu_tanh_gated,
    grouped_linear,
    grouped_outer,
    grouped_sum,
    silu_gated,
)

# The second expert and the last have no row.
ENDS = [3, 3, 8, 10, 10]
SIXTEEN_BITS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets():
    return torch.tensor(ENDS, dtype=torch.int32)


def groups():
    return [slice(start, end) for start, end in zip([0, *ENDS], ENDS, strict=False)]


def tolerance(dtype):
    return SIXTEEN_BITS.get(dtype, FLOAT32_TOLERANCE)


def test_silu_gated_takes_the_gate_from_the_first_half():
    gate, up = normal(4, 8), normal(4, 8, seed=1)
    assert torch.equal(silu_gated(torch.cat([gate, up], dim=-1)), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_first", [True, False])
def test_grouped_linear_multiplies_each_row_by_its_experts_weight(in_first, dtype):
    rows, weight = normal(10, 16, dtype=dtype), normal(5, 16, 24, seed=1, dtype=dtype)
    expected = torch.cat([rows[group].double() @ weight[e].double() for e, group in enumerate(groups())])
    result = grouped_linear(rows, weight if in_first else weight.mT.contiguous().mT, offsets())
    assert result.dtype == dtype
    assert relative_error(result, expected) <= tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_outer_sums_each_experts_rows_and_is_zero_without_any(dtype):
    left, right = normal(10, 16, dtype=dtype), normal(10, 24, seed=1, dtype=dtype)
    expected = torch.stack([left[group].double().t() @ right[group].double() for group in groups()])
    result = grouped_outer(left, right, offsets())
    assert result[1].count_nonzero() == result[4].count_nonzero() == 0
    assert relative_error(result, expected) <= tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_sum_sums_each_experts_rows(dtype):
    rows = normal(10, 16, dtype=dtype)
    expected = torch.stack([rows[group].double().sum(0) for group in groups()])
    assert relative_error(grouped_sum(rows, torch.ones(rows.shape[0], 1), offsets()), expected) <= tolerance(dtype)


def test_grouped_products_take_no_rows():
    none, empty = torch.empty(0, 16), torch.zeros(5, dtype=torch.int32)
    assert grouped_linear(none, normal(5, 16, 24), empty).shape == (0, 24)
    assert torch.equal(grouped_outer(none, torch.empty(0, 24), empty), torch.zeros(5, 16, 24))
    assert torch.equal(grouped_sum(none, none[:, :1], empty), torch.zeros(5, 16))


@pytest.mark.parametrize("needs", [None, "a", "gated a"])
@pytest.mark.parametrize("activation", [silu_gated, gpt_oss_interleaved, relu_squared])
def test_activation_backward_is_autograd_of_the_gated_activation(activation, needs):
    h, gates = normal(6, 16), torch.tensor([1.5, -0.5, 0.0, 1e-40, -3.0, 0.7])
    exact_h, exact_gates = h.double().requires_grad_(), gates.double().requires_grad_()
    scaled_truth = exact_gates[:, None] * activation(exact_h)
    grad = normal(*scaled_truth.shape, seed=1)
    scaled_truth.backward(grad.double())

    grad_h, inner, activated = activation_backward(activation, h, grad, gates, needs=needs)
    assert relative_error(grad_h, exact_h.grad) <= FLOAT32_TOLERANCE
    assert relative_error(inner, exact_gates.grad) <= FLOAT32_TOLERANCE
    assert inner[2] != 0  # a gate of zero has a gradient
    if needs is None:
        assert activated is None
    else:
        expected = scaled_truth if needs == "gated a" else activation(exact_h)
        assert relative_error(activated, expected) <= FLOAT32_TOLERANCE
        assert activated.data_ptr() == grad.data_ptr()


def test_activation_backward_sums_the_inner_product_in_float32():
    h, grad = normal(6, 4096, dtype=torch.bfloat16), normal(6, 2048, seed=1, dtype=torch.bfloat16)
    activated = silu_gated(h)  # the inner product is of what the forward computed, rounding included
    expected = (activated.double() * grad.double()).sum(-1)
    grad_h, inner, scaled = activation_backward(silu_gated, h, grad, torch.ones(6), needs="gated a")
    assert relative_error(inner, expected) <= 1e-5
    assert inner.dtype == torch.float32
    assert grad_h.dtype == scaled.dtype == torch.bfloat16


def test_activation_backward_leaves_nothing_on_the_tape():
    h = normal(6, 16).requires_grad_()
    with torch.no_grad():
        results = activation_backward(silu_gated, h, normal(6, 8), torch.ones(6), needs="gated a")
    assert not any(result.requires_grad for result in results)
    assert h.grad is None


@pytest.mark.parametrize("gated", [True, False])
def test_combine_sums_each_tokens_rows(gated):
    inverse = torch.randperm(12, generator=torch.Generator().manual_seed(0)).view(4, 3)
    rows, gates = normal(12, 8), normal(4, 3, seed=1)
    wide = torch.full((4, 24), float("nan"))
    combine(rows, inverse, gates if gated else None, wide[:, 8:16])
    factors = gates.double() if gated else torch.ones(4, 3).double()
    assert relative_error(wide[:, 8:16], (rows.double()[inverse] * factors[..., None]).sum(1)) <= FLOAT32_TOLERANCE
    assert wide[:, :8].isnan().all()
    assert wide[:, 16:].isnan().all()


def test_combine_keeps_other_tokens_nans_out():
    rows, out = torch.ones(4, 8), torch.empty(4, 8)
    rows[1:3] = float("nan")
    combine(rows, torch.arange(4).view(4, 1), None, out)
    assert out.isnan().any(1).tolist() == [False, True, True, False]


def test_combine_accumulates_in_float32():
    inverse, rows = torch.arange(512).view(1, 512), torch.ones(512, 8, dtype=torch.bfloat16)
    out = torch.empty(1, 8, dtype=torch.bfloat16)
    combine(rows, inverse, None, out)
    assert torch.equal(out, torch.full((1, 8), 512.0, dtype=torch.bfloat16))  # bfloat16 counts to 256


def test_combine_of_nothing():
    combine(torch.empty(0, 8), torch.empty(0, 3, dtype=torch.int64), None, torch.ones(0, 8))


@pytest.mark.parametrize("in_first", [True, False])
@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_grouped_linear_gathers_in_pieces(in_first, chunk_rows, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", chunk_rows)
    source, tokens = normal(7, 16), torch.tensor([0, 3, 3, 6, 1, 2, 5, 4, 0, 6])
    weight = normal(5, 16, 24, seed=1) if in_first else normal(5, 24, 16, seed=1).mT
    result = grouped_linear(source, weight, offsets(), tokens=tokens)
    expected = grouped_linear(source[tokens], weight, offsets())
    assert relative_error(result, expected) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_a_low_rank_term_is_added(chunk_rows, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", chunk_rows)
    rows, weight, small, factor = normal(10, 16), normal(5, 16, 24, seed=1), normal(10, 4, seed=2), normal(5, 4, 24)
    expected = torch.cat([rows[g].double() @ weight[e].double() + small[g].double() @ factor[e].double()
                          for e, g in enumerate(groups())])  # fmt: skip
    result = grouped_linear(rows, weight, offsets(), low_rank=(small, factor.mT.contiguous().mT))
    assert relative_error(result, expected) <= FLOAT32_TOLERANCE
    assert relative_error(grouped_linear(rows, weight, offsets()), expected) > 0.1


@pytest.mark.parametrize("chunk_rows", [3, 100])
@pytest.mark.parametrize("side", ["left", "right"])
def test_grouped_outer_gathers_one_side(side, chunk_rows, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", chunk_rows)
    tokens = torch.tensor([0, 3, 3, 6, 1, 2, 5, 4, 0, 6])
    source, rows = normal(7, 16), normal(10, 24, seed=1)
    if side == "left":
        result = grouped_outer(source, rows, offsets(), left_tokens=tokens)
        expected = grouped_outer(source[tokens], rows, offsets())
    else:
        result = grouped_outer(rows, source, offsets(), right_tokens=tokens)
        expected = grouped_outer(rows, source[tokens], offsets())
    assert relative_error(result, expected) <= FLOAT32_TOLERANCE
    assert relative_error(grouped_outer(source[tokens.roll(1)], rows, offsets()), expected if side == "left" else
                          expected.mT) > 0.1  # fmt: skip


@pytest.mark.parametrize("activation", [silu_gated, gpt_oss_interleaved])
def test_activation_backward_in_pieces_and_over_its_input(activation, monkeypatch):
    h, grad, gates = normal(10, 16), normal(10, 8, seed=1), normal(10, seed=2)
    whole = activation_backward(activation, h, grad.clone(), gates, needs="gated a")
    monkeypatch.setattr(kernels, "ACTIVATION_BYTES", 3 * 16 * 4)
    seen = []
    pieces_of = lambda part: seen.append(len(part)) or activation(part)  # noqa: E731
    assert relative_error(kernels.activate(pieces_of, h), activation(h)) <= FLOAT32_TOLERANCE
    assert seen == [3, 3, 3, 1]
    pieces = activation_backward(activation, h, grad, gates, needs="gated a", overwrite=True)
    assert all(relative_error(piece, part) <= FLOAT32_TOLERANCE for piece, part in zip(pieces, whole, strict=True))
    assert pieces[0].data_ptr() == h.data_ptr() != whole[0].data_ptr()


@pytest.mark.parametrize(
    ("activation", "plain"),
    [(gelu_gated, F.gelu), (gelu_tanh_gated, lambda gate: F.gelu(gate, approximate="tanh"))],
)
def test_gelu_gated_takes_the_gate_from_the_first_half(activation, plain):
    gate, up = normal(4, 8), normal(4, 8, seed=1)
    assert relative_error(activate(activation, torch.cat([gate, up], dim=-1)), plain(gate) * up) <= FLOAT32_TOLERANCE
