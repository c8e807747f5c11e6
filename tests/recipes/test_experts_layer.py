"""The layer benchmark's variants compute the same layer; its table has its numbers; without a GPU it says so."""

import experts_layer
import pytest
import torch
from experts_layer import (
    HEADERS,
    MODELS,
    Block,
    Numbers,
    cells_of,
    errors,
    main,
    make_inputs,
    reference,
    run,
    transformers_own,
    variants,
)  # fmt: skip
from transformers import Qwen3MoeConfig


def config():
    made = Qwen3MoeConfig(**MODELS["tiny"])
    made._experts_implementation = "grouped_mm"
    return made


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_every_variant_computes_the_same_layer(mode, monkeypatch):
    monkeypatch.setattr(experts_layer.importlib.util, "find_spec", lambda name: None)  # peers need a GPU
    device = torch.device("cpu")
    inputs = make_inputs(config(), 64, device, seed=0)
    wanted = reference(Block(config(), mode, device), inputs)
    assert len(wanted) == (7 if mode == "lora" else 3)
    for name, make in variants(mode).items():
        block = Block(config(), mode, device)
        found = errors(run(make(block), block, inputs), wanted)
        assert max(found.values()) < 2e-2, name


def test_the_comparison_sees_another_layer():
    device = torch.device("cpu")
    inputs, others = (make_inputs(config(), 64, device, seed) for seed in range(2))
    block = Block(config(), "frozen", device)
    found = errors(run(block, block, inputs), reference(block, others))
    assert min(found.values()) > 0.5


def test_the_reference_sees_the_adapters():
    device = torch.device("cpu")
    block, inputs = Block(config(), "lora", device), make_inputs(config(), 64, device, seed=0)
    wanted = reference(block, inputs)
    for parameter in block.adapters().values():
        parameter.data = parameter.data.roll(1, 0)
    found = errors(run(block, block, inputs), wanted)
    assert min(found.values()) > 0.1


def test_ratios_are_to_the_baseline():
    baseline, ours = Numbers(4.0, 8.0, 1.0, 4.0, 0.5), Numbers(1.0, 4.0, 0.5, 2.0, 0.25)
    cells = cells_of(ours, baseline, roofline=1.0)
    assert cells == ["1 (0.25)", "4 (0.50)", "0.50", "2.00 (0.50)", "2.00", "2.5e-01"]
    assert len(cells) == len(HEADERS) - 2
    assert cells_of(baseline, baseline, roofline=1.0)[0] == "4 (1.00)"


def test_a_variant_that_fails_is_a_row_with_its_message(monkeypatch):
    def fail(block):
        raise ImportError("no")

    monkeypatch.setattr(experts_layer, "variants", lambda mode: {"ours": transformers_own, "peer": fail})
    monkeypatch.setattr(experts_layer, "measure", lambda *_: Numbers(1.0, 1.0, 1.0, 1.0))
    rows = experts_layer.bench(config(), "frozen", 8, 1.0, torch.device("cpu"))
    assert {len(row) for row in rows} == {len(HEADERS)}
    assert [row[:2] for row in rows] == [["8", "ours"], ["8", "peer"]]
    assert rows[1][2] == "ImportError: no"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="there is none here"):
        main()
