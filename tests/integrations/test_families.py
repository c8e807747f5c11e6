"""Every family that Transformers' registry dispatches, patched, against its default implementation; their table.

`PYTHONPATH=.:tests python tests/integrations/test_families.py` writes the table. `FAMILY_SEEDS=50` in the environment
has the comparisons drawn 50 times.
"""

import importlib
import importlib.util
import os
import re
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from helpers.families import adapted, build, experts_classes, family_names, results, rounding, truth
from helpers.patching import equal, num_active_executions
from torch import nn

from lightning_moe import dispatch, gategrad, measure_moe_activations, moe_experts, patch_moe
from lightning_moe.activation_estimate import estimate_activations

TABLE = Path(__file__).parents[2] / "lightning_moe" / "families.md"
TABLE_VERSION = "5.24.0"  # of Transformers; others know other families
WAYS = ("full", "attention", "experts")
SEEDS = range(int(os.environ.get("FAMILY_SEEDS", "1")))  # of the weights and of the batch
# A tensor may be twice as far from float64 as the default implementation's: both round, in other places. Where that was
# lucky, rounding decides: each number may move by some last digits, as a float32 sum of these models' 64 terms.
SLACK, ROUNDINGS = 2.0, 4.0
# The middle one of some 65 ratios of errors, most of which lie within 0.1 of 1, scatters by 0.02.
MEDIAN_SLACK = 1.1
TOP_K = {"zaya": 1}
FALLBACK = {"muse_spark"}  # a norm stands between the down projection and the routing weight


def all_families():
    return [
        (family, experts_class)
        for family in family_names()
        for experts_class in experts_classes(importlib.import_module(f"transformers.models.{family}.modeling_{family}"))
    ]


FAMILIES = [pytest.param(*found, id=found[1].__name__) for found in all_families()]
# Not decorated, of the same spec: registered by ourselves, where this Transformers has it.
if importlib.util.find_spec("transformers.models.step3p7"):
    FAMILIES.append(
        pytest.param(
            "step3p7",
            importlib.import_module("transformers.models.step3p7.modeling_step3p7").Step3p7Experts,
            id="Step3p7Experts",
        )
    )


def problems(model, actual, baseline, seed=0):
    """Names of what is missing, or further from float64 than the default implementation is and rounding explains."""
    exact = truth(model, seed)
    found = sorted(actual.keys() ^ baseline.keys()) + sorted(baseline.keys() ^ exact.keys())
    names = actual.keys() & baseline.keys() & exact.keys()
    errors, baseline_errors = ({n: (side[n].double() - exact[n]).norm() for n in names} for side in (actual, baseline))
    beyond = [name for name in names if not errors[name] <= SLACK * baseline_errors[name]]
    if beyond:
        allowed = rounding(model, exact, seed)
        beyond = [name for name in beyond if not errors[name] <= ROUNDINGS * allowed[name]]
    return found + beyond


def check(model, experts_class, seed, measure=nullcontext):
    """Fails unless the patched model gives the default implementation's results, and the restored one its bits.

    Returns the report and what was measured meanwhile.
    """
    baseline = results(model, seed)
    with gategrad(model) as report, measure(model) as measured:
        assert experts_class.__name__ in {layer.class_name.removeprefix("Parametrized") for layer in report}
        ours = results(model, seed)
        assert any(num_active_executions(model)) == bool(report.active)
    assert problems(model, ours, baseline, seed) == []
    assert len(report.active) in (0, len(report))
    assert report.active or equal(ours, baseline)
    assert equal(results(model, seed), baseline)
    return report, measured


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("how", ["full", "experts"])
@pytest.mark.parametrize(("family", "experts_class"), FAMILIES)
def test_output_and_every_gradient(family, experts_class, how, seed):
    report, _ = check(adapted(build(family, experts_class, seed), how), experts_class, seed)
    if how == "experts":
        assert all(layer.has_adapters and not layer.adapter_reasons for layer in report.active)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("family", "experts_class"), FAMILIES)
