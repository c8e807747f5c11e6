"""The run's report: its rows are those of what was trained, and it hides no error and causes none."""

import csv
import re
from collections import namedtuple

import pytest
import torch
from helpers.models import Tiny, qwen3, qwen3_config, tokens, with_attention_lora
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lora.report import RunReport
from torch.utils.data import DataLoader, TensorDataset

from lightning_moe import AdapterExport, ExpertLoadMonitor, MemoryMonitor, MoEGateGradCallback, PlanOptions, plan_memory

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
]

Example = namedtuple("Example", "prompt answer")


class Data(LightningDataModule):
    """Four batches, and what the report asks of a data module."""

    held_out = [Example(" ", "to nothing"), Example("  What? ", "[/that] | <b>\nand this")]

    def report(self):
        return ["3 documents [of] them"]

    def train_dataloader(self):
        return DataLoader(TensorDataset(tokens(8)), batch_size=2)

    val_dataloader = train_dataloader


class Trained(Tiny):
    """Attention adapters, and what the report asks of a module."""

    description = {"attention": "varlen"}

    def __init__(self, stop=None):
        super().__init__(lambda: with_attention_lora(qwen3()))
        self.flops_per_batch = None
        self.stop, self.answers = stop, []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        if self.stop is not None and batch_idx == 2:
            raise self.stop
        return {"loss": loss + 1, "train/loss": loss.detach()}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.step(batch))

    def generate(self, data, prompt):
        assert prompt == "  What? "
        self.answers.append(f"[/answer] {len(self.answers)} | <b>\x1b")
        return self.answers[-1]


def trainer(tmp_path, *callbacks, **options):
    defaults = {
        "max_steps": 4,
        "log_every_n_steps": 1,
        "limit_val_batches": 1,
        "val_check_interval": 2,
        "num_sanity_val_steps": 0,
        "logger": CSVLogger(tmp_path, name="", version=""),
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **defaults | options)


def run(tmp_path, module=None, **options):
    """Four steps with all that the report reads; returns the module."""
    module = module or Trained()
    callbacks = [RunReport(), MoEGateGradCallback(), MemoryMonitor(0), ExpertLoadMonitor(), AdapterExport(),
                 ThroughputMonitor(lambda batch: 1, lambda batch: batch[0].numel(), window_size=2),
                 ModelCheckpoint(every_n_train_steps=2, save_last=True)]  # fmt: skip
    torch.manual_seed(0)
    trainer(tmp_path, *callbacks, **options).fit(module, datamodule=Data())
    return module


def text(folder):
    return (folder / "report" / "summary.md").read_text("utf-8")


def summary(folder):
    """The rows of summary.md, by name; of those with one name, all."""
    rows = {}
    for line in text(folder).splitlines():
        if line.startswith("| ") and line != "| | |":
            name, value = line.removeprefix("| ").removesuffix(" |").split(" | ", 1)
            rows[name] = f"{rows[name]}; {value}" if name in rows else value
    return rows


def test_the_report_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = run(tmp_path)
    rows, printed = summary(tmp_path), capsys.readouterr().out
    heat_map = tmp_path / "report" / re.search(r"!\[load of the experts\]\((.*)\)", text(tmp_path))[1]
    assert heat_map.read_bytes().startswith(b"\x89PNG")
    assert rows["run"] == "4 steps"
    assert rows["loss, first and last"] == f"{module.losses[0]:.4f} → {module.losses[-1]:.4f}"
    assert rows["MoE activations, baseline and now"].endswith("2 layers")
    assert rows["parameters that train"].startswith(
        f"{sum(p.numel() for p in module.parameters() if p.requires_grad):,} "
    )
    assert rows["attention"] == "varlen"
    assert f"torch {torch.__version__}" in rows["versions"]
    assert rows["prompt held out"] == "What?"
    assert rows["answer wanted"] == "[/that] \\| &lt;b&gt;<br>and this"
    assert (rows["answer before"], rows["answer after"]) == ("[/answer] 0 \\| &lt;b&gt;�", "[/answer] 1 \\| &lt;b&gt;�")
    assert rows["PEFT adapter, fused"] == "adapter"
    assert "verified" not in rows
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    for words in ("3 documents [of] them", "[/answer] 1 | <b>�", *rows):
        assert words in printed
    option, checkpoint = rows["to go on"].split()
    assert option == "--ckpt_path"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(("verify", "row"), [
    (lambda folder: f"yes, {folder} is right", "yes, adapter is right"),
    (lambda folder: 1 / 0, "not verified: division by zero"),
])  # fmt: skip
def test_what_the_module_says_of_its_adapters_is_a_row(tmp_path, monkeypatch, verify, row):
    monkeypatch.chdir(tmp_path)
    module = Trained()
    module.verify = verify
    run(tmp_path, module)
    rows = summary(tmp_path)
    assert rows["run"] == "4 steps"
    assert rows["verified"] == row


