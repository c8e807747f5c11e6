"""Counting expert load: once per backward, on any model, patched or not; and its heat map."""

import copy

import pytest
import torch
from helpers.models import experts_modules, qwen3, tokens, with_attention_lora, with_expert_lora
from torch.utils.checkpoint import checkpoint

from lightning_moe import gategrad, plot_expert_load
from lightning_moe.expert_load import ExpertLoadCounter, count_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_experts", [1, 6, 8])
def test_rows_of_each_expert(dtype, num_experts):
    index = torch.arange(120, dtype=dtype).view(40, 3) % 7
    counted = count_rows(index, num_experts)
    assert counted.dtype == torch.int64
    assert counted.tolist() == [(index == expert).sum().item() for expert in range(num_experts)]


def routed(model, step):
    """The rows of each expert, seen at the experts modules' inputs while `step` runs."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: seen.append(count_rows(args[1], module.num_experts)))
        for module in experts_modules(model)
    ]
    step()
    for hook in hooks:
        hook.remove()
    return [rows.tolist() for rows in seen]


def train_step(model):
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()


@pytest.mark.parametrize("is_patched", [False, True])
@pytest.mark.parametrize("adapters", [lambda model: model, with_attention_lora, with_expert_lora])
def test_counts_the_rows_of_each_layer(adapters, is_patched):
    model = adapters(qwen3())
    expected = routed(model, lambda: train_step(model))
    counter = ExpertLoadCounter(model)
    with gategrad(model) if is_patched else torch.enable_grad():
        train_step(model)
        train_step(model)
    counted = counter.drain(CPU)
    assert not any(".base_layer" in name for name in counted)
    assert [rows.tolist() for rows in counted.values()] == [[2 * count for count in rows] for rows in expected]
    assert not any(rows.any() for rows in counter.drain(CPU).values())


def test_a_forward_alone_counts_nothing():
    model = qwen3()
    counter = ExpertLoadCounter(model)
    model(input_ids=tokens(), use_cache=False)
    with torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
    assert not any(rows.any() for rows in counter.drain(CPU).values())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_counts_once_under_activation_checkpointing(use_reentrant):
    model = qwen3()
    (experts, *_) = experts_modules(model)
    counter = ExpertLoadCounter(experts)
    hidden = torch.randn(5, model.config.hidden_size, requires_grad=True)
    index = torch.tensor([[0, 1]]).expand(5, 2)
    weights = torch.rand(5, 2, requires_grad=True)
    checkpoint(experts, hidden, index, weights, use_reentrant=use_reentrant).square().sum().backward()
    (rows,) = counter.drain(CPU).values()
    assert rows[:2].tolist() == [5, 5]
    assert rows.sum() == 10


def test_a_copy_of_the_model_counts_by_itself():
    model = qwen3()
    counter = ExpertLoadCounter(model)
    train_step(copy.deepcopy(model))
    assert not any(rows.any() for rows in counter.drain(CPU).values())


def test_remove_leaves_no_hook():
    model = qwen3()
    before = [dict(module._forward_hooks) for module in model.modules()]
    counter = ExpertLoadCounter(model)
    assert [dict(module._forward_hooks) for module in model.modules()] != before
    counter.remove()
    assert [dict(module._forward_hooks) for module in model.modules()] == before


def test_the_heat_map_shows_each_layers_rows_over_their_mean():
    figure = plot_expert_load({"a": torch.tensor([2, 0, 4]), "b": torch.tensor([1, 3])})
    (image,) = figure.axes[0].images
    shown = torch.from_numpy(image.get_array().filled(-1.0))
    assert shown.tolist() == [[1.0, 0.0, 2.0], [0.5, 1.5, -1.0]]
