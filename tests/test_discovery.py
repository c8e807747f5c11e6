"""What is found in a model, under which wrappers, and the estimate of its saved activations."""

import pytest
import torch
from helpers.models import experts_modules, gpt_oss, mixtral, qwen3, with_attention_lora
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_moe import measure_moe_activations, patch_moe
from lightning_moe.activation_estimate import estimate_activations
from lightning_moe.discovery import find_moe_layers
from lightning_moe.integrations.transformers_experts import read_spec
from lightning_moe.ops.grouped import gelu_gated, gelu_tanh_gated, silu_gated


class HandWritten(nn.Module):
    """An MoE outside Transformers, its experts in a list."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])


class OddMoE(nn.Module):
    """Known by its class's name only."""


def test_a_dense_model_has_none():
    assert find_moe_layers(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == []


@pytest.mark.parametrize("build", [qwen3, mixtral, gpt_oss])
def test_decorated_layers_are_found_in_order(build):
    layers = find_moe_layers(build())
    assert [layer.name for layer in layers] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert all(layer.reason is None and layer.is_dispatched for layer in layers)


@pytest.mark.parametrize(
    ("build", "activation"),
    [
        (qwen3, silu_gated),
        (lambda: qwen3(hidden_act="gelu"), gelu_gated),
        (lambda: qwen3(hidden_act="gelu_pytorch_tanh"), gelu_tanh_gated),
        (lambda: qwen3(hidden_act="relu"), None),
        (gpt_oss, None),
    ],
)
def test_activations_with_kernels_are_recognised(build, activation):
    """And compute what the module does; any other is the module's own."""
    experts = experts_modules(build())[0]
    found = read_spec(experts).activation
    assert found == (activation or experts._apply_gate)
    h = torch.randn(5, 32)
    assert torch.allclose(found(h), experts._apply_gate(h), atol=1e-6)


def test_layers_under_expert_adapters_are_the_modules_themselves():
    model = qwen3()
    inner = experts_modules(model)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=[], target_parameters=names))
    layers = find_moe_layers(wrapped)
    assert [layer.module for layer in layers] == inner
    assert layers[0].name.endswith("mlp.experts.base_layer.base_layer")


@pytest.mark.parametrize("module", [HandWritten(), OddMoE()])
def test_undecorated_layers_are_reported_once(module):
    layers = find_moe_layers(nn.ModuleDict({"mlp": module, "dense": nn.Linear(2, 2)}))
    assert len(layers) == 1
    assert layers[0].reason.code == "outside_registry"
    assert not layers[0].is_dispatched
    assert [layer.status for layer in patch_moe(module)] == ["fallback"]


def test_container_modules_are_not_reported_as_moe_layers():
    class TunedMoE(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = qwen3()

    assert len(find_moe_layers(TunedMoE())) == 2


def test_a_class_with_a_registry_of_its_own_is_not_supported(monkeypatch):
    monkeypatch.setattr("lightning_moe.integrations.transformers_dispatch.ALL_EXPERTS_FUNCTIONS", object())
    (layer, _) = find_moe_layers(qwen3())
    assert layer.reason.code == "other_registry"
    assert not layer.is_dispatched


def test_a_forward_without_the_decorator_is_not_supported(monkeypatch):
    model = qwen3()
    monkeypatch.delattr(type(experts_modules(model)[0]).forward, "__wrapped__")
    assert all(layer.reason.code == "undecorated_forward" for layer in find_moe_layers(model))


@pytest.mark.parametrize("trained", ["attention", "everything"])
@pytest.mark.parametrize("build", [qwen3, gpt_oss])
def test_the_estimate_is_what_saved_tensor_hooks_measure(build, trained):
    model = with_attention_lora(build()) if trained == "attention" else build()
    ids = torch.randint(0, 64, (4, 64))
    patch_moe(model)
    with measure_moe_activations(model) as measured:
        model(input_ids=ids, labels=ids)
    assert len(measured) == 2
    for layer in measured:
        estimate = estimate_activations(model.get_submodule(layer.name), {}, recompute_gate_up=False)
        rows = layer.num_tokens * 2
        # The layer's input, kept where the first projection trains, and a few indices are not in the estimate.
        slack = 256 * 32 * 4 * 1.25
        assert 0 <= layer.baseline_num_bytes - estimate.baseline_per_row * rows <= slack
        assert 0 <= layer.num_bytes - estimate.saved_per_row * rows <= slack
