"""Tests of the comparison: its arithmetic on made-up runs, its plot, and one small run of the real thing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from benchmarks import whole_step as compare
from benchmarks.whole_step import Run, plot, rows_of, write_config
from matplotlib.image import imread

RUNS = [
    Run("stock", 256, [2.0, 1.5, 1.0], [9.0, 2.0, 2.2], 10.0, [9.0, 6.0, 5.0]),
    Run("lightning_moe", 256, [2.0, 1.51, 1.0], [9.0, 1.0, 1.2], 8.0, [8.0, 3.0, 3.0]),
    Run("stock", 512, failure="out of memory"),
    Run("lightning_moe", 512, [1.0, 1.0, 1.0], [3.0, 3.0, 3.0], 12.0, [9.0, 7.0, 7.0]),
]


def test_the_table_gives_medians_after_the_warmup_and_ratios_to_stock():
    rows = rows_of(RUNS, warmup=1)
    assert rows[0] == ["256", "1", "stock", "10.00", "6.00", "2.100", "122", "", ""]
    assert rows[1] == ["256", "1", "lightning_moe", "8.00", "3.00 (0.50)", "1.100 (0.52)", "233", "0.01", ""]
    assert rows[2] == ["512", "1", "stock", "out of memory", "", "", "", "", ""]
    assert rows[3] == ["512", "1", "lightning_moe", "12.00", "7.00", "3.000", "171", "", ""]


def test_several_devices_are_beside_stock_on_as_many_and_beside_one():
    spread = [
        Run("stock", 256, [2.0, 1.5, 1.0], [9.0, 4.0, 4.0], 6.0, [9.0, 4.0, 4.0], devices=2),
        Run("lightning_moe", 256, [2.0, 1.5, 1.0], [9.0, 1.1, 1.1], 5.0, [8.0, 3.0, 3.0], devices=2),
    ]
    rows = rows_of(RUNS + spread, warmup=1)
    assert rows[-2] == ["256", "2", "stock", "6.00", "4.00", "4.000", "128 (1.05)", "", ""]
    assert rows[-1] == ["256", "2", "lightning_moe", "5.00", "3.00 (0.75)", "1.100 (0.28)", "465 (2.00)", "0", ""]


def test_repeats_are_compared_bit_by_bit():
    same, other = (Run("stock", 8, [loss], [1.0], 1.0, [1.0]) for loss in (1.0, 1.0 + 1e-15))
    assert rows_of([same, same], 0)[0][-1] == "same bits"
    assert rows_of([same, other], 0)[0][-1] == "differs"


def test_the_plot_shows_where_memory_ran_out(tmp_path):
    plot(RUNS, "title", 79.2, tmp_path / "with.png")
    plot([run for run in RUNS if not run.failure], "title", 79.2, tmp_path / "without.png")
    pictures = [imread(tmp_path / name) for name in ("with.png", "without.png")]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).any()


def test_each_sides_configuration(tmp_path):
    base = Path(compare.TINY)
    stock, mine = (
        yaml.safe_load(write_config(base, side, 128, 3, tmp_path / side).read_text())
        for side in ("stock", "lightning_moe+offload")
    )
    assert stock["model"]["attention"] == "sdpa"
    assert stock["model"]["liger"] is False
    assert mine["model"]["offload"] is True
    assert "attention" not in mine["model"]
    for settings in (stock, mine):
        assert settings["data"]["max_length"] == 128
        names = [callback["class_path"] for callback in settings["trainer"]["callbacks"]]
        assert names == ["lightning_moe.MoEGateGradCallback", "lightning_moe.MemoryMonitor", "lora.watching.StepSpeed"]
        assert (settings["trainer"]["devices"], settings["trainer"]["strategy"]) == (1, "auto")


def test_the_configuration_over_several_devices_is_that_of_the_recipe(tmp_path):
    base = Path(compare.TINY).with_name("qwen3_30b_a3b.yaml")
    settings = yaml.safe_load(write_config(base, "stock", 128, 3, tmp_path, devices=2).read_text())["trainer"]
    wanted = yaml.safe_load(base.with_name("qwen3_30b_a3b_fsdp.yaml").read_text())["trainer"]
    assert settings["devices"] == wanted["devices"] == 2
    assert settings["strategy"] == wanted["strategy"]


def test_the_whole_on_the_cpu(tmp_path, capsys):
    sides = ("stock", "stock+liger", "lightning_moe")
    compare.main(lengths=(96,), sides=sides, steps=3, warmup=1, out=tmp_path)
    assert "stock+liger is left out: it needs a GPU" in capsys.readouterr().out
    results = json.loads((tmp_path / "compare.json").read_text())
    stock, mine = results["runs"]
    assert (stock["side"], mine["side"]) == ("stock", "lightning_moe")
    assert len(stock["losses"]) == len(mine["losses"]) == 3
    assert max(abs(a - b) for a, b in zip(stock["losses"], mine["losses"], strict=True)) < 1e-4
    assert stock["losses"][0] != stock["losses"][-1]
    assert "python recipes/benchmarks/whole_step.py" in (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_a_side_that_fails_is_named_with_its_output(tmp_path):
    options = ("--model.rank=-1",)
    compare.main(lengths=(96,), sides=("lightning_moe",), steps=2, warmup=0, options=options, out=tmp_path)
    assert "model.rank must be positive" in json.loads((tmp_path / "compare.json").read_text())["runs"][0]["failure"]


def test_a_side_out_of_memory_is_not_asked_again(tmp_path, monkeypatch):
    asked = []

    def run(recipe, side, tokens, *others):
        asked.append((side, tokens))
        return Run(side, tokens, failure="out of memory") if side == "stock" else RUNS[1]

    monkeypatch.setattr(compare, "run", run)
    compare.main(lengths=(256, 512), sides=("stock", "lightning_moe"), out=tmp_path)
    assert asked == [("stock", 256), ("lightning_moe", 256), ("lightning_moe", 512)]


def test_brackets_are_printed_as_they_are(tmp_path, monkeypatch, capsys):
    failed = Run("stock", 256, failure="no option [model.rank] (see output.txt)")
    monkeypatch.setattr(compare, "run", lambda *_: failed)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--sides", "[stock, lightning_moe]"])
    compare.main(lengths=(256,), sides=("stock",), out=tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert "--sides [stock, lightning_moe]" in printed
    assert printed.count("no option [model.rank]") == 2


BAD = (
    {"devices": ()}, {"devices": (0,)}, {"steps": 0}, {"lengths": ()}, {"warmup": 8}, {"repeats": 0},
    {"recipe": Path("nowhere.yaml")},
)  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_arguments_are_refused(bad, tmp_path):
    with pytest.raises(SystemExit, match="compare needs at least one|there is no nowhere.yaml|--devices takes"):
        compare.main(out=tmp_path, **bad)


def test_the_command_line_reaches_the_function():
    command = [sys.executable, str(Path(compare.__file__)), "--recipe=nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "there is no nowhere.yaml" in done.stderr
