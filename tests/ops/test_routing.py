"""Tests of routing: the sorted rows, and the way there and back."""

import pytest
import torch

from lightning_moe.ops.routing import sort_by_expert


def random_index(num_tokens=9, top_k=3, num_experts=6, dtype=torch.int64):
    return torch.randint(num_experts, (num_tokens, top_k), generator=torch.Generator().manual_seed(0)).to(dtype)


def experts_of_rows(routing):
    """The expert of each sorted row, read off the offsets in plain Python."""
    ends = [0, *routing.offsets.tolist()]
    return [expert for expert in range(len(ends) - 1) for _ in range(ends[expert], ends[expert + 1])]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_are_the_pairs_sorted_by_expert(dtype):
    index = random_index(dtype=dtype)
    routing = sort_by_expert(index, num_experts=6)
    pairs = sorted(range(index.numel()), key=lambda pair: int(index.flatten()[pair]))  # Python's sort is stable
    assert routing.permutation.tolist() == pairs
    assert experts_of_rows(routing) == [int(index.flatten()[pair]) for pair in pairs]
    assert (routing.num_rows, routing.top_k) == (27, 3)


def test_dtypes_are_what_indexing_and_grouped_mm_take():
    routing = sort_by_expert(random_index(dtype=torch.int32), num_experts=6)
    assert (routing.permutation.dtype, routing.inverse.dtype) == (torch.int64, torch.int64)
    assert routing.offsets.dtype == torch.int32


def test_inverse_undoes_the_permutation():
    routing = sort_by_expert(random_index(), num_experts=6)
    identity = torch.arange(routing.num_rows)
    assert torch.equal(routing.inverse[routing.permutation], identity)
    assert torch.equal(routing.permutation[routing.inverse], identity)
    assert not torch.equal(routing.permutation, identity)


def test_a_non_contiguous_index_sorts_the_same():
    index = random_index()
    strided = index.t().contiguous().t()
    assert not strided.is_contiguous()
    expected, routing = sort_by_expert(index, 6), sort_by_expert(strided, 6)
    assert torch.equal(routing.permutation, expected.permutation)
    assert torch.equal(routing.offsets, expected.offsets)


@pytest.mark.parametrize(
    ("index", "offsets"),
    [
        ([[3], [1]], [0, 1, 1, 2, 2]),
        ([[2, 2], [2, 2]], [0, 0, 4, 4, 4]),
        ([[0, 4]], [1, 1, 1, 1, 2]),
    ],
    ids=["experts without a row", "one expert takes all", "first and last"],
)
def test_offsets_end_each_experts_rows(index, offsets):
    assert sort_by_expert(torch.tensor(index), num_experts=5).offsets.tolist() == offsets


def test_tokens_and_experts_of_rows():
    index = random_index()
    routing = sort_by_expert(index, num_experts=6)
    pairs = list(zip(routing.tokens.tolist(), routing.expert_of_row().tolist(), strict=True))
    assert pairs == sorted(((t, e) for t, row in enumerate(index.tolist()) for e in row), key=lambda pair: pair[::-1])
    assert routing.expert_of_row().tolist() == experts_of_rows(routing)


def test_expert_of_row_skips_experts_without_a_row():
    assert sort_by_expert(torch.tensor([[4], [1], [4]]), num_experts=6).expert_of_row().tolist() == [1, 4, 4]


def test_without_tokens():
    routing = sort_by_expert(torch.empty(0, 3, dtype=torch.int64), num_experts=4)
    assert (routing.num_rows, routing.offsets.tolist(), routing.tokens.tolist()) == (0, [0] * 4, [])
