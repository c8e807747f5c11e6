"""RunReport: what a run tells its user, on the terminal and in `report/summary.md`. Curves are in TensorBoard."""

import html
import math
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_moe import (
    AdapterExport,
    CUDAGraphCallback,
    ExpertLoadMonitor,
    MemoryMonitor,
    MoEGateGradCallback,
    __version__,
)

PACKAGES = ("torch", "transformers", "peft", "lightning")

MIB, GIB = 2**20, 2**30

C = TypeVar("C", bound=Callback)


class RunReport(Callback):
    """Prints what became of the data, generates an answer before and after training, ends with a summary.

    A run that an exception or Ctrl-C ends gets a summary too, of what there is by then.

    The LightningModule offers `network` and `generate(data, prompt)`, returns what it logs as `train/loss` from
    `training_step` by that name, and may offer rows of its own as `description`, by their names,
    `planned_memory(data, output_buffer_mib)`, and `verify(folder)`, in words whether an exported adapter is right. The
    data module offers `held_out` and `report()`. The answer is to the first prompt held out that is not empty.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._losses: list[Tensor] = []
        self._validation_losses: list[Tensor] = []
        self._peak_gib = 0.0
        self._planned = ""
        self._example: Any = None
        self._answers: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier run; an exception may come before this."""
        self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The data's report, and what memory is planned."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is asked of every rank, or hangs
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            self._planned = _planned_memory(trainer, pl_module)
            for line in [*data.report(), *([f"Memory planned: {self._planned}."] if self._planned else [])]:
                Console().print(Text(line))
        self._example = next((example for example in data.held_out if example.prompt.strip()), None)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The answer before training, of a checkpoint's adapter where there is one."""
        self._generate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the first and the last loss, left on their device, and the peak of memory where it is logged."""
        self._losses = [*self._losses[:1], outputs["train/loss"]]
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._note_peak(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the first and the last loss."""
        if "val/loss" in trainer.callback_metrics and not trainer.sanity_checking:
            self._validation_losses = [*self._validation_losses[:1], trainer.callback_metrics["val/loss"]]

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The answer after training, while the model is still on its device."""
        self._generate(trainer, pl_module)
        self._note_peak(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The summary, when other callbacks have written what they write at a fit's end."""
        if stage == "fit" and self._losses and trainer.is_global_zero:
            self._summarize(trainer, pl_module, f"{trainer.global_step} steps")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The summary of what there is."""
        if not self._losses or not trainer.is_global_zero:
            return
        try:
            reason = repr(exception).partition("\\n")[0]  # a traceback is no row of a table
            self._summarize(trainer, pl_module, f"stopped after {trainer.global_step} steps: {reason}")
        except Exception as error:
            rank_zero_warn(f"the report of the run that stopped could not be written: {error!r}")

    def _generate(self, trainer: Trainer, module: Any) -> None:
        if self._example is not None:
            self._answers.append(module.generate(trainer.datamodule, self._example.prompt))  # type: ignore[attr-defined]

    def _note_peak(self, trainer: Trainer) -> None:
        self._peak_gib = max(self._peak_gib, float(trainer.callback_metrics.get("memory/peak_allocated_gib", 0)))

    def _summarize(self, trainer: Trainer, module: LightningModule, outcome: str) -> None:
        path = self._folder / "report" / "summary.md"
        rows = [("run", outcome), *self._training_rows(trainer), *_model_rows(trainer, module), *self._sample_rows()]
        rows += [*_file_rows(trainer, module), ("report", os.path.relpath(path))]
        table = Table(title="Summary", title_justify="left", title_style="bold", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, Text(value))  # an answer's brackets are no markup
        Console().print(table)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_markdown(rows, trainer, path.parent), "utf-8")

    def _training_rows(self, trainer: Trainer) -> Iterator[tuple[str, str]]:
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        for kind, losses in (("", self._losses), ("validation ", self._validation_losses)):
            if losses:
                yield f"{kind}loss, first and last", f"{losses[0].item():.4f} → {losses[-1].item():.4f}"
        if "train/device/items_per_sec" in logged:
            yield "tokens per second and rank", f"{logged['train/device/items_per_sec']:,.0f}"
            seconds = trainer.accumulate_grad_batches / logged["train/device/batches_per_sec"]
            yield "seconds per step", f"{seconds:.3f}"
        if self._peak_gib:
            kind = "allocated" if trainer.strategy.root_device.type == "cuda" else "resident"
            yield f"peak memory ({kind})", f"{self._peak_gib:.2f} GiB"
        if self._planned:
            yield "peak memory planned", self._planned

    def _sample_rows(self) -> Iterator[tuple[str, str]]:
        if self._example is not None:
            yield "prompt held out", self._example.prompt.strip()
            yield "answer wanted", self._example.answer
        for name, answer in zip(("answer before", "answer after"), self._answers, strict=False):
            yield name, "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in answer)  # no control sequences


def _planned_memory(trainer: Trainer, module: Any) -> str:
    plans = getattr(module, "planned_memory", None)
    buffers = [callback.output_buffer_mib for callback in _of_type(trainer, MoEGateGradCallback)]
    plan = plans(trainer.datamodule, buffers[0]) if plans and buffers else None  # type: ignore[attr-defined]
    if plan is None:
        return ""
    said = f"{plan.allocated / GIB:.2f} GiB allocated on a GPU at most, {plan.peak / GIB:.2f} GiB of its memory"
    return f"{said}, in {plan.moment}"


def _model_rows(trainer: Trainer, module: LightningModule) -> Iterator[tuple[str, str]]:
    for callback in _of_type(trainer, MemoryMonitor):
        if callback.activations:
            kept = sum(layer.num_bytes for layer in callback.activations) / MIB
            baseline = sum((layer.baseline_num_bytes or math.nan for layer in callback.activations), 0.0) / MIB
            ratio = f"({kept / baseline:.2f}), {len(callback.activations)} layers"
            yield "MoE activations, baseline and now", f"{baseline:.2f} → {kept:.2f} MiB {ratio}"
    for monitor in _of_type(trainer, ExpertLoadMonitor):
        if monitor.expert_load:
            rows_of = monitor.expert_load.items()
            most, name = max((float(rows.max() / rows.double().mean().clamp_min(1e-9)), name) for name, rows in rows_of)
            yield "most loaded expert", f"{most:.2f} times its layer's mean, in {name.replace('.base_layer', '')}"
            idle = sum(int((rows == 0).sum()) for _, rows in rows_of)
            yield "experts without a token", f"{idle} of {sum(rows.numel() for _, rows in rows_of)}"
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters() if parameter.requires_grad}
    trained, total = sum(sizes.values()), sum(parameter.numel() for parameter in module.parameters())
    yield "parameters that train", f"{trained:,} of {total:,} ({trained / total:.2%})"
    if on_experts := sum(size for name, size in sizes.items() if ".experts." in name):
        yield "of these on experts", f"{on_experts:,}"
    yield from getattr(module, "description", {}).items()
    for graphs in _of_type(trainer, CUDAGraphCallback):
        yield "CUDA graph", "; ".join(graphs.lines) or "nothing was captured"
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    yield "device", name + (f", {trainer.world_size} ranks" if trainer.world_size > 1 else "")
    versions = {package: version(package) for package in PACKAGES} | {"lightning_moe": __version__}
    yield "versions", ", ".join(f"{package} {found}" for package, found in versions.items())


def _file_rows(trainer: Trainer, module: Any) -> Iterator[tuple[str, str]]:
    for logger in trainer.loggers:
        yield type(logger).__name__, os.path.relpath(logger.log_dir or logger.save_dir or ".")
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and (checkpoint := callback.last_model_path or callback.best_model_path):
        yield "to go on", f"--ckpt_path {os.path.relpath(checkpoint)}"
    for exporter in _of_type(trainer, AdapterExport):
        for layout, folder in exporter.folders.items():
            yield f"PEFT adapter, {layout}", os.path.relpath(folder)
            if hasattr(module, "verify"):
                yield "verified", _verify(module, os.path.relpath(folder))


def _verify(module: Any, folder: str) -> str:
    try:
        return str(module.verify(folder))
    except Exception as error:  # the adapter is written, and a report is no reason for a run to fail
        return f"not verified: {error}"


def _of_type(trainer: Trainer, kind: type[C]) -> list[C]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def _markdown(rows: list[tuple[str, str]], trainer: Trainer, folder: Path) -> str:
    def cell(text: str) -> str:
        return html.escape(text, quote=False).replace("|", "\\|").replace("\n", "<br>")

    table = [f"| {cell(name)} | {cell(value)} |" for name, value in rows]
    lines = ["# Run report", "", "| | |", "|---|---|", *table, ""]
    for monitor in _of_type(trainer, ExpertLoadMonitor):
        if monitor.heat_map is not None:
            lines += [f"![load of the experts]({os.path.relpath(monitor.heat_map, folder)})", ""]
    return "\n".join(lines)
