"""Health counters: once per backward, never in a forward; audits compare with the default implementation."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_moe.health import HealthCounts, LayerHealth
from lightning_moe.ops import moe_experts, operator

GATES = torch.tensor([[0.5, -0.5], [0.0, 1.0], [-0.0, 1e-40]])
INDEX = torch.tensor([[0, 2], [0, 5], [4, 0]])  # of four experts; 4 and 5 are non-local


def operation(health, hidden, gates, bytes_saved=0):
    """Four experts of a layer that has more."""
    experts = torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(0)), torch.ones(4, 4, 8)
    return moe_experts(
        hidden, INDEX, gates, *experts, is_expert_parallel=True, health=health.counters(hidden), bytes_saved=bytes_saved
    )


def default(health, hidden, gates, **options):
    """A layer whose output is linear in its gates, as the identity asks."""
    own = gates.view_as(gates)
    output = hidden * own.sum(1, keepdim=True)
    health.watch_fallback(output, INDEX, own, num_experts=4, **options)
    return output


LAYERS = [operation, default]


def run(health, layer, repeats=1, **options):
    hidden, gates = torch.randn(3, 4, requires_grad=True), GATES.clone().requires_grad_()
    output = layer(health, hidden, gates, **options)
    for _ in range(repeats):
        output.sum().backward(retain_graph=True)


def test_counts_what_the_gates_say():
    health = LayerHealth()
    run(health, operation, bytes_saved=10)
    run(health, operation, bytes_saved=2**40)
    run(health, default, bias_fallback=True)
    counts = health.drain(micro_batches=8)
    assert counts == HealthCounts(
        gates=12, nonpositive_gates=6, zero_gates=3, nonfinite_gate_grads=0, active_layers=2, fallback_layers=1,
        bias_fallback_layers=1, activation_bytes_saved=10 + 2**40, audit_rel_error=counts.audit_rel_error,
    )  # fmt: skip
    assert health.drain(micro_batches=8) == HealthCounts(audit_rel_error=pytest.approx(float("nan"), nan_ok=True))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_runs_in_parts_is_one_layer(layer):
    health = LayerHealth()
    for _ in range(4):
        run(health, layer)
    counts = health.drain(micro_batches=1)
    assert (counts.active_layers + counts.fallback_layers, counts.gates) == (1, 4 * 4)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_forward_alone_counts_nothing(layer):
    health = LayerHealth()
    run(health, layer, repeats=0)
    layer(health, torch.randn(3, 4), GATES)
    with torch.no_grad():
        layer(health, torch.randn(3, 4, requires_grad=True), GATES)
    counts = health.drain(micro_batches=8)
    assert counts.gates == 0


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_once_under_checkpointing(use_reentrant, layer):
    health = LayerHealth()
    hidden, gates = torch.randn(3, 4, requires_grad=True), GATES.clone().requires_grad_()
    calls = []

    def block(hidden, gates):
        calls.append(1)
        return layer(health, hidden, gates)

    checkpoint(block, hidden, gates, use_reentrant=use_reentrant).square().sum().backward()
    counts = health.drain(micro_batches=8)
    assert len(calls) == 2
    assert (counts.gates, counts.active_layers + counts.fallback_layers) == (4, 1)


@pytest.mark.parametrize("layer", LAYERS)
def test_gates_without_gradient_are_counted_too(layer):
    health = LayerHealth()
    output = layer(health, torch.randn(3, 4, requires_grad=True), GATES)
    output.sum().backward()
    assert health.drain(micro_batches=8).nonpositive_gates == 2


@pytest.mark.parametrize(("layer", "found"), [(operation, 3), (default, 4)])
def test_nonfinite_gradients(layer, found):
    """The operation gives a non-local gate a gradient of zero; the default implementation here does not know any."""
    health = LayerHealth()
    hidden, gates = torch.tensor([[torch.inf, 1.0] * 2, [1.0] * 4, [torch.nan, 1.0] * 2]), GATES.clone()
    layer(health, hidden, gates.requires_grad_()).sum().backward()
    assert health.drain(micro_batches=8).nonfinite_gate_grads == found


# Ids of experts in forward, in the recomputation, and how many of the latter are flips.
CHOICES = {
    "same": ([[0, 1], [2, 3]], [[0, 1], [2, 3]], 0),
    "swapped slots": ([[0, 1], [2, 3]], [[1, 0], [2, 3]], 0),
    "one flip": ([[0, 1], [2, 3]], [[0, 2], [2, 3]], 1),
    "flips": ([[0, 1], [2, 3]], [[0, 2], [0, 1]], 3),
    "twice the same": ([[0, 1], [2, 3]], [[0, 0], [2, 3]], 0),
}


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("use_reentrant", [False, True, None])
def test_routing_flips(choices, use_reentrant):
    """A router that chooses otherwise when it is run again; without a recomputation, or where none can be compared."""
    *remaining, flips = CHOICES[choices]
    health, weights = LayerHealth(), (torch.randn(4, 16, 4), torch.randn(4, 4, 8))
    hidden, gates = torch.randn(2, 4, requires_grad=True), torch.rand(2, 2, requires_grad=True)

    def block(hidden, gates):
        return moe_experts(hidden, torch.tensor(remaining.pop(0)), gates, *weights, health=health.counters(hidden))

    if use_reentrant is None:
        block(hidden, gates).sum().backward()
    else:
        checkpoint(block, hidden, gates, use_reentrant=use_reentrant).sum().backward()
    counts = health.drain(micro_batches=1)
    assert (counts.routing_flips, counts.gates) == (flips if use_reentrant is False else 0, 4)


def test_flips_between_ranks_are_counted_where_the_new_expert_is():
    """Experts 0 to 3 are here; what the others' ids mean is theirs to count."""
    remaining = [torch.tensor([[0, 5], [6, 7], [1, 8], [0, 1]]), torch.tensor([[5, 6], [2, 7], [1, 9], [0, 5]])]
    health, weights = LayerHealth(), (torch.randn(4, 16, 4), torch.randn(4, 4, 8))
    hidden, gates = torch.randn(4, 4, requires_grad=True), torch.rand(4, 2, requires_grad=True)

    def block(hidden, gates):
        options = {"is_expert_parallel": True, "health": health.counters(hidden)}
        return moe_experts(hidden, remaining.pop(0), gates, *weights, **options)

    checkpoint(block, hidden, gates, use_reentrant=False).sum().backward()
    assert health.drain(micro_batches=1).routing_flips == 1


