"""Each Triton kernel against its plain PyTorch reference: on a GPU if there is one, else interpreted on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from reference import relative_error

from lightning_moe import kernels
from lightning_moe.kernels import FUSED_ACTIVATIONS

triton_kernels = pytest.importorskip("lightning_moe.triton_kernels", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's matrix product does not read bfloat16.
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16, torch.float32]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}

# Ends of six experts' rows: odd sizes with empty experts, one huge expert, a single row, none.
ROUTINGS = {
    "odd": [0, 3, 140, 140, 421, 421],
    "huge": [0, 0, 700, 700, 700, 701],
    "one": [0, 0, 0, 1, 1, 1],
    "none": [0] * 6,
}


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ends(name):
    return torch.tensor(ROUTINGS[name], dtype=torch.int32, device=DEVICE)


def plain(name):
    """The reference: the function in kernels.py with its kernels out of reach."""

    def call(*args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_kernels", lambda tensor: None)
            return getattr(kernels, name)(*args, **options)

    return call


@pytest.mark.parametrize("routing", ROUTINGS)
def test_tiles_cover_each_row_once(routing):
    num_rows = ROUTINGS[routing][-1]
    expert, row = triton_kernels.tiles(ends(routing), num_rows)
    starts, rows = [0, *ROUTINGS[routing]], []
    for e, first in zip(expert.tolist(), row.tolist(), strict=True):
        if e >= 0:
            last = min(first + triton_kernels.BLOCK_ROWS, ROUTINGS[routing][e])
            assert starts[e] <= first < last
            rows.extend(range(first, last))
    assert sorted(rows) == list(range(num_rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("in_first", [True, False])
@pytest.mark.parametrize(("inner", "columns"), [(72, 40), (64, 264), (136, 256)])
def test_grouped_linear(dtype, routing, in_first, inner, columns):
    offsets, num_rows = ends(routing), ROUTINGS[routing][-1]
    tokens = torch.randint(0, 50, (num_rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    source, weight = normal(50, inner, dtype=dtype), normal(6, inner, columns, dtype=dtype, seed=1)
    weight = weight if in_first else weight.mT.contiguous()
    tiles = triton_kernels.tiles(offsets, num_rows)
    expected = plain("grouped_linear")(source[tokens], weight, offsets, in_first=in_first)
    gathered = triton_kernels.grouped_linear(source, weight, offsets, tiles, in_first=in_first, tokens=tokens)
    given = triton_kernels.grouped_linear(source[tokens], weight, offsets, tiles, in_first=in_first)
    part = weight.narrow(2 if in_first else 1, 8, 16)
    narrow = triton_kernels.grouped_linear(source[tokens], part, offsets, tiles, in_first=in_first)
    assert gathered.shape == expected.shape
    assert torch.equal(gathered, given)
    if num_rows:
        assert relative_error(gathered, expected) <= TOLERANCE[dtype]
        assert relative_error(narrow, expected[:, 8:24]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 37])
@pytest.mark.parametrize("intermediate", [24, 128, 1100])
@pytest.mark.parametrize("activation", FUSED_ACTIVATIONS)
def test_gated_and_its_backward(dtype, num_rows, intermediate, activation):
    kind = FUSED_ACTIVATIONS[activation]
    h, grad = normal(num_rows, 2 * intermediate, dtype=dtype), normal(num_rows, intermediate, dtype=dtype, seed=1)
    gates = normal(num_rows, seed=2)
    exact = h.double().requires_grad_()
    activated = activation(exact)
    scale = gates.double()[:, None]
    (grad_h,) = torch.autograd.grad(activated, exact, scale * grad.double())
    expected = [activated, grad_h, (activated * grad.double()).sum(1), scale * activated]
    results = [triton_kernels.gated(h, kind)]
    bare = triton_kernels.gated_backward(h, grad, gates, kind, needs_scaled=False, overwrite=False)
    results += triton_kernels.gated_backward(h, grad, gates, kind, needs_scaled=True, overwrite=True)
    assert bare[2] is None
    assert torch.equal(bare[0], results[1])
    assert torch.equal(bare[1], results[2])
    assert results[1].data_ptr() == h.data_ptr()
    assert results[2].dtype == torch.float32
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape
        if num_rows:
            assert relative_error(result, wanted.detach()) <= TOLERANCE[dtype]
            assert relative_error(torch.zeros_like(result), wanted.detach()) > TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("num_tokens", "top_k", "columns"), [(0, 2, 8), (1, 1, 8), (37, 3, 40), (5, 8, 1100)])
def test_combine(dtype, weighted, num_tokens, top_k, columns):
    rows, gates = normal(num_tokens * top_k, columns, dtype=dtype), normal(num_tokens, top_k, seed=1)
    inverse = torch.randperm(num_tokens * top_k, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    inverse = inverse.view(num_tokens, top_k)
    wide = torch.full((num_tokens, columns + 8), float("nan"), dtype=dtype, device=DEVICE)
    expected = torch.empty(num_tokens, columns, dtype=torch.float32, device=DEVICE)
    plain("combine")(rows.float(), inverse, gates if weighted else None, expected)
    triton_kernels.combine(rows, inverse, gates if weighted else None, wide[:, 8:])
    if num_tokens:
        assert relative_error(wide[:, 8:], expected) <= TOLERANCE[dtype]
        if num_tokens > 1:  # permuted rows are seen
            assert relative_error(wide[:, 8:].roll(1, 0), expected) > TOLERANCE[dtype]
    assert wide[:, :8].isnan().all()


def test_plain_silu_is_the_reference_of_the_fused_one():
    h = normal(3, 16)
    assert torch.equal(plain("activate")(kernels.silu_gated, h), F.silu(h[:, :8]) * h[:, 8:])
