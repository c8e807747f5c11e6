"""Every family that Transformers' registry dispatches, patched, against its own stock code; and the table of them.

`python tests/test_families.py` writes the table anew.
"""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers
from families import adapted, build, experts_classes, family_names, results, truth
from torch import nn

from lightning_moe import gategrad, measure_moe_tape, patching
from lightning_moe.discovery import estimate_tape

TABLE = Path(__file__).parents[1] / "recipes" / "families.md"
TABLE_VERSION = "5.24.0"  # of Transformers; others know other families
WAYS = ("full", "attention", "experts")
# How much further from float64 than stock code a tensor may be: both round, in other places. Seen: 1.5.
SLACK = 2.0
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


def problems(actual, stock, exact):
    """The names of what is missing, or further from the truth than stock code's by more than rounding."""
    size = max(tensor.double().norm() for tensor in exact.values())
    found = sorted(actual.keys() ^ stock.keys()) + sorted(stock.keys() ^ exact.keys())
    for name in actual.keys() & stock.keys() & exact.keys():
        error, stock_error = ((side[name].double() - exact[name]).norm() for side in (actual, stock))
        if not error <= SLACK * (stock_error + 1e-7 * exact[name].norm() + 1e-10 * size):
            found.append(name)
    return found


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("family", "experts_class"), FAMILIES)
def test_loss_and_every_gradient(family, experts_class, how, monkeypatch):
    model = adapted(build(family, experts_class), how)
    stock = results(model)
    calls = []
    operation = patching.moe_experts
    monkeypatch.setattr(
        patching, "moe_experts", lambda *args, **options: calls.append(1) or operation(*args, **options)
    )
    with gategrad(model) as report:
        ours = results(model)
    layers = [
        layer for layer in report.layers if layer.class_name.removeprefix("Parametrized") == experts_class.__name__
    ]
    assert layers
    assert report.active if calls else report.fallback == report.layers
    if not report.active:
        assert all(torch.equal(ours[name], stock[name]) for name in stock)
    assert problems(ours, stock, truth(model)) == []
    if how == "experts":
        assert {layer.adapters for layer in report.active} <= {"apart"}
    after = results(model)
    assert all(torch.equal(after[name], stock[name]) for name in stock)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v4"])
def test_the_comparison_sees_a_lost_gate_gradient(family, how, monkeypatch):
    experts_class = dict(all_families())[family]
    model = adapted(build(family, experts_class), how)
    stock, exact = results(model), truth(model)
    operation = patching.moe_experts
    monkeypatch.setattr(
        patching, "moe_experts", lambda x, index, gates, **options: operation(x, index, gates.detach(), **options)
    )
    with gategrad(model):
        assert problems(results(model), stock, exact)


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
the callback. `python tests/test_families.py` writes this table. The tests hold it, and hold each family's smallest
model, patched, to its stock code and to float64: the output and every gradient, with all weights trained, with LoRA on
the attention, and with LoRA on the experts. Outside the registry Step3p7 is patched, and so is what `register_experts`
names; the others are named in the report with the reason.

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
    tape = estimate_tape(real, {}, recompute_up=False)
    return f"{tape.kept_per_row / tape.stock_per_row:.2f}"


def table():
    rows = []
    for family, experts_class in all_families():
        model = build(family, experts_class)
        with gategrad(model) as report:
            layer = next(layer for layer in report.layers if layer.class_name == experts_class.__name__)
            kept = tape_kept(model.get_submodule(layer.name)) if layer.status == "active" else "1.00"
        rows.append(f"| {family} | {experts_class.__name__} | {layer.status} | {layer.reason} | {kept} |\n")
    return INTRODUCTION + "".join(rows)


@pytest.mark.skipif(transformers.__version__ != TABLE_VERSION, reason=f"the table is Transformers {TABLE_VERSION}'s")
def test_the_table_says_what_is():
    assert TABLE.read_text() == table(), "python tests/test_families.py writes it anew"


def test_the_readme_counts_the_tables_families():
    rows = re.findall(r"^[|] (\w+) [|] \w+ [|] (active|fallback) [|]", TABLE.read_text(), re.MULTILINE)
    families, active = {family for family, _ in rows}, {family for family, status in rows if status == "active"}
    count = f"[{len(active)} of {len(families)} families](recipes/families.md)"
    assert count in (TABLE.parents[1] / "README.md").read_text()


@pytest.mark.parametrize(("family", "experts_class"), FAMILIES)
def test_the_estimated_tape_is_the_measured_one(family, experts_class):
    model = adapted(build(family, experts_class), "attention")
    with gategrad(model) as report, measure_moe_tape(model) as tapes:
        results(model)
        for tape in tapes:
            layer = next(layer for layer in report.layers if layer.name == tape.name)
            if layer.status == "active" and tape.stock_num_bytes:  # else no adapter stands before it
                estimate = estimate_tape(model.get_submodule(tape.name), {}, recompute_up=False)
                rows = tape.num_tokens * TOP_K.get(family, 2)
                assert tape.num_bytes == pytest.approx(estimate.kept_per_row * rows, rel=0.05)
                # A cast or a mask in stock code may keep a copy more than the estimate counts; a loop keeps several.
                more = 4 if family == "step3p7" else 1.25
                assert 0.95 <= tape.stock_num_bytes / (estimate.stock_per_row * rows) <= more
    assert tapes


if __name__ == "__main__":
    TABLE.write_text(table())
