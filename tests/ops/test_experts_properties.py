"""The operation on problems that nobody thought of, against the float64 loop and beside the baseline.

The suite draws the same few at every run. To look for minutes, and for others, with any seed:

    python -m pytest -n 0 --timeout 0 tests/ops/test_experts_properties.py --hypothesis-profile soak --hypothesis-seed 1
"""

from dataclasses import dataclass, replace

import torch
from helpers.reference import (
    DIFFERENTIABLE,
    FACTORS,
    GATE_KINDS,
    LAYOUTS,
    buffer_mib,
    make_problem,
    relative_error,
    run,
    run_baseline,
    run_loop,
)
from hypothesis import given
from hypothesis import strategies as st

ROUTINGS = ("spread", "repeated", "one expert", "few experts")


@dataclass(frozen=True)
class Draw:
    """What a problem is made of: small enough to be printed where one fails."""

    layout: str
    dtype: torch.dtype
    hidden_dtype: torch.dtype
    gate_dtype: torch.dtype
    factor_dtype: torch.dtype
    gates: str
    routing: str
    num_tokens: int
    top_k: int
    num_experts: int
    hidden_granules: int
    intermediate_granules: int
    gate_up_ranks: tuple[int, ...]
    down_ranks: tuple[int, ...]
    requires_grad: frozenset[str]
    seed: int

    def problem(self):
        granule = 16 // self.dtype.itemsize  # grouped_mm takes whole multiples of 16 bytes
        made = make_problem(
            self.layout,
            top_k=min(self.top_k, self.num_experts),
            hidden_size=granule * self.hidden_granules,
            intermediate_size=granule * self.intermediate_granules,
            **{
                name: getattr(self, name)
                for name in (
                    "seed", "dtype", "hidden_dtype", "gate_dtype", "factor_dtype", "gates", "num_tokens",
                    "num_experts", "gate_up_ranks", "down_ranks", "requires_grad",
                )
            },
        )  # fmt: skip
        index = routed(self.routing, (self.num_tokens, self.top_k), self.num_experts, self.seed)
        gates = made.tensors["top_k_weights"].repeat(1, self.top_k)[:, : self.top_k]  # it names no expert twice
        return replace(made.with_tensors(top_k_weights=gates), top_k_index=index)


def draws(*dtypes):
    ranks = st.lists(st.integers(1, 9), max_size=2).map(tuple)
    return st.sampled_from(dtypes).flatmap(
        lambda dtype: st.builds(
            Draw,
            layout=st.sampled_from(sorted(LAYOUTS)),
            dtype=st.just(dtype),
            hidden_dtype=st.sampled_from([dtype, torch.float32]),
            gate_dtype=st.sampled_from([dtype, torch.float32]),
            factor_dtype=st.sampled_from([dtype, torch.float32]),
            gates=st.sampled_from(GATE_KINDS),
            routing=st.sampled_from(ROUTINGS),
            num_tokens=st.integers(0, 9),
            top_k=st.integers(1, 4),
            num_experts=st.integers(1, 6),
            hidden_granules=st.integers(1, 5),
            intermediate_granules=st.integers(1, 5),
            gate_up_ranks=ranks,
            down_ranks=ranks,
            requires_grad=st.frozensets(st.sampled_from((*DIFFERENTIABLE, *FACTORS))),
            seed=st.integers(0, 2**16),
        )
    )


def routed(kind, shape, num_experts, seed):
    index = torch.randint(num_experts, shape, generator=torch.Generator().manual_seed(seed))
    if kind == "repeated":
        index = index[:, :1].expand(shape).contiguous()
    elif kind == "one expert":
        index = torch.full(shape, seed % num_experts)
    elif kind == "few experts":
        index = index // 2
    return index


options = st.fixed_dictionaries(
    {"output_buffer_mib": st.sampled_from([512, buffer_mib(1), buffer_mib(2)]), "recompute_gate_up": st.booleans()}
)


def sensitivity(problem, truth):
    """How far the truth itself moves where every number moves in its last digit: a result of few terms may cancel."""
    eps = torch.finfo(problem.tensors["down_proj"].dtype).eps
    moved = {name: torch.zeros((), dtype=torch.float64) for name in truth}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def nudged(tensor, generator=generator):
            return tensor.double() * (1 + eps * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))

        other = replace(
            problem.with_tensors(**{name: nudged(tensor) for name, tensor in problem.tensors.items()}),
            grad_output=nudged(problem.grad_output),
        )
        for name, result in run_loop(other).items():
            moved[name] = torch.maximum(moved[name], (result - truth[name]).norm())
    return moved


def smallest_sum(problem):
    """What a sum may lose below the normal numbers; some processors' bfloat16 products take those for zero."""
    dtype = problem.tensors["down_proj"].dtype
    return torch.finfo(dtype).tiny * (64 if dtype == torch.bfloat16 else 1)


def assert_about_as_near_as_the_baseline(problem, **options):
    truth, baseline, ours = run_loop(problem), run_baseline(problem), run(problem, **options)
    assert ours.keys() == truth.keys()
    moved = sensitivity(problem, truth)
    for name, exact in truth.items():
        assert ours[name].shape == exact.shape, name
        error, baseline_error = ((side[name].double() - exact).norm() for side in (ours, baseline))
        allowed = 2 * baseline_error + 4 * moved[name] + smallest_sum(problem) * exact.numel() ** 0.5
        assert error <= allowed, (
            f"{name} is off by {error:.3g}, allowed {allowed:.3g}, the baseline by {baseline_error:.3g}"
        )


@given(draw=draws(torch.float32, torch.bfloat16, torch.float16), options=options)
def test_any_problem_is_about_as_near_to_the_loop_as_the_baseline(draw, options):
    assert_about_as_near_as_the_baseline(draw.problem(), **options)


@given(draw=draws(torch.float32, torch.bfloat16), options=options, how=st.sampled_from(["dropped", "doubled"]))
def test_a_wrong_gate_would_show(draw, options, how):
    problem = draw.problem()
    gates = problem.tensors["top_k_weights"]
    if not gates.numel() or gates[0, 0].abs() < 1e-3 or not problem.grad_output[0].norm():
        return
    wrong = gates.clone()
    wrong[0, 0] *= {"dropped": 0.0, "doubled": 2.0}[how]
    truth = run_loop(problem)["output"][0]
    if (run_loop(problem.with_tensors(top_k_weights=wrong))["output"][0] - truth).norm() > 0.1 * truth.norm():
        assert relative_error(run(problem.with_tensors(top_k_weights=wrong), **options)["output"][0], truth) > 0.05
