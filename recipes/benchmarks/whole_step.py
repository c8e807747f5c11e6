"""Stock code beside the callback: the same steps of qwen3_lora.py, each side in a process of its own, in turn.

    python recipes/benchmarks/whole_step.py                  the tiny model on the CPU
    python recipes/benchmarks/whole_step.py --recipe recipes/configs/qwen3_30b_a3b.yaml --lengths "[4096, 16384, 65536]"
    ... --options "[--model.init=random, --data.tokenizer=null]"                       without the weights
    ... --options "[--model.experts=true]"                                             adapters on the experts
    ... --sides "[stock, lightning_moe]" --repeats 2 --options "[--trainer.deterministic=true]"
    ... --devices "[1, 2]"                                                             alone, and sharded over two

Every step is one sequence of exactly so many tokens. Ends with a table, compare.md, compare.json and a plot of the
memory against the length, which shows where a side runs out of it.
"""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import lightning
import peft
import torch
import transformers
import yaml
from jsonargparse import auto_cli
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

RECIPE = Path(__file__).parents[1] / "qwen3_lora.py"
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
KEPT_CALLBACKS = ("MoEGateGradCallback", "MemoryMonitor")
OUT_OF_MEMORY = ("OutOfMemoryError", "can't allocate memory", "out of memory")

SideName = Literal["stock", "stock+liger", "lightning_moe", "lightning_moe+offload"]
STOCK = {"attention": "sdpa", "liger": False, "loss": "chunks", "offload": False, "tile_tokens": 0}
SIDES: dict[SideName, dict[str, Any]] = {
    "stock": STOCK,
    "stock+liger": {**STOCK, "liger": True},
    "lightning_moe": {"offload": False},
    "lightning_moe+offload": {"offload": True},
}


@dataclass
class Run:
    """One process.

    Attributes:
        side: whose code.
        tokens: in each step, of each device.
        losses: of each step.
        seconds: of each step.
        peak_gib: the most that was allocated.
        above_gib: for each step, the same above what was held when it began: weights, adapters and, from the second
            step on, the optimizer's moments.
        failure: why there are no figures; empty where there are.
        devices: over which the model is sharded, one process each; `losses` are means over them, memory the maximum.
    """

    side: SideName
    tokens: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    above_gib: list[float] = field(default_factory=list)
    failure: str = ""
    devices: int = 1


