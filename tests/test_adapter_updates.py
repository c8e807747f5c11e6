"""AdapterUpdates tracks which experts' adapters got a gradient and which changed."""

import pytest
import torch
from helpers.models import experts_modules, qwen3, tokens, with_attention_lora, with_expert_lora
from peft.tuners.lora import ParamWrapper
from torch import nn
from torch.distributed.tensor import distribute_tensor

from lightning_moe.adapter_updates import AdapterUpdates, NotUpdated, format_report
from lightning_moe.integrations.peft_experts import split_a, split_b

EVERY = 2 * 8  # layers x experts


def default_init():
    """LoRA as it starts: B is zero, so that A has no gradient in the first step."""
    model = with_expert_lora(qwen3())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    return model


def train(model, updates, num_steps=3, learning_rate=0.1, parameters=None, ids=None):
    parameters = [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for step in range(num_steps):
        batch = tokens(8, 32, seed=step) if ids is None else ids
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        updates.note_gradients()
        optimizer.step()


def test_adapters_that_train_are_updated():
    model = default_init()
    updates = AdapterUpdates(model)
    assert len(updates) == 4
    train(model, updates)
    assert updates.conclude() == (0, [])


def test_before_any_step_none_has():
    updates = AdapterUpdates(default_init())
    count, not_updated = updates.conclude()
    assert count == EVERY
    assert [(u.without_gradient, u.unchanged) for u in not_updated] == [(8, 0)] * 4


def test_the_first_step_moves_b_only():
    model = default_init()
    updates = AdapterUpdates(model)
    train(model, updates, num_steps=1)
    count, not_updated = updates.conclude()
    assert count == EVERY
    assert [(u.without_gradient, u.unchanged) for u in not_updated] == [(8, 0)] * 4


@pytest.mark.parametrize("build", [default_init, lambda: with_expert_lora(qwen3())], ids=["fresh", "trained"])
@pytest.mark.parametrize("outside", ["lora_", "lora_B"])
def test_an_adapter_outside_the_optimizer_is_unchanged(build, outside):
    model = build()
    inside = [p for n, p in model.named_parameters() if p.requires_grad and f"layers.1.mlp.experts.{outside}" not in n]
    updates = AdapterUpdates(model)
    train(model, updates, parameters=inside)
    count, (not_updated,) = updates.conclude()
    assert count == 8
    assert (not_updated.layer, not_updated.parameter) == ("base_model.model.model.layers.1.mlp.experts", "down_proj")
    assert (not_updated.without_gradient, not_updated.unchanged) == (0, 8)
    assert "is the adapter in the optimizer" in not_updated.reasons


def test_factors_that_are_not_finite_are_not_updated():
    model = default_init()
    updates = AdapterUpdates(model)
    train(model, updates)
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    with torch.no_grad():
        split_b(wrapper.lora_B["default"].weight, 8)[5, 0, 0] = torch.nan
    count, (not_updated,) = updates.conclude()
    assert (count, not_updated.nonfinite, not_updated.unchanged) == (1, 1, 0)
    assert not_updated.reasons == "1 of 8 experts hold NaN or infinity"


def test_gradients_of_nan_are_none():
    model = default_init()
    updates = AdapterUpdates(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, torch.nan)
    updates.note_gradients()
    assert {u.without_gradient for u in updates.conclude()[1]} == {8}


def test_a_learning_rate_too_small_for_the_dtype_is_seen():
    model = with_expert_lora(qwen3())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    updates = AdapterUpdates(model)
    train(model, updates, learning_rate=1e-9)
    count, not_updated = updates.conclude()
    assert count == EVERY
    assert {u.without_gradient for u in not_updated} == {0}


def test_an_expert_without_a_token_is_counted_alone():
    model = default_init()
    updates = AdapterUpdates(model)
    handles = [
        module.register_forward_pre_hook(lambda _, args: (args[0], args[1].where(args[1] != 3, 4), args[2]))
        for module in experts_modules(model)
    ]
    train(model, updates)
    for handle in handles:
        handle.remove()
    count, not_updated = updates.conclude()
    assert count == 2
    assert {(u.num_experts, u.without_gradient, u.unchanged) for u in not_updated} == {(8, 1, 0)}
    assert "1 of 8 experts without a gradient (too few tokens went there" in not_updated[0].reasons


def test_one_changed_element_of_one_expert_is_seen():
    model = default_init()
    updates = AdapterUpdates(model)
    for factors in updates._factors.values():
        for factor in factors:
            factor.has_gradient[:] = True
    for number, wrapper in enumerate(m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "num_experts")):
        with torch.no_grad():
            split_a(wrapper.lora_A["default"].weight, 8)[number, 1, 2] += 1e-3
            split_b(wrapper.lora_B["default"].weight, 8)[number, 3, 1] += 1e-3
    _, not_updated = updates.conclude()
    assert [u.unchanged for u in not_updated] == [7] * 4


def test_frozen_adapters_are_not_tracked():
    model = default_init().requires_grad_(False)
    assert len(AdapterUpdates(model)) == 0
    model.base_model.model.model.layers[0].mlp.experts.lora_B.requires_grad_(True)
    assert len(AdapterUpdates(model)) == 1
    assert len(AdapterUpdates(with_attention_lora(qwen3()))) == 0


def test_the_report_names_reasons_parameters_and_layers_once():
    not_updated = [
        NotUpdated(f"layers.{i}", name, "default", 8, 2, 3) for i in range(2) for name in ("up_proj", "down_proj")
    ]
    (line,) = format_report(not_updated).splitlines()
    assert line.startswith("- 2 of 8 experts without a gradient")
    assert "; 3 of 8 experts with a gradient but unchanged" in line
    assert line.endswith("up_proj and down_proj, adapter 'default', in layers.0, layers.1")
    assert len(format_report([*not_updated, NotUpdated("layers.2", "up_proj", "default", 8, 8, 0)]).splitlines()) == 2


def test_sharded_factors_are_gathered():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = with_expert_lora(qwen3())
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for wrapper in (module for module in model.modules() if isinstance(module, ParamWrapper)):
            for linear in (*wrapper.lora_A.values(), *wrapper.lora_B.values()):
                linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh))
        updates = AdapterUpdates(model)
        for factors in updates._factors.values():
            for factor in factors:
                factor.parameter.grad = torch.ones_like(factor.parameter)
        updates.note_gradients()
        assert updates.conclude()[0] == EVERY
        for factors in updates._factors.values():
            for factor in factors:
                with torch.no_grad():
                    factor.parameter += 1.0
        assert updates.conclude() == (0, [])
    finally:
        torch.distributed.destroy_process_group()
