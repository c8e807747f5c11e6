"""One experts layer, forward and backward: lightning_moe beside Transformers' default and whatever peers are installed.

    python recipes/benchmarks/experts_layer.py        Qwen3-30B-A3B's layer, frozen experts
    python recipes/benchmarks/experts_layer.py --mode full --tokens "[8192]"; --mode lora: PEFT on the experts
    python recipes/benchmarks/experts_layer.py --out runs/experts_layer    writes table.md there

README.md beside this file says what each column means and how it is measured.
"""

import importlib.util
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
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
WARMUP_MS, MEASURED_MS = 100, 500
RANK = 16

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_30b_a3b": {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    "tiny": {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2},
}
HEADERS = ["tokens", "variant", "kept MiB", "peak MiB", "forward ms", "total ms", "× roofline", "largest error"]


class Numbers(NamedTuple):
    """Of one variant at one size: MiB, milliseconds, and the largest relative error."""

    kept: float
    peak: float
    forward: float
    total: float
    error: float = 0.0


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


def run(layer: Layer, block: Block, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output and gradients of the layer and of its adapters, by name."""
    hidden, index, weights, grad = inputs
    output = layer(hidden, index, weights)
    grads = torch.autograd.grad(output, (hidden, weights, *block.adapters().values()), grad)
    names = ("d hidden", "d routing weights", *(f"d adapter {name}" for name in block.adapters()))
    return {"output": output.detach(), **dict(zip(names, grads, strict=True))}


def reference(block: Block, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What `run` gives, in float32 by Transformers' loop over the experts, with PEFT's adapters merged."""
    exact = deepcopy(block).float()
    hidden, index, weights, grad = (tensor.detach() for tensor in inputs)
    hidden, weights = (tensor.float().requires_grad_() for tensor in (hidden, weights))
    return run(transformers_own(exact, "eager"), exact, (hidden, index, weights, grad.float()))


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors by name."""
    return {name: ((found[name].float() - want).norm() / want.norm()).item() for name, want in wanted.items()}


def measure(layer: Layer, block: Block, inputs: tuple[Tensor, ...]) -> Numbers:
    """MiB kept by the forward pass and at the peak, and median milliseconds of forward and of both passes."""
    from triton.testing import do_bench

    hidden, index, weights, grad = inputs
    leaves = [*block.parameters(), hidden, weights]
    timed = partial(do_bench, warmup=WARMUP_MS, rep=MEASURED_MS, return_mode="median")
    forward = timed(lambda: layer(hidden, index, weights))
    total = timed(lambda: layer(hidden, index, weights).backward(grad), grad_to_none=leaves)

    for leaf in leaves:
        leaf.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = layer(hidden, index, weights)
    kept = torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()
    output.backward(grad)
    return Numbers(kept / MIB, (torch.cuda.max_memory_allocated() - before) / MIB, forward, total)


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a plain bfloat16 matrix product of 8192 cubed."""
    from triton.testing import do_bench

    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / do_bench(lambda: left @ right, return_mode="median") * 1e3


def bench(
    config: Qwen3MoeConfig, mode: Mode, num_tokens: int, roofline: float, device: torch.device
) -> list[list[str]]:
    """The table's rows at one size; `roofline` in milliseconds."""
    rows, baseline = [], None
    inputs = make_inputs(config, num_tokens, device, seed=0)
    wanted = reference(Block(config, mode, device), inputs)
    for name, make in track(variants(mode).items(), description=f"{num_tokens} tokens", transient=True):
        block = Block(config, mode, device)
        try:
            layer = make(block)
            error = max(errors(run(layer, block, inputs), wanted).values())
            numbers = measure(layer, block, inputs)._replace(error=error)
            baseline = baseline or numbers
            cells = cells_of(numbers, baseline, roofline)
        except Exception as problem:  # a peer that fails is a line of the table, not the end of it
            cells = [f"{type(problem).__name__}: {problem}"[:60], *[""] * (len(HEADERS) - 3)]
        rows.append([f"{num_tokens:,}", name, *cells])
        del block
        torch.cuda.empty_cache()
    return rows


def cells_of(numbers: Numbers, baseline: Numbers, roofline: float) -> list[str]:
    """Numbers, those of memory and time with their ratio to the baseline's."""
    return [
        f"{numbers.kept:.0f} ({numbers.kept / baseline.kept:.2f})",
        f"{numbers.peak:.0f} ({numbers.peak / baseline.peak:.2f})",
        f"{numbers.forward:.2f}",
        f"{numbers.total:.2f} ({numbers.total / baseline.total:.2f})",
        f"{numbers.total / roofline:.2f}",
        f"{numbers.error:.1e}",
    ]


def main(
    model: Literal["qwen3_30b_a3b", "tiny"] = "qwen3_30b_a3b",
    mode: Mode = "frozen",
    tokens: tuple[PositiveInt, ...] = (4096, 16384, 32768),
    out: Path | None = None,
) -> None:
    """Benchmarks one experts layer on a GPU.

    Args:
        model: whose shapes.
        mode: frozen experts, LoRA on them, or full fine-tuning.
        tokens: the sizes.
        out: a folder for table.md.
    """
    if not torch.cuda.is_available():
        sys.exit("experts_layer measures a GPU and there is none here")
    config = Qwen3MoeConfig(**MODELS[model])
    config._experts_implementation = "grouped_mm"
    device = torch.device("cuda")
    rate = matrix_rate(device)
    # Per row three products of hidden x intermediate forward, three backward, three more for weights' gradients.
    passes = 3 if mode == "full" else 2
    work = 2 * 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok * passes
    rows = [row for size in tokens for row in bench(config, mode, size, work * size / rate * 1e3, device)]
    source = f"{provenance(__file__, 'transformers', 'peft')}; plain matrix product {rate / 1e12:.0f} TFLOP/s"
    table = (f"{model}, {mode}", source, HEADERS, rows)
    show(*table)
    if out is not None:
        write(out / "table.md", *table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
