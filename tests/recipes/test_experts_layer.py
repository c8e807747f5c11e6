"""The layer benchmark's contenders compute the same layer; its table and plot come out; without a GPU it says so."""

import pytest
import torch
from benchmarks import experts_layer as bench_layer
from benchmarks.experts_layer import HEADERS, MODELS, Block, Result, contenders, errors, main, make_inputs, reference
from transformers import Qwen3MoeConfig


def config():
    made = Qwen3MoeConfig(**MODELS["tiny"])
    made._experts_implementation = "grouped_mm"
    return made


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_every_contender_computes_the_same_layer(mode, monkeypatch):
    monkeypatch.setattr(bench_layer.importlib.util, "find_spec", lambda name: None)  # peers need a GPU
    device = torch.device("cpu")
    inputs = make_inputs(config(), 64, device, seed=0)
    wanted = reference(Block(config(), mode, device), inputs)
    assert len(wanted) == (7 if mode == "lora" else 3)
    for name, make in contenders(mode, 64).items():
        block = Block(config(), mode, device)
        found = errors(make(block), block, inputs, wanted)
        assert found.pop("repeats") == 1.0
        assert max(found.values()) < 2e-2, name


def test_the_comparison_sees_another_layer():
    device = torch.device("cpu")
    inputs, others = (make_inputs(config(), 64, device, seed) for seed in range(2))
    block = Block(config(), "frozen", device)
    assert min(v for n, v in errors(block, block, inputs, reference(block, others)).items() if n != "repeats") > 0.5


def test_table_and_plot(tmp_path):
    results = [
        Result("stock", 8, kept=4.0, peak=8.0, forward=1.0, total=4.0, errors={"output": 0.5, "repeats": 0.0}),
        Result("ours", 8, kept=1.0, peak=4.0, forward=0.5, total=2.0, errors={"output": 0.25, "repeats": 1.0}),
        Result("peer", 8, failure="ImportError: no"),
    ]
    rows = bench_layer.rows_of(results, {8: 1.0})
    assert {len(row) for row in rows} == {len(HEADERS)}
    assert rows[1] == ["8", "ours", "1 (0.25)", "4 (0.50)", "0.50", "2.00 (0.50)", "2.00", "2.5e-01", "yes"]
    assert rows[2][2] == "ImportError: no"
    bench_layer.plot(results, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="there is none here"):
        main()
