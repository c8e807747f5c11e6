"""Tests of LoRA on linear layers: PEFT's outputs and gradients, nearer to float64 than PEFT's where bits are few."""

from functools import partial

import pytest
import torch
from lora.kept_results import keep_and_reuse
from lora.linear import fuse_updates
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

IN, OUT, RANK = 48, 80, 4


def adapted(dtype=torch.float32, *, fused, bias=False, dropout=0.0):
    torch.manual_seed(0)
    network = nn.ModuleDict({"proj": nn.Linear(IN, OUT, bias=bias)}).to(dtype)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["proj"]), network)
    layer = network["proj"]
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.lora_A.float(), layer.lora_B.float()
    layer.cast_input_dtype_enabled = False
    if fused:
        fuse_updates(network)
    return layer


def run(layer, dtype=torch.float32, autocast=False, needs_x=True):
    torch.manual_seed(1)
    x = torch.randn(2, 30, IN, dtype=torch.float64).to(dtype).requires_grad_(needs_x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(x)
    grad = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return [output, *torch.autograd.grad(output, ([x] if needs_x else []) + [a, b], grad)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("needs_x", [False, True])
def test_outputs_and_gradients_are_pefts(bias, needs_x):
    got, want = (run(adapted(fused=fused, bias=bias), needs_x=needs_x) for fused in (True, False))
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs)


class Products(TorchDispatchMode):
    """Counts updates that are added to a product."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.addmm_.default
        return func(*args, **(kwargs or {}))


def errors(got, want):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]


def exact(bias):
    """The same bfloat16 weights and input in float64."""
    layer = adapted(torch.bfloat16, fused=False, bias=bias)
    for name in ("lora_A", "lora_B"):
        weight = getattr(layer, name)["default"].weight
        weight.data = weight.data.bfloat16().float()
    return run(layer.double(), torch.float64)


@pytest.mark.parametrize("bias", [False, True])
def test_in_bfloat16_no_further_from_float64_than_peft(bias):
    want = exact(bias)
    inputs = {"dtype": torch.bfloat16, "autocast": True}
    mine, theirs = (errors(run(adapted(torch.bfloat16, fused=f, bias=bias), **inputs), want) for f in (True, False))
    # Of both, the gradients in rank space round alike: the same products in another order.
    assert mine[0] < theirs[0]
    assert all(a < 1.05 * b for a, b in zip(mine, theirs, strict=True))


def test_that_comparison_sees_a_missing_update_and_another_scaling():
    want = exact(bias=False)
    layer = adapted(torch.bfloat16, fused=True)
    right = errors(run(layer, torch.bfloat16, autocast=True), want)
    for scaling in (0.0, 1.9):
        layer.scaling["default"] = scaling
        wrong = errors(run(layer, torch.bfloat16, autocast=True), want)
        assert all(a > 2 * b for a, b in zip(wrong, right, strict=True))


def test_doras_magnitudes_train():
    network = nn.ModuleDict({"proj": nn.Linear(IN, OUT)})
    config = LoraConfig(r=RANK, target_modules=["proj"], use_dora=True, init_lora_weights=False)
    inject_adapter_in_model(config, network)
    fuse_updates(network)
    network["proj"](torch.randn(3, IN)).sum().backward()
    assert network["proj"].lora_magnitude_vector["default"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("change", ["disable", "merge"])
def test_disabled_and_merged_adapters_run_pefts_forward(change):
    outputs = []
    for fused in (True, False):
        layer = adapted(fused=fused)
        if change == "disable":
            layer.enable_adapters(False)
        else:
            layer.merge()
        outputs.append(layer(torch.ones(3, IN)))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], adapted(fused=True)(torch.ones(3, IN)))


@pytest.mark.parametrize("ends_with_it", [True, False])
def test_a_recomputation_that_ends_with_the_layer_does_not_compute_its_output(ends_with_it):
    layer = adapted(fused=True)
    contexts = partial(keep_and_reuse, attention=False, ends_with=layer if ends_with_it else None)
    x = torch.randn(30, IN, requires_grad=True)
    with Products() as products:
        output = checkpoint(lambda x: layer(x.sin()), x, use_reentrant=False, context_fn=contexts)
        output.sum().backward()
    once = adapted(fused=True)(x.sin())
    assert products.count == 3 - ends_with_it  # y, again, and the gradient of x
    assert torch.equal(output, once)
    (want,) = torch.autograd.grad(once.sum(), x)
    assert torch.equal(x.grad, want)


def test_that_comparison_sees_a_block_that_goes_on_after_the_layer():
    layer = adapted(fused=True)
    contexts = partial(keep_and_reuse, attention=False, ends_with=layer)
    x = torch.randn(30, IN, requires_grad=True)
    checkpoint(lambda x: layer(x.sin()).square(), x, use_reentrant=False, context_fn=contexts).sum().backward()
    (want,) = torch.autograd.grad(adapted(fused=True)(x.sin()).square().sum(), x)
    assert not torch.allclose(x.grad, want, rtol=0.1)
