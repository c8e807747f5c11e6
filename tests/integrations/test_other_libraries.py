"""Forwards that accelerate, Liger and others put on patched modules keep running and are kept."""

import copy
from contextlib import nullcontext
from types import MethodType

import pytest
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from helpers.models import Tiny, experts_modules, qwen3, with_expert_lora
from helpers.patching import agree, equal, gradients, num_active_executions
from helpers.training import LIGHTNING_WARNINGS, trainer
from peft.tuners.lora import ParamWrapper

from lightning_moe import MoEGateGradCallback, gategrad, patch_moe, unpatch_moe
from lightning_moe.patching import touched_modules

pytestmark = LIGHTNING_WARNINGS


def plain():
    return qwen3(num_hidden_layers=1)


def adapted():
    return with_expert_lora(qwen3(num_hidden_layers=1), attention=True)


def wrapper(model, position):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)][position]


class Noting(ModelHook):
    """Notes each forward; accelerate's own hooks move tensors there."""

    def __init__(self, calls):
        self.calls = calls

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append(module)
        return args, kwargs


def hook_of_accelerate(module, calls):
    add_hook_to_module(module, Noting(calls))


def rebound(module, calls):
    """As Liger does: a forward of fixed arguments that bypasses the registry, here to the class's eager code."""
    eager = type(module).forward.__wrapped__

    def forward(self, hidden_states, top_k_index, top_k_weights):
        calls.append(self)
        return eager(self, hidden_states, top_k_index, top_k_weights)

    module.forward = MethodType(forward, module)


def wrapped(module, calls):
    """A forward of fixed arguments around the one that was there."""
    original = module.forward

    def forward(hidden_states, top_k_index, top_k_weights):
        calls.append(module)
        return original(hidden_states, top_k_index, top_k_weights)

    module.forward = forward


def inner(model):
    return wrapper(model, 1)


def outer(model):
    return wrapper(model, 0)


def the_experts(model):
    (module,) = experts_modules(model)
    return module


CASES = [
    (build, place, put_on)
    for build, places in ((plain, [the_experts]), (adapted, [the_experts, outer, inner]))
    for place in places
    for put_on in ([hook_of_accelerate, wrapped, rebound] if place is the_experts else [hook_of_accelerate, wrapped])
]


def others(module):
    """What the other library left on the module."""
    return {name: vars(module).get(name) for name in ("forward", "_hf_hook", "_old_forward")}


@pytest.mark.parametrize(("build", "place", "put_on"), CASES)
def test_a_forward_put_on_before_patching_runs_and_is_kept(build, place, put_on):
    model, calls = build(), []
    module = place(model)
    put_on(module, calls)
    left, baseline = others(module), gradients(model)
    calls.clear()
    with gategrad(model) as report:
        assert others(module) == left
        (layer,) = report
        if place is the_experts and put_on is not hook_of_accelerate:
            assert layer.reason.code == "replaced_forward"
        else:
            assert layer.status == "active"
            codes = {reason.code for reason in layer.adapter_reasons}
            assert codes <= {"lora_forward", "lora_inner_forward"}
            assert bool(codes) == (place is not the_experts)
        assert agree(gradients(model), baseline)
        assert calls == [module]
        assert num_active_executions(model) == [1] * (layer.status == "active")
    assert others(module) == left
    assert touched_modules(model) == []
    assert equal(gradients(model), baseline)
    assert calls == [module] * 2


@pytest.mark.parametrize(("build", "place", "put_on"), CASES)
def test_a_forward_put_on_while_patched_runs_and_is_kept(build, place, put_on):
    twin = build()
    put_on(place(twin), [])
    baseline = gradients(twin)
    model, calls = build(), []
    module = place(model)
    patch_moe(model)
    put_on(module, calls)
    left = others(module)
    if place is outer or build is plain or put_on is hook_of_accelerate and place is the_experts:
        found = gradients(model)
    else:
        with pytest.warns(UserWarning, match="PEFT merges adapters into .*lora_inner_forward"):
            found = gradients(model)
    assert agree(found, baseline)
    assert calls == [module]
    unpatch_moe(model)
    assert others(module) == left
    assert [touched for touched in touched_modules(model) if touched is not module] == []
    assert equal(gradients(model), baseline)
    assert calls == [module] * 2


def test_a_removed_accelerate_hook_is_no_replaced_forward():
    model = plain()
    add_hook_to_module(the_experts(model), ModelHook())
    remove_hook_from_module(the_experts(model))
    left = others(the_experts(model))
    assert left["forward"] is not None
    with gategrad(model) as report:
        assert len(report.active) == 1
    assert others(the_experts(model)) == left


@pytest.mark.parametrize("order", [(rebound, hook_of_accelerate), (hook_of_accelerate, rebound)])
def test_an_accelerate_hook_with_a_replaced_forward_falls_back(order):
    model, calls = plain(), []
    for put_on in order:
        put_on(the_experts(model), calls)
    with gategrad(model) as report:
        assert report.fallback[0].reason.code == "replaced_forward"
        gradients(model)
        assert the_experts(model) in calls


def test_a_copy_with_an_accelerate_hook_is_patched():
    model = plain()
    add_hook_to_module(the_experts(model), ModelHook())
    twin = copy.deepcopy(model)
    with gategrad(twin) as report:
        assert len(report.active) == 1
        gradients(twin)
        assert num_active_executions(twin) == [1]


def test_an_accelerate_hook_removed_after_unpatching_puts_back_a_forward_that_does_what_pefts_does():
    """Its hook was put on while the wrapper was patched, so it puts our forward back; that does what PEFT's does."""
    model = adapted()
    baseline = gradients(model)
    with gategrad(model):
        add_hook_to_module(outer(model), ModelHook())
    remove_hook_from_module(outer(model))
    assert equal(gradients(model), baseline)
    with gategrad(model) as report:
        assert not report.merging
    assert "forward" not in vars(outer(model))
    assert equal(gradients(model), baseline)


def raises_at_second_batch(outputs, batch, batch_idx):
    if batch_idx == 1:
        raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_an_accelerate_hook_survives_a_fit(tmp_path, fails):
    module, calls, callback = Tiny(adapted), [], MoEGateGradCallback()
    hook_of_accelerate(the_experts(module), calls)
    left = others(the_experts(module))
    if fails:
        module.on_train_batch_end = raises_at_second_batch
    fitting = trainer(tmp_path, callback, max_steps=2)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        fitting.fit(module)
    assert all(module.was_patched)
    assert len(calls) == len(module.losses) == 2
    assert others(the_experts(module)) == left
    assert touched_modules(module) == []
