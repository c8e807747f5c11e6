"""One experts layer, forward and backward: lightning_moe beside Transformers' default and whatever peers are installed.

    python recipes/benchmarks/experts_layer.py        Qwen3-30B-A3B's layer, frozen experts
    python recipes/benchmarks/experts_layer.py --mode full --tokens "[8192]"; --mode lora: PEFT on the experts
    python recipes/benchmarks/experts_layer.py --out runs/experts_layer    writes table.md and plot.png there

README.md beside this file says what each column means and how it is measured.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft import LoraConfig, inject_adapter_in_model
from rich.progress import track
from tables import provenance, show, write
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_moe import patch_moe

Mode = Literal["frozen", "lora", "full"]
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
MIB = 2**20
NUM_INPUTS = 3
NUM_WARMUP = 3
RANK = 16

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_30b_a3b": {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    "tiny": {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2},
}
ERRORS = ("output", "d hidden", "d routing weights", "d adapters")
HEADERS = [
    "tokens", "variant", "kept MiB", "peak MiB", "forward ms", "total ms", "× roofline",
    "error: out / dx / d routing weights / largest of the adapters'", "same bits",
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One variant at one size: MiB, milliseconds, and relative errors by name; or why it did not run."""

    name: str
    num_tokens: int
    kept: float = 0.0
    peak: float = 0.0
    forward: float = 0.0
    total: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    same_bits: bool = False
    failure: str = ""


class Block(nn.Module):
    """Holds the experts under the name that adapters are addressed by."""

    def __init__(self, config: Qwen3MoeConfig, mode: Mode, device: torch.device) -> None:
        super().__init__()
        with device:
            self.experts: nn.Module = Qwen3MoeExperts(config).to(torch.bfloat16)
        generator = torch.Generator(device).manual_seed(0)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
        self.requires_grad_(mode == "full")
        if mode == "lora":
            names = ["experts.gate_up_proj", "experts.down_proj"]
            options = LoraConfig(r=RANK, target_modules=[], target_parameters=names, init_lora_weights=False)
            torch.manual_seed(0)
            inject_adapter_in_model(options, self)
            for parameter in self.adapters().values():
                parameter.data = parameter.data.float()  # as get_peft_model does

    @property
    def base(self) -> Any:
        """The experts module itself, under its adapters."""
        module: Any = self.experts
        while hasattr(module, "base_layer"):
            module = module.base_layer
        return module

    def adapters(self) -> dict[str, nn.Parameter]:
        """The adapters' factors by name: A and B of the first projection, then of the second."""
        return {name: parameter for name, parameter in self.named_parameters() if "lora_" in name}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, routing_weights: Tensor) -> Tensor:
        """The layer."""
        return self.experts(hidden_states, top_k_index, routing_weights)


class DividingDown(torch.autograd.Function):
    """Down projection and routing weight by the idea's first form: dGate = <A, dA> / max(gate, 1e-6)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, gates: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]  # noqa: D102
        ctx.save_for_backward(a, gates, weight, offsets)
        return F.grouped_mm(a, weight.mT, offs=offsets) * gates[:, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: D102
        a, gates, weight, offsets = ctx.saved_tensors
        scaled = grad * gates[:, None]
        grad_a = F.grouped_mm(scaled, weight, offs=offsets)
        grad_gates = (a.float() * grad_a.float()).sum(-1) / gates.float().clamp_min(1e-6)
        grad_weight = F.grouped_mm(scaled.t(), a, offs=offsets) if ctx.needs_input_grad[2] else None
        return grad_a, grad_gates.to(gates.dtype), grad_weight, None


def plain_autograd(block: Block, weight_before_down: bool) -> Layer:
    """Grouped products by hand, in one of two forms.

    Args:
        block: holds the weights.
        weight_before_down: multiply the routing weight into the activation, and leave the rest to autograd; otherwise
            the idea's first form, `DividingDown`, combined by index_add.
    """
    experts = block.base

    def run(hidden_states: Tensor, top_k_index: Tensor, routing_weights: Tensor) -> Tensor:
        order = torch.argsort(top_k_index.flatten(), stable=True)
        every = torch.arange(experts.num_experts, device=order.device)
        offsets = torch.searchsorted(top_k_index.flatten()[order], every, right=True, out_int32=True)
        tokens, gates = order // top_k_index.shape[1], routing_weights.flatten()[order]
        gate, up = F.grouped_mm(hidden_states[tokens], experts.gate_up_proj.mT, offs=offsets).chunk(2, dim=-1)
        a = F.silu(gate) * up
        if not weight_before_down:
            y = DividingDown.apply(a, gates, experts.down_proj, offsets)
            return torch.zeros_like(hidden_states).index_add_(0, tokens, y)
        y = F.grouped_mm(a * gates[:, None], experts.down_proj.mT, offs=offsets)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        return y[inverse].view(*top_k_index.shape, -1).sum(1)

    return run


def transformers_own(block: Block, implementation: str = "grouped_mm") -> Layer:
    """One of Transformers' own experts functions."""
    block.base.config._experts_implementation = implementation
    return block


