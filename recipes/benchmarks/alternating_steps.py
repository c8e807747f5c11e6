"""Training steps of several variants in one process, in turn, on one base: for short steps, whose pace the host sets.

    python recipes/benchmarks/alternating_steps.py                  the tiny model, also on a CPU
    python recipes/benchmarks/alternating_steps.py --recipe recipes/configs/qwen3_30b_a3b.yaml --lengths "[1024, 4096]"

README.md beside this file says what each column means.
"""

import copy
import gc
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
import yaml
from jsonargparse import auto_cli
from rich.progress import Progress
from tables import provenance, show, write
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_moe import GraphedFunction, patch_moe, replayed_bytes

sys.path.append(str(Path(__file__).parents[1]))  # where the recipe is
from lora.attention import register
from lora.module import MoELoRA

Variant = Literal[
    "baseline+liger", "baseline+liger+selective", "baseline+liger+graph", "lightning_moe", "lightning_moe+offload",
    "lightning_moe+full+offload", "lightning_moe+graph", "lightning_moe+nf4", "lightning_moe+nf4+offload",
    "lightning_moe+nf4+full+offload", "lightning_moe+nf4+graph", "lightning_moe+host+offload",
    "lightning_moe+nf4+host", "lightning_moe+nf4+host+offload",
]  # fmt: skip
WARMUP_OF_GRAPHS = 4  # three steps by themselves, and the capture
HEADERS = ["tokens", "variant", "s per step", "above weights GiB", "peak GiB", "losses"]
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
LONG = 8192  # from here on the host runs ahead within one step
# Transformers' own checkpointing is put on by the benchmark. Captured, `sdpa` would make a full mask.
BASELINE = {
    "attention": "sdpa", "fused_lora": False, "checkpointing": "none", "offload": False,
    "tile_tokens": 0,
}  # fmt: skip
OPTIONS: dict[Variant, dict[str, Any]] = {
    "baseline+liger": BASELINE,
    "baseline+liger+selective": {**BASELINE, "attention": "varlen", "checkpointing": "selective"},
    "baseline+liger+graph": {**BASELINE, "attention": "varlen"},
    "lightning_moe": {"checkpointing": "selective", "offload": False},
    "lightning_moe+offload": {"checkpointing": "selective", "offload": True},
    "lightning_moe+full+offload": {"checkpointing": "full", "offload": True},
    "lightning_moe+graph": {"checkpointing": "selective", "offload": False},
    "lightning_moe+nf4": {"quantize": "nf4", "checkpointing": "selective", "offload": False},
    "lightning_moe+nf4+offload": {"quantize": "nf4", "checkpointing": "selective", "offload": True},
    "lightning_moe+nf4+full+offload": {"quantize": "nf4", "checkpointing": "full", "offload": True},
    "lightning_moe+nf4+graph": {"quantize": "nf4", "checkpointing": "selective", "offload": False},
    "lightning_moe+host+offload": {"experts_on": "host", "checkpointing": "selective", "offload": True},
    "lightning_moe+nf4+host": {
        "quantize": "nf4",
        "experts_on": "host",
        "checkpointing": "selective",
        "offload": False,
    },
    "lightning_moe+nf4+host+offload": {
        "quantize": "nf4",
        "experts_on": "host",
        "checkpointing": "selective",
        "offload": True,
    },
}


BASE_OPTIONS = ("quantize", "experts_on")


def base_of(variant: Variant) -> tuple[Any, ...]:
    """What tells the bases of the variants apart."""
    return tuple(OPTIONS[variant].get(name) for name in BASE_OPTIONS)


class OnSharedBase(MoELoRA):
    """The recipe's module on the weights of another model, which stay where they are."""

    shared: PreTrainedModel

    def build_base(self) -> PreTrainedModel:
        """A model of its own class and configuration, with the other's tensors."""
        register()
        config = copy.deepcopy(self.shared.config)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                config, dtype=self.shared.dtype, attn_implementation=self.hparams["attention"]
            )
        base.load_state_dict(self.shared.state_dict(), assign=True)
        for name, buffer in self.shared.named_buffers():
            module, _, leaf = name.rpartition(".")
            base.get_submodule(module).register_buffer(leaf, buffer, persistent=False)
        return base


