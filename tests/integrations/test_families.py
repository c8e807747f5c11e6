"""Every family that Transformers' registry dispatches, patched, against its own stock code; and the table of them.

`python tests/integrations/test_families.py` writes the table anew. `FAMILY_SEEDS=50` in the environment has the
comparisons drawn 50 times.
"""

import importlib
import importlib.util
import os
import re
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from helpers.families import adapted, build, experts_classes, family_names, results, rounding, truth
from torch import nn

from lightning_moe import gategrad, measure_moe_activations, moe_experts, patching
from lightning_moe.activation_estimate import estimate_activations

TABLE = Path(__file__).parents[2] / "lightning_moe" / "families.md"
TABLE_VERSION = "5.24.0"  # of Transformers; others know other families
WAYS = ("full", "attention", "experts")
SEEDS = range(int(os.environ.get("FAMILY_SEEDS", "1")))  # of the weights and of the batch
# A tensor may be twice as far from float64 as stock code's: both round, in other places. Where stock code was lucky,
# rounding decides: each number may move by some last digits, as a float32 sum of the 64 terms that these models have.
SLACK, ROUNDINGS = 2.0, 4.0
# The middle one of some 65 ratios of errors, most of which lie within 0.1 of 1, scatters by 0.02.
MEDIAN_SLACK = 1.1
TOP_K = {"zaya": 1}
CANNOT = {"muse_spark"}  # a norm stands between the down projection and the gate


def all_families():
    return [
        (family, experts_class)
        for family in family_names()
        for experts_class in experts_classes(importlib.import_module(f"transformers.models.{family}.modeling_{family}"))
    ]


FAMILIES = [pytest.param(*found, id=found[1].__name__) for found in all_families()]
# Not decorated, of the same contract: registered by ourselves, where this Transformers has it.
if importlib.util.find_spec("transformers.models.step3p7"):
    FAMILIES.append(
        pytest.param(
            "step3p7",
            importlib.import_module("transformers.models.step3p7.modeling_step3p7").Step3p7Experts,
            id="Step3p7Experts",
        )
    )


def problems(model, actual, stock, seed=0):
    """The names of what is missing, or further from the truth than stock code is and than rounding explains."""
    exact = truth(model, seed)
    found = sorted(actual.keys() ^ stock.keys()) + sorted(stock.keys() ^ exact.keys())
    names = actual.keys() & stock.keys() & exact.keys()
    errors, stock_errors = ({n: (side[n].double() - exact[n]).norm() for n in names} for side in (actual, stock))
    beyond = [name for name in names if not errors[name] <= SLACK * stock_errors[name]]
    if beyond:
        allowed = rounding(model, exact, seed)
        beyond = [name for name in beyond if not errors[name] <= ROUNDINGS * allowed[name]]
    return found + beyond


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("family", "experts_class"), FAMILIES)
def test_loss_and_every_gradient(family, experts_class, how, seed, monkeypatch):
    model = adapted(build(family, experts_class, seed), how)
    stock = results(model, seed)
    calls = []
    operation = patching.moe_experts
    monkeypatch.setattr(
        patching, "moe_experts", lambda *args, **options: calls.append(1) or operation(*args, **options)
    )
    with gategrad(model) as report:
        ours = results(model, seed)
    layers = [layer for layer in report if layer.class_name.removeprefix("Parametrized") == experts_class.__name__]
    assert layers
    assert report.active if calls else report.fallback == report
    if not report.active:
        assert all(torch.equal(ours[name], stock[name]) for name in stock)
    assert problems(model, ours, stock, seed) == []
    if how == "experts":
        assert {layer.adapters for layer in report.active} <= {"apart"}
    after = results(model, seed)
    assert all(torch.equal(after[name], stock[name]) for name in stock)


def error(results, exact):
    """The relative errors of all tensors, root of the sum of squares."""
    return torch.stack(
        [(results[name].double() - tensor).norm() / tensor.norm() for name, tensor in exact.items()]
    ).norm()


@pytest.mark.parametrize("seed", SEEDS)
def test_together_the_families_are_as_near_to_the_truth_as_stock_code(seed):
    """One model's errors are one draw; over so many, nearer and further cancel."""
    ratios = []
    for family, experts_class in all_families():
        if family in CANNOT:
            continue
        model = build(family, experts_class, seed)
        stock, exact = results(model, seed), truth(model, seed)
        with gategrad(model):
            ours = results(model, seed)
        ratios.append(error(ours, exact) / error(stock, exact))
    assert torch.stack(ratios).median() <= MEDIAN_SLACK


def test_the_common_comparison_sees_results_of_fewer_digits():
    model = build("mixtral", dict(all_families())["mixtral"])
    stock, exact = results(model), truth(model)
    fewer = {name: (tensor * 2**12 + tensor) - tensor * 2**12 for name, tensor in stock.items()}
    assert error(fewer, exact) > MEDIAN_SLACK * error(stock, exact)


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
        *product(["mixtral", "gpt_oss"], WAYS, [lose_gate_gradient]),
        *product(["mixtral", "gpt_oss"], WAYS[:1], [drop_a_gate, permute_rows, give_zeros]),
        ("deepseek_v4", "full", lose_gate_gradient),
    ],
)
def test_the_comparison_sees_a_broken_operation(family, how, broken, monkeypatch):
    model = adapted(build(family, dict(all_families())[family]), how)
    stock = results(model)
    with monkeypatch.context() as patch, gategrad(model):
        patch.setattr(patching, "moe_experts", broken)
        ours = results(model)
    assert problems(model, ours, stock)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "openai_privacy_filter"])
