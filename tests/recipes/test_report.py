"""The run's report: its rows and pictures are those of what was trained, and it hides no error and causes none."""

import os
import shlex
from collections import namedtuple

import pytest
import torch
from helpers.models import Tiny, qwen3, tokens, with_attention_lora
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lora import report
from lora.report import RunReport, plot_expert_load, plot_loss, plot_memory
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, TensorDataset

from lightning_moe import MemoryMonitor, MoEGateGradCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
]

PICTURES = {"loss.png", "memory.png", "expert_load.png"}
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

    description = {"attention": "documents"}

    def __init__(self, stop=None):
        super().__init__(lambda: with_attention_lora(qwen3()))
        self.save_hyperparameters({"adapter_layouts": ["fused"]})
        self.stop, self.answers = stop, []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        if self.stop is not None and batch_idx == 2:
            raise self.stop
        return {"loss": loss + 1, "train/loss": loss.detach()}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.step(batch))

    def answer(self, data, prompt):
        assert prompt == "  What? "
        self.answers.append(f"[/answer] {len(self.answers)} | <b>")
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


def run(tmp_path, module=None, *, without=(), **options):
    """Four steps with all that the report reads, but for what is left out; returns the module."""
    module = module or Trained()
    callbacks = [MoEGateGradCallback(), MemoryMonitor(tape_at_step=0), LearningRateMonitor(),
                 ModelCheckpoint(every_n_train_steps=2, save_last=True), RunReport()]  # fmt: skip
    kept = [callback for callback in callbacks if not isinstance(callback, tuple(without))]
    torch.manual_seed(0)
    trainer(tmp_path, *kept, **options).fit(module, datamodule=Data())
    return module


def summary(folder):
    """The rows of summary.md, by name; of those with one name, all."""
    rows = {}
    for line in (folder / "report" / "summary.md").read_text("utf-8").splitlines():
        if line.startswith("| ") and line != "| | |":
            name, value = line.removeprefix("| ").removesuffix(" |").split(" | ", 1)
            rows[name] = f"{rows[name]}; {value}" if name in rows else value
    return rows


def files(folder):
    return {path.name for path in (folder / "report").iterdir()}


def test_the_report_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").touch()
    module = run(tmp_path)
    rows, printed = summary(tmp_path), capsys.readouterr().out
    assert files(tmp_path) == PICTURES | {"summary.md"}
    for name in PICTURES:
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert rows["run"] == "4 steps"
    assert rows["loss, first and last"] == f"{module.losses[0]:.4f} → {module.losses[-1]:.4f}"
    assert rows["MoE tape, stock and now"].endswith("2 layers")
    assert rows["parameters that train"].startswith(
        f"{sum(p.numel() for p in module.parameters() if p.requires_grad):,} "
    )
    assert rows["attention"] == "documents"
    assert f"torch {torch.__version__}" in rows["versions"]
    assert rows["prompt held out"] == "What?"
    assert rows["answer wanted"] == "[/that] \\| &lt;b&gt;<br>and this"
    assert (rows["answer before"], rows["answer after"]) == ("[/answer] 0 \\| &lt;b&gt;", "[/answer] 1 \\| &lt;b&gt;")
    assert rows["PEFT adapter, fused"] == "adapter"
    assert "left out" not in rows
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    for words in ("2 active, 0 fallback", "3 documents [of] them", "[/answer] 1 | <b>", *rows):
        assert words in printed
    text = (tmp_path / "report" / "summary.md").read_text("utf-8")
    for name in PICTURES:
        assert f"]({name})" in text
    words = shlex.split(text.partition("```bash\n")[2].partition("\n```")[0])
    assert words[0] == "python"
    assert os.path.samefile(words[1], report.RECIPE)
    assert words[2:-1] == ["fit", "--config", "config.yaml", "--ckpt_path"]
    assert words[-1] == rows["checkpoint"]
    assert torch.load(words[-1], weights_only=True)["global_step"] == 4


def test_figures_of_the_rows_are_those_of_the_log(tmp_path):
    module = run(tmp_path)
    curves = report.read_curves(module.trainer)
    rows = summary(tmp_path)
    assert curves["train/loss"][1] == pytest.approx(module.losses)
    assert curves["val/loss"][0] == [1, 3]
    assert rows["validation loss, first and last"] == " → ".join(f"{value:.4f}" for value in curves["val/loss"][1])
    assert rows["peak memory (resident)"] == f"{max(curves['memory/peak_allocated_gib'][1]):.2f} GiB"


@pytest.mark.parametrize("error", [ValueError("no | <b>\nmore"), KeyboardInterrupt()])
def test_a_run_that_stops_has_a_report_of_what_there_is(tmp_path, error, capsys):
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else ValueError):
        run(tmp_path, Trained(stop=error))
    rows = summary(tmp_path)
    assert files(tmp_path) == PICTURES | {"summary.md"}
    assert rows["run"].startswith(f"stopped after 2 steps: {type(error).__name__}(")
    assert "more" not in rows["run"]
    assert "--ckpt_path" in (tmp_path / "report" / "summary.md").read_text("utf-8")
    assert "answer before" in rows
    assert "answer after" not in rows
    assert not (tmp_path / "adapter").exists()
    assert "stopped after 2 steps" in capsys.readouterr().out


def test_a_report_that_fails_hides_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(RunReport, "_rows", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="no"), pytest.warns(UserWarning, match="could not be written: ZeroDivision"):
        run(tmp_path, Trained(stop=ValueError("no")))