def test_the_memory_that_is_planned_is_said_at_the_start_and_at_the_end(tmp_path, capsys):
    class Planned(Trained):
        def planned_memory(self, data, output_buffer_mib):
            assert isinstance(data, Data)
            options = PlanOptions(tokens=16, dtype="float32", output_buffer_mib=output_buffer_mib)
            return plan_memory(qwen3_config(), options)

    run(tmp_path, Planned())
    printed = capsys.readouterr().out
    said = summary(tmp_path)["peak memory planned"]
    assert re.match(r"0\.\d\d GiB allocated on a GPU at most, 1\.\d\d GiB of its memory, in .*layer \d of 2", said)
    start = " ".join(printed.partition("Summary")[0].split())
    assert f"Memory planned: {said}." in start
    run(tmp_path, Trained())
    assert "peak memory planned" not in summary(tmp_path)


def test_numbers_of_the_rows_are_those_of_the_log(tmp_path):
    run(tmp_path)
    with open(tmp_path / "metrics.csv") as file:
        lines = list(csv.DictReader(file))

    def logged(name):
        return [float(line[name]) for line in lines if line.get(name)]

    rows = summary(tmp_path)
    assert rows["validation loss, first and last"] == " → ".join(f"{value:.4f}" for value in logged("val/loss"))
    assert rows["peak memory (resident)"] == f"{max(logged('memory/peak_allocated_gib')):.2f} GiB"
    assert rows["tokens per second and rank"] == f"{logged('train/device/items_per_sec')[-1]:,.0f}"
    assert rows["seconds per step"] == f"{1 / logged('train/device/batches_per_sec')[-1]:.3f}"


@pytest.mark.parametrize("error", [ValueError("no | <b>\nmore"), KeyboardInterrupt()])
def test_a_run_that_stops_has_a_report_of_what_there_is(tmp_path, error, capsys):
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else ValueError):
        run(tmp_path, Trained(stop=error))
    rows = summary(tmp_path)
    assert rows["run"].startswith(f"stopped after 2 steps: {type(error).__name__}(")
    assert "more" not in rows["run"]
    assert "--ckpt_path" in text(tmp_path)
    assert "answer before" in rows
    assert "answer after" not in rows
    assert not (tmp_path / "adapter").exists()
    assert "stopped after 2 steps" in capsys.readouterr().out


def test_a_report_that_fails_hides_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(RunReport, "_sample_rows", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="no"), pytest.warns(UserWarning, match="could not be written: ZeroDivision"):
        run(tmp_path, Trained(stop=ValueError("no")))


def test_no_report_of_a_run_that_did_not_train(tmp_path):
    module = Trained()
    module.configure_optimizers = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, module)
    assert not (tmp_path / "report").exists()


def test_an_error_before_setup_is_shown_as_it_is(tmp_path, monkeypatch):
    module = Trained()
    monkeypatch.setattr(module, "prepare_data", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, module)


def test_an_exception_after_an_earlier_fit_repeats_no_report(tmp_path):
    fitting = trainer(tmp_path, RunReport(), enable_checkpointing=False)
    fitting.fit(Trained(), datamodule=Data())
    (tmp_path / "report" / "summary.md").unlink()
    module = Trained()
    module.validation_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fitting.validate(module, datamodule=Data())
    assert not (tmp_path / "report" / "summary.md").exists()


def test_other_ranks_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lightning.pytorch.Trainer.is_global_zero", False)
    with pytest.raises(ValueError, match="no"):
        run(tmp_path, Trained(stop=ValueError("no")))
    module = run(tmp_path)
    assert len(module.answers) == 2
    assert not (tmp_path / "report").exists()
    assert not (tmp_path / "adapter").exists()
    assert "Summary" not in capsys.readouterr().out


def test_losses_are_those_that_are_logged_whatever_the_accumulation(tmp_path):
    module = run(tmp_path, accumulate_grad_batches=2, max_steps=2)
    first, last = summary(tmp_path)["loss, first and last"].split(" → ")
    assert [first, last] == [f"{module.losses[0]:.4f}", f"{module.losses[3]:.4f}"]


def test_without_a_prompt_there_is_no_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(Data, "held_out", [Example("", "to nothing")])
    module = run(tmp_path)
    assert module.answers == []
    assert not {"prompt held out", "answer wanted", "answer before", "answer after"} & summary(tmp_path).keys()
