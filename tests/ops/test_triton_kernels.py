"""Each Triton kernel against its plain PyTorch reference: on a GPU if there is one, else interpreted on the CPU."""

from dataclasses import replace
from functools import cache, partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers.quantized import MAKERS
from helpers.reference import make_problem, relative_error, run, run_baseline, run_loop

from lightning_moe.ops import counting
from lightning_moe.ops import grouped as kernels
from lightning_moe.ops.counting import new_counters
from lightning_moe.ops.fp8 import FP8
from lightning_moe.ops.grouped import FUSED_ACTIVATIONS
from lightning_moe.ops.mxfp4 import MXFP4
from lightning_moe.ops.quantized import QuantizedWeight
from lightning_moe.ops.routing import sort_by_expert

errors = pytest.importorskip("triton.runtime.errors", reason="Triton is not installed")
triton_kernels = pytest.importorskip("lightning_moe.ops.triton_kernels", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's matrix product does not read bfloat16.
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16, torch.float32]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}

# Ends of six experts' rows: odd sizes with empty experts, one of several tiles, a single row, none.
ROUTINGS = {
    "odd": [0, 3, 134, 134, 300, 300],
    "huge": [0, 0, 300, 300, 300, 301],
    "one": [0, 0, 0, 1, 1, 1],
    "none": [0] * 6,
}