def patched(block: Block, **options: Any) -> Layer:
    """The layer as the callback patches it."""
    patch_moe(block, **options)
    return block


def liger(block: Block) -> Layer:
    """Liger's fused MoE."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # an optional peer

    weights = block.base.gate_up_proj, block.base.down_proj
    return lambda hidden_states, top_k_index, routing_weights: LigerFusedMoEFunction.apply(
        hidden_states, *weights, top_k_index.int(), routing_weights
    )


def variants(mode: Mode) -> dict[str, Callable[[Block], Layer]]:
    """What runs in a mode, the baseline first: only the baseline and the patched layer know adapters."""
    found: dict[str, Callable[[Block], Layer]] = {
        "baseline (grouped_mm)": transformers_own,
        "lightning_moe": patched,
        "lightning_moe, output_buffer_mib = 64": partial(patched, output_buffer_mib=64),
        "lightning_moe, recompute_gate_up": partial(patched, recompute_gate_up=True),
    }
    if mode == "lora":
        return found
    found["dGate by division"] = partial(plain_autograd, weight_before_down=False)
    found["weight before down"] = partial(plain_autograd, weight_before_down=True)
    if importlib.util.find_spec("liger_kernel"):
        found["Liger fused MoE"] = liger
    if importlib.util.find_spec("sonicmoe"):
        found["SonicMoE"] = partial(transformers_own, implementation="sonicmoe")
    return found


def make_inputs(config: Qwen3MoeConfig, num_tokens: int, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """Hidden states, expert ids, routing weights of a normalised top-k router, and the output's gradient."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(width: int) -> Tensor:
        return torch.randn(num_tokens, width, device=device, generator=generator)

    weights, index = normal(config.num_experts).softmax(-1).topk(config.num_experts_per_tok)
    weights = weights / weights.sum(-1, keepdim=True)
    hidden, grad = normal(config.hidden_size), normal(config.hidden_size)
    return hidden.bfloat16().requires_grad_(), index, weights.bfloat16().requires_grad_(), grad.bfloat16()