def make_step(
    variant: Variant, options: dict[str, Any], shared: PreTrainedModel, precision: str
) -> tuple[Callable[[dict[str, Any]], Tensor], GraphedFunction | None]:
    """A whole training step of a batch, and what is captured of it."""
    module = OnSharedBase(**(options | OPTIONS[variant]))
    module.__dict__["shared"] = shared
    torch.manual_seed(0)  # the same adapters in each
    module.configure_model()
    assert module.network is not None
    if OPTIONS[variant] | {"attention": None} == BASELINE | {"attention": None}:
        saves = {} if "graph" not in variant else {"preserve_rng_state": False}
        base: Any = module.network.get_base_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **saves})
    if variant.startswith("lightning_moe"):
        patch_moe(module, output_buffer_mib=64)
    optimizer = module.configure_optimizers()["optimizer"]
    losses = GraphedFunction(module.graphed_losses, module, True) if variant.endswith("graph") else None

    def step(batch: dict[str, Any]) -> Tensor:
        with torch.autocast(shared.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            total, loss = (losses or module.graphed_losses)(batch)
        total.backward()
        optimizer.step()
        return loss

    return step, losses


def make_batch(tokens: int, vocabulary: int, seed: int, device: torch.device) -> dict[str, Any]:
    """One document of random tokens."""
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed)).to(device)
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    return {
        "input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(tokens, device=device)[None],
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(), "max_length_q": tokens, "max_length_k": tokens,
        "weight": 1.0,
    }  # fmt: skip


def timed(
    step: Callable[[dict[str, Any]], Tensor],
    graphed: GraphedFunction | None,
    batch: dict[str, Any],
    device: torch.device,
    steps: int,
) -> tuple[float, ...]:
    """Seconds of a step, so many in a row; GiB above what was held, and of the whole card; and the loss."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        replayed_bytes(device)
    start = perf_counter()
    for _ in range(steps):
        loss = step(batch)
    value = loss.item()
    seconds = (perf_counter() - start) / steps
    if not on_gpu:
        return seconds, float("nan"), float("nan"), value
    above = torch.cuda.max_memory_allocated() - held
    if graphed is not None and (replayed := replayed_bytes(device)):  # a graph holds its gradients between steps too
        above = max(above, replayed + sum(p.nbytes for p in graphed.module.parameters() if p.requires_grad))
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()  # the context, cuBLAS's and Triton's modules
    return seconds, above / 2**30, (outside + torch.cuda.max_memory_reserved()) / 2**30, value


class Measured(NamedTuple):
    """Of a variant's steps: the median of the seconds, the most of the GiB, each loss, and why there is no graph."""

    seconds: float
    above: float
    peak: float
    losses: list[float]
    missing: str


def in_turn(
    variants: tuple[Variant, ...],
    tokens: int,
    rounds: int,
    options: dict[str, Any],
    bases: dict[tuple[Any, ...], PreTrainedModel],
    precision: str,
    device: torch.device,
) -> dict[Variant, Measured]:
    """Steps of so many tokens of each, and nothing of them is held afterwards."""
    steps = 1 if tokens >= LONG else 2
    warmup = WARMUP_OF_GRAPHS // steps if any(variant.endswith("graph") for variant in variants) else 1
    made = {variant: make_step(variant, options, bases[base_of(variant)], precision) for variant in variants}
    found: dict[Variant, list[tuple[float, ...]]] = {variant: [] for variant in variants}
    for number in range(rounds + warmup):
        batch = make_batch(tokens, options["architecture"]["vocab_size"], number, device)
        for variant, (step, graphed) in made.items():
            found[variant].append(timed(step, graphed, batch, device, steps))
    measured = {}
    for variant, results in found.items():
        graphed = made[variant][1]
        seconds, above, peak, losses = zip(*results[warmup:], strict=True)
        missing = "" if graphed is None or graphed.reason is None else f", {graphed.reason}"
        measured[variant] = Measured(median(seconds), max(above), max(peak), list(losses), missing)
    del made, step, graphed
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measured


