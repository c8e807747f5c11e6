"""Compiled layers: the operation is one operator, in a graph without breaks, and computes and counts as eagerly."""

import functools
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.models import EXPERT_TARGETS, experts_modules, gpt_oss, mixtral, qwen3, tokens, with_expert_lora
from helpers.patching import agree, equal, gradients
from helpers.reference import DIFFERENTIABLE, FACTORS, assert_agrees, call, make_problem, run
from torch import nn
from torch.library import opcheck

from lightning_moe import patch_moe, register_experts
from lightning_moe.ops import operator
from lightning_moe.ops.grouped import FUSED_ACTIVATIONS, silu_gated
from lightning_moe.ops.passes import Inputs
from lightning_moe.patch_state import patch_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's own
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # inductor's advice where there is a GPU
]
INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
)
BACKENDS = ["aot_eager", INDUCTOR]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Earlier tests' graphs count towards the limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def frozen_experts():
    model = qwen3()
    for experts in experts_modules(model):
        experts.requires_grad_(False)
    return model


def frozen_with_adapters(targets=EXPERT_TARGETS):
    return with_expert_lora(qwen3(), targets, attention=True)


MODELS = {
    "frozen experts": frozen_experts,
    "full": qwen3,
    "mixtral": mixtral,
    "adapters": frozen_with_adapters,
    "adapters on one": functools.partial(frozen_with_adapters, EXPERT_TARGETS[1:]),
}


def decoder_layers(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def patched(build, **options):
    model = build()
    patch_moe(model, **options)
    return model


def drained(model):
    return [patch_of(experts).health.drain(micro_batches=8) for experts in experts_modules(model)]


# Inductor compiles C++ for many seconds, and what it is given is the same graph: one model with all that there is.
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "aot_eager") for name in MODELS), pytest.param("adapters", *INDUCTOR.values, marks=INDUCTOR.marks)],
)
def test_a_decoder_layer_compiles_without_a_break(name, backend):
    expected, compiled = patched(MODELS[name]), patched(MODELS[name])
    want = gradients(expected)
    for layer in decoder_layers(compiled):
        layer.compile(backend=backend, fullgraph=True)
    assert agree(gradients(compiled), want)
    found, wanted = drained(compiled), drained(expected)
    for counts in (*found, *wanted):
        counts.audit_rel_error = None
    assert found == wanted
    assert all(counts.active_layers == 1 and counts.activation_bytes_saved > 0 for counts in found)


def test_the_same_bits_without_a_backend_that_fuses():
    compiled = patched(frozen_experts)
    for layer in decoder_layers(compiled):
        layer.compile(backend="aot_eager", fullgraph=True)
    assert equal(gradients(compiled), gradients(patched(frozen_experts)))


@pytest.mark.parametrize("batch", [1, 3])
def test_other_sizes_and_two_forwards_before_a_backward(batch):
    """What counts for a layer is added to by both; nothing that forward saved may have been changed meanwhile."""
    expected, compiled = patched(qwen3), patched(qwen3)
    for layer in decoder_layers(compiled):
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    found = []
    for model in (expected, compiled):
        model.zero_grad()
        batches = [tokens(batch, length, seed=length) for length in (5, 9)]
        sum(model(input_ids=ids, labels=ids).loss for ids in batches).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert agree(*found)
    assert [c.active_layers for c in drained(compiled)] == [c.active_layers for c in drained(expected)] == [2, 2]


def test_what_changed_since_patching_is_noticed():
    """With another activation the graph breaks, and the layer computes with the new one."""
    expected, compiled = patched(qwen3), patched(qwen3)
    layers = decoder_layers(compiled)
    for layer in layers:
        layer.compile(backend="aot_eager")
    before = gradients(compiled)
    for model in (expected, compiled):
        for experts in experts_modules(model):
            experts.act_fn = nn.Tanh()
    changed = gradients(compiled)
    assert agree(changed, gradients(expected))
    assert changed["loss"] != before["loss"]


