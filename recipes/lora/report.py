"""RunReport: what a run of qwen3_lora.py tells its user, on the terminal and as a folder with plots.

Curves are those of the CSVLogger's file, read at the end; nothing here runs in a step but for keeping the loss.
"""

import csv
import html
import math
import os
import platform
import shlex
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from lightning_moe import MemoryMonitor, MoEGateGradCallback, export_adapter

RECIPE = Path(__file__).parents[1] / "qwen3_lora.py"
PACKAGES = ("torch", "transformers", "peft", "lightning", "lightning_moe")

# Steps and values of what was logged, by name.
Curves = dict[str, tuple[list[int], list[float]]]

C = TypeVar("C", bound=Callback)


class RunReport(Callback):
    """Says what is patched and what the data are, shows a held-out answer before and after, writes adapters and report.

    The report is a table on the terminal, and `report/` beside the logs: the same table in `summary.md`, with the
    pictures `loss.png`, `memory.png` and `expert_load.png`. A run that an exception or Ctrl-C ends gets one too, of
    what there is by then, without adapters. A picture that cannot be made is named, and ends no run.

    The LightningModule offers `network`, `hparams["adapter_layouts"]` and `answer(data, prompt)`, returns what it logs
    as `train/loss` from `training_step` by that name, and may offer rows of its own as `description`, by their names;
    the data module offers `held_out` and `report()`. The answer is to the first prompt held out that is not empty.
    """

    def __init__(self) -> None:
        self._first_loss: Tensor | None = None
        self._last_loss: Tensor | None = None
        self._example: Any = None
        self._before = ""
        self._after: str | None = None
        self._folder = Path()
        self._adapters: dict[str, Path] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier run."""
        self._first_loss = self._last_loss = None
        self._after = None
        self._adapters = {}

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The patch report and the data's."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is asked of every process, or hangs
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            console = Console()
            for callback in _those(trainer, MoEGateGradCallback):
                if callback.report is not None:
                    console.print(callback.report)
            for line in data.report():
                console.print(Text(line))
        self._example = next((example for example in data.held_out if example.prompt.strip()), None)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The answer before training, of a checkpoint's adapter where there is one."""
        if self._example is not None:
            self._before = pl_module.answer(trainer.datamodule, self._example.prompt)  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the loss, left on its device."""
        self._last_loss = outputs["train/loss"]
        if self._first_loss is None:
            self._first_loss = self._last_loss

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The answer after training, while the model is still on its device."""
        if self._example is not None:
            self._after = pl_module.answer(trainer.datamodule, self._example.prompt)  # type: ignore[attr-defined]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The adapter folders and the report."""
        if self._last_loss is None:
            return
        sharded = any(isinstance(parameter, DTensor) for parameter in pl_module.parameters())
        if trainer.is_global_zero or sharded:  # then every process gives its share
            self._adapters = self._write_adapters(self._folder, pl_module)
        if trainer.is_global_zero:
            self._report(trainer, pl_module, f"{trainer.global_step} steps")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The report of what there is."""
        if not trainer.is_global_zero or self._last_loss is None or trainer.state.fn != "fit":
            return
        try:
            reason = repr(exception).partition("\\n")[0]  # a traceback is no row of a table
            self._report(trainer, pl_module, f"stopped after {trainer.global_step} steps: {reason}")
        except Exception as error:
            rank_zero_warn(f"the report of the run that stopped could not be written: {error!r}")

    def _write_adapters(self, folder: Path, module: LightningModule) -> dict[str, Path]:
        """One folder for each layout, under a name that is free: an earlier run's adapter stays."""
        written = {}
        for layout in dict.fromkeys(module.hparams["adapter_layouts"]):
            stem = "adapter" if layout == "fused" else f"adapter_{layout}"
            names = (stem if number == 0 else f"{stem}-{number}" for number in count())
            written[layout] = next(folder / name for name in names if not (folder / name).exists())
            export_adapter(module, written[layout], layout)
        return written

    def _report(self, trainer: Trainer, module: LightningModule, outcome: str) -> None:
        curves = read_curves(trainer)
        load = next((callback.expert_load for callback in _those(trainer, MoEGateGradCallback)), {})
        rows = [("run", outcome), *self._rows(trainer, module, curves or {}, load)]
        folder = self._folder / "report"
        pictures, left_out = _draw(folder, curves, load)
        rows += [("left out", reason) for reason in left_out]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.md").write_text(_markdown(rows, pictures, self._resume_command(trainer)), "utf-8")
            rows.append(("report", os.path.relpath(folder)))
        except OSError as error:
            rank_zero_warn(f"{folder / 'summary.md'} could not be written: {error}")
        table = Table(title="Summary", title_justify="left", title_style="bold", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, Text(value))  # an answer's brackets are no markup
        Console().print(table)

    def _rows(
        self, trainer: Trainer, module: LightningModule, curves: Curves, load: dict[str, Tensor]
    ) -> Iterator[tuple[str, str]]:
        device = trainer.strategy.root_device
        assert self._first_loss is not None
        assert self._last_loss is not None
        yield "loss, first and last", f"{self._first_loss.item():.4f} → {self._last_loss.item():.4f}"
        if "val/loss" in curves:
            losses = curves["val/loss"][1]
            yield "validation loss, first and last", f"{losses[0]:.4f} → {losses[-1]:.4f}"
        if "speed/tokens_per_second" in curves:
            yield "tokens per second and process, median", f"{median(curves['speed/tokens_per_second'][1]):,.0f}"
        if "speed/mfu" in curves:
            yield "model FLOPs utilisation, median", f"{median(curves['speed/mfu'][1]):.1%}"
        if "memory/peak_allocated_gib" in curves:
            kind = "allocated" if device.type == "cuda" else "resident"
            yield f"peak memory ({kind})", f"{max(curves['memory/peak_allocated_gib'][1]):.2f} GiB"
        for callback in _those(trainer, MemoryMonitor):
            if callback.tape:
                kept = sum(layer.num_bytes for layer in callback.tape)
                stock = sum(layer.stock_num_bytes or math.nan for layer in callback.tape)
                sizes = f"{stock / 2**20:.2f} → {kept / 2**20:.2f} MiB ({kept / stock:.2f})"
                yield "MoE tape, stock and now", f"{sizes}, {len(callback.tape)} layers"
        if load:
            name, most = max(((name, _over_mean(rows).max().item()) for name, rows in load.items()), key=lambda x: x[1])
            idle = sum(int((rows == 0).sum()) for rows in load.values())
            yield "most loaded expert", f"{most:.2f} times its layer's mean, in {name.replace('.base_layer', '')}"
            yield "experts without a row", f"{idle} of {sum(rows.numel() for rows in load.values())}"
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in module.parameters())
        on_experts = sum(p.numel() for n, p in module.named_parameters() if p.requires_grad and ".experts." in n)
        yield "parameters that train", f"{trained:,} of {total:,} ({trained / total:.2%})"
        if on_experts:
            yield "of these on experts", f"{on_experts:,}"
        yield from getattr(module, "description", {}).items()
        yield "device", _device_name(device) + (f", {trainer.world_size} processes" if trainer.world_size > 1 else "")
        yield "versions", ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        if self._example is not None:
            yield "prompt held out", self._example.prompt.strip()
            yield "answer wanted", self._example.answer
            yield "answer before", self._before
        if self._after is not None:
            yield "answer after", self._after
        for logger in trainer.loggers:
            yield type(logger).__name__, os.path.relpath(logger.log_dir or logger.save_dir or ".")
        if checkpoint := _checkpoint(trainer):
            yield "checkpoint", os.path.relpath(checkpoint)
        for layout, folder in self._adapters.items():
            yield f"PEFT adapter, {layout}", os.path.relpath(folder)

    def _resume_command(self, trainer: Trainer) -> str | None:
        checkpoint, config = _checkpoint(trainer), self._folder / "config.yaml"
        if checkpoint is None:
            return None
        words = ["python", os.path.relpath(RECIPE), "fit"]
        if config.exists():  # as LightningCLI leaves it
            words += ["--config", os.path.relpath(config)]
        return shlex.join([*words, "--ckpt_path", os.path.relpath(checkpoint)])


