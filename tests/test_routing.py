"""Tests of routing: the sorted rows, the way there and back, and the chunks they are cut into."""

import pytest
import torch

from lightning_moe.routing import sort_by_expert


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


def test_without_tokens_there_is_one_empty_chunk():
    routing = sort_by_expert(torch.empty(0, 2, dtype=torch.int64), num_experts=3)
    (chunk,) = routing.chunks(4)
    assert routing.num_rows == 0
    assert routing.offsets.tolist() == chunk.offsets.tolist() == [0, 0, 0]
    assert chunk.pairs.numel() == chunk.tokens.numel() == chunk.expert_of_row().numel() == 0


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 26, 27, 100])
def test_chunks_cut_the_rows_without_gap_or_overlap(chunk_rows):
    routing = sort_by_expert(random_index(), num_experts=6)
    chunks = list(routing.chunks(chunk_rows))
    assert [chunk.start for chunk in chunks] == list(range(0, 27, chunk_rows))
    assert all(chunk.pairs.shape[0] <= chunk_rows for chunk in chunks)
    assert torch.equal(torch.cat([chunk.pairs for chunk in chunks]), routing.permutation)


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 27])
def test_chunks_know_each_rows_token_and_expert(chunk_rows):
    index = random_index()
    for chunk in sort_by_expert(index, num_experts=6).chunks(chunk_rows):
        assert chunk.tokens.tolist() == [pair // 3 for pair in chunk.pairs.tolist()]
        assert torch.equal(chunk.expert_of_row(), index.flatten()[chunk.pairs])
        assert experts_of_rows(chunk) == chunk.expert_of_row().tolist()
        assert chunk.offsets.dtype == torch.int32


def test_expert_of_row_skips_experts_without_a_row():
    (chunk,) = sort_by_expert(torch.tensor([[4], [1], [4]]), num_experts=6).chunks(3)
    assert chunk.expert_of_row().tolist() == [1, 4, 4]
