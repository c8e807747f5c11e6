"""Expert parallelism: a rank holds some of a layer's experts, and ids of non-local ones reach the operation."""

import importlib.util
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.launch import together
from helpers.models import Tiny, qwen3, tokens
from helpers.rank_fits import turn_gates
from helpers.reference import (
    FACTORS,
    LAYOUTS,
    WEIGHTS,
    StockExperts,
    assert_agrees,
    gradients,
    make_problem,
    merged,
    relative_error,
    run,
)
from helpers.training import logged, trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from transformers.integrations.moe import grouped_mm_experts_forward

from lightning_moe import ExpertLoadMonitor, MoEGateGradCallback, gategrad

RANKS = {"plain": {}, "low_rank": {"gate_up_ranks": (4,), "down_ranks": (4,)}}
PER_EXPERT = (*WEIGHTS, *FACTORS)


@pytest.fixture(autouse=True)
def unwritten_rows_are_nan(monkeypatch):
    """grouped_mm leaves the rows past the last offset as it found them; here it finds NaN."""
    baseline = F.grouped_mm

    def spoiled(left, right, *, offs, **options):
        result = baseline(left, right, offs=offs, **options)
        if right.dim() == 3:
            result[offs[-1] :] = float("nan")
        return result

    monkeypatch.setattr(F, "grouped_mm", spoiled)


def shard(problem, first, count):
    """What a process that holds the experts from `first` on is called with: foreign ids are `count`, their gates 0."""
    local = problem.top_k_index - first
    foreign = (local < 0) | (local >= count)
    tensors = {n: t[first : first + count] if n in PER_EXPERT else t for n, t in problem.tensors.items()}
    tensors["top_k_weights"] = problem.tensors["top_k_weights"].masked_fill(foreign, 0)
    return replace(problem, tensors=tensors, top_k_index=local.masked_fill(foreign, count))


def run_baseline_shard(problem):
    leaves = problem.leaves()
    plain = merged(problem.layout, leaves)
    module = StockExperts(problem.layout, plain)
    module._is_expert_parallel = True
    output = grouped_mm_experts_forward(module, plain["hidden_states"], problem.top_k_index, plain["top_k_weights"])
    return gradients(problem, leaves, output)