def _those(trainer: Trainer, kind: type[C]) -> list[C]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def _checkpoint(trainer: Trainer) -> str | None:
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint):
        return None
    return callback.last_model_path or callback.best_model_path or None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def read_curves(trainer: Trainer) -> Curves | None:
    """What the first CSVLogger has; None where there is no such logger."""
    logger = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
    if logger is None:
        return None
    logger.save()
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.exists():
        return {}
    curves: Curves = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return curves


def _over_mean(rows: Tensor) -> Tensor:
    """Each expert's rows over their mean, (experts,) float64; zeros where there are no rows."""
    return rows.double() / rows.double().mean().clamp_min(torch.finfo(torch.float64).tiny)


def _draw(folder: Path, curves: Curves | None, load: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Writes the pictures; returns the names of those, and what is left out and how to get it."""
    logged = curves or {}
    no_curves = ""
    if curves is None:
        no_curves = "add lightning.pytorch.loggers.CSVLogger to trainer.logger"
    elif "train/loss" not in curves:
        no_curves = "no step was logged: lower trainer.log_every_n_steps"
    plots: tuple[tuple[str, Callable[[], Figure | None], str], ...] = (
        ("loss.png", lambda: plot_loss(logged), no_curves),
        ("memory.png", lambda: plot_memory(logged), no_curves or "add lightning_moe.MemoryMonitor to the callbacks"),
        ("expert_load.png", lambda: plot_expert_load(load, logged), "it needs MoEGateGradCallback, switched on"),
    )
    pictures, left_out = [], []
    for name, plot, remedy in plots:
        try:
            figure = plot()
            if figure is None:
                left_out.append(f"{name}: {remedy}")
                continue
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / name, dpi=130)
            pictures.append(name)
        except Exception as error:
            rank_zero_warn(f"{folder / name} could not be made: {error!r}")
            left_out.append(f"{name}: {error!r}")
    if load and no_curves:
        left_out.append(f"expert_load.png over steps: {no_curves}")
    return pictures, left_out


def plot_loss(curves: Curves) -> Figure | None:
    """Loss, gradient norm and learning rate over steps, as far as they were logged; None without a loss."""
    losses = {"train/loss": "training", "val/loss": "validation"}
    if not curves.keys() & losses:
        return None
    rates = {name: "" for name in sorted(curves) if name.startswith("lr-")}
    panels = [("loss", losses), ("gradient norm\nbefore clipping", {"train/grad_norm": ""}), ("learning rate", rates)]
    return _stacked("Training", panels, curves)


def plot_memory(curves: Curves) -> Figure | None:
    """What was held and its peaks over steps; None where MemoryMonitor logged nothing."""
    held = {"memory/peak_allocated_gib": "peak since the last log", "memory/allocated_gib": "held after the step"}
    if not curves.keys() & held:
        return None
    panels = [("GiB", held), ("GiB", {"memory/step_peak_gib": "largest rise within a step"})]
    return _stacked("Memory, the maximum over processes", panels, curves)


def plot_expert_load(load: dict[str, Tensor], curves: Curves) -> Figure | None:
    """Each expert's rows over its layer's mean, beside what was logged of it over steps; None where none were counted.

    Args:
        load: (experts,) int64 rows, by layer.
        curves: as logged.
    """
    if not load:
        return None
    over_mean = pad_sequence([_over_mean(rows) for rows in load.values()], batch_first=True, padding_value=torch.nan)
    figure = _figure(12, max(4.5, min(9.0, 1.5 + 0.15 * len(load))), "Load of the experts")
    over_steps = {
        "gategrad/load_max_over_mean": "most loaded expert\nover its layer's mean",
        "gategrad/idle_experts": "experts without a row\nsince the last log",
    }
    logged = [name for name in over_steps if name in curves]
    grid = figure.add_gridspec(max(len(logged), 1), 2 if logged else 1, width_ratios=(3, 2) if logged else None)
    axes = figure.add_subplot(grid[:, 0])
    axes.set_facecolor("lightgrey")  # where a layer has fewer experts
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, over_mean.nan_to_num().max().item()))
    picture = axes.imshow(over_mean.numpy(), norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="rows over the layer's mean, whole run")
    axes.set(xlabel="expert", ylabel="MoE layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for position, name in enumerate(logged):
        beside = figure.add_subplot(grid[position, 1], xlabel="step", ylabel=over_steps[name])
        _curve(beside, curves, name)
        _from_zero(beside)
    return figure


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def _stacked(title: str, panels: list[tuple[str, dict[str, str]]], curves: Curves) -> Figure:
    """Panels over the same steps, each with the label of its axis and those of its curves."""
    shown = [(label, names) for label, names in panels if curves.keys() & names]
    figure = _figure(8, 1.2 + 2.2 * len(shown), title)
    grid = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for axes, (label, names) in zip(grid, shown, strict=True):
        for name in (name for name in names if name in curves):
            _curve(axes, curves, name, label=names[name])
        axes.set_ylabel(label)
        _from_zero(axes)
        if any(names.values()):
            axes.legend(frameon=False)
    grid[-1].set_xlabel("step")
    return figure


def _curve(axes: Axes, curves: Curves, name: str, label: str = "") -> None:
    steps, values = curves[name]
    axes.plot(steps, values, marker="." if len(steps) < 60 else "", label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="y", scilimits=(-3, 6))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _from_zero(axes: Axes) -> None:
    values = [value for line in axes.lines for value in np.asarray(line.get_ydata()) if math.isfinite(value)]
    axes.set_ylim(0, 1.08 * max(values, default=0) or 1)


def _markdown(rows: list[tuple[str, str]], pictures: list[str], resume: str | None) -> str:
    def cell(text: str) -> str:
        return html.escape(text, quote=False).replace("|", "\\|").replace("\n", "<br>")

    table = [f"| {cell(name)} | {cell(value)} |" for name, value in rows]
    lines = ["# Run report", "", "| | |", "|---|---|", *table, ""]
    for picture in pictures:
        lines += [f"![{Path(picture).stem.replace('_', ' ')}]({picture})", ""]
    if resume is not None:
        lines += ["To go on from the last checkpoint:", "", "```bash", resume, "```", ""]
    return "\n".join(lines)