def test_attention_lora_and_estimated_activations(family, experts_class, seed):
    model = adapted(build(family, experts_class, seed), "attention")
    report, measured = check(model, experts_class, seed, measure_moe_activations)
    assert measured
    active = {layer.name for layer in report.active}
    for found in measured:
        if found.name in active and found.baseline_num_bytes:  # else no adapter stands before it
            estimate = estimate_activations(model.get_submodule(found.name), {}, recompute_gate_up=False)
            rows = found.num_tokens * TOP_K.get(family, 2)
            assert found.num_bytes == pytest.approx(estimate.saved_per_row * rows, rel=0.05)
            # The default implementation may save a copy more, by a cast or a mask; a loop over experts saves several.
            more = 4 if family == "step3p7" else 1.25
            assert 0.95 <= found.baseline_num_bytes / (estimate.baseline_per_row * rows) <= more


def error(results, exact):
    """The relative errors of all tensors, root of the sum of squares."""
    return torch.stack(
        [(results[name].double() - tensor).norm() / tensor.norm() for name, tensor in exact.items()]
    ).norm()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_families_together_are_as_accurate_as_the_default_implementation(seed):
    """One model's errors are one draw; over so many, nearer and further cancel."""
    ratios = []
    for family, experts_class in all_families():
        if family in FALLBACK:
            continue
        model = build(family, experts_class, seed)
        baseline, exact = results(model, seed), truth(model, seed)
        with gategrad(model):
            ours = results(model, seed)
        ratios.append(error(ours, exact) / error(baseline, exact))
    assert torch.stack(ratios).median() <= MEDIAN_SLACK


def test_the_common_comparison_fails_on_results_of_fewer_digits():
    model = build("mixtral", dict(all_families())["mixtral"])
    baseline, exact = results(model), truth(model)
    fewer = {name: (tensor * 2**12 + tensor) - tensor * 2**12 for name, tensor in baseline.items()}
    assert error(fewer, exact) > MEDIAN_SLACK * error(baseline, exact)


def lose_gate_gradient(x, index, gates, **options):
    return moe_experts(x, index, gates.detach(), **options)


def drop_a_gate(x, index, gates, **options):
    kept = torch.ones_like(gates)
    kept[1, 0] = 0
    return moe_experts(x, index, gates * kept, **options)


def permute_rows(*args, **options):
    return moe_experts(*args, **options).roll(1, 0)


def give_zeros(*args, **options):
    return moe_experts(*args, **options) * 0


@pytest.mark.parametrize(
    ("family", "how", "broken"),
    [
        *product(["mixtral"], WAYS, [lose_gate_gradient]),
        *product(["gpt_oss"], WAYS[:1], [lose_gate_gradient, drop_a_gate, permute_rows, give_zeros]),
    ],
)
def test_the_comparison_fails_on_a_broken_operation(family, how, broken, monkeypatch):
    model = adapted(build(family, dict(all_families())[family]), how)
    baseline = results(model)
    with monkeypatch.context() as patch, gategrad(model):
        patch.setattr(dispatch, "moe_experts", broken)
        ours = results(model)
    assert problems(model, ours, baseline)


@pytest.mark.parametrize("family", ["mixtral", "openai_privacy_filter"])
def test_the_comparison_fails_on_each_wrong_tensor(family):
    model = build(family, dict(all_families())[family])
    baseline = results(model)
    assert problems(model, baseline, baseline) == []
    zeros = {name: torch.zeros_like(tensor) for name, tensor in baseline.items()}
    rolled = {name: tensor.flatten().roll(tensor[0].numel()).view_as(tensor) for name, tensor in baseline.items()}
    for wrong in (zeros, rolled):
        assert set(problems(model, wrong, baseline)) == set(baseline)


