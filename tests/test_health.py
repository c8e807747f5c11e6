"""Counting hangs on gradients: once per backward, never in a forward, and audits see through to stock code."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_moe.health import HealthCounts, LayerHealth

GATES = torch.tensor([[0.5, -0.5], [0.0, 1.0], [-0.0, 1e-40]])
INDEX = torch.tensor([[0, 2], [0, 5], [4, 0]])  # of four experts; 4 and 5 are another process's
ROWS = [3, 0, 1, 0]


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
    run(health, activation_bytes_saved=10)
    counts = health.drain(micro_batches=8)
    assert counts == HealthCounts(
        gates=4, nonpositive_gates=2, zero_gates=1, nonfinite_gate_grads=0, active_layers=1, activation_bytes_saved=10,
        audit_rel_error=counts.audit_rel_error, expert_rows=counts.expert_rows,
    )  # fmt: skip
    assert rows(counts) == [ROWS]
    assert health.drain(micro_batches=8) == HealthCounts(audit_rel_error=pytest.approx(float("nan"), nan_ok=True))


def rows(counts):
    return [layer.tolist() for layer in counts.expert_rows]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_experts", [1, 6, 8])
def test_rows_of_each_expert(dtype, num_experts):
    health = LayerHealth()
    hidden, index = torch.randn(40, 4, requires_grad=True), torch.arange(120, dtype=dtype).view(40, 3) % 7
    output = hidden * 2
    health.watch(output, index, torch.rand(40, 3), num_experts=num_experts, active=True)
    output.sum().backward()
    (counted,) = health.drain(micro_batches=8).expert_rows
    assert counted.dtype == torch.int64
    assert counted.tolist() == [(index == expert).sum().item() for expert in range(num_experts)]


def test_rows_add_up_over_backwards_and_line_up_over_layers():
    health, other, total = LayerHealth(), LayerHealth(), HealthCounts()
    run(health, repeats=3)
    run(other, num_experts=6)
    for each in (health, other):
        total.add(each.drain(micro_batches=8), torch.device("cpu"))
    assert rows(total) == [[3 * count for count in ROWS], [*ROWS, 1, 1]]


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
    assert (counts.gates, counts.expert_rows) == (0, ())


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
    assert (counts.gates, counts.active_layers, rows(counts)) == (4, 1, [ROWS])


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
    assert rows(counts) == [ROWS]
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


@pytest.mark.parametrize(("stock", "found"), [(linear, False), (curved, True)])
def test_an_audit_tells_a_linear_gate_from_another(stock, found):
    health = LayerHealth()
    health.audit_due = True
    hidden, gates = torch.randn(20, 4), torch.rand(20, 2).requires_grad_()
    own = gates.view_as(gates)
    output = linear(hidden, None, own)
    health.audit(stock, hidden, torch.zeros(20, 2, dtype=torch.int64), own, output)
    output.square().sum().backward()
    error = health.drain(micro_batches=8).audit_rel_error
    assert (error > 0.1) == found
    assert found or error < 1e-6
    assert not health.audit_due


@pytest.mark.parametrize(("num_tokens", "last"), [(1, 0), (3, 2), (8, 7), (2000, 1999)])
def test_an_audit_takes_tokens_from_the_first_to_the_last(num_tokens, last):
    """Under bfloat16-true the default dtype is one in which 1999 is 2000."""
    seen = []

    def stock(hidden, index, gates):
        seen.extend(index[:, 0].tolist())
        return linear(hidden, index, gates)

    hidden, own = torch.randn(num_tokens, 4), torch.rand(num_tokens, 2).requires_grad_().clone()
    index = torch.arange(num_tokens).view(-1, 1).repeat(1, 2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        LayerHealth().audit(stock, hidden, index, own, linear(hidden, None, own))
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
    assert (rows(counts), rows(twice)) == ([ROWS], [[2 * count for count in ROWS]])
