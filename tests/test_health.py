"""Health counters: once per backward, never in a forward; audits compare with the default implementation."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_moe.health import HealthCounts, LayerHealth

GATES = torch.tensor([[0.5, -0.5], [0.0, 1.0], [-0.0, 1e-40]])
INDEX = torch.tensor([[0, 2], [0, 5], [4, 0]])  # of four experts; 4 and 5 are non-local


def layer(health, hidden, gates, **options):
    """A layer whose output is linear in its gates, as the identity asks."""
    own = gates.view_as(gates)
    output = hidden * own.sum(1, keepdim=True)
    health.watch(output, INDEX, own, **{"num_experts": 4, "active": True} | options)
    return output


def run(health, repeats=1, **options):
    hidden, gates = torch.randn(3, 4, requires_grad=True), GATES.clone().requires_grad_()
    output = layer(health, hidden, gates, **options)
    for _ in range(repeats):
        output.sum().backward(retain_graph=True)


def test_counts_what_the_gates_say():
    health = LayerHealth()
    run(health, bytes_saved=10)
    counts = health.drain(micro_batches=8)
    assert counts == HealthCounts(
        gates=4, nonpositive_gates=2, zero_gates=1, nonfinite_gate_grads=0, active_layers=1, activation_bytes_saved=10,
        audit_rel_error=counts.audit_rel_error,
    )  # fmt: skip
    assert health.drain(micro_batches=8) == HealthCounts(audit_rel_error=pytest.approx(float("nan"), nan_ok=True))


def test_a_layer_that_runs_in_parts_is_one_layer():
    health = LayerHealth()
    for _ in range(4):
        run(health)
    counts = health.drain(micro_batches=1)
    assert (counts.active_layers, counts.gates) == (1, 4 * 4)


def test_a_forward_alone_counts_nothing():
    health = LayerHealth()
    run(health, repeats=0)
    layer(health, torch.randn(3, 4), GATES)
    with torch.no_grad():
        layer(health, torch.randn(3, 4, requires_grad=True), GATES)
    counts = health.drain(micro_batches=8)
    assert counts.gates == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_once_under_checkpointing(use_reentrant):
    health = LayerHealth()
    hidden, gates = torch.randn(3, 4, requires_grad=True), GATES.clone().requires_grad_()
    calls = []

    def block(hidden, gates):
        calls.append(1)
        return layer(health, hidden, gates)

    checkpoint(block, hidden, gates, use_reentrant=use_reentrant).square().sum().backward()
    counts = health.drain(micro_batches=8)
    assert len(calls) == 2
    assert (counts.gates, counts.active_layers) == (4, 1)


def test_gates_without_gradient_are_counted_too():
    health = LayerHealth()
    output = layer(health, torch.randn(3, 4, requires_grad=True), GATES)
    output.sum().backward()
    assert health.drain(micro_batches=8).nonpositive_gates == 2


def test_fallbacks_and_nonfinite_gradients():
    health = LayerHealth()
    gates = GATES.clone().requires_grad_()
    hidden = torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0], [2.0, 1.0]])
    layer(health, hidden, gates, active=False, bias_fallback=True).sum().backward()
    counts = health.drain(micro_batches=8)
    assert (counts.active_layers, counts.fallback_layers, counts.bias_fallback_layers) == (0, 1, 1)
    assert counts.nonfinite_gate_grads == 4


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
    run(health)
    twin = copy.deepcopy(health)
    run(twin)
    counts, twice = health.drain(micro_batches=8), twin.drain(micro_batches=8)
    assert (counts.gates, twice.gates) == (4, 8)