def reference(block: Block, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output and gradients of the layer and of its adapters, in float32, expert by expert."""
    hidden, index, weights, grad = inputs
    x, g = (leaf.detach().float().requires_grad_() for leaf in (hidden, weights))
    base, out, adapters = block.base, torch.zeros_like(x), block.adapters()
    factors = [parameter.detach().clone().requires_grad_() for parameter in adapters.values()]
    for expert in range(base.num_experts):
        token, slot = torch.where(index == expert)
        up_weight, down_weight = (w[expert].detach().float() for w in (base.gate_up_proj, base.down_proj))
        if factors:
            # PEFT stores A expert by expert, B rank by rank.
            up_a, down_a = (a[expert * RANK : (expert + 1) * RANK] for a in factors[::2])
            up_b, down_b = (b[:, expert :: base.num_experts] for b in factors[1::2])
            scaling = block.experts.scaling["default"]  # type: ignore[index, union-attr]
            up_weight, down_weight = up_weight + scaling * up_b @ up_a, down_weight + scaling * down_b @ down_a
        gate, up = (x[token] @ up_weight.t()).chunk(2, dim=-1)
        out = out.index_add(0, token, (F.silu(gate) * up) @ down_weight.t() * g[token, slot, None])
    grads = torch.autograd.grad(out, (x, g, *factors), grad.float())
    names = ("d hidden", "d routing weights", *(f"d adapter {name}" for name in adapters))
    return {"output": out.detach(), **dict(zip(names, grads, strict=True))}


def errors(
    layer: Layer, block: Block, inputs: tuple[Tensor, ...], wanted: dict[str, Tensor]
) -> tuple[dict[str, float], bool]:
    """Relative errors of output and gradients, and whether two runs have the same bits."""
    hidden, index, weights, grad = inputs
    runs = []
    for _ in range(2):
        output = layer(hidden, index, weights)
        grads = torch.autograd.grad(output, (hidden, weights, *block.adapters().values()), grad)
        runs.append([output.detach(), *grads])
    found = {
        name: ((got.float() - want).norm() / want.norm()).item()
        for (name, want), got in zip(wanted.items(), runs[0], strict=True)
    }
    return found, all(map(torch.equal, *runs))


def measure(
    layer: Layer, block: Block, inputs: list[tuple[Tensor, ...]], repeats: int
) -> tuple[float, float, float, float]:
    """MiB kept by the forward pass and at the peak, and median milliseconds of forward and of both passes."""
    leaves = [*block.parameters(), *(tensor for one in inputs for tensor in one)]

    def step(number: int, after_forward: Callable[[Tensor], None]) -> None:
        hidden, index, weights, grad = inputs[number % len(inputs)]
        output = layer(hidden, index, weights)
        after_forward(output)
        output.backward(grad)
        for leaf in leaves:
            leaf.grad = None

    times = []
    for number in range(NUM_WARMUP + repeats):
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        step(number, lambda _, middle=middle: middle.record())  # type: ignore[misc]
        end.record()
        times.append((start, middle, end))
    torch.cuda.synchronize()
    forward = median(start.elapsed_time(middle) for start, middle, _ in times[NUM_WARMUP:])
    total = median(start.elapsed_time(end) for start, _, end in times[NUM_WARMUP:])

    kept: list[int] = []  # apart from the times: asking the allocator takes the host a while
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(0, lambda output: kept.append(torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()))
    return kept[0] / MIB, (torch.cuda.max_memory_allocated() - before) / MIB, forward, total


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a plain bfloat16 matrix product of 8192 cubed."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(NUM_WARMUP + 10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        left @ right
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return 2 * 8192**3 / median(start.elapsed_time(end) for start, end in times[NUM_WARMUP:]) * 1e3


def bench(config: Qwen3MoeConfig, mode: Mode, num_tokens: int, repeats: int) -> list[Result]:
    """Every variant at one size."""
    device, results = torch.device("cuda"), []
    inputs = [make_inputs(config, num_tokens, device, seed) for seed in range(NUM_INPUTS)]
    wanted = reference(Block(config, mode, device), inputs[0])
    for name, make in track(variants(mode).items(), description=f"{num_tokens} tokens", transient=True):
        block = Block(config, mode, device)
        try:
            layer = make(block)
            found, same_bits = errors(layer, block, inputs[0], wanted)
            results.append(Result(name, num_tokens, *measure(layer, block, inputs, repeats), found, same_bits))
        except Exception as error:  # a peer that fails is a line of the table, not the end of it
            results.append(Result(name, num_tokens, failure=f"{type(error).__name__}: {error}"[:60]))
        del block
        torch.cuda.empty_cache()
    return results


def rows_of(results: list[Result], rooflines: dict[int, float]) -> list[list[str]]:
    """The table's cells, ratios to the baseline beside the numbers."""
    rows = []
    for result in results:
        row = [str(result.num_tokens), result.name]
        if result.failure:
            rows.append([*row, result.failure, *[""] * (len(HEADERS) - 3)])
            continue
        base = next(r for r in results if r.num_tokens == result.num_tokens)
        adapters = [error for name, error in result.errors.items() if name.startswith("d adapter")]
        found = result.errors | ({"d adapters": max(adapters)} if adapters else {})
        rows.append([
            *row,
            f"{result.kept:.0f} ({result.kept / base.kept:.2f})",
            f"{result.peak:.0f} ({result.peak / base.peak:.2f})",
            f"{result.forward:.2f}",
            f"{result.total:.2f} ({result.total / base.total:.2f})",
            f"{result.total / rooflines[result.num_tokens]:.2f}",
            " / ".join(f"{found[name]:.1e}" for name in ERRORS if name in found),
            "yes" if result.same_bits else "no",
        ])  # fmt: skip
    return rows


def plot(results: list[Result], title: str, path: Path) -> None:
    """Peak memory and time against tokens."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    sizes = sorted({result.num_tokens for result in results})
    for axis, label, name in zip(axes, ("peak MiB", "forward + backward, ms"), ("peak", "total"), strict=True):
        for variant in dict.fromkeys(result.name for result in results if not result.failure):
            points = [(r.num_tokens, getattr(r, name)) for r in results if r.name == variant and not r.failure]
            width = 3 if variant.startswith("lightning_moe") else 1.5
            axis.plot(*zip(*points, strict=True), marker="o", label=variant, linewidth=width)
        axis.set(xlabel="tokens", ylabel=label, xlim=0, ylim=0)
        axis.set_xticks(sizes, labels=[f"{size:,}" for size in sizes])
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)


def main(
    model: Literal["qwen3_30b_a3b", "tiny"] = "qwen3_30b_a3b",
    mode: Mode = "frozen",
    tokens: tuple[int, ...] = (4096, 16384, 32768),
    repeats: int = 20,
    out: Path | None = None,
) -> None:
    """Benchmarks one experts layer on a GPU.

    Args:
        model: whose shapes.
        mode: frozen experts, LoRA on them, or full fine-tuning.
        tokens: the sizes.
        repeats: executions that a median is taken over.
        out: a folder for table.md and plot.png.
    """
    if not torch.cuda.is_available():
        sys.exit("experts_layer measures a GPU and there is none here")
    if repeats < 1 or not tokens or min(tokens) < 1:
        sys.exit(f"experts_layer needs at least one repeat and sizes of at least one token, not {repeats} and {tokens}")
    config = Qwen3MoeConfig(**MODELS[model])
    config._experts_implementation = "grouped_mm"
    rate = matrix_rate(torch.device("cuda"))
    # Per row three products of hidden x intermediate forward, three backward, three more for weights' gradients.
    passes = 3 if mode == "full" else 2
    work = 2 * 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok * passes
    rooflines = {size: work * size / rate * 1e3 for size in tokens}
    results = [result for size in tokens for result in bench(config, mode, size, repeats)]
    source = f"{provenance(__file__, 'transformers', 'peft')}; plain matrix product {rate / 1e12:.0f} TFLOP/s"
    table = (f"{model}, {mode}", source, HEADERS, rows_of(results, rooflines))
    show(*table)
    if out is not None:
        write(out / "table.md", *table)
        plot(results, f"{model}, {mode}: one experts layer, {torch.cuda.get_device_name()}", out / "plot.png")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
