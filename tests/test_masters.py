"""Tests of the float32 copies: small steps add up, gradients move, earlier values come back."""

import torch
from masters import Masters
from torch import nn


def trained(dtype, steps=200, saved=None):
    parameter = nn.Parameter(torch.full((4,), 0.05, dtype=dtype))
    masters = Masters({"weight": parameter}, saved or {})
    optimizer = torch.optim.SGD(masters.by_name.values(), lr=1.0)
    optimizer.register_step_post_hook(lambda *_: masters.after_step())
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, 1e-5)
        masters.take_gradients()
        optimizer.step()
        optimizer.zero_grad()
    return parameter, masters


def test_steps_too_small_for_bfloat16_add_up():
    parameter, masters = trained(torch.bfloat16)
    start, gradient = (torch.full((4,), value).bfloat16() for value in (0.05, 1e-5))
    want = start.float() - 200 * gradient.float()
    torch.testing.assert_close(masters.by_name["weight"].data, want)
    assert torch.equal(parameter.data, want.bfloat16())
    alone = start.clone()
    for _ in range(200):
        alone -= gradient
    assert torch.equal(alone, start)  # what would have happened without


def test_a_float32_parameter_is_its_own_master():
    parameter, masters = trained(torch.float32)
    assert masters.by_name["weight"] is parameter
    torch.testing.assert_close(parameter.data, torch.full((4,), 0.048))


def test_gradients_move_and_are_float32():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    idle = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    masters = Masters({"weight": parameter, "idle": idle}, {})
    parameter.grad = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    masters.take_gradients()
    assert parameter.grad is None
    assert torch.equal(masters.by_name["weight"].grad, torch.tensor([1.0, 2.0]))
    assert masters.by_name["idle"].grad is None


def test_gradients_are_free_after_a_step():
    for dtype in (torch.float32, torch.bfloat16):
        parameter, masters = trained(dtype, steps=0)
        parameter.grad = torch.ones_like(parameter)
        masters.take_gradients()
        masters.after_step()
        assert parameter.grad is None
        assert masters.by_name["weight"].grad is None


def test_an_earlier_runs_values_are_taken_up_in_full():
    first, masters = trained(torch.bfloat16, steps=100)
    saved = {"weight": masters.by_name["weight"].detach().clone()}
    _, resumed = trained(torch.bfloat16, steps=100, saved=saved)
    _, uninterrupted = trained(torch.bfloat16, steps=200)
    assert torch.equal(resumed.by_name["weight"], uninterrupted.by_name["weight"])
    _, without = trained(torch.bfloat16, steps=100, saved={"weight": first.detach()})
    assert not torch.equal(without.by_name["weight"], uninterrupted.by_name["weight"])
