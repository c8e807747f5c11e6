"""One experts layer, forward and backward: lightning_moe beside stock Transformers and whatever peers are installed.

    python recipes/benchmarks/experts_layer.py        Qwen3-30B-A3B's layer, frozen experts
    python recipes/benchmarks/experts_layer.py --mode full --tokens "[8192]"; --mode lora: PEFT on the experts
    python recipes/benchmarks/experts_layer.py --out runs/bench_layer    writes table.md and plot.png there

Memory is the allocator's, in MiB above what was held before: `kept` after the forward, the output itself not counted;
`peak` over both passes. Times are medians over CUDA events, on inputs that rotate. `floor` is the arithmetic alone at
the rate of a plain matrix product measured in the same run. Errors are relative, against float32.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import matplotlib as mpl
import peft
import torch
import torch.nn.functional as F
import transformers
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_moe import patch_moe

Mode = Literal["frozen", "lora", "full"]
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
MIB = 2**20
NUM_INPUTS = 3
RANK = 16

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_30b_a3b": {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    "tiny": {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2},
}


@dataclass(frozen=True)
class Result:
    """One contender at one size: MiB, milliseconds, and relative errors by name; or why it did not run."""

    name: str
    num_tokens: int
    kept: float = 0.0
    peak: float = 0.0
    forward: float = 0.0
    total: float = 0.0
    errors: dict[str, float] | None = None
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
            for _, parameter in self.adapters():
                parameter.data = parameter.data.float()  # as get_peft_model does

    @property
    def weights(self) -> Any:
        """The experts module itself, adapters taken off."""
        module: Any = self.experts
        while hasattr(module, "base_layer"):
            module = module.base_layer
        return module

    def adapters(self) -> list[tuple[str, nn.Parameter]]:
        """The adapters' factors."""
        return [(name, parameter) for name, parameter in self.named_parameters() if "lora_" in name]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, gates: Tensor) -> Tensor:
        """The layer."""
        return self.experts(hidden_states, top_k_index, gates)


class SeedDown(torch.autograd.Function):
    """Down projection and gate in the idea's first form: dGate = <A, dA> / max(gate, floor)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, gates: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]  # noqa: D102
        ctx.save_for_backward(a, gates, weight, offsets)
        return F.grouped_mm(a, weight.mT, offs=offsets) * gates[:, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: D102
        a, gates, weight, offsets = ctx.saved_tensors
        grad_a = F.grouped_mm(grad * gates[:, None], weight, offs=offsets)
        grad_gates = (a.float() * grad_a.float()).sum(-1) / gates.float().clamp_min(1e-6)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = F.grouped_mm((grad * gates[:, None]).t(), a, offs=offsets)
        return grad_a, grad_gates.to(gates.dtype), grad_weight, None


def _sorted(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    experts, order = torch.sort(top_k_index.flatten())
    every = torch.arange(num_experts, device=experts.device)
    return order, torch.searchsorted(experts, every, right=True, out_int32=True)


def seed_form(block: Block) -> Layer:
    """The identity as first published: divide by the floored gate, combine by index_add."""
    experts = block.weights

    def run(hidden_states: Tensor, top_k_index: Tensor, gates: Tensor) -> Tensor:
        order, offsets = _sorted(top_k_index, experts.num_experts)
        tokens = order // top_k_index.shape[1]
        h = F.grouped_mm(hidden_states[tokens], experts.gate_up_proj.mT, offs=offsets)
        gate, up = h.chunk(2, dim=-1)
        y = SeedDown.apply(F.silu(gate) * up, gates.flatten()[order], experts.down_proj, offsets)
        return torch.zeros_like(hidden_states).index_add_(0, tokens, y)

    return run


def gate_before_down(block: Block) -> Layer:
    """The gate multiplied into the activation, by plain autograd."""
    experts = block.weights

    def run(hidden_states: Tensor, top_k_index: Tensor, gates: Tensor) -> Tensor:
        order, offsets = _sorted(top_k_index, experts.num_experts)
        h = F.grouped_mm(hidden_states[order // top_k_index.shape[1]], experts.gate_up_proj.mT, offs=offsets)
        gate, up = h.chunk(2, dim=-1)
        a = F.silu(gate) * up * gates.flatten()[order][:, None]
        y = F.grouped_mm(a, experts.down_proj.mT, offs=offsets)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        return y[inverse].view(*top_k_index.shape, -1).sum(1)

    return run


def stock(block: Block, implementation: str = "grouped_mm") -> Layer:
    """One of Transformers' own experts functions."""
    block.weights.config._experts_implementation = implementation
    return block


def ours(block: Block, **options: Any) -> Layer:
    """The patched layer."""
    patch_moe(block, **options)
    return block


