"""NaN and infinity go where the baseline would have them, and nowhere else.

A gate's gradient is the same number by another sum, so where the baseline has an infinity there may be a NaN:
infinities of both signs meet in one sum and not in the other.
"""

from dataclasses import replace

import pytest
import torch
from helpers.reference import DIFFERENTIABLE, LAYOUTS, make_problem, run, run_baseline

VALUES = [float("nan"), float("inf"), float("-inf")]
CASES = [
    (layout, name, value)
    for layout in ("default", "gpt_oss", "no_gate_projection", "biased")
    for name in ("grad_output", *DIFFERENTIABLE)
    for value in VALUES
    if (LAYOUTS[layout].has_bias or "bias" not in name)
    # gpt-oss clamps an infinite pre-activation: nothing is left to look for.
    and not (layout == "gpt_oss" and name == "gate_up_proj_bias" and value in VALUES[1:])
]


def poison(problem, name, value):
    """One entry of one tensor; of weights and biases one of an expert that has rows and is not everybody's."""
    expert = problem.top_k_index[2, 1]
    place = {"hidden_states": (2, 3), "grad_output": (2, 3), "top_k_weights": (2, 1)}.get(name, (expert, 1))
    tensor = (problem.grad_output if name == "grad_output" else problem.tensors[name]).clone()
    entry = tensor[place]
    (entry if entry.dim() == 0 else entry[:1]).fill_(value)
    if name == "grad_output":
        return replace(problem, grad_output=tensor)
    return problem.with_tensors(**{name: tensor})


def assert_finite_in_the_same_places(actual, expected):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        finite = want.isfinite()
        assert torch.equal(actual[name].isfinite(), finite), f"{name} is finite in other places than the baseline's"
        torch.testing.assert_close(actual[name][finite], want[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute_gate_up", [False, True])
@pytest.mark.parametrize(("layout", "name", "value"), CASES)
def test_the_baseline_has_them_in_the_same_places(layout, name, value, recompute_gate_up):
    problem = poison(make_problem(layout), name, value)
    expected = run_baseline(problem)
    assert any(not result.isfinite().all() for result in expected.values())
    assert any(result.isfinite().any() for result in expected.values())
    assert_finite_in_the_same_places(run(problem, recompute_gate_up=recompute_gate_up), expected)


@pytest.mark.parametrize("how", ["one too many", "one too few"])
def test_the_comparison_fails_on_other_places(how):
    expected = run_baseline(poison(make_problem(), "hidden_states", float("nan")))
    actual = {name: result.clone() for name, result in expected.items()}
    if how == "one too many":
        actual["output"][0, 0] = float("nan")
    else:
        actual["output"][2, 0] = 0.0
    with pytest.raises(AssertionError, match="output is finite in other places"):
        assert_finite_in_the_same_places(actual, expected)
