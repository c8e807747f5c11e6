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
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from tables import provenance, show, write

RECIPES = Path(__file__).parents[1]
TINY = RECIPES / "configs" / "tiny.yaml"
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
    "tokens", "variant", "peak GiB", "above weights GiB", "s per step", "tokens/s and rank", "largest loss deviation",
]  # fmt: skip
NUM_SEQUENCES = 8  # of the data, for as many ranks


@dataclass
class Run:
    """One process.

    Attributes:
        variant: what ran.
        tokens: in each step, of each rank.
        losses: of each step.
        seconds: of each step.
        peak_gib: the most that was allocated in each step.
        above_gib: the same above what was held when the step began: weights, adapters and, from the second step on, the
            optimizer's moments.
        failure: why there are no numbers; empty where there are.
    """

    variant: VariantName
    tokens: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)
    above_gib: list[float] = field(default_factory=list)
    failure: str = ""


def write_overlay(base: Path, variant: VariantName, tokens: int, steps: int, folder: Path) -> Path:
    """The configuration of one process, to be read after the base's, and its data."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    num_bytes = 8 * tokens * NUM_SEQUENCES  # a token of a large vocabulary has four or five, beside what is JSON's
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
        "accelerator": settings["accelerator"], "devices": 1, "callbacks": [*gate_grad, recorder],
    }  # fmt: skip
    data = {"source": str(folder / "data.jsonl"), "packing": "wrapped", "max_length": int(tokens), "batch_size": 1}
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump({"model": VARIANTS[variant], "data": data, "trainer": trainer}))
    return path


def run(base: Path, variant: VariantName, tokens: int, steps: int, options: tuple[str, ...], folder: Path) -> Run:
    """Trains in a process of its own and reads what it recorded."""
    overlay = write_overlay(base, variant, tokens, steps, folder)
    command = [
        sys.executable,
        str(RECIPES / "qwen3_lora.py"),
        "fit",
        f"--config={base}",
        f"--config={overlay}",
        *options,
    ]
    environment = {**os.environ, "LIGHTNING_MOE_GATEGRAD": "0" if variant.startswith("baseline") else "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    if not done.returncode:
        return Run(variant, tokens, **json.loads((folder / "steps.json").read_text()))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    is_memory = any(words in done.stderr for words in OUT_OF_MEMORY)
    return Run(variant, tokens, failure="out of memory" if is_memory else f"{last} (see {folder / 'output.txt'})")


def rows_of(runs: list[Run], warmup: int) -> list[list[str]]:
    """The table: a row for each length and variant; medians over steps, ratios to the first variant."""
    rows = []
    for one in runs:
        row = [f"{one.tokens:,}", one.variant]
        if one.failure:
            rows.append([*row, one.failure, *[""] * (len(HEADERS) - 3)])
            continue
        seconds, above = median(one.seconds[warmup:]), max(one.above_gib[warmup:])
        deviation = ratio_time = ratio_memory = ""
        first = next((other for other in runs if other.tokens == one.tokens and not other.failure), one)
        if first is not one and first.variant == runs[0].variant:
            deviation = f"{max(abs(a - b) for a, b in zip(one.losses, first.losses, strict=True)):.2g}"
            ratio_time = f" ({seconds / median(first.seconds[warmup:]):.2f})"
            ratio_memory = f" ({above / max(first.above_gib[warmup:]):.2f})"
        rows.append([
            *row, f"{max(one.peak_gib):.2f}", f"{above:.2f}{ratio_memory}", f"{seconds:.3f}{ratio_time}",
            f"{one.tokens / seconds:,.0f}", deviation,
        ])  # fmt: skip
    return rows


def plot(runs: list[Run], title: str, limit_gib: float | None, path: Path) -> None:
    """Peak memory against the length; a cross, at the card's memory, where a variant ran out of memory."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    top = limit_gib or max([1.0, *(gib for one in runs for gib in one.peak_gib)])
    for variant in dict.fromkeys(one.variant for one in runs):
        mine = [one for one in runs if one.variant == variant]
        points = [(one.tokens, max(one.peak_gib)) for one in mine if not one.failure]
        (line,) = axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=variant)
        if failed := [one.tokens for one in mine if one.failure == "out of memory"]:
            end = (min(failed), top)
            axis.plot(*zip(*points[-1:], end, strict=True), ls=":", color=line.get_color())
            axis.plot(*end, marker="x", markersize=11, mew=3, ls="", color=line.get_color())
    if limit_gib:
        axis.axhline(limit_gib, color="0.5", ls="--", lw=1, label="the card's memory")
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
    lengths: tuple[PositiveInt, ...] = (256, 512),
    variants: tuple[VariantName, ...] = tuple(VARIANTS),
    steps: PositiveInt = 6,
    warmup: NonNegativeInt = 2,
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
        steps: of each run, after the warm-up.
        warmup: steps before these, which time, and memory above the weights, leave out.
        options: handed on to qwen3_lora.py, each as one word: `--model.experts=true`.
        out: a folder for the results, and a folder in it for each process.
    """
    on_gpu = torch.cuda.is_available()
    has_liger = on_gpu and importlib.util.find_spec("liger_kernel") is not None
    console, taken = Console(), []
    for variant in variants:
        if ("offload" in variant and not on_gpu) or ("liger" in variant and not has_liger):
            console.print(f"{variant} is left out: it needs {'the package liger-kernel' if on_gpu else 'a GPU'}")
        else:
            taken.append(variant)
    runs: list[Run] = []
    with Progress(console=console, transient=True) as progress:
        for tokens, variant in progress.track(list(product(lengths, taken))):
            if not any(one.variant == variant and one.failure for one in runs):
                folder = out / f"{tokens}-{variant.replace('+', '-')}"
                runs.append(run(recipe, variant, tokens, warmup + steps, options, folder))

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