# Bytes of shared memory that a block may have.
HOPPER, AMPERE, CONSUMER = 232_448, 166_912, 101_376


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """What a Hopper would say: the interpreter has no device to ask."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_kernels, "_shared_memory", lambda device: HOPPER)
        monkeypatch.setattr(triton_kernels, "has_tensor_memory_accelerator", lambda device: True)


def with_dtypes(*axes):
    """Every combination, with one of the dtypes, so that any two values meet: a dtype chooses no path in a kernel."""
    places = product(*(range(len(axis)) for axis in axes))
    return [(DTYPES[sum(at) % 2], *(axis[i] for axis, i in zip(axes, at, strict=True))) for at in places]


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


def routed_experts(routing, dtype=torch.int64):
    """Experts of pairs in a random order, (S, 1), of which each expert has the rows that the routing says."""
    ends = ROUTINGS[routing]
    experts = [e for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) for _ in range(start, end)]
    order = torch.randperm(len(experts), generator=torch.Generator().manual_seed(0))
    return torch.tensor(experts, dtype=dtype)[order, None].to(DEVICE)


def route(top_k_index, num_experts=6, *, is_expert_parallel=False, needs_tiles=True, compact_dtype=None):
    return triton_kernels.route(
        top_k_index, num_experts, is_expert_parallel=is_expert_parallel, needs_tiles=needs_tiles,
        compact_dtype=compact_dtype,
    )  # fmt: skip


def tiles_of(routing):
    return route(routed_experts(routing))[3]


@pytest.mark.parametrize("needs_tiles", [True, False])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_route(routing, needs_tiles):
    experts = routed_experts(routing)
    permutation, inverse, offsets, tiles, chosen = route(experts, needs_tiles=needs_tiles)
    assert (tiles is not None) == needs_tiles
    assert tiles is None or tiles.shape == (2, kernels.num_tiles(experts.numel(), 6))
    assert offsets.tolist() == ROUTINGS[routing]
    assert chosen is None
    expected = torch.sort(experts.flatten(), stable=True).indices
    assert torch.equal(permutation, expected)
    assert torch.equal(inverse[permutation], torch.arange(experts.numel(), device=DEVICE))
    assert (permutation.dtype, inverse.dtype, offsets.dtype) == (torch.int64, torch.int64, torch.int32)


@pytest.mark.parametrize(  # in more blocks than count for themselves, in few, in none
    ("num_experts", "num_pairs"), [(3, 33_000), (3, 2500), (1, 2500), (130, 2500), (3, 0)]
)
def test_route_of_several_blocks(num_experts, num_pairs):
    generator = torch.Generator().manual_seed(1)
    experts = torch.randint(num_experts, (num_pairs, 1), generator=generator).to(DEVICE)
    permutation, _, offsets, *_ = route(experts, num_experts)
    assert torch.equal(permutation, torch.sort(experts.flatten(), stable=True).indices)
    assert torch.equal(offsets, experts.flatten().bincount(minlength=num_experts).cumsum(0))


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32, torch.uint8])
def test_route_with_the_rows_of_other_ranks_last(id_dtype):
    experts = torch.tensor([[0], [9], [2], [2], [4]], dtype=id_dtype, device=DEVICE)  # 4 and 9 are others'
    permutation, inverse, offsets, _, chosen = route(experts, 4, is_expert_parallel=True, compact_dtype=torch.uint8)
    assert offsets.tolist() == [1, 1, 3, 3]
    assert permutation.tolist() == [0, 2, 3, 1, 4]
    assert inverse.tolist() == [0, 3, 1, 2, 4]
    assert chosen.tolist() == [[0], [4], [2], [2], [4]]
    assert chosen.dtype == torch.uint8


@pytest.mark.parametrize("routing", ROUTINGS)
def test_tiles_cover_each_row_once(routing):
    num_rows = ROUTINGS[routing][-1]
    expert, row = tiles_of(routing)
    starts, rows = [0, *ROUTINGS[routing]], []
    for e, first in zip(expert.tolist(), row.tolist(), strict=True):
        if e >= 0:
            last = min(first + triton_kernels.BLOCK_ROWS, ROUTINGS[routing][e])
            assert starts[e] <= first < last
            rows.extend(range(first, last))
    assert sorted(rows) == list(range(num_rows))


@pytest.mark.parametrize(
    ("dtype", "routing", "in_first", "size", "pointers"),
    with_dtypes(list(ROUTINGS), [True, False], [(72, 40), (64, 264), (136, 256)], [False, True]),
)
def test_grouped_linear(dtype, routing, in_first, size, pointers):
    inner, columns = size
    offsets, num_rows = ends(routing), ROUTINGS[routing][-1]
    tokens = torch.randint(0, 50, (num_rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    source, weight = normal(50, inner, dtype=dtype), normal(6, inner, columns, dtype=dtype, seed=1)
    weight = weight if in_first else weight.mT.contiguous().mT
    tiles = tiles_of(routing)
    expected = plain("grouped_linear")(source[tokens], weight, offsets)
    linear = partial(triton_kernels.grouped_linear, offsets=offsets, tiles=tiles, pointers=pointers)
    gathered = linear(source, weight, tokens=tokens)
    slots = torch.arange(num_rows, device=DEVICE) % 3
    paired = linear(source, weight, tokens=3 * tokens + slots, top_k=3)
    given = linear(source[tokens], weight)
    narrow = linear(source[tokens], weight[..., 8:24])
    wide = gathered.new_full((num_rows, 30), 7)
    linear(source[tokens], weight[..., 8:24], into=(wide, 6))
    assert torch.equal(wide[:, 6:22], narrow)
    assert (wide[:, :6] == 7).all()
    assert (wide[:, 22:] == 7).all()
    assert gathered.shape == expected.shape
    assert torch.equal(gathered, given)
    assert torch.equal(paired, given)
    if num_rows:
        assert relative_error(gathered, expected) <= TOLERANCE[dtype]
        assert relative_error(narrow, expected[:, 8:24]) <= TOLERANCE[dtype]
        assert relative_error(torch.zeros_like(gathered), expected) > 0.1
    if num_rows > 1:
        assert relative_error(gathered.roll(1, 0), expected) > 0.1
        others = plain("grouped_linear")(source[tokens], weight.roll(1, 0), offsets)
        assert relative_error(gathered, others) > 0.1


@pytest.mark.parametrize(
    ("dtype", "routing", "rank", "in_first", "pointers"),
    with_dtypes(list(ROUTINGS), [8, 24, 72], [True, False], [False, True]),
)
def test_grouped_linear_with_a_low_rank_term(dtype, routing, rank, in_first, pointers):
    offsets, num_rows = ends(routing), ROUTINGS[routing][-1]
    rows, weight = normal(num_rows, 72, dtype=dtype), normal(6, 72, 264, dtype=dtype, seed=1)
    small, factor = normal(num_rows, rank, dtype=dtype, seed=2), normal(6, rank, 264, dtype=dtype, seed=3)
    factor = factor if in_first else factor.mT.contiguous().mT
    tiles = tiles_of(routing)
    linear = partial(triton_kernels.grouped_linear, offsets=offsets, tiles=tiles, pointers=pointers)
    result = linear(rows, weight, low_rank=(small, factor))
    part = linear(rows, weight[..., 128:], low_rank=(small, factor[..., 128:]))
    reduced = linear(small, factor[..., :16])
    if num_rows:
        expected = plain("grouped_linear")(rows, weight, offsets) + plain("grouped_linear")(small, factor, offsets)
        assert relative_error(result, expected) <= 2 * TOLERANCE[dtype]
        assert relative_error(part, expected[:, 128:]) <= 2 * TOLERANCE[dtype]
        assert relative_error(plain("grouped_linear")(rows, weight, offsets), expected) > 0.1
        assert relative_error(reduced, plain("grouped_linear")(small, factor[..., :16], offsets)) <= TOLERANCE[dtype]


def test_stages_by_shared_memory():
    limits = (HOPPER, AMPERE, CONSUMER)
    stages = [[triton_kernels._num_stages(2**n, limit) for n in range(4, 9)] for limit in limits]
    assert stages == [[4] * 5, [4] * 5, [4, 4, 4, 4, 3]]


@pytest.mark.parametrize(
    "pointers", [False, True] if DEVICE == "cuda" else [False]
)  # stages are none to the interpreter
@pytest.mark.parametrize(("dtype", "in_first", "columns"), with_dtypes([True, False], [128, 264]))
def test_less_shared_memory_gives_the_same_bits(dtype, in_first, columns, pointers, monkeypatch):
    offsets, num_rows, inner = ends("odd"), ROUTINGS["odd"][-1], 328  # more steps than there are stages
    tokens = torch.randint(0, 50, (num_rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    source, weight = normal(50, inner, dtype=dtype), normal(6, inner, columns, dtype=dtype, seed=1)
    weight = weight if in_first else weight.mT.contiguous().mT
    low_rank = normal(num_rows, 72, dtype=dtype, seed=2), normal(6, 72, columns, dtype=dtype, seed=3)
    tiles = tiles_of("odd")
    linear = partial(triton_kernels.grouped_linear, low_rank=low_rank, pointers=pointers)
    given = []
    for limit in (HOPPER, CONSUMER):
        monkeypatch.setattr(triton_kernels, "_shared_memory", lambda device, limit=limit: limit)
        for rows, picked in [(source, tokens), (source[tokens], None)]:
            given.append(linear(rows, weight, offsets, tiles, tokens=picked))
    expected = plain("grouped_linear")(source[tokens], weight, offsets, low_rank=low_rank)
    assert all(torch.equal(result, given[0]) for result in given)
    assert relative_error(given[0], expected) <= 2 * TOLERANCE[dtype]
    assert relative_error(given[0].roll(1, 0), expected) > 0.1


def test_descriptors_are_left_to_devices_that_load_by_them(monkeypatch):
    launched = []
    monkeypatch.setattr(triton_kernels, "run_kernel", lambda kernel, *args, **options: launched.append(kernel))
    for has in (True, False):
        monkeypatch.setattr(triton_kernels, "has_tensor_memory_accelerator", lambda device, has=has: has)
        for pointers in (None, True, False):
            rows, weight = normal(300, 16, dtype=DTYPES[0]), normal(6, 16, 16, dtype=DTYPES[0])
            triton_kernels.grouped_linear(rows, weight, ends("odd"), torch.empty(2, 8), pointers=pointers)
    by_descriptors, by_pointers = triton_kernels._grouped_linear_kernel, triton_kernels._grouped_linear_pointers_kernel
    assert launched == [by_descriptors, by_pointers, by_descriptors, by_pointers, by_pointers, by_descriptors]


@pytest.mark.skipif(DEVICE == "cuda", reason="the memory between the experts is reserved, not used, on the CPU alone")
@pytest.mark.parametrize("in_first", [True, False])
def test_pointers_to_weights_past_two_to_the_thirty_one_elements(in_first):
    """Experts far from each other, in memory that nothing touches but they."""
    offsets, rows = torch.tensor([1, 2, 4], dtype=torch.int32), normal(4, 16, dtype=torch.float16)
    apart, near = 2**30 + 8, normal(3, 16, 24, dtype=torch.float16, seed=1)
    strides = (apart, 24, 1) if in_first else (apart, 1, 16)
    far = torch.empty(2 * apart + 16 * 24, dtype=torch.float16).as_strided(near.shape, strides)
    for mine, its in zip(far, near, strict=True):
        mine.copy_(its)
    tiles = torch.tensor([[0, 1, 2, -1], [0, 1, 2, 0]], dtype=torch.int32)
    linear = partial(triton_kernels.grouped_linear, rows, offsets=offsets, tiles=tiles, pointers=True)
    assert far[-1].data_ptr() - far.data_ptr() > 2 * 2**31
    assert torch.equal(linear(far), linear(near))
    low_rank = rows, far
    assert torch.equal(linear(near, low_rank=low_rank), linear(near, low_rank=(rows, near)))
    assert relative_error(linear(far), plain("grouped_linear")(rows, near, offsets)) <= TOLERANCE[torch.float16]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with a tensor memory accelerator")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("inner", "columns"), [(2048, 1536), (768, 2048), (72, 264)])
@pytest.mark.parametrize("in_first", [True, False])
@pytest.mark.parametrize("gather", [True, False])
def test_pointers_agree_with_descriptors_on_a_gpu(gather, in_first, inner, columns, dtype):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU with a tensor memory accelerator")
    offsets, num_rows = ends("odd"), ROUTINGS["odd"][-1]
    weight, factor = normal(6, inner, columns, dtype=dtype, seed=1), normal(6, 8, columns, dtype=dtype, seed=3)
    if not in_first:
        weight, factor = weight.mT.contiguous().mT, factor.mT.contiguous().mT
    tokens = torch.randint(0, 50, (num_rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    linear = partial(
        triton_kernels.grouped_linear, normal(50 if gather else num_rows, inner, dtype=dtype), weight, offsets,
        tiles_of("odd"), tokens=tokens if gather else None,
        low_rank=(normal(num_rows, 8, dtype=dtype, seed=2) * inner**0.5, factor),
    )  # fmt: skip
    by_pointers, by_descriptors = linear(pointers=True), linear(pointers=False)
    assert relative_error(by_pointers, by_descriptors) <= TOLERANCE[dtype]
    assert relative_error(linear(pointers=True, low_rank=None), by_descriptors) > 0.1
    assert relative_error(by_pointers.roll(1, 0), by_descriptors) > 0.1


@pytest.mark.parametrize("piece", [triton_kernels.OUTER_PIECE, 64, 7], ids=["at once", "in pieces", "in uneven pieces"])
@pytest.mark.parametrize(("dtype", "routing", "size"), with_dtypes(list(ROUTINGS), [(40, 8), (136, 72), (16, 64)]))
def test_grouped_outer(dtype, routing, size, piece, monkeypatch):
    monkeypatch.setattr(triton_kernels, "OUTER_PIECE", piece)
    width, rank = size
    offsets, num_rows = ends(routing), ROUTINGS[routing][-1]
    tokens = torch.randint(0, 50, (num_rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    source, small = normal(50, width, dtype=dtype), normal(num_rows, rank, dtype=dtype, seed=1)
    rows = source[tokens]
    options = {"left_tokens": None, "right_tokens": None, "out_dtype": torch.float32}
    gathered = triton_kernels.grouped_outer(source, small, offsets, **options | {"left_tokens": tokens})
    turned = triton_kernels.grouped_outer(small, source, offsets, **options | {"right_tokens": tokens})
    given = triton_kernels.grouped_outer(rows, small, offsets, **options)
    narrow = triton_kernels.grouped_outer(small, rows, offsets, **options | {"out_dtype": dtype})
    expected = torch.stack([
        rows[start:end].double().T @ small[start:end].double()
        for start, end in zip([0, *ROUTINGS[routing]], ROUTINGS[routing], strict=False)
    ])  # fmt: skip
    for result in (gathered, turned.mT, given):
        assert result.dtype == torch.float32
        assert result.shape == expected.shape
        if num_rows:
            assert relative_error(result, expected) <= 1e-6
    if num_rows:
        assert relative_error(narrow.mT, expected) <= TOLERANCE[dtype]
        assert relative_error(given.roll(1, 0), expected) > 0.1
    else:
        assert not gathered.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "intermediate"), [(0, 24), (1, 128), (9, 24), (9, 128), (5, 1100)])
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
    bare = triton_kernels.gated_backward(h, grad, gates, kind, needs=None, overwrite=False)
    ungated = triton_kernels.gated_backward(h, grad.clone(), gates, kind, needs="a", overwrite=False)
    results += triton_kernels.gated_backward(h, grad, gates, kind, needs="gated a", overwrite=True)
    assert bare[2] is None
    assert torch.equal(ungated[2], results[0])
    assert results[3].data_ptr() == grad.data_ptr()
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compares", [None, torch.uint8, torch.int32])
@pytest.mark.parametrize("has_grads", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 700])
def test_count(dtype, compares, has_grads, num_tokens):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 8, (num_tokens, 3), generator=generator)  # 6 and 7 are another's
    before = index.where(torch.rand(num_tokens, 3, generator=generator) < 0.9, 5).flip(1)
    routing = sort_by_expert(index.clamp(max=6).to(DEVICE), 6, is_expert_parallel=True)
    gates = torch.randint(-1, 3, (num_tokens, 3), generator=generator).to(DEVICE, dtype)
    grads = normal(num_tokens, 3).sqrt().to(dtype) / (gates != 2) if has_grads else None
    choices = None if compares is None else tuple(i.clamp(max=6).to(DEVICE, compares) for i in (index, before))
    counted = []
    for count in (triton_kernels.count, plain_count):
        counters = new_counters(torch.device(DEVICE)) + 2**40
        for bytes_saved in (3, 2**35):
            count(counters, gates, grads, routing.inverse, routing.offsets, choices=choices, bytes_saved=bytes_saved)
        counted.append((counters - 2**40).tolist())
    assert counted[0] == counted[1]
    assert counted[0][0] == 2
    assert counted[0][-1] == 3 + 2**35
    if num_tokens == 700:
        assert all(counted[0][1:4])
        assert (counted[0][4] > 0) == has_grads
        assert (counted[0][5] > 0) == (compares is not None)


def plain_count(*args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_kernels", lambda tensor: None)
        counting.count(*args, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_backward_by_pairs(dtype):
    """Gates are read, and their inner products put, where the pairs stand."""
    h, grad, gates = normal(37, 48, dtype=dtype), normal(37, 24, dtype=dtype, seed=1), normal(37, seed=2)
    pairs = torch.randperm(37, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    options = {"needs": "gated a", "overwrite": False}
    expected = triton_kernels.gated_backward(h, grad.clone(), gates[pairs], "silu", **options)
    plainly = plain("activation_backward")(kernels.silu_gated, h, grad.clone(), gates, pairs=pairs, needs="gated a")
    fused = triton_kernels.gated_backward(h, grad, gates, "silu", pairs=pairs, inner_dtype=dtype, **options)
    assert torch.equal(fused[0], expected[0])
    assert torch.equal(fused[1][pairs], expected[1].to(dtype))
    assert torch.equal(fused[2], expected[2])
    for result, want in zip(fused, plainly, strict=True):
        assert relative_error(result, want) <= TOLERANCE[dtype]


def test_plain_silu_is_the_reference_of_the_fused_one():
    h = normal(3, 16)
    assert torch.equal(plain("activate")(kernels.silu_gated, h), F.silu(h[:, :8]) * h[:, 8:])


@pytest.fixture
def whole_operation(monkeypatch):
    """Has the operation run on the kernels wherever the tensors are; memory that nobody wrote is NaN."""
    plain = torch.Tensor.new_empty

    def spoiled(self, *size, **options):
        made = plain(self, *size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", spoiled)
    monkeypatch.setattr(kernels, "_takes", lambda dtype, _: dtype == torch.float16 or not dtype.is_floating_point)
    monkeypatch.setattr(kernels, "_is_ampere_or_later", lambda device: True)


@pytest.fixture(params=["descriptors", "pointers"])
def loads(monkeypatch, request):
    """Has the grouped products load by descriptors or by pointers."""
    has = request.param == "descriptors"
    monkeypatch.setattr(triton_kernels, "has_tensor_memory_accelerator", lambda device: has)


SIZES = {"num_tokens": 12, "num_experts": 6, "hidden_size": 32, "intermediate_size": 32, "dtype": torch.float16}


def run_fused(problem, **options):
    """The operation on the device, with the activation that has kernels; its results on the CPU."""
    there = replace(
        problem.with_tensors(**{name: tensor.to(DEVICE) for name, tensor in problem.tensors.items()}),
        layout=replace(problem.layout, activation=kernels.silu_gated),
        top_k_index=problem.top_k_index.to(DEVICE),
        grad_output=problem.grad_output.to(DEVICE),
    )
    options["health"] = new_counters(torch.device(DEVICE))
    return {name: result.cpu() for name, result in run(there, **options).items()}


@pytest.mark.parametrize("ranks", [{}, {"gate_up_ranks": (4,), "down_ranks": (4,)}], ids=["plain", "low_rank"])
@pytest.mark.parametrize("layout", ["default", "transposed_biased"])
def test_rows_of_other_processes_experts_add_nothing(layout, ranks, whole_operation, loads):
    problem = make_problem(layout, **SIZES, **ranks)
    problem = replace(problem, top_k_index=problem.top_k_index + 3 * (problem.top_k_index > 3))  # 7 and 8: another's
    actual = run_fused(problem, is_expert_parallel=True)
    foreign = problem.top_k_index > 6
    assert actual["top_k_weights"][foreign].count_nonzero() == 0
    silent = problem.with_tensors(top_k_weights=problem.tensors["top_k_weights"].masked_fill(foreign, 0))
    expected = run_loop(replace(silent, top_k_index=problem.top_k_index.clamp(max=5)))
    expected["top_k_weights"].masked_fill_(foreign, 0)
    for name, want in expected.items():
        assert relative_error(actual[name], want) < 5e-3, name


@pytest.mark.parametrize("name", ["hidden_states", "top_k_weights", "gate_up_proj", "down_proj", "down_proj_bias"])
def test_a_nan_goes_where_the_baseline_has_it(name, whole_operation, loads):
    problem = make_problem("biased", **SIZES)
    tensor = problem.tensors[name].clone()
    tensor[2, 1] = float("nan")
    problem = problem.with_tensors(**{name: tensor})
    actual, expected = run_fused(problem), run_baseline(problem)
    assert any(not want.isfinite().all() for want in expected.values())
    for result, want in expected.items():
        assert torch.equal(actual[result].isfinite(), want.isfinite()), result


@cache
def with_every_kernel():
    """A problem, and its results where every kernel fits."""
    problem = make_problem("default", **SIZES, gate_up_ranks=(4,), down_ranks=(4,))
    return problem, run_fused(problem)


OUT_OF_SHARED_MEMORY = errors.OutOfResources(147_480, 101_376, "shared memory")


@pytest.mark.parametrize(
    ("kernel", "error"),
    [(kernel, OUT_OF_SHARED_MEMORY) for kernel in
     ["route", "grouped_linear", "grouped_linear_pointers", "grouped_outer", "gated", "gated_backward", "combine",
      "count"]]
    + [("gated_backward", errors.PTXASError("`ptxas` failed\nRepro command"))],
)  # fmt: skip
def test_plain_code_runs_where_a_kernel_is_too_large(kernel, error, whole_operation, monkeypatch):
    problem, expected = with_every_kernel()
    launches = []

    class TooLarge:
        def __getitem__(self, grid):
            def launch(*args, **options):
                launches.append(grid)
                raise error

            return launch

    monkeypatch.setattr(kernels, "_too_large", set())
    monkeypatch.setattr(triton_kernels, f"_{kernel}_kernel", TooLarge())
    launcher = kernel.removesuffix("_pointers")
    if launcher != kernel:
        monkeypatch.setattr(triton_kernels, "has_tensor_memory_accelerator", lambda device: False)
    with pytest.warns(UserWarning, match=f"kernel {launcher} does not fit .*{str(error).splitlines()[0]}$"):
        first = run_fused(problem)
    second = run_fused(problem)  # a second warning would be an error
    assert len(launches) == 1
    for name, want in expected.items():
        # One more rounding to float16, of each product and of the low-rank part added to it.
        assert relative_error(first[name], want) <= 4 * TOLERANCE[torch.float16], name
        assert relative_error(first[name].roll(1, 0), want) > 0.1, name
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("layout", ["in first", "out first", "slice"])
def test_a_weights_descriptor_is_that_of_the_view_whose_last_side_is_contiguous(layout):
    """The interpreter, which reads the tensor itself, does not come here."""
    weight = {
        "in first": normal(3, 64, 128, dtype=torch.bfloat16),
        "out first": normal(3, 128, 64, dtype=torch.bfloat16).mT,
        "slice": normal(3, 64, 256, dtype=torch.bfloat16)[..., :128],
    }[layout]
    in_first = layout != "out first"
    view, block = (weight, (1, 64, 32)) if in_first else (weight.mT, (1, 32, 64))
    mine, found = triton_kernels._weight_descriptor_at(
        weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), 64, 32
    )
    assert found == in_first
    assert mine.base.data_ptr() == view.data_ptr()
    got = mine.base.dtype, mine.shape, mine.strides, mine.block_shape
    assert got == (view.dtype, list(view.shape), list(view.stride()), list(block))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("dtype", "shape"), [(DTYPES[0], (3, 32, 160)), (DTYPES[1], (2, 192, 256))])
def test_quantized_weights_become_dense_with_the_bits_of_the_reference(dtype, shape, make, monkeypatch):
    """All of it, some rows, and columns whose first is in the middle of a block or begins one."""
    weight = make(normal(*shape).cpu().to(dtype)).to(DEVICE)
    parts = (
        [slice(0, shape[1]), slice(shape[1] // 2 + 1, shape[1] - 1)],
        [slice(0, shape[2]), slice(30, 131), slice(64, 131)],
    )
    expected = {(rows, columns): plain_dense(weight, slice(*rows), slice(*columns)) for rows, columns in ends_of(parts)}
    monkeypatch.setattr(kernels, "_kernels", lambda tensor: triton_kernels)
    for (rows, columns), dense in expected.items():
        assert torch.equal(weight.dequantize(slice(*rows), slice(*columns)), dense)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_every_code_and_scale_has_the_bits_of_the_reference(name, dtype, monkeypatch):
    """Subnormal numbers, the ends of the range, and what is no number."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    if name == "fp8":
        powers = torch.tensor([2.0**-140, 2.0**-126, 2.0**-20, 1, 2.0**100, 2.0**125], device=DEVICE)
        scales = normal(1, 6, 2) * powers[:, None]
        parts = {"values": codes.repeat(1, 6 * 128, 1).view(torch.float8_e4m3fn), "scales": scales}
        weight = QuantizedWeight(FP8(), parts, (1, 6 * 128, 256), dtype)
    else:
        parts = {"packed": codes.repeat(1, 256, 1), "scales": codes.view(1, 256, 1).repeat(1, 1, 16)}
        weight = QuantizedWeight(MXFP4(), parts, (1, 256, 512), dtype)
    expected = plain_dense(weight, *(slice(0, side) for side in weight.shape[1:]))
    assert expected.isinf().any()
    assert expected.isnan().any()
    monkeypatch.setattr(kernels, "_kernels", lambda tensor: triton_kernels)
    torch.testing.assert_close(weight.dequantize(), expected, rtol=0, atol=0, equal_nan=True)


def ends_of(parts):
    return [((r.start, r.stop), (c.start, c.stop)) for r, c in product(*parts)]


def plain_dense(weight, rows, columns):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_kernels", lambda tensor: None)
        return weight.dequantize(rows, columns)
