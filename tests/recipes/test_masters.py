"""Tests of the float32 copies: small steps add up, gradients move, earlier values come back."""

from collections import defaultdict

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lora.masters import Masters
from qwen3_lora import UNHELPFUL_WARNINGS
from test_resuming import data, module, trainer
from torch import nn

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in UNHELPFUL_WARNINGS]


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


def test_gradients_of_micro_batches_add_up_in_float32():
    parameter, idle = (nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)) for _ in range(2))
    parameter.grad = torch.ones_like(parameter)  # left by a run that was stopped
    masters = Masters({"weight": parameter, "idle": idle}, {})
    for number in range(301):
        masters.before_backward()
        if number < 300:
            parameter.grad = torch.ones_like(parameter) if parameter.grad is None else parameter.grad + 1
        masters.after_backward()
    assert torch.equal(parameter.grad, torch.full((2,), 300.0).bfloat16())
    masters.take_gradients()
    assert parameter.grad is None
    assert torch.equal(masters.by_name["weight"].grad, torch.full((2,), 300.0))  # bfloat16 stops at 256
    assert masters.by_name["idle"].grad is idle.grad is None


def test_what_a_stopped_run_left_is_no_gradient_of_the_next():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    Masters({"weight": parameter}, {})
    assert parameter.grad is None


class Gradients(Callback):
    """Each micro-batch's gradients, and what the model and its optimizer have of them."""

    def __init__(self):
        self.parts, self.seen = defaultdict(list), {}

    def on_train_start(self, trainer, pl_module):
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad, name=name: self.parts[name].append(grad.float()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_of_the_recipe_has_the_sum_of_its_micro_batches(accumulate, tmp_path, monkeypatch):
    gradients, network, clipped = Gradients(), module(dtype="bfloat16"), {}

    def clip(optimizer, **options):
        clipped.update({name: master.grad.clone() for name, master in network._masters.by_name.items()})
        assert not any(p.grad is not None for p in network.parameters())
        LightningModule.configure_gradient_clipping(network, optimizer, **options)
        clipped["norm"] = torch.nn.utils.get_total_norm([p.grad for p in network._masters.by_name.values()]).item()

    monkeypatch.setattr(network, "configure_gradient_clipping", clip)
    run = trainer(tmp_path, 1, gradients, accumulate_grad_batches=accumulate, gradient_clip_val=1e-3)
    run.fit(network, data())
    assert clipped.pop("norm") == pytest.approx(1e-3, rel=1e-2)
    assert clipped.keys() == gradients.seen.keys()
    for name, grad in clipped.items():
        assert torch.equal(grad, sum(gradients.parts[name]))
        assert len(gradients.parts[name]) == accumulate
        assert torch.equal(gradients.seen[name], grad.bfloat16())  # what other callbacks look at
    assert all(master.grad is None for master in network._masters.by_name.values())


def test_scaled_gradients_are_refused_where_the_copies_would_not_be_told(tmp_path):
    scaling = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    run = trainer(tmp_path, 1, plugins=[scaling])
    with pytest.raises(ValueError, match="trainer.precision 16-mixed scales gradients.* or set --model.dtype float32"):
        run.fit(module(dtype="bfloat16"), data())
