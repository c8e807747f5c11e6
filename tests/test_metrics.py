"""Counts into figures: exact, summed over processes, absent where there is nothing to say."""

import pytest
import torch

from lightning_moe import GateGradHealth
from lightning_moe.health import HealthCounts

COUNTS = HealthCounts(
    gates=100, nonpositive_gates=torch.tensor(25), zero_gates=5, nonfinite_gate_grads=torch.tensor(2), active_layers=6,
    fallback_layers=2, bias_fallback_layers=1, activation_bytes_saved=2**22,
    expert_rows=(torch.tensor([6, 0, 2]), torch.tensor([5, 1, 0, 0, 4]), torch.tensor([0, 0])),
)  # fmt: skip


def figures(metric):
    return {name: value.item() for name, value in metric.compute().items()}


def test_figures():
    metric = GateGradHealth()
    metric.update(COUNTS, micro_batches=2)
    assert figures(metric) == {
        "active_layers": 3.0, "fallback_layers": 1.0, "bias_fallback_layers": 0.5, "nonpositive_gates": 25,
        "nonpositive_fraction": 0.25, "zero_gates": 5, "nonfinite_gate_grads": 2, "activations_mib_saved": 2.0,
        "load_max_over_mean": 2.5, "idle_experts": 5,
    }  # fmt: skip
    metric.reset()
    metric.update(HealthCounts(), micro_batches=1)
    assert set(figures(metric).values()) == {0}


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
def test_load_of_the_experts(rows, load, idle):
    metric = GateGradHealth()
    for _ in range(2):
        metric.update(HealthCounts(expert_rows=tuple(map(torch.tensor, rows))), micro_batches=1)
    found = figures(metric)
    assert (found["load_max_over_mean"], found["idle_experts"]) == (load, idle)


def test_an_expert_idle_in_one_update_is_not_idle():
    metric = GateGradHealth()
    for rows in ([[4, 0]], [[0, 4]]):
        metric.update(HealthCounts(expert_rows=tuple(map(torch.tensor, rows))), micro_batches=1)
    assert (figures(metric)["load_max_over_mean"], figures(metric)["idle_experts"]) == (1.0, 0)


def test_rows_are_exact_where_float32_is_not():
    metric = GateGradHealth()
    metric.update(HealthCounts(expert_rows=(torch.tensor([2**24, 2**24 + 1]),)), micro_batches=1)
    metric.update(HealthCounts(expert_rows=(torch.tensor([1, 1]),)), micro_batches=1)
    assert metric.expert_rows.tolist() == [[2**24 + 1, 2**24 + 2]]


def test_counts_are_exact_where_float32_is_not():
    metric = GateGradHealth()
    for _ in range(3):
        metric.update(HealthCounts(gates=2**25 + 1, nonpositive_gates=2**24 + 1), micro_batches=1)
    assert figures(metric)["nonpositive_gates"] == 3 * (2**24 + 1)


def test_the_audit_shows_its_worst():
    metric = GateGradHealth()
    for error in (float("nan"), 0.125, torch.tensor(0.5), 0.25):
        metric.update(HealthCounts(audit_rel_error=error), micro_batches=1)
    assert figures(metric)["audit_rel_error"] == 0.5


@pytest.mark.parametrize("shares", [(1, 1), (2, 1)])
def test_processes_sum(shares):
    whole, parts = GateGradHealth(), [GateGradHealth() for _ in shares]
    for part, share in zip(parts, shares, strict=True):
        for _ in range(share):
            part.update(COUNTS, micro_batches=2)
            whole.update(COUNTS, micro_batches=2)
    merged = GateGradHealth()
    for name, reduce in merged._reductions.items():
        setattr(merged, name, reduce(torch.stack([getattr(part, name) for part in parts])))
    merged._update_count = 1
    assert figures(merged) == figures(whole)


def test_replicas_merge_exactly_where_float32_ends():
    one, other = GateGradHealth(), GateGradHealth()
    one.update(HealthCounts(gates=2**25, nonpositive_gates=2**24 + 1, audit_rel_error=0.25), micro_batches=1)
    other.update(HealthCounts(gates=2**25, nonpositive_gates=2**24 + 2, audit_rel_error=0.5), micro_batches=3)
    other.update(HealthCounts(expert_rows=COUNTS.expert_rows), micro_batches=0)
    one.merge_state(other)
    merged = figures(one)
    assert merged["nonpositive_gates"] == 2**25 + 3 != int(torch.tensor(2.0**25) + 3)  # what a float32 sum says
    assert (merged["load_max_over_mean"], merged["idle_experts"]) == (2.5, 5)
    assert merged["audit_rel_error"] == 0.5
    assert one.micro_batches == 4


def test_every_count_is_an_int64_sum():
    metric = GateGradHealth()
    metric.update(COUNTS, micro_batches=2)
    sums = {name: state for name, state in metric.metric_state.items() if name != "audit_rel_error"}
    rows = sums.pop("expert_rows")
    assert {state.dtype for state in sums.values()} == {torch.int64}
    assert {name: state.item() for name, state in sums.items()} == {
        "gates": 100, "nonpositive_gates": 25, "zero_gates": 5, "nonfinite_gate_grads": 2, "active_layers": 6,
        "fallback_layers": 2, "bias_fallback_layers": 1, "activation_bytes_saved": 2**22, "micro_batches": 2,
    }  # fmt: skip
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[6, 0, 2, -1, -1], [5, 1, 0, 0, 4], [0, 0, -1, -1, -1]]
