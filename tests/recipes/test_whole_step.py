"""Tests of the benchmark of whole steps: its arithmetic on made-up runs, its plot, one small run of the real thing."""

import io
import json
import runpy
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import qwen3_lora
import whole_step
import yaml
from matplotlib.image import imread
from whole_step import Run, plot, rows_of, write_overlay

RUNS = [
    Run("baseline", 256, [2.0, 1.5, 1.0], [9.0, 2.0, 2.2], [9.0, 10.0, 9.5], [9.0, 6.0, 5.0]),
    Run("lightning_moe", 256, [2.0, 1.51, 1.0], [9.0, 1.0, 1.2], [8.0] * 3, [8.0, 3.0, 3.0]),
    Run("baseline", 512, failure="out of memory"),
    Run("lightning_moe", 512, [1.0, 1.0, 1.0], [3.0, 3.0, 3.0], [12.0] * 3, [9.0, 7.0, 7.0]),
]


def test_the_table_gives_medians_after_the_warmup_and_ratios_to_the_baseline():
    rows = rows_of(RUNS, warmup=1)
    assert rows[0] == ["256", "baseline", "10.00", "6.00", "2.100", "122", ""]
    assert rows[1] == ["256", "lightning_moe", "8.00", "3.00 (0.50)", "1.100 (0.52)", "233", "0.01"]
    assert rows[2] == ["512", "baseline", "out of memory", "", "", "", ""]
    assert rows[3] == ["512", "lightning_moe", "12.00", "7.00", "3.000", "171", ""]


def test_the_plot_shows_where_memory_runs_out(tmp_path):
    plot(RUNS, "title", 79.2, tmp_path / "with.png")
    plot([run for run in RUNS if not run.failure], "title", 79.2, tmp_path / "without.png")
    pictures = [imread(tmp_path / name) for name in ("with.png", "without.png")]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).any()


def test_each_variants_configuration(tmp_path):
    baseline, mine = (
        yaml.safe_load(write_overlay(whole_step.TINY, variant, 128, 3, tmp_path / variant).read_text())
        for variant in ("baseline", "lightning_moe+offload")
    )
    assert baseline["model"]["attention"] == "sdpa"
    assert baseline["model"]["liger"] is False
    assert mine["model"]["offload"] is True
    assert "attention" not in mine["model"]
    for settings in (baseline, mine):
        assert settings["data"]["max_length"] == 128
        names = [callback["class_path"] for callback in settings["trainer"]["callbacks"]]
        assert names == ["lightning_moe.MoEGateGradCallback", "benchmarks.step_recorder.StepRecorder"]
        assert "strategy" not in settings["trainer"]


def test_the_callbacks_options_are_those_of_the_recipe(tmp_path):
    base = whole_step.TINY.with_name("qwen3_30b_a3b.yaml")
    callbacks = yaml.safe_load(base.read_text())["trainer"]["callbacks"]
    overlay = yaml.safe_load(write_overlay(base, "lightning_moe", 128, 3, tmp_path).read_text())
    options = [c["init_args"] for c in callbacks if c["class_path"] == "lightning_moe.MoEGateGradCallback"]
    assert options == [overlay["trainer"]["callbacks"][0]["init_args"]]


def test_the_data_are_long_enough_for_a_sequence_on_each_of_eight_ranks(tmp_path):
    settings = yaml.safe_load(write_overlay(whole_step.TINY, "baseline", 9_000, 3, tmp_path).read_text())
    records = [json.loads(line) for line in Path(settings["data"]["source"]).read_text().splitlines()]
    # A token of a large vocabulary has about four bytes; one document in twenty is held out.
    assert sum(len(record["prompt"] + record["completion"]) for record in records) * 0.95 / 4 > 8 * 9_000


def recipe_in_this_process(command, run=subprocess.run, **options):
    """Takes the place of subprocess.run where it is the recipe's command line that counts, and not its process."""
    if command[:2] != [sys.executable, qwen3_lora.__file__]:
        return run(command, **options)
    out, err, status = io.StringIO(), io.StringIO(), 0
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(action="ignore"):
            qwen3_lora.main(command[2:])
    except SystemExit as leaving:
        status = leaving.code
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def test_the_overlay_for_several_gpus_is_an_option(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_step.subprocess, "run", recipe_in_this_process)
    options = (f"--config={whole_step.TINY.with_name('fsdp.yaml')}", "--print_config")
    with pytest.raises(FileNotFoundError, match=r"steps\.json"):
        whole_step.run(whole_step.TINY, "baseline", 96, 2, options, tmp_path)
    trainer = yaml.safe_load((tmp_path / "output.txt").read_text())["trainer"]
    assert trainer["strategy"]["init_args"]["num_ranks"] == trainer["devices"] == 2


