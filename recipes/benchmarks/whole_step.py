"""Whole training steps of qwen3_lora.py: the baseline beside the callback, each run in a process of its own, in turn.

    python recipes/benchmarks/whole_step.py                  the tiny model on the CPU
    python recipes/benchmarks/whole_step.py --recipe recipes/configs/qwen3_30b_a3b.yaml --lengths "[4096, 16384, 65536]"

README.md beside this file says what each column means and gives more commands. Writes whole_step.md, whole_step.json
and whole_step.png, the memory against the length, which shows where a variant runs out of memory.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice, product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import yaml
from jsonargparse import auto_cli
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from tables import provenance, show, write

RECIPES = Path(__file__).parents[1]
TINY = RECIPES / "configs" / "tiny.yaml"
FSDP = RECIPES / "configs" / "fsdp.yaml"
TEXT = RECIPES / "lora" / "tiny.jsonl"
OUT_OF_MEMORY = ("OutOfMemoryError", "can't allocate memory", "out of memory")

VariantName = Literal[
    "baseline", "baseline+liger", "baseline+liger+selective", "lightning_moe+full", "lightning_moe",
    "lightning_moe+offload",
]  # fmt: skip
BASELINE = {
    "attention": "sdpa", "liger": False, "checkpointing": "full", "offload": False,
    "tile_tokens": 0, "fused_lora": False,
}  # fmt: skip
VARIANTS: dict[VariantName, dict[str, Any]] = {
    "baseline": BASELINE,
    "baseline+liger": {**BASELINE, "liger": True},
    "baseline+liger+selective": {**BASELINE, "liger": True, "attention": "varlen", "checkpointing": "selective"},
    "lightning_moe+full": {"checkpointing": "full", "offload": False},
    "lightning_moe": {"checkpointing": "selective", "offload": False},
    "lightning_moe+offload": {"checkpointing": "selective", "offload": True},
}
HEADERS = [
    "tokens", "devices", "variant", "peak GiB", "above weights GiB", "s per step", "tokens/s", "largest loss deviation",
    "repeats",
]  # fmt: skip


@dataclass
class Run:
    """One process.

    Attributes:
        variant: what ran.
        tokens: in each step, of each device.
        losses: of each step.
        seconds: of each step.
        peak_gib: the most that was allocated in each step.
        above_gib: the same above what was held when the step began: weights, adapters and, from the second step on, the
            optimizer's moments.
        failure: why there are no numbers; empty where there are.
        devices: over which the model is sharded, one process each; `losses` are means over them, memory the maximum.
    """

    variant: VariantName
    tokens: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)
    above_gib: list[float] = field(default_factory=list)
    failure: str = ""
    devices: int = 1


def write_overlay(base: Path, variant: VariantName, tokens: int, steps: int, folder: Path, devices: int = 1) -> Path:
    """The configuration of one process, to be read after the base's, and its data: long enough for one sequence."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    num_bytes = 5 * tokens * devices  # a token of a large vocabulary has four or five
    copies = -(-num_bytes // sum(map(len, lines))) + 1
    (folder / "data.jsonl").write_text("\n".join(islice(cycle(lines), copies * len(lines))), encoding="utf-8")
    settings = yaml.safe_load(base.read_text())["trainer"]
    recorder = {
        "class_path": "benchmarks.step_recorder.StepRecorder",
        "init_args": {"path": str(folder / "steps.json")},
    }
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}}
    gate_grad = [c for c in settings["callbacks"] if c["class_path"].endswith(".MoEGateGradCallback")]
    trainer = {
        "max_steps": steps, "limit_val_batches": 0, "val_check_interval": None, "log_every_n_steps": steps + 1,
        "enable_checkpointing": False, "enable_progress_bar": False, "logger": logger,
        "accelerator": settings["accelerator"], "devices": devices, "callbacks": [*gate_grad, recorder],
    }  # fmt: skip
    data = {"source": str(folder / "data.jsonl"), "packing": "wrapped", "max_length": tokens, "batch_size": 1}
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump({"model": VARIANTS[variant], "data": data, "trainer": trainer}))
    return path