@pytest.mark.parametrize("recompute_gate_up", [False, True])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shards_add_up_to_the_whole(layout, ranks, recompute_gate_up):
    problem = make_problem(layout, gates="mixed", num_experts=6, **RANKS[ranks])
    whole = run(problem)
    parts = [
        run(shard(problem, first, 2), is_expert_parallel=True, recompute_gate_up=recompute_gate_up)
        for first in (0, 2, 4)
    ]
    summed = {
        name: torch.cat([part[name] for part in parts]) if name in PER_EXPERT else sum(part[name] for part in parts)
        for name in whole
    }
    assert_agrees(summed, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shard_equals_the_baseline(layout, dtype):
    problem = shard(make_problem(layout, num_experts=6, num_tokens=40, dtype=dtype), 2, 2)
    actual, expected = run(problem, is_expert_parallel=True), run_baseline_shard(problem)
    for name, want in expected.items():
        assert relative_error(actual[name], want) <= 8 * torch.finfo(dtype).eps, name
    foreign = problem.top_k_index == 2
    assert actual["top_k_weights"][foreign].count_nonzero() == 0


@pytest.mark.parametrize("gate", [3.0, float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["default", "gpt_oss", "biased"])
def test_a_non_local_gate_that_is_not_zero_counts_for_nothing(layout, gate):
    problem = shard(make_problem(layout, num_experts=6), 2, 2)
    gates = problem.tensors["top_k_weights"]
    loud = problem.with_tensors(top_k_weights=gates.masked_fill(problem.top_k_index == 2, gate))
    assert_agrees(run(loud, is_expert_parallel=True), run(problem, is_expert_parallel=True))


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_bias"])
def test_a_nan_bias_of_the_last_expert_stays_with_its_own_rows(name):
    problem = shard(make_problem("biased", num_experts=6), 2, 2)
    bias = problem.tensors[name].clone()
    bias[-1, 0] = float("nan")
    problem = problem.with_tensors(**{name: bias})
    actual, expected = run(problem, is_expert_parallel=True), run_baseline_shard(problem)
    assert any(not want.isfinite().all() for want in expected.values())
    for result, want in expected.items():
        assert torch.equal(actual[result].isfinite(), want.isfinite()), result


def test_a_process_without_a_row_adds_nothing():
    problem = make_problem(num_experts=6)
    nobody = replace(shard(problem, 0, 2), top_k_index=torch.full_like(problem.top_k_index, 2))
    for name, result in run(nobody, is_expert_parallel=True).items():
        assert result.count_nonzero() == 0, name


@pytest.mark.parametrize("num_experts", [255, 256, 257])
def test_foreign_ids_fit_the_sort_keys(num_experts):
    index = torch.tensor([[0, num_experts], [num_experts - 1, num_experts + 40], [1, 2]])
    problem = replace(make_problem(num_experts=num_experts, num_tokens=3, top_k=2), top_k_index=index)
    assert_agrees(run(problem, is_expert_parallel=True), run_baseline_shard(problem))


def test_without_the_option_a_foreign_id_is_an_error():
    with pytest.raises(ValueError, match="names experts"):
        run(shard(make_problem(num_experts=6), 2, 2))


def spread_experts(model, how, experts, alone):
    """Transformers' own expert parallelism over a mesh; each process has a part of every layer's experts."""
    from transformers.distributed.expert_parallel import apply_expert_parallelism  # not in 5.17

    plan = {}
    for name, _ in model.named_modules():
        if name.endswith("mlp.experts"):
            plan |= {f"{name}.gate_up_proj": "grouped_gemm", f"{name}.down_proj": "grouped_gemm"}
            plan[name] = "ep_dispatch_experts"
    apply_expert_parallelism(model, experts, experts if how == "all_reduce" else alone, plan, how)


def one_of_two_processes(how):
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]))
    model = qwen3()
    with torch.no_grad():
        alone = model(input_ids=tokens(), labels=tokens()).loss
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("experts", "alone"))
    spread_experts(model, how, mesh["experts"], mesh["alone"])

    def run():
        model.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        local = {name: getattr(p.grad, "_local_tensor", p.grad) for name, p in model.named_parameters()}
        return {"loss": loss.detach()} | {name: grad.clone() for name, grad in local.items()}

    baseline = run()
    with gategrad(model) as report:
        assert [layer.status for layer in report] == ["active", "active"]
        ours = run()
    assert_agrees(ours, baseline)
    assert any(not torch.equal(ours[name], baseline[name]) for name in baseline)  # another code did run
    assert_agrees({"loss": ours["loss"]}, {"loss": alone})


needs_expert_parallelism = pytest.mark.skipif(
    importlib.util.find_spec("transformers.distributed.expert_parallel") is None,
    reason="this Transformers has no transformers.distributed.expert_parallel",
)


@needs_expert_parallelism
@pytest.mark.parametrize("how", ["all_reduce", "all_to_all"])
def test_transformers_own_expert_parallelism(how):
    together(one_of_two_processes, how)


class OfParts(Tiny):
    def configure_model(self):
        if self.network is not None:
            return
        super().configure_model()
        for name, module in self.network.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(turn_gates)
        if self.device_mesh is not None:
            experts, alone = (self.device_mesh[name] for name in ("tensor_parallel", "data_parallel"))
            spread_experts(self.network, "all_reduce", experts, alone)


def trained(folder, strategy, devices):
    module, monitor = OfParts(qwen3, "configure_model", learning_rate=0.0), ExpertLoadMonitor()
    run = trainer(
        folder, MoEGateGradCallback(), monitor, strategy=strategy, devices=devices, use_distributed_sampler=False
    )
    run.fit(module)
    assert all(module.was_patched)
    return module.losses, monitor.expert_load


@needs_expert_parallelism
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.")
def test_each_gate_is_counted_where_its_expert_is(tmp_path):
    strategy = ModelParallelStrategy(1, 2, save_distributed_checkpoint=False)
    alone = trained(tmp_path / "one", "auto", 1)
    ours = together(trained, tmp_path / "two", strategy, 2)
    for losses, load in ours:
        assert losses == pytest.approx(alone[0], rel=1e-5)
        assert not load  # the ranks' experts have the same numbers
    assert alone[1]
    for name in ("active_layers", "fallback_layers", "nonpositive_gates", "nonpositive_fraction", "zero_gates"):
        assert logged(tmp_path / "two", f"gategrad/{name}") == logged(tmp_path / "one", f"gategrad/{name}"), name
    assert min(logged(tmp_path / "two", "gategrad/zero_gates")) > 0
    assert not logged(tmp_path / "two", "moe/idle_experts")
