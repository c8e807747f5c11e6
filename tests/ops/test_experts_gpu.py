"""The operation on a GPU: against a float64 loop, repeatable, without host synchronisation, past 2^31 elements."""

from dataclasses import replace

import pytest
import torch
from helpers.reference import (
    FACTORS,
    LOW_PRECISION_SLACK,
    assert_no_worse,
    call,
    gradients,
    make_problem,
    pooled_error,
    relative_error,
    run,
    run_baseline,
    run_loop,
    with_scatter,
)
from torch.utils.checkpoint import checkpoint

from lightning_moe import moe_experts
from lightning_moe.ops import grouped as kernels
from lightning_moe.ops.counting import COUNTERS, new_counters
from lightning_moe.ops.grouped import FUSED_ACTIVATIONS, silu_gated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def layer(num_tokens=300, hidden=136, intermediate=72, num_experts=6, top_k=3, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {
        "hidden_states": normal(num_tokens, hidden),
        "top_k_weights": normal(num_tokens, top_k),
        "gate_up_proj": normal(num_experts, 2 * intermediate, hidden) / hidden**0.5,
        "down_proj": normal(num_experts, hidden, intermediate) / intermediate**0.5,
    }
    index = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    tensors = {name: tensor.to("cuda", dtype).requires_grad_() for name, tensor in tensors.items()}
    return tensors, index.cuda(), normal(num_tokens, hidden).to("cuda", dtype)


def execute(tensors, index, grad, wanted=None, **options):
    wanted = wanted or list(tensors)
    output = moe_experts(top_k_index=index, **tensors, **options)
    return [output, *torch.autograd.grad(output, [tensors[name] for name in wanted], grad)]


def plainly(monkeypatch, *args, **options):
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_kernels", lambda tensor: None)
        return execute(*args, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", FUSED_ACTIVATIONS)
@pytest.mark.parametrize("output_buffer_mib", [512, 0.001])
def test_kernels_are_no_further_from_the_truth_than_plain_code(dtype, activation, output_buffer_mib, monkeypatch):
    problem = layer(dtype=dtype, hidden=264)
    exact = ({n: t.detach().double().cpu().requires_grad_() for n, t in problem[0].items()}, problem[1].cpu())
    x, gates, up, down = exact[0].values()
    rows = torch.einsum("th,tkih->tki", x, up[exact[1]])
    output = (torch.einsum("tki,tkhi->tkh", activation(rows), down[exact[1]]) * gates[..., None]).sum(1)
    truth = [output, *torch.autograd.grad(output, list(exact[0].values()), problem[2].double().cpu())]
    fused = execute(*problem, activation=activation, output_buffer_mib=output_buffer_mib)
    plain = plainly(monkeypatch, *problem, activation=activation)
    for ours, reference, want in zip(fused, plain, truth, strict=True):
        allowed = with_scatter(LOW_PRECISION_SLACK, want.numel()) * relative_error(reference.cpu(), want)
        assert relative_error(ours.cpu(), want) <= allowed
        assert relative_error(torch.zeros_like(want), want) > 0.5 > allowed
        assert relative_error(want.roll(1, 0), want) > 0.5


def test_two_runs_are_bit_identical():
    problem = layer(num_tokens=4096, hidden=512, intermediate=256)
    assert all(map(torch.equal, execute(*problem), execute(*problem)))


def test_the_saved_activation_survives_a_retained_graph():
    tensors, index, grad = layer()
    output = moe_experts(top_k_index=index, **tensors)
    wanted = list(tensors.values())
    first = torch.autograd.grad(output, wanted, grad, retain_graph=True)
    second = torch.autograd.grad(output, wanted, grad, retain_graph=True)
    assert all(map(torch.equal, first, second))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_device():
    problem, counters = layer(), new_counters(torch.device("cuda"))
    execute(*problem, health=counters)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        execute(*problem, health=counters)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "shape", [{"num_tokens": 0}, {"num_tokens": 1}, {"num_tokens": 2, "top_k": 1}, {"num_experts": 1, "top_k": 1}]
)
def test_edges(shape, monkeypatch):
    problem = layer(**shape)
    for ours, plain in zip(execute(*problem), plainly(monkeypatch, *problem), strict=True):
        assert ours.shape == plain.shape
        assert not ours.numel() or relative_error(ours.cpu(), plain.cpu()) < 2**-6


def test_gates_that_are_not_contiguous():
    tensors, index, grad = layer()
    expected = execute(tensors, index, grad)
    strided = tensors["top_k_weights"].detach().t().contiguous().t().requires_grad_()
    assert all(map(torch.equal, execute(tensors | {"top_k_weights": strided}, index, grad), expected))


def test_flips_are_counted_on_the_device():
    tensors, index, grad = layer()
    counters, remaining = new_counters(torch.device("cuda")), [index, (index + 1) % 6]

    def block(hidden):
        options = {"health": counters, "bytes_saved": 2**33}
        return moe_experts(top_k_index=remaining.pop(0), **tensors | {"hidden_states": hidden}, **options)

    checkpoint(block, tensors["hidden_states"], use_reentrant=False).backward(grad)
    flips = int((~(((index + 1) % 6)[:, :, None] == index[:, None]).any(-1)).sum())
    found = dict(zip(COUNTERS, counters.tolist(), strict=True))
    nonpositive = int((tensors["top_k_weights"] <= 0).sum())
    assert (found["routing_flips"], found["nonpositive_gates"]) == (flips, nonpositive)
    assert (found["executions"], found["gates"], found["bytes_saved"]) == (1, index.numel(), 2**33)


def test_an_activation_without_kernels_is_still_right(monkeypatch):
    problem = layer()
    fused = execute(*problem)
    generic = execute(*problem, activation=lambda h: silu_gated(h))
    assert all(relative_error(a.cpu(), b.cpu()) < 2**-6 for a, b in zip(generic, fused, strict=True))


def test_offsets_pass_two_to_the_thirty_one():
    """S x H beyond 2^31 elements: the last tokens' results equal those of the same tokens alone."""
    num_tokens, hidden = 2**18 + 300, 2048  # x 4 slots = 2.15e9 projected features
    tensors, index, grad = layer(num_tokens, hidden, 64, num_experts=4, top_k=4)
    wanted = ["hidden_states", "top_k_weights"]
    frozen = {name: t if name in wanted else t.detach() for name, t in tensors.items()}
    whole = execute(frozen, index, grad, wanted, output_buffer_mib=2**20)
    assert num_tokens * 4 * hidden > 2**31
    tail = slice(num_tokens - 64, None)
    alone = {n: t[tail].detach().requires_grad_() if n in wanted else t for n, t in frozen.items()}
    for ours, few in zip(whole, execute(alone, index[tail], grad[tail], wanted), strict=True):
        assert relative_error(ours[tail].cpu(), few.cpu()) < 2**-7


def on_gpu(problem):
    moved = problem.with_tensors(**{name: tensor.cuda() for name, tensor in problem.tensors.items()})
    return replace(moved, top_k_index=problem.top_k_index.cuda(), grad_output=problem.grad_output.cuda())


def back(results):
    return {name: result.cpu() for name, result in results.items()}


def on_experts(wants=("hidden_states", "top_k_weights", *FACTORS), **options):
    """Problems with low-rank updates, for the kernels' shapes."""
    sizes = {"num_tokens": 200, "top_k": 3, "num_experts": 6, "hidden_size": 136, "intermediate_size": 72}
    return [make_problem(**{**sizes, "seed": seed, **options}).wanting(*wants) for seed in range(3)]


@pytest.mark.parametrize("factor_dtype", [None, torch.float32], ids=["own_dtype", "float32_factors"])
@pytest.mark.parametrize("ranks", [(16,), (8, 3), (100,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_rank_updates_are_nearer_to_the_truth_than_merged_weights(dtype, ranks, factor_dtype):
    problems = on_experts(dtype=dtype, factor_dtype=factor_dtype, gate_up_ranks=ranks, down_ranks=ranks)
    truths = [run_loop(problem) for problem in problems]
    ours, baseline = ([back(function(on_gpu(problem))) for problem in problems] for function in (run, run_baseline))
    for name in truths[0]:
        assert pooled_error(ours, truths, name) <= pooled_error(baseline, truths, name), name
        zeros = [{name: torch.zeros_like(truth[name])} for truth in truths]
        permuted = [{name: result[name].roll(1, 0)} for result in ours]
        assert min(pooled_error(zeros, truths, name), pooled_error(permuted, truths, name)) > 0.1


@pytest.mark.parametrize("layout", ["gpt_oss", "no_gate_projection"])
def test_low_rank_updates_on_other_layouts(layout):
    problems = on_experts(layout=layout, dtype=torch.bfloat16, gate_up_ranks=(16,), down_ranks=(16,), update_size=0.1)
    ours, baseline = ([back(function(on_gpu(problem))) for problem in problems] for function in (run, run_baseline))
    assert_no_worse(ours, baseline, [run_loop(problem) for problem in problems])


@pytest.mark.parametrize("sizes", [{"num_tokens": 0}, {"num_tokens": 1}, {"num_experts": 1, "top_k": 1}])
def test_edges_of_low_rank_updates(sizes, monkeypatch):
    problem = on_gpu(on_experts(dtype=torch.bfloat16, gate_up_ranks=(4,), down_ranks=(4,), **sizes)[0])
    fused = run(problem)
    monkeypatch.setattr(kernels, "_kernels", lambda tensor: None)
    for name, plain in run(problem).items():
        assert fused[name].shape == plain.shape
        assert relative_error(fused[name].cpu(), plain.cpu()) < 2**-5, name


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("recompute_gate_up", [False, True])
def test_low_rank_updates_wait_for_nothing_and_repeat(recompute_gate_up):
    problem = on_gpu(on_experts(dtype=torch.bfloat16, gate_up_ranks=(16,), down_ranks=(16,))[0])
    first = run(problem)
    leaves = problem.leaves()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = call(problem, leaves, recompute_gate_up=recompute_gate_up)
        second = gradients(problem, leaves, output)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", ["gpt_oss", "no_gate_projection", "transposed_biased"])
def test_generic_paths_on_the_gpu(layout):
    problems = [make_problem(layout, dtype=torch.bfloat16, seed=seed, num_tokens=80) for seed in range(4)]
    ours = [back(run(on_gpu(problem))) for problem in problems]
    baseline = [back(run_baseline(on_gpu(problem))) for problem in problems]
    assert_no_worse(ours, baseline, [run_loop(problem) for problem in problems])