def liger(block: Block) -> Layer:
    """Liger's fused MoE."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # an optional peer

    experts = block.weights
    return lambda hidden_states, top_k_index, gates: LigerFusedMoEFunction.apply(
        hidden_states, experts.gate_up_proj, experts.down_proj, top_k_index.int(), gates
    )


def contenders(mode: Mode, num_tokens: int) -> dict[str, Callable[[Block], Layer]]:
    """What runs in a mode: only the patched and the stock layer know adapters."""
    found: dict[str, Callable[[Block], Layer]] = {
        "stock grouped_mm": stock,
        "lightning_moe": ours,
        "lightning_moe, chunk_tokens = tokens/8": lambda block: ours(block, chunk_tokens=max(num_tokens // 8, 1)),
        "lightning_moe, recompute_up": lambda block: ours(block, recompute_up=True),
    }
    if mode == "lora":
        return found
    found |= {"seed's form": seed_form, "gate before down": gate_before_down}
    if importlib.util.find_spec("liger_kernel"):
        found["Liger fused MoE"] = liger
    if importlib.util.find_spec("sonicmoe"):
        found["SonicMoE"] = lambda block: stock(block, "sonicmoe")
    return found


def make_inputs(config: Qwen3MoeConfig, num_tokens: int, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """Hidden states, expert ids, gates and the output's gradient, as a normalised top-k router gives them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(width: int) -> Tensor:
        return torch.randn(num_tokens, width, device=device, generator=generator)

    gates, index = normal(config.num_experts).softmax(-1).topk(config.num_experts_per_tok)
    gates = gates / gates.sum(-1, keepdim=True)
    hidden, grad = normal(config.hidden_size), normal(config.hidden_size)
    return hidden.bfloat16().requires_grad_(), index, gates.bfloat16().requires_grad_(), grad.bfloat16()


