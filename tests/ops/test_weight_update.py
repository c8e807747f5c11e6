"""Updates of weights by blocks and parts, against the whole product."""

import pytest
import torch

from lightning_moe.ops.low_rank import LowRank
from lightning_moe.ops.weight_update import Piece, Update, as_matrices


def exact(*shape, seed=0):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) / 8


FACTORS = LowRank(exact(3, 2, 5), exact(3, 4, 2, seed=1), 0.5)
PRODUCT = 0.5 * FACTORS.b @ FACTORS.a
WEIGHT = exact(4, 6, 5, seed=2)
# Matrices 1 to 3 of 4, rows 2 to 5 of 6.
UPDATE = Update(pieces=[Piece(1, 2, FACTORS)])
WANTED = WEIGHT.clone()
WANTED[1:, 2:] += PRODUCT


@pytest.mark.parametrize("step", [1, 4, 6])
def test_blocks_make_the_whole(step):
    for matrix in range(4):
        rows = [UPDATE.apply(WEIGHT[matrix, row : row + step], matrix, row) for row in range(0, 6, step)]
        assert torch.equal(torch.cat(rows), WANTED[matrix])
    assert not torch.equal(WANTED, WEIGHT)


@pytest.mark.parametrize("matrices", [range(4), range(1), range(2, 3), range(1, 3)])
@pytest.mark.parametrize("rows", [range(6), range(2), range(3, 6), range(1, 4)])
def test_a_part_is_updated_as_it_is_in_the_whole(matrices, rows):
    part = UPDATE.restrict(matrices, rows)
    for matrix in matrices:
        own = WEIGHT[matrix, rows.start : rows.stop]
        assert torch.equal(part.apply(own, matrix - matrices.start, 0), WANTED[matrix, rows.start : rows.stop])
    assert bool(part.pieces) == (matrices != range(1) and rows != range(2))


def test_what_is_put_in_place_comes_before_what_is_added():
    whole = exact(4, 6, 5, seed=3)
    kept = whole.clone()
    update = Update(whole, UPDATE.pieces)
    assert torch.equal(update.apply(WEIGHT[3], 3, 0), whole[3] + (WANTED - WEIGHT)[3])
    assert torch.equal(whole, kept)
    assert torch.equal(update.restrict(range(2), range(3)).whole, whole[:2, :3])


def test_transposed():
    update = Update(exact(3, 4, 5, seed=4), [Piece(0, 0, FACTORS)])
    wanted = (update.whole + PRODUCT)[2].T
    assert torch.equal(update.transpose(4).apply(WEIGHT[2, :5, :4], 2, 0), wanted)
    with pytest.raises(ValueError, match="some rows"):
        UPDATE.transpose(6)


def test_shapes_as_matrices():
    assert as_matrices((3, 4, 5)) == (3, 4, 5)
    assert as_matrices((4, 5)) == (1, 4, 5)
    assert as_matrices((5,)) == (1, 1, 5)
    assert as_matrices((4, 5, 2, 2)) == (1, 4, 20)
    assert as_matrices(()) == (1, 1, 1)