def main(
    recipe: Path = TINY,
    lengths: tuple[int, ...] = (128, 256),
    variants: tuple[Variant, ...] = ("baseline+liger", "lightning_moe", "lightning_moe+graph"),
    rounds: int = 4,
    experts: bool = False,
    layers: int | None = None,
    rank: int | None = None,
    optimizer: Literal["adamw", "adamw_8bit"] | None = None,
    card_gib: float | None = None,
    out: Path | None = None,
) -> None:
    """Compares training steps.

    Args:
        recipe: a configuration of qwen3_lora.py; its architecture gets random weights.
        lengths: tokens of each step.
        variants: in turn; ratios are to the first. `baseline+liger` is Transformers and PEFT with Transformers' own
            checkpointing and Liger's RMSNorm and rotary embedding; `+selective` keeps attention as the recipe does;
            `+graph` is captured as a CUDA graph. `lightning_moe` is the recipe with attention kept, `+offload` in host
            memory, `+full` with nothing kept but layers' inputs, `+nf4` on a base of its own with quantized experts,
            `+host` on one whose experts wait in host memory.
        rounds: of two steps of each variant, of one from 8,192 tokens on, after those for warming up: four where a
            graph is among them, else one round.
        experts: LoRA on the experts too.
        layers: of the model, where not all of them.
        rank: of the adapters, where not the recipe's.
        optimizer: where not the recipe's.
        card_gib: of a smaller GPU: PyTorch gets a GiB less than that, which is for the context and modules. The
            variants then run one after the other, not in turn.
        out: a folder for alternating_steps.md.
    """
    settings = yaml.safe_load(recipe.read_text())
    options = settings["model"] | {"init": "random", "experts": experts}
    if layers is not None:
        options["architecture"]["num_hidden_layers"] = layers
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        print("Without a GPU or liger-kernel all variants have Transformers' own norms.")
    given = {"rank": rank, "optimizer": optimizer}
    options |= {name: value for name, value in given.items() if value is not None}
    if card_gib is not None and device.type == "cuda":
        share = (card_gib - 1) * 2**30 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
    bases = {}
    for base in dict.fromkeys(map(base_of, variants)):
        given = {name: value for name, value in zip(BASE_OPTIONS, base, strict=True) if value is not None}
        bases[base] = MoELoRA(**options | {"checkpointing": "none", "offload": False} | given).to(device).build_base()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    precision = settings["trainer"].get("precision", "32-true")
    # What others hold between their steps would be held on the smaller GPU, too.
    together = [variants] if card_gib is None else [(variant,) for variant in variants]
    rows = []
    with Progress(transient=True) as progress:
        task = progress.add_task("lengths", total=len(lengths) * len(together))
        for tokens in lengths:
            first = None
            for some in together:
                for variant, measured in in_turn(some, tokens, rounds, options, bases, precision, device).items():
                    first = first or measured
                    rows.append([
                        f"{tokens:,}", variant + measured.missing,
                        f"{measured.seconds:.4f} ({measured.seconds / first.seconds:.2f})",
                        f"{measured.above:.2f} ({measured.above / first.above:.2f})", f"{measured.peak:.2f}",
                        " ".join(f"{loss:.4f}" for loss in measured.losses),
                    ])  # fmt: skip
                    progress.console.print(*rows[-1], sep=" | ", markup=False, soft_wrap=True)
                progress.advance(task)
    table = (f"Training steps in turn, {recipe.stem}", provenance(__file__, "transformers", "peft"), HEADERS, rows)
    show(*table)
    if out is not None:
        write(out / "alternating_steps.md", *table)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the recipe does
    auto_cli(main, as_positional=False)