def write_config(base: Path, side: SideName, tokens: int, steps: int, folder: Path, devices: int = 1) -> Path:
    """The configuration of one process: the base's, but for what the side and the measurement ask for."""
    settings = yaml.safe_load(base.read_text())
    callbacks = [c for c in settings["trainer"]["callbacks"] if c["class_path"].rpartition(".")[2] in KEPT_CALLBACKS]
    settings["model"].update(SIDES[side])
    settings["data"].update(packing="joined", max_length=tokens, batch_size=1)
    settings["trainer"].update(
        max_steps=steps,
        limit_val_batches=0,
        val_check_interval=None,
        log_every_n_steps=1,
        enable_checkpointing=False,
        callbacks=[*callbacks, {"class_path": "lora.watching.StepSpeed"}],
        devices=devices,
        strategy=sharded_over(devices) if devices > 1 else "auto",
        logger={
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder), "name": "csv", "version": 0, "flush_logs_every_n_steps": 1},
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def sharded_over(devices: int) -> dict[str, Any]:
    """The strategy, as a configuration has it."""
    sizes = {"data_parallel_size": devices, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    return {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": sizes}


def run(
    base: Path, side: SideName, tokens: int, steps: int, options: tuple[str, ...], folder: Path, devices: int = 1
) -> Run:
    """Trains in a process of its own, or one for each device, and reads what it logged."""
    config = write_config(base, side, tokens, steps, folder, devices)
    command = [sys.executable, str(RECIPE), "fit", "--config", str(config), *options]
    environment = {**os.environ, "LIGHTNING_MOE_GATEGRAD": "0" if side.startswith("stock") else "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        if any(words in done.stderr for words in OUT_OF_MEMORY):
            return Run(side, tokens, failure="out of memory", devices=devices)
        lines = done.stderr.strip().splitlines() or ["no message"]
        return Run(side, tokens, failure=f"{lines[-1]} (see {folder / 'output.txt'})", devices=devices)
    with (folder / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return Run(
        side,
        tokens,
        [float(row["train/loss"]) for row in rows],
        [float(row["speed/seconds_per_step"]) for row in rows],
        max(float(row["memory/peak_allocated_gib"]) for row in rows),
        [float(row["memory/step_peak_gib"]) for row in rows],
        devices=devices,
    )


HEADERS = [
    "tokens",
    "devices",
    "side",
    "peak GiB",
    "above weights GiB",
    "s per step",
    "tokens/s",
    "largest loss deviation",
    "twice",
]


def rows_of(runs: list[Run], warmup: int) -> list[list[str]]:
    """The table: one row for each length, number of devices and side; medians over steps and repeats.

    Ratios are to stock on as many devices; of the tokens per second, all devices together, to one device.
    """
    rows = []
    for tokens, devices in dict.fromkeys((run.tokens, run.devices) for run in runs):
        these = [run for run in runs if (run.tokens, run.devices) == (tokens, devices)]
        stock = [run for run in these if run.side == "stock" and not run.failure]
        for side in dict.fromkeys(run.side for run in these):
            mine = [run for run in these if run.side == side]
            if mine[0].failure:
                rows.append([f"{tokens:,}", str(devices), side, mine[0].failure, *[""] * (len(HEADERS) - 4)])
                continue
            alone = [
                run for run in runs if (run.tokens, run.devices, run.side) == (tokens, 1, side) and not run.failure
            ]
            seconds = step_seconds(mine, warmup)
            above, peak = above_gib(mine, warmup), max(run.peak_gib for run in mine)
            deviation = ratio_time = ratio_memory = scaling = ""
            if alone and devices > 1:
                scaling = f" ({devices * step_seconds(alone, warmup) / seconds:.2f})"
            if stock and side != "stock":
                differences = [abs(a - b) for a, b in zip(mine[0].losses, stock[0].losses, strict=True)]
                deviation = f"{max(differences):.2g}"
                ratio_time = f" ({seconds / step_seconds(stock, warmup):.2f})"
                ratio_memory = f" ({above / above_gib(stock, warmup):.2f})"
            twice = "" if len(mine) < 2 else "same bits" if mine[0].losses == mine[1].losses else "differs"
            rows.append(
                [
                    f"{tokens:,}", str(devices), side, f"{peak:.2f}", f"{above:.2f}{ratio_memory}",
                    f"{seconds:.3f}{ratio_time}", f"{devices * tokens / seconds:,.0f}{scaling}", deviation, twice,
                ]
            )  # fmt: skip
    return rows


def above_gib(runs: list[Run], warmup: int) -> float:
    """The most over the steps after the warm-up, of all repeats."""
    return max(gib for run in runs for gib in (run.above_gib[warmup:] or run.above_gib))


def step_seconds(runs: list[Run], warmup: int) -> float:
    """The median over the steps after the warm-up, of all repeats."""
    return median(seconds for run in runs for seconds in (run.seconds[warmup:] or run.seconds))


def plot(runs: list[Run], title: str, limit_gib: float | None, path: Path) -> None:
    """Peak memory against the length; a cross where a side ran out of memory."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    top = limit_gib or max(run.peak_gib for run in runs) or 1.0
    for number, (side, devices) in enumerate(dict.fromkeys((run.side, run.devices) for run in runs)):
        mine, color = [run for run in runs if (run.side, run.devices) == (side, devices)], f"C{number}"
        label = side + f", {devices} devices" * (devices > 1)
        points = sorted({(run.tokens, run.peak_gib) for run in mine if not run.failure})
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", color=color, label=label)
        failed = [run.tokens for run in mine if run.failure == "out of memory"]
        if failed:
            end = (min(failed), top)
            axis.plot(*zip(*points[-1:], end, strict=True), ls=":", color=color)
            axis.plot(*end, marker="x", markersize=11, mew=3, ls="", color=color)
            axis.annotate(
                f"{label}: out of memory", end, xytext=(0, -14 - 12 * number), textcoords="offset points",
                ha="center", va="top", fontsize=8, color=color,
            )  # fmt: skip
    if limit_gib:
        axis.axhline(limit_gib, color="0.5", ls="--", lw=1)
        there = (0.01, limit_gib)
        axis.annotate("what the card has", there, xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    lengths = sorted({run.tokens for run in runs})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.set(xlabel="tokens in one sequence", ylabel="peak memory of a device, GiB", title=title)
    axis.set_ylim(0, 1.08 * max(top, *(run.peak_gib for run in runs)))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="center left")
    figure.savefig(path, dpi=130)


def provenance() -> str:
    """Card, versions, commit and command."""
    git = ["git", "-C", str(RECIPE.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return (
        f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"lightning {lightning.__version__}, commit {commit}; "
        f"`python recipes/benchmarks/whole_step.py {' '.join(sys.argv[1:])}`"
    )


def main(
    recipe: Path = TINY,
    lengths: tuple[int, ...] = (256, 512),
    sides: tuple[SideName, ...] = tuple(SIDES),
    steps: int = 8,
    warmup: int = 2,
    repeats: int = 1,
    devices: tuple[int, ...] = (1,),
    options: tuple[str, ...] = (),
    out: Path = Path("runs/compare"),
) -> None:
    """Compares a training run with stock code and with the callback.

    Args:
        recipe: a configuration of qwen3_lora.py.
        lengths: tokens of each step, ascending; a side that ran out of memory is not asked again.
        sides: `stock` is Transformers and PEFT as they come, with the recipe's checkpointing and a chunked loss;
            `+liger` has Liger's RMSNorm and rotary embedding as well; `+offload` the layers' inputs in host memory.
            What needs a GPU, or Liger, is left out where there is none.
        steps: of each run.
        warmup: steps at the beginning that time, and memory above the weights, leave out.
        repeats: of the whole, sides in turn.
        devices: on how many, each number in turn; on more than one the model is sharded (FSDP2), and each device has a
            sequence of its own.
        options: handed on to qwen3_lora.py, each as one word: `--model.experts=true`.
        out: a folder for the results, and a folder in it for each process.
    """
    if not recipe.is_file():
        sys.exit(f"there is no {recipe}: --recipe takes a configuration of qwen3_lora.py")
    if steps < 1 or repeats < 1 or not 0 <= warmup < steps or not lengths or min(lengths) < 2:
        sys.exit("compare needs at least one step after the warm-up, one repeat, and lengths of two tokens or more")
    on_gpu = torch.cuda.is_available()
    if not devices or min(devices) < 1 or (on_gpu and max(devices) > torch.cuda.device_count()):
        sys.exit(f"--devices takes numbers from 1 to the GPUs that there are, not {list(devices)}")
    has_liger = on_gpu and importlib.util.find_spec("liger_kernel") is not None
    left_out = {
        side for side in sides if (side.endswith("offload") and not on_gpu) or ("liger" in side and not has_liger)
    }
    console = Console()
    for side in sorted(left_out):
        console.print(f"{side} is left out: it needs {'a GPU' if not on_gpu else 'the package liger-kernel'}")
    taken = [side for side in sides if side not in left_out]
    plan = list(product(lengths, range(repeats), devices, taken))
    runs: list[Run] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(plan))
        for tokens, repeat, number, side in plan:
            over = f" on each of {number} devices" * (number > 1)
            progress.update(task, description=f"{side}, {tokens:,} tokens{over}")
            if not any((run.side, run.devices) == (side, number) and run.failure for run in runs):
                folder = out / f"{tokens}-{side.replace('+', '-')}-{number}-{repeat}"
                runs.append(run(recipe, side, tokens, steps, options, folder, number))
            progress.advance(task)

    source, rows = provenance(), rows_of(runs, warmup)
    table = Table(*HEADERS, title="Stock code and the callback", caption=Text(source))
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=max(console.width, 130)).print(table)
    out.mkdir(parents=True, exist_ok=True)
    lines = [source, "", f"| {' | '.join(HEADERS)} |", "|---" * len(HEADERS) + "|"]
    (out / "compare.md").write_text("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n")
    (out / "compare.json").write_text(json.dumps({"source": source, "runs": [asdict(run) for run in runs]}, indent=1))
    limit = torch.cuda.mem_get_info()[1] / 2**30 if on_gpu else None
    plot(runs, f"Peak memory, {torch.cuda.get_device_name() if on_gpu else 'CPU'}", limit, out / "compare.png")
    if failures := [f"{run.side}, {run.tokens:,} tokens: {run.failure}" for run in runs if run.failure]:
        console.print(Text("\n".join(failures)))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
