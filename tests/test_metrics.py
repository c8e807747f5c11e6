"""Counts into metrics: exact, summed over ranks, absent where there is nothing to report."""

import pytest
import torch

from lightning_moe import ExpertLoad, GateGradHealth
from lightning_moe.health import HealthCounts

COUNTS = HealthCounts(
    gates=100, nonpositive_gates=torch.tensor(25), zero_gates=5, nonfinite_gate_grads=torch.tensor(2), routing_flips=7,
    active_layers=torch.tensor(6), fallback_layers=2, bias_fallback_layers=1, activation_bytes_saved=2**22,
)  # fmt: skip
ROWS = [torch.tensor([6, 0, 2]), torch.tensor([5, 1, 0, 0, 4]), torch.tensor([0, 0])]


def computed(metric):
    return {name: value.item() for name, value in metric.compute().items()}


def reduced_over_ranks(metric_class, ranks):
    """One metric with the ranks' states reduced, as torchmetrics does it."""
    one = metric_class()
    for name, reduce in one._reductions.items():
        setattr(one, name, reduce(torch.stack([getattr(rank, name) for rank in ranks])))
    one._update_count = 1
    return one


def test_health_metrics():
    metric = GateGradHealth()
    metric.update(COUNTS, micro_batches=2)
    assert computed(metric) == {
        "active_layers": 3.0, "fallback_layers": 1.0, "bias_fallback_layers": 0.5, "nonpositive_gates": 25,
        "nonpositive_fraction": 0.25, "zero_gates": 5, "nonfinite_gate_grads": 2, "routing_flips": 7,
        "activations_mib_saved": 2.0,
    }  # fmt: skip
    metric.reset()
    metric.update(HealthCounts(), micro_batches=1)
    assert set(computed(metric).values()) == {0}


def test_health_counts_are_exact_where_float32_is_not():
    metric = GateGradHealth()
    for _ in range(3):
        metric.update(HealthCounts(gates=2**25 + 1, nonpositive_gates=2**24 + 1), micro_batches=1)
    assert computed(metric)["nonpositive_gates"] == 3 * (2**24 + 1)


def test_the_largest_audit_error_is_kept():
    metric = GateGradHealth()
    for error in (float("nan"), 0.125, torch.tensor(0.5), 0.25):
        metric.update(HealthCounts(audit_rel_error=error), micro_batches=1)
    assert computed(metric)["audit_rel_error"] == 0.5


@pytest.mark.parametrize("updates", [(1, 1), (2, 1)])
def test_health_is_summed_over_ranks(updates):
    whole, ranks = GateGradHealth(), [GateGradHealth() for _ in updates]
    for rank, number in zip(ranks, updates, strict=True):
        for _ in range(number):
            rank.update(COUNTS, micro_batches=2)
            whole.update(COUNTS, micro_batches=2)
    assert computed(reduced_over_ranks(GateGradHealth, ranks)) == computed(whole)


def test_health_merges_exactly_where_float32_ends():
    one, other = GateGradHealth(), GateGradHealth()
    one.update(HealthCounts(gates=2**25, nonpositive_gates=2**24 + 1, audit_rel_error=0.25), micro_batches=1)
    other.update(HealthCounts(gates=2**25, nonpositive_gates=2**24 + 2, audit_rel_error=0.5), micro_batches=3)
    one.merge_state(other)
    merged = computed(one)
    assert merged["nonpositive_gates"] == 2**25 + 3 != int(torch.tensor(2.0**25) + 3)  # what a float32 sum gives
    assert merged["audit_rel_error"] == 0.5
    assert one.micro_batches == 4


def test_every_health_count_is_an_int64_sum():
    metric = GateGradHealth()
    metric.update(COUNTS, micro_batches=2)
    sums = {name: state for name, state in metric.metric_state.items() if name != "audit_rel_error"}
    assert {state.dtype for state in sums.values()} == {torch.int64}
    assert {name: state.item() for name, state in sums.items()} == {
        "gates": 100, "nonpositive_gates": 25, "zero_gates": 5, "nonfinite_gate_grads": 2, "routing_flips": 7,
        "active_layers": 6, "fallback_layers": 2, "bias_fallback_layers": 1, "activation_bytes_saved": 2**22,
        "micro_batches": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "load", "idle"),
    [
        ([[3, 3, 3]], 1.0, 0),
        ([[0, 9, 0]], 3.0, 2),
        ([[1, 0], [2, 2, 2, 1, 1]], 2.0, 1),  # 10 / 8 in the larger layer
        ([[2, 2, 2, 1, 1], [1, 0]], 2.0, 1),
        ([[5, 5], [0, 0, 0]], 1.0, 3),
        ([[0, 0]], 0.0, 2),
    ],
)
def test_expert_load(rows, load, idle):
    metric = ExpertLoad()
    for _ in range(2):
        metric.update([torch.tensor(layer) for layer in rows])
    assert computed(metric) == {"load_max_over_mean": load, "idle_experts": idle}


def test_no_expert_load_without_layers():
    metric = ExpertLoad()
    metric.update([])
    assert metric.compute() == {}


def test_an_expert_idle_in_one_update_is_not_idle():
    metric = ExpertLoad()
    for rows in ([4, 0], [0, 4]):
        metric.update([torch.tensor(rows)])
    assert computed(metric) == {"load_max_over_mean": 1.0, "idle_experts": 0}


def test_expert_rows_are_exact_where_float32_is_not():
    metric = ExpertLoad()
    metric.update([torch.tensor([2**24, 2**24 + 1])])
    metric.update([torch.tensor([1, 1])])
    assert metric.rows.tolist() == [[2**24 + 1, 2**24 + 2]]


def test_expert_load_is_summed_over_ranks():
    whole, ranks = ExpertLoad(), [ExpertLoad(), ExpertLoad()]
    for rank in ranks:
        rank.update(ROWS)
        whole.update(ROWS)
    assert reduced_over_ranks(ExpertLoad, ranks).rows.tolist() == whole.rows.tolist()
    assert whole.rows.tolist() == [[12, 0, 4, -2, -2], [10, 2, 0, 0, 8], [0, 0, -2, -2, -2]]
    assert computed(whole) == {"load_max_over_mean": 2.5, "idle_experts": 5}
