"""Host time of one experts layer, forward and backward: what the CPU takes to hand its kernels to the GPU.

    python recipes/benchmarks/host_time.py                      Qwen3-30B-A3B's layer, 64 tokens
    python recipes/benchmarks/host_time.py --mode lora          PEFT's LoRA on the experts
    python recipes/benchmarks/host_time.py --model tiny         also on a CPU, where it times the arithmetic too

README.md beside this file says what each column means and how it is measured.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal

import torch
from experts_layer import MODELS, Block, Mode, make_inputs, patched, transformers_own
from jsonargparse import auto_cli
from tables import provenance, show, write
from transformers import Qwen3MoeConfig

HEADERS = ["variant", "host ms", "forward", "backward"]
Times = list[tuple[float, float]]


def main(
    model: Literal["qwen3_30b_a3b", "tiny"] = "qwen3_30b_a3b",
    mode: Mode = "frozen",
    tokens: int = 64,
    executions: int = 25,
    rounds: int = 20,
    out: Path | None = None,
) -> None:
    """Times the host.

    Args:
        model: whose shapes.
        mode: frozen experts, LoRA on them, or full fine-tuning.
        tokens: so few that the device is done before the host.
        executions: between two synchronizations.
        rounds: of so many executions of each variant in turn; the first is warm-up.
        out: a folder for host_time.md.
    """
    if min(tokens, executions) < 1 or rounds < 2:
        sys.exit("host_time needs at least one token, one execution and two rounds")
    config = Qwen3MoeConfig(**MODELS[model])
    config._experts_implementation = "grouped_mm"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = make_inputs(config, tokens, device, seed=0)

    def timed(layer: Callable[..., torch.Tensor]) -> tuple[float, float]:
        """Milliseconds of the median execution, forward and backward, while the device follows behind."""
        hidden, index, weights, grad = inputs
        times = []
        for _ in range(executions):
            hidden.grad = weights.grad = None
            start = perf_counter()
            output = layer(hidden, index, weights)
            middle = perf_counter()
            output.backward(grad)
            times.append((middle - start, perf_counter() - middle))
        if device.type == "cuda":
            torch.cuda.synchronize()
        forward, backward = zip(*times, strict=True)
        return median(forward) * 1e3, median(backward) * 1e3

    baseline_block, block = (Block(config, mode, device) for _ in range(2))
    layers = {"baseline (grouped_mm)": transformers_own(baseline_block), "lightning_moe": patched(block)}
    found: dict[str, Times] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            found[name].append(timed(layer))
    rows, baseline = [], 0.0
    for name, times in found.items():
        forward, backward = (median(part) for part in zip(*times[1:], strict=True))
        baseline = baseline or forward + backward
        total = f"{forward + backward:.2f} ({(forward + backward) / baseline:.2f})"
        rows.append([name, total, f"{forward:.2f}", f"{backward:.2f}"])
    table = (f"{model}, {mode}, {tokens} tokens", provenance(__file__, "transformers", "peft"), HEADERS, rows)
    show(*table)
    if out is not None:
        write(out / "host_time.md", *table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