def test_no_report_of_a_run_that_did_not_train(tmp_path):
    module = Trained()
    module.configure_optimizers = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, module)
    assert not (tmp_path / "report").exists()


def test_an_exception_after_an_earlier_fit_repeats_no_report(tmp_path):
    fitting = trainer(tmp_path, RunReport(), enable_checkpointing=False)
    fitting.fit(Trained(), datamodule=Data())
    (tmp_path / "report" / "summary.md").unlink()
    module = Trained()
    module.validation_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fitting.validate(module, datamodule=Data())
    assert not (tmp_path / "report" / "summary.md").exists()


@pytest.mark.parametrize(
    ("without", "options", "pictures", "remedy"),
    [
        ((), {"logger": "tensorboard"}, {"expert_load.png"}, "loss.png: add lightning.pytorch.loggers.CSVLogger"),
        ((), {"log_every_n_steps": 9, "limit_val_batches": 0}, {"expert_load.png"}, "lower trainer.log_every_n_steps"),
        ((MemoryMonitor,), {}, {"loss.png", "expert_load.png"}, "memory.png: add lightning_moe.MemoryMonitor"),
        ((MoEGateGradCallback,), {}, {"loss.png", "memory.png"}, "expert_load.png: it needs MoEGateGradCallback"),
    ],
)
def test_pictures_without_figures_are_named_with_the_remedy(tmp_path, without, options, pictures, remedy):
    if options.get("logger"):
        options = {"logger": TensorBoardLogger(tmp_path, name="", version="")}
    run(tmp_path, without=without, **options)
    assert files(tmp_path) == pictures | {"summary.md"}
    assert remedy in summary(tmp_path)["left out"]


def test_a_picture_that_fails_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plot_memory", lambda curves: 1 / 0)
    with pytest.warns(UserWarning, match=r"memory.png could not be made: ZeroDivisionError"):
        run(tmp_path)
    assert files(tmp_path) == PICTURES - {"memory.png"} | {"summary.md"}
    assert "memory.png: ZeroDivisionError" in summary(tmp_path)["left out"]


@pytest.mark.filterwarnings("ignore:.*could not be made")
def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    (tmp_path / "report").touch()
    with pytest.warns(UserWarning, match="summary.md could not be written"):
        run(tmp_path)
    assert "loss, first and last" in capsys.readouterr().out


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
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


def test_an_earlier_adapter_is_left_alone(tmp_path):
    module = run(tmp_path)
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    module.hparams["adapter_layouts"] = ["fused", "fused"]
    assert RunReport()._write_adapters(tmp_path, module) == {"fused": tmp_path / "adapter-1"}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


CURVES = {
    "train/loss": ([0, 1, 2], [3.0, float("nan"), 1.0]),
    "val/loss": ([2], [4.0]),
    "lr-AdamW": ([0, 1, 2], [0.0, 1e-4, 1e-4]),
    "memory/peak_allocated_gib": ([0, 1], [5.0, 6.0]),
    "memory/step_peak_gib": ([0, 1], [1.0, 2.0]),
    "gategrad/load_max_over_mean": ([0, 1], [2.0, 3.0]),
    "gategrad/idle_experts": ([0, 1], [0.0, 0.0]),
}


def drawn(figure):
    """Labels of axes with the points of their lines."""
    assert isinstance(figure, Figure)
    return {
        axes.get_ylabel(): [list(zip(*line.get_data(), strict=True)) for line in axes.lines]
        for axes in figure.axes
        if axes.lines
    }


def test_curves_show_what_was_logged():
    losses = drawn(plot_loss(CURVES))
    assert list(losses) == ["loss", "learning rate"]  # no gradient norm was logged
    assert losses["loss"][1] == [(2, 4.0)]
    assert losses["learning rate"] == [[(0, 0.0), (1, 1e-4), (2, 1e-4)]]
    assert drawn(plot_memory(CURVES))["GiB"] == [[(0, 1.0), (1, 2.0)]]
    assert len(plot_memory(CURVES).axes) == 2
    for figure in (plot_loss(CURVES), plot_memory(CURVES)):
        for axes in figure.axes:
            low, high = axes.get_ylim()
            assert low == 0
            assert high > max(value for line in axes.lines for value in line.get_ydata() if value == value)


def test_the_heat_map_is_each_experts_rows_over_the_mean():
    load = {"one": torch.tensor([6, 0, 3, 3]), "two": torch.tensor([1, 3]), "three": torch.tensor([0, 0, 0, 0])}
    figure = plot_expert_load(load, CURVES)
    (image,) = (image for axes in figure.axes for image in axes.images)
    shown = image.get_array()
    assert shown.filled(-1).tolist() == [[2, 0, 1, 1], [0.5, 1.5, -1, -1], [0, 0, 0, 0]]
    assert (image.norm.vmin, image.norm.vcenter, image.norm.vmax) == (0, 1, 2)
    assert sorted(line for lines in drawn(figure).values() for line in lines) == [[(0, 0.0), (1, 0.0)],
                                                                                  [(0, 2.0), (1, 3.0)]]  # fmt: skip
    assert drawn(plot_expert_load(load, {})) == {}


def test_nothing_logged_gives_no_figure():
    assert plot_loss({}) is plot_memory({}) is plot_expert_load({}, CURVES) is None
