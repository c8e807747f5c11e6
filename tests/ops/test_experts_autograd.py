"""Tests of the operation under PyTorch's autograd: second derivatives, saved-tensor hooks, a backward that fails half
way, selective activation checkpointing, compiled autograd."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.reference import DIFFERENTIABLE, FACTORS, assert_agrees, buffer_mib, call, gradients, make_problem, run
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_moe.ops import grouped as kernels_module
from lightning_moe.ops import passes, projection

EVERYTHING = (*DIFFERENTIABLE, *FACTORS)


# Second derivatives through the incoming gradient


def test_a_jacobian_vector_product_by_double_backward_raises():
    problem = make_problem()

    def output(hidden_states):
        return call(problem, problem.tensors | {"hidden_states": hidden_states})

    hidden_states = problem.tensors["hidden_states"]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.jvp(output, hidden_states, torch.ones_like(hidden_states))


@pytest.mark.parametrize("wants", [("hidden_states",), EVERYTHING], ids=["input", "everything"])
def test_a_gradient_penalty_differentiated_for_a_head_after_the_experts_raises(wants):
    problem = make_problem(requires_grad=wants)
    leaves, head = problem.leaves(), torch.randn(16, requires_grad=True)
    loss = (call(problem, leaves) * head).square().sum()
    (first,) = torch.autograd.grad(loss, leaves["hidden_states"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.square().sum(), head)


def test_first_derivatives_with_create_graph_are_those_without():
    problem = make_problem(gate_up_ranks=(4,), down_ranks=(4,))
    plain, leaves = run(problem), problem.leaves()
    output = call(problem, leaves)
    wanted = [leaves[name] for name in problem.everything]
    found = torch.autograd.grad(output, wanted, problem.grad_output, create_graph=True)
    assert all(torch.equal(grad, plain[name]) for name, grad in zip(problem.everything, found, strict=True))


# A backward that fails and is called again


class OutOfMemory(RuntimeError):
    pass


def fail_once(monkeypatch, name, module=passes):
    """Has a building block of the operation raise on its next call."""
    original = getattr(module, name)

    def fail(*args, **kwargs):
        monkeypatch.setattr(module, name, original)
        raise OutOfMemory

    monkeypatch.setattr(module, name, fail)


HOOKS = {
    "none": partial(saved_tensors_hooks, lambda tensor: tensor, lambda tensor: tensor),
    "save_on_cpu": save_on_cpu,
}


@pytest.mark.parametrize("failing", [("grouped_linear", projection), ("grouped_outer", passes)], ids=["early", "late"])
@pytest.mark.parametrize("hooks", HOOKS)
def test_under_hooks_a_backward_that_failed_can_be_called_again(hooks, failing, monkeypatch):
    problem = make_problem()
    plain, leaves = run(problem), problem.leaves()
    with HOOKS[hooks]():
        output = call(problem, leaves)
    fail_once(monkeypatch, *failing)
    with pytest.raises(OutOfMemory):
        output.backward(problem.grad_output)
    results = gradients(problem, leaves, output)
    assert all(torch.equal(results[name], plain[name]) for name in plain)


def test_a_backward_that_failed_after_h_was_overwritten_says_so_when_it_is_called_again(monkeypatch):
    problem = make_problem()
    output = call(problem, problem.leaves())
    fail_once(monkeypatch, "grouped_outer")
    with pytest.raises(OutOfMemory):
        output.backward(problem.grad_output)
    with pytest.raises(RuntimeError, match="run forward again"):
        output.backward(problem.grad_output)


def test_under_activation_checkpointing_a_backward_that_failed_late_can_be_called_again(monkeypatch):
    problem = make_problem()
    plain, leaves = run(problem), problem.leaves()
    output = checkpoint(lambda: call(problem, leaves), use_reentrant=False)
    fail_once(monkeypatch, "grouped_outer")
    with pytest.raises(OutOfMemory):
        output.backward(problem.grad_output)
    results = gradients(problem, leaves, output)
    assert all(torch.equal(results[name], plain[name]) for name in plain)


def test_after_a_backward_that_succeeded_pytorch_says_that_there_is_no_second_one():
    problem = make_problem()
    output = call(problem, problem.leaves())
    output.backward(problem.grad_output)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward(problem.grad_output)


@pytest.mark.parametrize("copies", [False, True])
def test_a_hook_that_keeps_what_it_packed_sees_no_change(copies):
    problem, kept = make_problem(), []

    def pack(tensor):
        kept.append(tensor.clone() if copies else tensor)
        return kept[-1]

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call(problem, problem.leaves())
    before = [tensor.clone() for tensor in kept]
    output.backward(problem.grad_output)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(kept, before, strict=True))


def overwrites(monkeypatch):
    """Lists, for each backward of the operation, whether dh takes the memory of h."""
    found = []
    original = passes.activation_backward

    def noting(*args, overwrite, **kwargs):
        found.append(overwrite)
        return original(*args, overwrite=overwrite, **kwargs)

    monkeypatch.setattr(passes, "activation_backward", noting)
    return found


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_gradient_takes_the_memory_of_h_where_nobody_else_sees_it(depth, monkeypatch):
    problem, found = make_problem(), overwrites(monkeypatch)
    leaves = problem.leaves()

    def layer():
        return call(problem, leaves)

    for _ in range(depth):  # activation checkpointing around activation checkpointing
        layer = partial(checkpoint, layer, use_reentrant=False)
    layer().backward(problem.grad_output)
    assert found == [True]


# Selective activation checkpointing


aten = torch.ops.aten
VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.t.default, aten.expand.default, aten.unsqueeze.default,
    aten.permute.default, aten.alias.default, aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.transpose.int,
    aten.split.Tensor, aten.detach.default,
}  # fmt: skip
PRODUCTS = {aten.mm.default, aten.bmm.default, aten._grouped_mm.default}
SAVED = {"views": VIEWS, "products": PRODUCTS, "views and products": VIEWS | PRODUCTS}


def segment_gradients(problem, saved=None, **options):
    """Gradients through experts and a product after them, which asks for the output in the recomputation too."""
    leaves = problem.leaves()

    def segment():
        return call(problem, leaves, **options).sin()

    if saved is None:
        return gradients(problem, leaves, segment())

    def policy(_, operation, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operation in saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return gradients(problem, leaves, checkpoint(segment, use_reentrant=False, context_fn=contexts))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernels_module, "CHUNK_ROWS", 4)
    monkeypatch.setattr(kernels_module, "ACTIVATION_BYTES", 16 * 7)  # of rows of any width there: one to a few
    monkeypatch.setattr(passes, "MIN_BUFFER_COLUMNS", 4)


LOW_RANK = {"gate_up_ranks": (3, 2), "down_ranks": (3,)}


@pytest.mark.parametrize("is_expert_parallel", [False, True])
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("ranks", [{}, LOW_RANK], ids=["plain", "low rank"])
@pytest.mark.parametrize("layout", ["default", "gpt_oss"])
@pytest.mark.parametrize("wants", [EVERYTHING, ("hidden_states", "top_k_weights", *FACTORS)], ids=["full", "frozen"])
def test_selective_checkpointing_gives_the_same_gradients(
    saved, ranks, layout, wants, is_expert_parallel, small_chunks
):
    problem = make_problem(layout, **ranks, requires_grad=wants)
    if is_expert_parallel:
        index = problem.top_k_index.masked_fill(problem.top_k_index == 2, problem.num_experts)
        problem = replace(problem, top_k_index=index)
    options = {"output_buffer_mib": buffer_mib(1), "is_expert_parallel": is_expert_parallel}
    expected = segment_gradients(problem, **options)
    results = segment_gradients(problem, SAVED[saved], **options)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


class operations(TorchDispatchMode):  # noqa: N801 (a context manager)
    """Lists the operations that run."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function] = None
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ranks", [{}, LOW_RANK], ids=["plain", "low rank"])
@pytest.mark.parametrize("layout", ["default", "gpt_oss"])
def test_whatever_selective_checkpointing_saves_gradients_are_right_or_it_raises(layout, ranks, small_chunks):
    problem = make_problem(layout, **ranks)
    with operations() as ran:
        expected = segment_gradients(problem, output_buffer_mib=buffer_mib(1))
    refused = {}
    for operation in ran.seen:
        try:
            results = segment_gradients(problem, {operation}, output_buffer_mib=buffer_mib(1))
        except RuntimeError as error:
            refused[operation._schema.name] = str(error)
        else:
            assert all(torch.equal(results[name], expected[name]) for name in expected), operation
    assert all("has been mutated" in message for message in refused.values())
    # Buffers that are filled, and what fills them: nothing that a policy has a reason to save.
    filled = {"aten::new_empty", "aten::empty_like", "aten::scatter_", "aten::index_copy_", "aten::addcmul_"}
    assert refused.keys() <= filled


# Compiled autograd


def test_compiled_autograd_gives_the_same_gradients():
    problem = make_problem(gate_up_ranks=(4,), down_ranks=(4,))
    plain, leaves = run(problem), problem.leaves()
    output = call(problem, leaves)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        results = gradients(problem, leaves, output)
    assert_agrees(results, plain)