def test_an_activation_that_the_operator_does_not_know_breaks_the_graph():
    """gpt-oss gates by a function of its own."""
    expected, compiled = patched(gpt_oss), patched(gpt_oss)
    for layer in decoder_layers(compiled):
        layer.compile(backend="aot_eager")
    assert agree(gradients(compiled), gradients(expected))
    assert [counts.active_layers for counts in drained(compiled)] == [1, 1]


class Experts(nn.Module):
    """A registered class."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.num_experts, self.act_fn = 4, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 16))
        self.down_proj = nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


def test_a_registered_class_compiles_too():
    register_experts(Experts)
    expected, compiled = nn.ModuleList([Experts()]), nn.ModuleList([Experts()])
    patch_moe(expected)
    patch_moe(compiled)
    compiled[0].compile(backend="aot_eager", fullgraph=True)
    found = []
    for (experts,) in (expected, compiled):
        hidden, weights = torch.ones(5, 16, requires_grad=True), torch.full((5, 2), 0.5, requires_grad=True)
        experts(hidden, torch.tensor([[0, 3]] * 5), weights).square().sum().backward()
        found.append({"hidden": hidden.grad, "weights": weights.grad, "down": experts.down_proj.grad})
    assert equal(*found)


# The operation itself


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"recompute_gate_up": True}, {"output_buffer_mib": 0.0001}], ids=str)
@pytest.mark.parametrize("ranks", [{}, {"gate_up_ranks": (3, 2), "down_ranks": (3,)}], ids=["plain", "low rank"])
def test_moe_experts_is_one_operator(ranks, options, backend):
    if backend == "inductor" and options:
        pytest.skip("the other backend's are enough")
    problem = make_problem("default", **ranks, requires_grad=(*DIFFERENTIABLE, *FACTORS))
    problem = replace(problem, layout=replace(problem.layout, activation=silu_gated))
    expected, leaves = run(problem, **options), problem.leaves()
    compiled = torch.compile(lambda leaves: call(problem, leaves, **options), backend=backend, fullgraph=True)
    output = compiled(leaves)
    grads = torch.autograd.grad(output, [leaves[name] for name in problem.everything], problem.grad_output)
    results = {"output": output.detach()} | dict(zip(problem.everything, grads, strict=True))
    assert_agrees(results, expected)


@pytest.mark.parametrize("activation", FUSED_ACTIVATIONS)
@pytest.mark.parametrize("wants", ["all", "input", "factors"])
@pytest.mark.parametrize("has_biases", [False, True])
def test_what_pytorch_asks_of_an_operator(activation, wants, has_biases):
    """No aliases, no changed input, the fake passes like the real ones: `opcheck`, of forward and of backward."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape, kind):
        return torch.randn(*shape, generator=generator).requires_grad_(wants in ("all", kind))

    inputs = Inputs(
        leaf(6, 16, kind="input"), leaf(6, 2, kind="input"), leaf(4, 16, 16, kind="weights"),
        leaf(4, 16, kind="weights") if has_biases else None, leaf(4, 16, 8, kind="weights"),
        leaf(4, 16, kind="weights") if has_biases else None,
    )  # fmt: skip
    index = torch.randint(0, 4, (6, 2), generator=generator)
    factors = [leaf(*shape, kind="factors") for shape in [(4, 3, 16), (4, 16, 3), (4, 3, 16), (4, 16, 3)]]
    flags = [tensor is not None and tensor.requires_grad for tensor in inputs]
    needs = [*flags, *[wants in ("all", "factors")] * 2, False, False]
    name = FUSED_ACTIVATIONS[activation]
    probe = operator.new_probe(torch.device("cpu"))
    options = ([1.0, 2.0], [], needs, name, False, 512.0, False, False, 3)
    opcheck(torch.ops.lightning_moe.experts_2.default, (*inputs, index, factors, probe, *options))
