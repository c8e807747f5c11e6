"""Tests of quantized experts in a model: patched, adapted, trained, checked, and what is refused."""

import copy
import gc
import importlib.util
import os
import weakref

import pytest
import torch
from helpers.launch import together
from helpers.models import Tiny, experts_modules, qwen3, tokens, with_expert_lora
from helpers.training import LIGHTNING_WARNINGS, fit, logged
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_moe import (
    AdapterExport,
    AdapterUpdateCheck,
    MoEGateGradCallback,
    gategrad,
    measure_moe_activations,
    moe_experts,
    patch_moe,
    saved_activations,
)
from lightning_moe.ops.quantized import QuantizedWeight
from lightning_moe.quantization import quantize, quantize_experts

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = LIGHTNING_WARNINGS

PROJECTIONS = ("gate_up_proj", "down_proj")


FORMATS = ("nf4", "fp8", "mxfp4")


def build(layers=2, format="nf4"):
    model = qwen3(num_hidden_layers=layers, hidden_size=64, moe_intermediate_size=64).requires_grad_(False)
    quantize_experts(model, format)
    return model


def with_dense_experts(model):
    model = copy.deepcopy(model)
    for experts in experts_modules(model):
        for name in PROJECTIONS:
            setattr(experts, name, nn.Parameter(getattr(experts, name).dequantize(), requires_grad=False))
    return model


def gradients(model):
    ids = tokens()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(results, expected):
    assert results.keys() == expected.keys()
    assert all(torch.equal(results[name], value) for name, value in expected.items())


@pytest.mark.parametrize("format", FORMATS)
def test_the_experts_are_quantized_and_nothing_else(format):
    model = qwen3(num_hidden_layers=2, hidden_size=64, moe_intermediate_size=64)
    names = quantize_experts(model, format)
    assert names == [f"model.layers.{layer}.mlp.experts.{name}" for layer in range(2) for name in PROJECTIONS]
    found = {name for name, parameter in model.named_parameters() if isinstance(parameter, QuantizedWeight)}
    assert found == set(names)
    assert not any(model.get_parameter(name).requires_grad for name in names)
    assert {model.get_parameter(name).format.name for name in names} == {format}
    assert quantize_experts(model, format) == names  # once is enough


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("attention", [False, True], ids=["experts", "experts-and-attention"])
def test_a_patched_model_has_the_bits_of_dense_experts(attention, format):
    quantized = build(format=format)
    pair = [with_expert_lora(model, attention=attention) for model in (quantized, with_dense_experts(quantized))]
    for model in pair:
        assert all(layer.status == "active" for layer in patch_moe(model))
    results, expected = map(gradients, pair)
    assert len(expected) > 4
    assert_same_bits(results, expected)


def test_unpatched_and_restored_it_computes_with_dense_copies():
    model = with_expert_lora(build())
    dense = with_dense_experts(model)
    with gategrad(model):
        pass
    assert_same_bits(gradients(model), gradients(dense))
    with torch.no_grad(), model.disable_adapter():
        without = model(input_ids=tokens()).logits
        assert torch.equal(without, build()(input_ids=tokens()).logits)
    assert not torch.allclose(without, dense(input_ids=tokens()).logits)


@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_a_fit_trains_checks_and_exports_the_adapters(tmp_path):
    model = with_expert_lora(build(1), attention=True)
    before = experts_modules(model)[0].down_proj.parts["packed"].clone()
    export = AdapterExport(["fused", "per_expert"])
    module = Tiny(lambda: model)
    fit(tmp_path, module, MoEGateGradCallback(audit_every_n_steps=2), AdapterUpdateCheck(), export)
    assert max(logged(tmp_path, "gategrad/audit_rel_error")) < 1e-5
    dense = Tiny(lambda: with_expert_lora(with_dense_experts(build(1)), attention=True))
    fit(tmp_path / "dense", dense, MoEGateGradCallback(audit_every_n_steps=2))
    assert module.losses == dense.losses
    for name in ("audit_rel_error", "activations_mib_saved"):  # against the baseline, which merges dense weights
        assert logged(tmp_path, f"gategrad/{name}") == logged(tmp_path / "dense", f"gategrad/{name}")
    assert len(set(module.losses)) == 4
    (experts,) = experts_modules(model)
    assert isinstance(experts.down_proj, QuantizedWeight)
    assert torch.equal(experts.down_proj.parts["packed"], before)
    assert experts.config._experts_implementation != "gategrad"
    assert len(export.folders) == 2
    assert all((folder / "adapter_model.safetensors").exists() for folder in export.folders.values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_compiled_the_graph_breaks_at_the_experts():
    model = with_expert_lora(build(1), attention=True)
    patch_moe(model)
    expected = gradients(model)
    model.zero_grad()
    for layer in model.get_base_model().model.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager")
    results = gradients(model)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value)
    weight = build(1).model.layers[0].mlp.experts.down_proj
    compiled = torch.compile(moe_experts, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="QuantizedWeight"):
        compiled(torch.ones(1, 64), torch.tensor([[0]]), torch.ones(1, 1), weight, weight)