def test_the_comparison_sees_each_wrong_tensor(family):
    model = build(family, dict(all_families())[family])
    stock = results(model)
    assert problems(model, stock, stock) == []
    zeros = {name: torch.zeros_like(tensor) for name, tensor in stock.items()}
    rolled = {name: tensor.flatten().roll(tensor[0].numel()).view_as(tensor) for name, tensor in stock.items()}
    for wrong in (zeros, rolled):
        assert set(problems(model, wrong, stock)) == set(stock)


OUTSIDE = [
    ("dbrx", "DbrxExperts", "DbrxFFNConfig", "two-dimensional"),
    ("doge", "DogeCDMoE", "DogeConfig", "embeddings"),
    ("jetmoe", "JetMoeMoA", "JetMoeConfig", "attention"),
    ("jetmoe", "JetMoeMoE", "JetMoeConfig", "a bias of its own"),
    ("llama4", "Llama4TextExperts", "Llama4TextConfig", "the gate multiplies the experts' input"),
    ("longcat_flash", "LongcatFlashMoE", "LongcatFlashConfig", "pass their input on"),
    ("nllb_moe", "NllbMoeExperts", "NllbMoeConfig", "dropout after the gate"),
    ("switch_transformers", "SwitchTransformersExperts", "SwitchTransformersConfig", "dropout inside"),
    ("vitpose_backbone", "VitPoseNaiveMoe", "VitPoseBackboneConfig", "without gates"),
]


@pytest.mark.parametrize(("family", "class_name", "config_name", "why"), OUTSIDE)
def test_a_family_of_another_contract_is_named_with_the_reason(family, class_name, config_name, why):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config_module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    sizes = {"ffn_dim": 16} if family == "nllb_moe" else {}
    with torch.device("meta"):
        model = nn.ModuleDict({"experts": getattr(module, class_name)(getattr(config_module, config_name)(), **sizes)})
    before = dict(vars(model["experts"]))
    (layer,) = patching.patch_moe(model).layers
    assert (layer.name, layer.class_name, layer.status) == ("experts", class_name, "fallback")
    assert why in layer.reason
    assert vars(model["experts"]) == before


INTRODUCTION = f"""# Families

Every class of experts that Transformers {TABLE_VERSION} dispatches through its registry, and what becomes of it under
the callback. `python tests/integrations/test_families.py` writes this table. The tests hold it, and hold each family's
smallest model, patched, to its stock code and to float64: the output and every gradient, with all weights trained, with
LoRA on the attention, and with LoRA on the experts. Outside the registry Step3p7 is patched, and so is what
`register_experts` names; the others are named in the report with the reason.

`tape kept` is the share of stock code's tape that is left, by the estimate that the report shows: frozen experts in
bfloat16, a layer of the sizes in the family's default configuration, `-` where that has none.

| family | class | status | why | tape kept |
|---|---|---|---|---|
"""


def tape_kept(experts):
    """By the sizes of the family's default configuration; nothing is allocated."""
    with torch.device("meta"):
        try:
            real = type(experts)(type(experts.config)()).bfloat16().requires_grad_(False)
        except TypeError:  # a size is None
            return "-"
    tape = estimate_activations(real, {}, recompute_gate_up=False)
    return f"{tape.saved_per_row / tape.baseline_per_row:.2f}"


def table():
    rows = []
    for family, experts_class in all_families():
        model = build(family, experts_class)
        with gategrad(model) as report:
            layer = next(layer for layer in report if layer.class_name == experts_class.__name__)
            kept = tape_kept(model.get_submodule(layer.name)) if layer.status == "active" else "1.00"
        rows.append(f"| {family} | {experts_class.__name__} | {layer.status} | {layer.reason} | {kept} |\n")
    return INTRODUCTION + "".join(rows)


@pytest.mark.skipif(transformers.__version__ != TABLE_VERSION, reason=f"the table is Transformers {TABLE_VERSION}'s")
def test_the_table_says_what_is():
    assert TABLE.read_text("utf-8") == table(), "python tests/integrations/test_families.py writes it anew"


def test_the_readme_counts_the_tables_families():
    rows = re.findall(r"^[|] (\w+) [|] \w+ [|] (active|fallback) [|]", TABLE.read_text("utf-8"), re.MULTILINE)
    families, active = {family for family, _ in rows}, {family for family, status in rows if status == "active"}
    count = f"[{len(active)} of {len(families)} families](lightning_moe/families.md)"
    assert count in (TABLE.parents[1] / "README.md").read_text("utf-8")


@pytest.mark.parametrize(("family", "experts_class"), FAMILIES)
def test_the_estimated_tape_is_the_measured_one(family, experts_class):
    model = adapted(build(family, experts_class), "attention")
    with gategrad(model) as report, measure_moe_activations(model) as tapes:
        results(model)
        for tape in tapes:
            layer = next(layer for layer in report if layer.name == tape.name)
            if layer.status == "active" and tape.baseline_num_bytes:  # else no adapter stands before it
                estimate = estimate_activations(model.get_submodule(tape.name), {}, recompute_gate_up=False)
                rows = tape.num_tokens * TOP_K.get(family, 2)
                assert tape.num_bytes == pytest.approx(estimate.saved_per_row * rows, rel=0.05)
                # A cast or a mask in stock code may keep a copy more than the estimate counts; a loop keeps several.
                more = 4 if family == "step3p7" else 1.25
                assert 0.95 <= tape.baseline_num_bytes / (estimate.baseline_per_row * rows) <= more
    assert tapes


if __name__ == "__main__":
    TABLE.write_text(table(), "utf-8")