def command_of(base: Path, overlay: Path, devices: int, options: tuple[str, ...]) -> list[str]:
    """The recipe's command line, with its overlay for several devices where there are several."""
    command = [sys.executable, str(RECIPES / "qwen3_lora.py"), "fit", "--config", str(base)]
    if devices > 1:
        command += ["--config", str(FSDP), f"--trainer.strategy.init_args.num_ranks={devices}"]
    return [*command, "--config", str(overlay), *options]


def run(
    base: Path, variant: VariantName, tokens: int, steps: int, options: tuple[str, ...], folder: Path, devices: int = 1
) -> Run:
    """Trains in a process of its own, or one for each device, and reads what it recorded."""
    overlay = write_overlay(base, variant, tokens, steps, folder, devices)
    command = command_of(base, overlay, devices, options)
    environment = {**os.environ, "LIGHTNING_MOE_GATEGRAD": "0" if variant.startswith("baseline") else "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    if not done.returncode:
        return Run(variant, tokens, **json.loads((folder / "steps.json").read_text()), devices=devices)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    is_memory = any(words in done.stderr for words in OUT_OF_MEMORY)
    failure = "out of memory" if is_memory else f"{last} (see {folder / 'output.txt'})"
    return Run(variant, tokens, failure=failure, devices=devices)


def rows_of(runs: list[Run], warmup: int) -> list[list[str]]:
    """The table: one row for each length, number of devices and variant; medians over steps and repeats.

    Ratios are to the first variant on as many devices; of the tokens per second, all devices together, to one device.
    """
    groups: dict[tuple[int, int, VariantName], list[Run]] = {}
    for one in runs:
        groups.setdefault((one.tokens, one.devices, one.variant), []).append(one)
    measured = {key: group for key, group in groups.items() if not group[0].failure}
    seconds = {key: median(s for one in group for s in after(one.seconds, warmup)) for key, group in measured.items()}
    above = {key: max(gib for one in group for gib in after(one.above_gib, warmup)) for key, group in measured.items()}
    rows = []
    for key, group in sorted(groups.items(), key=lambda item: item[0][:2]):
        tokens, devices, variant = key
        row = [f"{tokens:,}", str(devices), variant]
        if key not in measured:
            rows.append([*row, group[0].failure, *[""] * (len(HEADERS) - 4)])
            continue
        first, alone = (tokens, devices, runs[0].variant), (tokens, 1, variant)
        deviation = ratio_time = ratio_memory = scaling = ""
        if alone in measured and devices > 1:
            scaling = f" ({devices * seconds[alone] / seconds[key]:.2f})"
        if first in measured and first != key:
            pairs = zip(group[0].losses, groups[first][0].losses, strict=True)
            deviation = f"{max(abs(a - b) for a, b in pairs):.2g}"
            ratio_time, ratio_memory = (f" ({of[key] / of[first]:.2f})" for of in (seconds, above))
        same = "same bits" if all(one.losses == group[0].losses for one in group) else "differs"
        peak = max(gib for one in group for gib in one.peak_gib)
        rows.append([
            *row, f"{peak:.2f}", f"{above[key]:.2f}{ratio_memory}", f"{seconds[key]:.3f}{ratio_time}",
            f"{devices * tokens / seconds[key]:,.0f}{scaling}", deviation, same if len(group) > 1 else "",
        ])  # fmt: skip
    return rows


def after(values: list[float], warmup: int) -> list[float]:
    """The steps that count."""
    return values[warmup:] or values


def plot(runs: list[Run], title: str, limit_gib: float | None, path: Path) -> None:
    """Peak memory against the length; a cross where a variant ran out of memory."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    top = max(limit_gib or 0.0, *(gib for one in runs for gib in one.peak_gib), 1.0)
    for number, (variant, devices) in enumerate(dict.fromkeys((one.variant, one.devices) for one in runs)):
        mine, color = [one for one in runs if (one.variant, one.devices) == (variant, devices)], f"C{number}"
        label = variant + f", {devices} devices" * (devices > 1)
        points = sorted({(one.tokens, max(one.peak_gib)) for one in mine if not one.failure})
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", color=color, label=label)
        failed = [one.tokens for one in mine if one.failure == "out of memory"]
        if failed:
            end = (min(failed), limit_gib or top)
            axis.plot(*zip(*points[-1:], end, strict=True), ls=":", color=color)
            axis.plot(*end, marker="x", markersize=11, mew=3, ls="", color=color)
            axis.annotate(
                f"{label}: out of memory", end, xytext=(0, -14 - 12 * number), textcoords="offset points",
                ha="center", va="top", fontsize=8, color=color,
            )  # fmt: skip
    if limit_gib:
        axis.axhline(limit_gib, color="0.5", ls="--", lw=1)
        there = (0.01, limit_gib)
        axis.annotate("the card's memory", there, xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    lengths = sorted({one.tokens for one in runs})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.set(xlabel="tokens in one sequence", ylabel="peak memory of a device, GiB", title=title)
    axis.set_ylim(0, 1.08 * top)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="center left")
    figure.savefig(path, dpi=130)


def main(
    recipe: Path = TINY,
    lengths: tuple[int, ...] = (256, 512),
    variants: tuple[VariantName, ...] = tuple(VARIANTS),
    steps: int = 8,
    warmup: int = 2,
    repeats: int = 1,
    devices: tuple[int, ...] = (1,),
    options: tuple[str, ...] = (),
    out: Path = Path("runs/whole_step"),
) -> None:
    """Compares a training run without and with the callback.

    Args:
        recipe: a configuration of qwen3_lora.py.
        lengths: tokens of each step, ascending; a variant that ran out of memory is not run again.
        variants: in turn; ratios are to the first. `baseline` is Transformers and PEFT as they come, each layer
            recomputed, with the recipe's loss; `+liger` has Liger's RMSNorm and rotary embedding as well, `+selective`
            attention kept as the recipe keeps it. `lightning_moe` is the recipe with selective checkpointing, `+full`
            with each layer recomputed, `+offload` with what is kept in host memory. What needs a GPU, or Liger, is left
            out where there is none.
        steps: of each run.
        warmup: steps at the beginning that time, and memory above the weights, leave out.
        repeats: of the whole, variants in turn.
        devices: on how many, each number in turn; on more than one the model is sharded (FSDP2), and each device has a
            sequence of its own.
        options: handed on to qwen3_lora.py, each as one word: `--model.experts=true`.
        out: a folder for the results, and a folder in it for each process.
    """
    if not recipe.is_file():
        sys.exit(f"there is no {recipe}: --recipe takes a configuration of qwen3_lora.py")
    if steps < 1 or repeats < 1 or not 0 <= warmup < steps or not lengths or min(lengths) < 2:
        sys.exit("whole_step needs at least one step after the warm-up, one repeat, and lengths of two tokens or more")
    on_gpu = torch.cuda.is_available()
    if not devices or min(devices) < 1 or (on_gpu and max(devices) > torch.cuda.device_count()):
        sys.exit(f"--devices takes numbers from 1 to the GPUs that there are, not {list(devices)}")
    has_liger = on_gpu and importlib.util.find_spec("liger_kernel") is not None
    console, taken = Console(), []
    for variant in variants:
        if ("offload" in variant and not on_gpu) or ("liger" in variant and not has_liger):
            console.print(f"{variant} is left out: it needs {'the package liger-kernel' if on_gpu else 'a GPU'}")
        else:
            taken.append(variant)
    runs: list[Run] = []
    with Progress(console=console, transient=True) as progress:
        for tokens, repeat, number, variant in progress.track(list(product(lengths, range(repeats), devices, taken))):
            if not any((one.variant, one.devices) == (variant, number) and one.failure for one in runs):
                folder = out / f"{tokens}-{variant.replace('+', '-')}-{number}-{repeat}"
                runs.append(run(recipe, variant, tokens, steps, options, folder, number))

    out.mkdir(parents=True, exist_ok=True)
    source = provenance(__file__, "transformers", "peft", "lightning")
    table = ("The baseline and the callback", source, HEADERS, rows_of(runs, warmup))
    show(*table)
    write(out / "whole_step.md", *table)
    (out / "whole_step.json").write_text(
        json.dumps({"source": source, "runs": [asdict(one) for one in runs]}, indent=1)
    )
    limit = torch.cuda.mem_get_info()[1] / 2**30 if on_gpu else None
    plot(runs, f"Peak memory, {torch.cuda.get_device_name() if on_gpu else 'CPU'}", limit, out / "whole_step.png")
    for one in runs:
        if one.failure:
            console.print(Text(f"{one.variant}, {one.tokens:,} tokens: {one.failure}"))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