OUTSIDE = [
    ("dbrx", "DbrxExperts", "DbrxFFNConfig", "two-dimensional"),
    ("doge", "DogeCDMoE", "DogeConfig", "embeddings"),
    ("jetmoe", "JetMoeMoA", "JetMoeConfig", "attention"),
    ("jetmoe", "JetMoeMoE", "JetMoeConfig", "a bias of its own"),
    ("llama4", "Llama4TextExperts", "Llama4TextConfig", "the routing weight multiplies the experts' input"),
    ("longcat_flash", "LongcatFlashMoE", "LongcatFlashConfig", "pass their input on"),
    ("nllb_moe", "NllbMoeExperts", "NllbMoeConfig", "dropout after the routing weight"),
    ("switch_transformers", "SwitchTransformersExperts", "SwitchTransformersConfig", "dropout inside"),
    ("vitpose_backbone", "VitPoseNaiveMoe", "VitPoseBackboneConfig", "without routing weights"),
]


@pytest.mark.parametrize(("family", "class_name", "config_name", "why"), OUTSIDE)
def test_a_family_outside_the_registry_is_reported_with_its_reason(family, class_name, config_name, why):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config_module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    sizes = {"ffn_dim": 16} if family == "nllb_moe" else {}
    with torch.device("meta"):
        model = nn.ModuleDict({"experts": getattr(module, class_name)(getattr(config_module, config_name)(), **sizes)})
    before = dict(vars(model["experts"]))
    (layer,) = patch_moe(model)
    assert (layer.name, layer.class_name, layer.status) == ("experts", class_name, "fallback")
    assert layer.reason.code == "outside_registry"
    assert why in layer.reason.message
    assert vars(model["experts"]) == before


INTRODUCTION = f"""# Families

Every class of experts that Transformers {TABLE_VERSION} dispatches through its registry, and what becomes of it under
the callback. `tests/integrations/test_families.py` writes this table, and compares each family's smallest model,
patched, with its default implementation and with float64: the output and every gradient, with all weights trained, with
LoRA on the attention, and with LoRA on the experts. Outside the registry Step3p7 is patched, and so are classes
registered with `register_experts`; the others are listed in the report with the reason.

`saved` is the share of the default implementation's saved activations that is left, by the report's estimate: frozen
experts in bfloat16, a layer of the sizes in the family's default configuration, `-` where that has none.

| family | class | status | reason | saved |
|---|---|---|---|---|
"""


def share_saved(experts):
    """By the sizes of the family's default configuration; nothing is allocated."""
    with torch.device("meta"):
        try:
            real = type(experts)(type(experts.config)()).bfloat16().requires_grad_(False)
        except TypeError:  # a size is None
            return "-"
    estimate = estimate_activations(real, {}, recompute_gate_up=False)
    return f"{estimate.saved_per_row / estimate.baseline_per_row:.2f}"


def table():
    rows = []
    for family, experts_class in all_families():
        model = build(family, experts_class)
        with gategrad(model) as report:
            layer = next(layer for layer in report if layer.class_name == experts_class.__name__)
            share = share_saved(model.get_submodule(layer.name)) if layer.status == "active" else "1.00"
        rows.append(f"| {family} | {experts_class.__name__} | {layer.status} | {layer.reason or ''} | {share} |\n")
    return INTRODUCTION + "".join(rows)


@pytest.mark.skipif(transformers.__version__ != TABLE_VERSION, reason=f"the table is Transformers {TABLE_VERSION}'s")
def test_the_table_of_families_is_up_to_date():
    assert TABLE.read_text("utf-8") == table(), "see the first lines of this file"


def test_the_readme_counts_the_families_of_the_table():
    rows = re.findall(r"^[|] (\w+) [|] \w+ [|] (active|fallback) [|]", TABLE.read_text("utf-8"), re.MULTILINE)
    families, active = {family for family, _ in rows}, {family for family, status in rows if status == "active"}
    count = f"[{len(active)} of {len(families)} families](lightning_moe/families.md)"
    assert count in (TABLE.parents[1] / "README.md").read_text("utf-8")


if __name__ == "__main__":
    TABLE.write_text(table(), "utf-8")