def reference(block: Block, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output and gradients of the frozen layer, and of its adapters, in float32, expert by expert."""
    hidden, index, gates, grad = inputs
    weights, x, g, dout = block.weights, hidden.detach().float(), gates.detach().float(), grad.float()
    out, dx, dg = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(g)
    adapters = block.adapters()
    d_adapters = [torch.zeros_like(parameter) for _, parameter in adapters]
    for expert in range(weights.num_experts):
        token, slot = torch.where(index == expert)
        # PEFT stores A expert by expert, B rank by rank.
        ours = [slice(expert * RANK, (expert + 1) * RANK) if "lora_A" in name else (slice(None), slice(expert, None,
                weights.num_experts)) for name, _ in adapters]  # fmt: skip
        with torch.enable_grad():
            rows, row_gates = x[token].requires_grad_(), g[token, slot].requires_grad_()
            factors = [p.detach()[part].requires_grad_() for (_, p), part in zip(adapters, ours, strict=True)]
            up_weight, down_weight = weights.gate_up_proj[expert].detach(), weights.down_proj[expert].detach()
            down_weight, up_weight = down_weight.float(), up_weight.float()
            if factors:
                up_a, up_b, down_a, down_b = factors
                scaling = block.experts.scaling["default"]  # type: ignore[index, union-attr]
                down_weight, up_weight = down_weight + scaling * down_b @ down_a, up_weight + scaling * up_b @ up_a
            gate, up = (rows @ up_weight.t()).chunk(2, dim=-1)
            y = (F.silu(gate) * up) @ down_weight.t() * row_gates[:, None]
        grad_rows, grad_gates, *grad_factors = torch.autograd.grad(y, (rows, row_gates, *factors), dout[token])
        out.index_add_(0, token, y.detach())
        dx.index_add_(0, token, grad_rows)
        dg[token, slot] = grad_gates
        for total, part, one in zip(d_adapters, ours, grad_factors, strict=True):
            total[part] = one
    wanted = {"output": out, "d hidden": dx, "d gate": dg}
    return wanted | {f"d adapter {name}": total for (name, _), total in zip(adapters, d_adapters, strict=True)}


def measure(layer: Layer, block: Block, inputs: list[tuple[Tensor, ...]], repeats: int) -> dict[str, Any]:
    """Memory of one execution after a warm-up, and the median times."""
    wanted = [*(p for p in block.parameters() if p.requires_grad)]

    def clear() -> None:
        for tensor in [*wanted, *(t for one in inputs for t in one)]:
            tensor.grad = None

    def events() -> list[torch.cuda.Event]:
        return [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    times = []
    for step in range(repeats + 3):
        hidden, index, gates, grad = inputs[step % len(inputs)]
        clear()
        start, middle, end = events()
        start.record()
        output = layer(hidden, index, gates)
        middle.record()
        output.backward(grad)
        end.record()
        times.append((start, middle, end))
        del output
    torch.cuda.synchronize()
    times = times[3:]

    clear()
    hidden, index, gates, grad = inputs[0]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = layer(hidden, index, gates)
    kept = torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()
    output.backward(grad)
    peak = torch.cuda.max_memory_allocated() - before
    return {
        "kept": kept / MIB,
        "peak": peak / MIB,
        "forward": median(start.elapsed_time(middle) for start, middle, _ in times),
        "total": median(start.elapsed_time(end) for start, _, end in times),
    }


def errors(layer: Layer, block: Block, inputs: tuple[Tensor, ...], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors of output and gradients, and whether two runs are bit-identical."""
    hidden, index, gates, grad = inputs
    runs = []
    for _ in range(2):
        output = layer(hidden, index, gates)
        leaves = (hidden, gates, *(parameter for _, parameter in block.adapters()))
        runs.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
    found = {
        name: ((ours.float() - want).norm() / want.norm()).item()
        for (name, want), ours in zip(wanted.items(), runs[0], strict=True)
    }
    return found | {"repeats": float(all(map(torch.equal, *runs)))}


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a plain bfloat16 matrix product of 8192 cubed."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        left @ right
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return 2 * 8192**3 / median(start.elapsed_time(end) for start, end in times[3:]) * 1e3


def bench(config: Qwen3MoeConfig, mode: Mode, num_tokens: int, repeats: int) -> list[Result]:
    """Every contender at one size."""
    device, results = torch.device("cuda"), []
    inputs = [make_inputs(config, num_tokens, device, seed) for seed in range(NUM_INPUTS)]
    wanted = reference(Block(config, mode, device), inputs[0])
    for name, make in track(contenders(mode, num_tokens).items(), description=f"{num_tokens} tokens", transient=True):
        block = Block(config, mode, device)
        try:
            layer = make(block)
            found = errors(layer, block, inputs[0], wanted)
            results.append(Result(name, num_tokens, **measure(layer, block, inputs, repeats), errors=found))
        except Exception as error:  # a peer that fails is a line of the table, not the end of it
            results.append(Result(name, num_tokens, failure=f"{type(error).__name__}: {error}"[:60]))
        del block
        torch.cuda.empty_cache()
    return results


def rows_of(results: list[Result], floors: dict[int, float]) -> list[list[str]]:
    """The table's cells, ratios to stock beside the figures."""
    rows = []
    for result in results:
        if result.failure:
            rows.append([str(result.num_tokens), result.name, result.failure, *[""] * 6])
            continue
        base = next(r for r in results if r.num_tokens == result.num_tokens)
        found = dict(result.errors or {})
        if adapters := [error for name, error in found.items() if name.startswith("d adapter")]:
            found["d adapters"] = max(adapters)
        rows.append([
            str(result.num_tokens),
            result.name,
            f"{result.kept:.0f} ({result.kept / base.kept:.2f})",
            f"{result.peak:.0f} ({result.peak / base.peak:.2f})",
            f"{result.forward:.2f}",
            f"{result.total:.2f} ({result.total / base.total:.2f})",
            f"{result.total / floors[result.num_tokens]:.2f}",
            " / ".join(f"{found[name]:.1e}" for name in ERRORS if name in found),
            {1.0: "yes", 0.0: "no"}.get(found.get("repeats", -1.0), ""),
        ])  # fmt: skip
    return rows


ERRORS = ("output", "d hidden", "d gate", "d adapters")
HEADERS = [
    "tokens",
    "what",
    "kept MiB",
    "peak MiB",
    "fwd ms",
    "total ms",
    "× floor",
    "error: out / dx / dgate / largest of the adapters'",
    "repeats",
]


def plot(results: list[Result], title: str, path: Path) -> None:
    """Peak memory and time against tokens."""
    mpl.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    names = list(dict.fromkeys(result.name for result in results if not result.failure))
    sizes = sorted({result.num_tokens for result in results})
    for axis, label, field in zip(axes, ("peak MiB", "forward + backward, ms"), ("peak", "total"), strict=True):
        for name in names:
            points = [(r.num_tokens, getattr(r, field)) for r in results if r.name == name and not r.failure]
            width = 3 if name.startswith("lightning_moe") else 1.5
            axis.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=width)
        axis.set(xlabel="tokens", ylabel=label, xlim=0, ylim=0)
        axis.set_xticks(sizes, labels=[f"{size:,}" for size in sizes])
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def provenance(rate: float) -> str:
    """Card, versions, commit and command."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return (
        f"{torch.cuda.get_device_name()}, {versions}, commit {commit}; plain matrix product {rate / 1e12:.0f} TFLOP/s; "
        f"`python recipes/benchmarks/experts_layer.py {' '.join(sys.argv[1:])}`"
    )


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
        sys.exit("bench_layer measures a GPU and there is none here")
    if repeats < 1 or not tokens or min(tokens) < 1:
        sys.exit(f"bench_layer needs at least one repeat and sizes of at least one token, not {repeats} and {tokens}")
    config = Qwen3MoeConfig(**MODELS[model])
    config._experts_implementation = "grouped_mm"
    rate = matrix_rate(torch.device("cuda"))
    # Per row three products of hidden x intermediate forward, three backward, three more for weights' gradients.
    passes = {"frozen": 2, "lora": 2, "full": 3}[mode]
    work = 2 * 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok * passes
    floors = {size: work * size / rate * 1e3 for size in tokens}
    results = [result for size in tokens for result in bench(config, mode, size, repeats)]
    source, rows = provenance(rate), rows_of(results, floors)

    table = Table(*HEADERS, title=f"{model}, {mode}", caption=Text(source))
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=max(Console().width, 150)).print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        lines = [f"{model}, {mode}. {source}", "", f"| {' | '.join(HEADERS)} |", "|---" * len(HEADERS) + "|"]
        (out / "table.md").write_text("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n")
        plot(results, f"{model}, {mode}: one experts layer, {torch.cuda.get_device_name()}", out / "plot.png")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