def test_what_is_compared_is_kept_only_under_hooks_and_with_counters():
    """A byte for each choice, beside what the rest keeps."""
    kept = []
    hidden, weights = torch.randn(2, 4, requires_grad=True), (torch.randn(4, 16, 4), torch.randn(4, 4, 8))
    for health in (None, LayerHealth().counters(hidden)):
        with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            moe_experts(hidden, torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2), *weights, health=health)
        assert [tensor.dtype for tensor in kept].count(torch.uint8) == (health is not None)
        kept.clear()


def test_counts_add_up():
    total = HealthCounts()
    for gates, error in ((3, float("nan")), (4, 0.5), (5, torch.tensor(0.25))):
        counts = HealthCounts(gates=gates, zero_gates=torch.tensor(1), audit_rel_error=error)
        total.add(counts, torch.device("cpu"))
    assert (total.gates, total.zero_gates, total.audit_rel_error) == (12, 3, 0.5)


def linear(hidden, index, gates):
    return hidden * gates.sum(1, keepdim=True)


def curved(hidden, index, gates):
    return (hidden * gates.sum(1, keepdim=True)).tanh()


@pytest.mark.parametrize(("default", "found"), [(linear, False), (curved, True)])
def test_an_audit_tells_a_linear_gate_from_another(default, found):
    health = LayerHealth()
    health.audit_due = True
    hidden, gates = torch.randn(20, 4), torch.rand(20, 2).requires_grad_()
    own = gates.view_as(gates)
    output = linear(hidden, None, own)
    health.audit(default, hidden, torch.zeros(20, 2, dtype=torch.int64), own, output)
    output.square().sum().backward()
    error = health.drain(micro_batches=8).audit_rel_error
    assert (error > 0.1) == found
    assert found or error < 1e-6
    assert not health.audit_due


@pytest.mark.parametrize(("num_tokens", "last"), [(1, 0), (3, 2), (8, 7), (2000, 1999)])
def test_an_audit_takes_tokens_from_the_first_to_the_last(num_tokens, last):
    """Under bfloat16-true the default dtype is one in which 1999 is 2000."""
    seen = []

    def default(hidden, index, gates):
        seen.extend(index[:, 0].tolist())
        return linear(hidden, index, gates)

    hidden, own = torch.randn(num_tokens, 4), torch.rand(num_tokens, 2).requires_grad_().clone()
    index = torch.arange(num_tokens).view(-1, 1).repeat(1, 2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        LayerHealth().audit(default, hidden, index, own, linear(hidden, None, own))
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen[0] == 0
    assert seen[-1] == last
    assert len(seen) == len(set(seen)) == min(8, num_tokens)


def test_a_copy_counts_by_itself():
    health = LayerHealth()
    run(health, operation)
    twin = copy.deepcopy(health)
    run(twin, operation)
    counts, twice = health.drain(micro_batches=8), twin.drain(micro_batches=8)
    assert (counts.gates, twice.gates) == (4, 8)


def test_counters_stay_where_a_cuda_graph_adds_to_them():
    health = LayerHealth()
    health.probe = operator.new_probe(torch.device("cpu"))
    health.probe.grad = torch.zeros_like(health.probe)
    counters = health.counters(GATES), health.probe.grad
    for _ in range(2):
        for counter in counters:
            counter += 1
        assert health.drain(micro_batches=9).gates == 2