def test_the_whole_on_the_cpu(tmp_path, capsys):
    variants = ("baseline", "baseline+liger", "lightning_moe")
    whole_step.main(lengths=(96,), variants=variants, steps=2, warmup=1, out=tmp_path)
    assert "baseline+liger is left out: it needs a GPU" in capsys.readouterr().out
    results = json.loads((tmp_path / "whole_step.json").read_text())
    baseline, mine = results["runs"]
    assert (baseline["variant"], mine["variant"]) == ("baseline", "lightning_moe")
    assert len(baseline["losses"]) == len(mine["losses"]) == 3
    assert max(abs(a - b) for a, b in zip(baseline["losses"], mine["losses"], strict=True)) < 1e-4
    assert baseline["losses"][0] != baseline["losses"][-1]
    for one in (baseline, mine):
        assert [len(one[name]) for name in ("seconds", "peak_gib", "above_gib")] == [3] * 3
        assert all(0.001 < seconds < 60 for seconds in one["seconds"])
        assert all(0 <= above < peak < 100 for above, peak in zip(one["above_gib"], one["peak_gib"], strict=True))
    assert "python recipes/benchmarks/whole_step.py" in (tmp_path / "whole_step.md").read_text()
    assert (tmp_path / "whole_step.png").stat().st_size > 1000


def test_a_variant_that_fails_is_named_with_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_step.subprocess, "run", recipe_in_this_process)
    options = ("--model.rank=-1",)
    whole_step.main(lengths=(96,), variants=("lightning_moe",), steps=2, warmup=0, options=options, out=tmp_path)
    assert (
        "-1 does not conform to restriction v>0"
        in json.loads((tmp_path / "whole_step.json").read_text())["runs"][0]["failure"]
    )


def test_a_variant_out_of_memory_is_not_run_again(tmp_path, monkeypatch):
    asked = []

    def run(recipe, variant, tokens, *others):
        asked.append((variant, tokens))
        return Run(variant, tokens, failure="out of memory") if variant == "baseline" else RUNS[1]

    monkeypatch.setattr(whole_step, "run", run)
    whole_step.main(lengths=(256, 512), variants=("baseline", "lightning_moe"), out=tmp_path)
    assert asked == [("baseline", 256), ("lightning_moe", 256), ("lightning_moe", 512)]


def test_brackets_are_printed_as_they_are(tmp_path, monkeypatch, capsys):
    failed = Run("baseline", 256, failure="no option [model.rank] (see output.txt)")
    monkeypatch.setattr(whole_step, "run", lambda *_: failed)
    monkeypatch.setattr(sys, "argv", ["whole_step.py", "--variants", "[baseline, lightning_moe]"])
    whole_step.main(lengths=(256,), variants=("baseline",), out=tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert "--variants [baseline, lightning_moe]" in printed
    assert printed.count("no option [model.rank]") == 2


@pytest.mark.parametrize("bad", ["--steps=0", "--warmup=-1", "--lengths=[0]"])
def test_bad_arguments_are_named(bad, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["whole_step.py", bad])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(whole_step.__file__, run_name="__main__")
    assert bad.partition("=")[0].strip("-") in capsys.readouterr().err


def test_the_command_line_reaches_the_function(tmp_path, monkeypatch):
    arguments = ["--lengths=[96]", "--variants=[baseline]", "--steps=2", "--warmup=0", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["whole_step.py", *arguments, "--options=[--print_config]"])
    with pytest.raises(FileNotFoundError, match=r"steps\.json"):  # nothing has trained
        runpy.run_path(whole_step.__file__, run_name="__main__")
    settings = yaml.safe_load((tmp_path / "96-baseline" / "output.txt").read_text())
    assert (settings["data"]["max_length"], settings["trainer"]["max_steps"]) == (96, 2)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        whole_step.main(recipe=Path("nowhere.yaml"), out=tmp_path)
