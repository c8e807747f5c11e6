"""The operation on problems that nobody thought of, against the float64 loop and beside stock code.

The suite draws the same few at every run. To look for longer, and for others, with any seed:

    python -m pytest -n 0 tests/test_properties.py --hypothesis-profile soak --hypothesis-seed 1
"""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    DIFFERENTIABLE,
    FACTORS,
    GATE_KINDS,
    LAYOUTS,
    assert_agrees,
    make_problem,
    relative_error,
    run,
    run_loop,
    run_stock,
)

ROUTINGS = ("spread", "repeated", "one expert", "few experts")


@st.composite
def problems(draw, dtypes):
    dtype = draw(st.sampled_from(dtypes))
    granule = 16 // dtype.itemsize  # grouped_mm takes whole multiples of 16 bytes
    num_tokens, top_k, num_experts = draw(st.integers(0, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**16))
    ranks = st.lists(st.integers(1, 9), max_size=2)
    problem = make_problem(
        draw(st.sampled_from(sorted(LAYOUTS))),
        seed=seed,
        dtype=dtype,
        hidden_dtype=draw(st.sampled_from([dtype, torch.float32])),
        gate_dtype=draw(st.sampled_from([dtype, torch.float32])),
        gates=draw(st.sampled_from(GATE_KINDS)),
        num_tokens=num_tokens,
        top_k=min(top_k, num_experts),
        num_experts=num_experts,
        hidden_size=granule * draw(st.integers(1, 5)),
        intermediate_size=granule * draw(st.integers(1, 5)),
        gate_up_ranks=draw(ranks),
        down_ranks=draw(ranks),
        factor_dtype=draw(st.sampled_from([dtype, torch.float32])),
        requires_grad=draw(st.sets(st.sampled_from((*DIFFERENTIABLE, *FACTORS)))),
    )
    index = routed(draw(st.sampled_from(ROUTINGS)), (num_tokens, top_k), num_experts, seed)
    gates = problem.tensors["top_k_weights"].repeat(1, top_k)[:, :top_k]  # `make_problem` names no expert twice
    return replace(problem.with_tensors(top_k_weights=gates), top_k_index=index)


def routed(kind, shape, num_experts, seed):
    index = torch.randint(num_experts, shape, generator=torch.Generator().manual_seed(seed))
    if kind == "repeated":
        index = index[:, :1].expand(shape).contiguous()
    elif kind == "one expert":
        index = torch.full(shape, seed % num_experts)
    elif kind == "few experts":
        index = index // 2
    return index


options = st.fixed_dictionaries({"chunk_tokens": st.sampled_from(["auto", 1, 2]), "recompute_up": st.booleans()})


@given(problem=problems([torch.float32]), options=options)
def test_any_problem_equals_the_loop(problem, options):
    # A result of few terms may cancel, so that more of its digits are rounding.
    assert_agrees(run(problem, **options), run_loop(problem), tolerance=2e-5)


@given(problem=problems([torch.bfloat16, torch.float16]), options=options)
def test_any_problem_in_16_bits_is_about_as_near_to_the_loop_as_stock_code(problem, options):
    truth, stock, ours = run_loop(problem), run_stock(problem), run(problem, **options)
    eps = torch.finfo(problem.tensors["down_proj"].dtype).eps
    for name, exact in truth.items():
        error, allowed = ((side[name].double() - exact).norm() for side in (ours, stock))
        assert error <= 3 * allowed + 4 * eps * exact.norm() + 1e-6, f"{name}: {error:.3g}, stock code {allowed:.3g}"


@given(problem=problems([torch.float32, torch.bfloat16]), options=options, how=st.sampled_from(["dropped", "doubled"]))
def test_a_wrong_gate_would_show(problem, options, how):
    gates = problem.tensors["top_k_weights"]
    if not gates.numel() or gates[0, 0].abs() < 1e-3 or not problem.grad_output[0].norm():
        return
    wrong = gates.clone()
    wrong[0, 0] *= {"dropped": 0.0, "doubled": 2.0}[how]
    truth = run_loop(problem)["output"][0]
    if (run_loop(problem.with_tensors(top_k_weights=wrong))["output"][0] - truth).norm() > 0.1 * truth.norm():
        assert relative_error(run(problem.with_tensors(top_k_weights=wrong), **options)["output"][0], truth) > 0.05
