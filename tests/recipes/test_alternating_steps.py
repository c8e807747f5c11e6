"""Tests of the benchmark of steps in turn: variants that compute the same, on one base, in one small run."""

import copy

import alternating_steps
import pytest
import torch
import yaml
from alternating_steps import make_batch, make_step
from lora.module import MoELoRA

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated"),  # Transformers' older names, which 5.17 has alone
    pytest.mark.filterwarnings("ignore:CUDA graph. the step runs without one"),
]
ARCHITECTURE = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "head_dim": 16,
}


VARIANTS = (
    "baseline+liger", "baseline+liger+selective", "baseline+liger+graph", "lightning_moe", "lightning_moe+offload",
    "lightning_moe+full+offload", "lightning_moe+kept", "lightning_moe+graph", "lightning_moe+nf4+host+offload",
)  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    settings = yaml.safe_load(alternating_steps.TINY.read_text())
    settings["model"]["architecture"] |= ARCHITECTURE
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_every_variant_has_the_same_losses_and_weights(recipe):
    options = yaml.safe_load(recipe.read_text())["model"] | {"modules_to_save": ()}
    shared = MoELoRA(**copy.deepcopy(options)).build_base()
    losses = {}
    for variant in VARIANTS:
        step, _ = make_step(variant, copy.deepcopy(options), shared, "32-true")
        losses[variant] = [step(make_batch(40, 384, seed, torch.device("cpu"))).item() for seed in range(3)]
    first = losses.pop("baseline+liger")
    assert len(set(first)) == 3
    for found in losses.values():
        assert found == pytest.approx(first, abs=1e-5)


def test_parts_of_a_variant_s_name_are_options():
    assert alternating_steps.options_of("lightning_moe+fp8+full+offload") == {
        "quantize": "fp8", "checkpointing": "full", "offload": True
    }  # fmt: skip
    assert alternating_steps.options_of("baseline+liger+graph")["attention"] == "varlen"
    for wrong in ("nf4", "lightning_moe+int8", ""):
        with pytest.raises(ValueError, match=r"no variant .*baseline or lightning_moe, with liger, \+selective"):
            alternating_steps.options_of(wrong)


def test_the_table(recipe, tmp_path, capsys):
    variants = ("baseline+liger", "lightning_moe")
    alternating_steps.main(recipe, lengths=(32,), variants=variants, rounds=1, experts=True, layers=2, out=tmp_path)
    table = (tmp_path / "alternating_steps.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("| - | 32 ")]
    assert [row[2] for row in rows] == list(variants)
    assert rows[0][3].endswith("(1.00)")
    assert [bool(row[5]) for row in rows] == [bool(row[7]) for row in rows] == [False, True]
    assert all(row[3] in capsys.readouterr().out for row in rows[:1])


def test_the_plan_of_a_variant_is_of_its_options():
    options = yaml.safe_load(alternating_steps.TINY.read_text())["model"]
    plans = {
        variant: alternating_steps.plan_of(variant, 4096, options, torch.device("cpu"))
        for variant in ("lightning_moe", "lightning_moe+full+offload", "lightning_moe+kept", "lightning_moe+experts")
    }
    chosen = {v: (p.options.checkpointing, p.options.offload, p.options.experts) for v, p in plans.items()}
    experts = options.get("experts", False)
    assert chosen == {
        "lightning_moe": ("selective", False, experts),
        "lightning_moe+full+offload": ("full", True, experts),
        "lightning_moe+kept": ("none", False, experts),
        "lightning_moe+experts": ("selective", False, True),
    }
    assert plans["lightning_moe+full+offload"].above < plans["lightning_moe"].above < plans["lightning_moe+kept"].above
    assert alternating_steps.plan_of("baseline+liger", 4096, options, torch.device("cpu")) is None
    assert alternating_steps.plan_of("lightning_moe+graph", 4096, options, torch.device("cpu")) is None


def test_a_variant_that_runs_out_of_memory_does_not_fit(recipe, tmp_path, monkeypatch):
    """And those after it run."""

    def in_turn(variants, tokens, *rest):
        if tokens == 64:
            raise torch.OutOfMemoryError
        return original(variants, tokens, *rest)

    original = alternating_steps.in_turn
    monkeypatch.setattr(alternating_steps, "in_turn", in_turn)
    alternating_steps.main(recipe, lengths=(64, 32), variants=("lightning_moe",), rounds=1, cards=(11.2,), out=tmp_path)
    table = (tmp_path / "alternating_steps.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("| 11.2 ")]
    assert [row[1] for row in cells] == ["64", "32"]
    assert cells[0][3] == "does not fit"
    assert cells[1][3].endswith("(1.00)")