class Doubled(torch.autograd.Function):
    """Saves its output, and notes what holds it."""

    contexts = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        doubled = x * 2
        ctx.save_for_backward(doubled)
        Doubled.contexts.append(weakref.ref(ctx))
        return doubled

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Doubles(nn.Module):
    def forward(self, x):
        return Doubled.apply(x)


def test_what_was_measured_is_let_go_of():
    x = torch.ones(3, requires_grad=True)
    num_bytes, shapes = saved_activations._saved_by(Doubles(), (x,), {})
    assert (num_bytes, shapes) == (12, ((3,),))
    gc.collect()
    assert [context() for context in Doubled.contexts] == [None]


def test_quantized_weights_are_not_measured_as_saved():
    model = with_expert_lora(build(1), attention=True)
    with gategrad(model), measure_moe_activations(model) as quantized:
        gradients(model)
    dense = with_dense_experts(model)
    with gategrad(dense), measure_moe_activations(dense) as expected:
        gradients(dense)
    assert [found.num_bytes for found in quantized] == [found.num_bytes for found in expected]


def test_merging_adapters_into_quantized_experts_raises():
    model = with_expert_lora(build(1))
    with pytest.raises(RuntimeError, match="would change a frozen weight in nf4.* merge them into the 16-bit model"):
        model.merge_and_unload()


def test_what_cannot_be_quantized_is_named_and_nothing_is_changed():
    with pytest.raises(ValueError, match="Linear has no experts to quantize"):
        quantize_experts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="experts can be quantized to nf4, fp8, mxfp4, not to 'int3'"):
        quantize_experts(qwen3(num_hidden_layers=1), "int3")
    odd = qwen3(num_hidden_layers=1, hidden_size=40, moe_intermediate_size=12)
    with pytest.raises(ValueError, match="no whole number of blocks of 64"):
        quantize_experts(odd)
    with pytest.raises(ValueError, match="gate_up_proj cannot be quantized to mxfp4: rows of 40 values"):
        quantize_experts(odd, "mxfp4")
    assert not any(isinstance(parameter, QuantizedWeight) for parameter in odd.parameters())
    with pytest.raises(ValueError, match="a weight cannot be quantized to mxfp4: rows of 40 values"):
        quantize(torch.ones(2, 64, 40), "mxfp4")


def test_only_nf4_asks_for_bitsandbytes(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    for format in ("fp8", "mxfp4"):
        build(format=format)
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes"):
        build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_bitsandbytes_own(dtype):
    """In rows of whole blocks: of others bitsandbytes 0.50 takes the wrong absmax on a CPU."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(3, 48, 320, dtype=dtype)
    quantized = quantize(weight, "nf4")
    for expert, dense in zip(weight, quantized.dequantize(), strict=True):
        packed, state = functional.quantize_4bit(expert, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(functional.dequantize_4bit(packed, state), dense)


def ddp_rank():
    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]))
    model = with_expert_lora(build(1))
    replica = DistributedDataParallel(model)
    patch_moe(replica)
    ids = tokens(seed=torch.distributed.get_rank())
    replica(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_ddp_averages_the_adapters_gradients():
    ranks = together(ddp_rank)
    alone = []
    for seed in range(2):
        model = with_expert_lora(build(1))
        patch_moe(model)
        ids = tokens(seed=seed)
        model(input_ids=ids, labels=ids).loss.backward()
        alone.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name in alone[0]:
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], (alone[0][name] + alone[1][name]) / 2)
        assert not torch.allclose(alone[0][name], alone[1][name])
