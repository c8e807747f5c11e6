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
from itertools import groupby, product
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

from lightning_moe import GraphedFunction, MemoryPlan, patch_moe, plan_memory, replayed_bytes

sys.path.append(str(Path(__file__).parents[1]))  # where the recipe is
from lora.attention import register
from lora.base_model import liger_unsupported_reason, read_config
from lora.module import MoELoRA, gpu_gib, plan_options
from qwen3_lora import ALLOCATOR

WARMUP_OF_GRAPHS = 4  # three steps by themselves, and the capture
HEADERS = [
    "card GiB", "tokens", "variant", "s per step", "above weights GiB", "planned", "peak GiB", "planned", "losses",
]  # fmt: skip
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
BUFFER_MIB = 256  # of the callback
LONG = 8192  # from here on the host runs ahead within one step
# What each part of a variant's name sets. Transformers' own checkpointing is put on by the benchmark.
PARTS: dict[str, dict[str, Any]] = {
    "baseline": {
        "attention": "sdpa", "fused_lora": False, "checkpointing": "none", "offload": False, "tile_tokens": 0,
    },
    "lightning_moe": {"checkpointing": "selective", "offload": False},
    "liger": {},
    "selective": {"attention": "varlen", "checkpointing": "selective"},
    "full": {"checkpointing": "full"},
    "kept": {"checkpointing": "none"},
    "experts": {"experts": True},
    "offload": {"offload": True},
    "graph": {"attention": "varlen"},  # captured, `sdpa` would make a full mask
    "nf4": {"quantize": "nf4"},
    "fp8": {"quantize": "fp8"},
    "mxfp4": {"quantize": "mxfp4"},
    "host": {"experts_on": "host"},
}  # fmt: skip
BASE_OPTIONS = ("quantize", "experts_on")


def options_of(variant: str) -> dict[str, Any]:
    """What a variant sets of the recipe's model. Raises ValueError on one that there is not."""
    parts = variant.split("+")
    if parts[0] not in ("baseline", "lightning_moe") or not PARTS.keys() >= set(parts):
        raise ValueError(f"no variant {variant!r}: baseline or lightning_moe, with {', +'.join(list(PARTS)[2:])}")
    return {name: value for part in parts for name, value in PARTS[part].items()}


def base_of(variant: str) -> tuple[Any, ...]:
    """What tells the bases of the variants apart."""
    return tuple(options_of(variant).get(name) for name in BASE_OPTIONS)


def plan_of(variant: str, tokens: int, options: dict[str, Any], device: torch.device) -> MemoryPlan | None:
    """What `lightning-moe plan` says of a variant's step; None of those that it does not know."""
    if not variant.startswith("lightning_moe") or variant.endswith("graph"):
        return None
    chosen = options | options_of(variant)
    place = "host" if chosen.get("experts_on") == "host" else "device"
    planned = plan_options(
        chosen, tokens=tokens, experts_on=place, output_buffer_mib=BUFFER_MIB, gpu_gib=gpu_gib(device)
    )
    return plan_memory(read_config(None, chosen["architecture"], chosen.get("quantize") is not None), planned)


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
    variant: str, options: dict[str, Any], shared: PreTrainedModel, precision: str
) -> tuple[Callable[[dict[str, Any]], Tensor], GraphedFunction | None]:
    """A whole training step of a batch, and what is captured of it."""
    has_liger = "liger" in variant.split("+") and liger_unsupported_reason(shared) is None
    liger = {"liger": True} if has_liger else {}
    module = OnSharedBase(**(options | options_of(variant) | liger))
    module.__dict__["shared"] = shared
    torch.manual_seed(0)  # the same adapters in each
    module.configure_model()
    assert module.network is not None
    if variant.startswith("baseline") and "selective" not in variant:
        saves = {} if "graph" not in variant else {"preserve_rng_state": False}
        base: Any = module.network.get_base_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **saves})
    if variant.startswith("lightning_moe"):
        patch_moe(module, output_buffer_mib=BUFFER_MIB)
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


def make_bases(
    variants: tuple[str, ...], options: dict[str, Any], device: torch.device
) -> dict[tuple[Any, ...], PreTrainedModel]:
    """The base of each variant, with all of the GPU's memory; some share one."""
    limit_memory(None, device)
    bases = {}
    for base in dict.fromkeys(map(base_of, variants)):
        given = {name: value for name, value in zip(BASE_OPTIONS, base, strict=True) if value is not None}
        module = MoELoRA(**copy.deepcopy(options) | {"checkpointing": "none", "offload": False} | given)
        bases[base] = module.to(device).build_base()
    return bases


def limit_memory(card_gib: float | None, device: torch.device) -> None:
    """Lets PyTorch have a GiB less than a smaller GPU has, and nothing of what it keeps for later; None for all."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if card_gib is None else (card_gib - 1) * 2**30 / total)


def link_speed(device: torch.device) -> float:
    """GB/s of copies from page-locked host memory to the GPU: of the faster of two."""
    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device, pin_memory=False)
    seconds = []
    for _ in range(2):
        torch.cuda.synchronize()
        start = perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(perf_counter() - start)
    return source.nbytes / min(seconds) / 1e9


class Measured(NamedTuple):
    """Of a variant's steps: the median of the seconds, the most of the GiB, each loss, and why there is no graph."""

    seconds: float
    above: float
    peak: float
    losses: list[float]
    missing: str


def in_turn(
    variants: tuple[str, ...],
    tokens: int,
    rounds: int,
    options: dict[str, Any],
    bases: dict[tuple[Any, ...], PreTrainedModel],
    precision: str,
    device: torch.device,
) -> dict[str, Measured]:
    """Steps of so many tokens of each, and nothing of them is held afterwards."""
    steps = 1 if tokens >= LONG else 2
    warmup = WARMUP_OF_GRAPHS // steps if any(variant.endswith("graph") for variant in variants) else 1
    made = {variant: make_step(variant, options, bases[base_of(variant)], precision) for variant in variants}
    found: dict[str, list[tuple[float, ...]]] = {variant: [] for variant in variants}
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
    variants: tuple[str, ...] = ("baseline+liger", "lightning_moe", "lightning_moe+graph"),
    rounds: int = 4,
    experts: bool = False,
    layers: int | None = None,
    rank: int | None = None,
    optimizer: Literal["adamw", "adamw_8bit"] | None = None,
    cards: tuple[float, ...] = (),
    out: Path | None = None,
) -> None:
    """Compares training steps.

    Args:
        recipe: a configuration of qwen3_lora.py; its architecture gets random weights.
        lengths: tokens of each step.
        variants: in turn; ratios are to the first. `baseline+liger` is Transformers and PEFT with Transformers' own
            checkpointing and Liger's RMSNorm and rotary embedding; `+selective` keeps attention as the recipe does;
            `+graph` is captured as a CUDA graph. `lightning_moe` is the recipe with attention kept, `+offload` in host
            memory, `+full` with nothing kept but layers' inputs, `+kept` with nothing computed again, `+experts` with
            LoRA on the experts too, `+nf4`, `+fp8` or `+mxfp4` on a base of its own with quantized experts, `+host` on
            one whose experts wait in host memory.
        rounds: of two steps of each variant, of one from 8,192 tokens on, after those for warming up: four where a
            graph is among them, else one round.
        experts: LoRA on the experts too.
        layers: of the model, where not all of them.
        rank: of the adapters, where not the recipe's.
        optimizer: where not the recipe's.
        cards: GiB of smaller GPUs, in turn: in the steps PyTorch gets a GiB less than that, which is for the context
            and modules. The variants then run one after the other; one that runs out of memory is said not to fit.
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
    if device.type == "cuda" and any("host" in variant for variant in variants):
        print(f"Page-locked host memory is copied to the GPU with {link_speed(device):.1f} GB/s.")
    precision = settings["trainer"].get("precision", "32-true")
    # What others hold would be held on the smaller GPU, too.
    groups = [tuple(group) for _, group in groupby(variants, base_of)] if cards else [variants]
    first: dict[tuple[float | None, int], Measured] = {}
    rows = []
    with Progress(transient=True) as progress:
        task = progress.add_task("steps", total=len(lengths) * (len(variants) * len(cards) or 1))
        for group in groups:
            bases = make_bases(group, options, device)
            together = [(variant,) for variant in group] if cards else [group]
            for some, card, tokens in product(together, cards or (None,), lengths):
                limit_memory(card, device)
                named = [f"{card or '-'}", f"{tokens:,}"]
                try:
                    found = in_turn(some, tokens, rounds, options, bases, precision, device)
                except torch.OutOfMemoryError:
                    rows += [[*named, variant, "does not fit", *[""] * 5] for variant in some]
                    found = {}
                for variant, measured in found.items():
                    to = first.setdefault((card, tokens), measured)
                    plan = plan_of(variant, tokens, options, device)
                    above, peak = (f"{plan.above / 2**30:.2f}", f"{plan.peak / 2**30:.2f}") if plan else ("", "")
                    rows.append([
                        *named, variant + measured.missing,
                        f"{measured.seconds:.4f} ({measured.seconds / to.seconds:.2f})",
                        f"{measured.above:.2f} ({measured.above / to.above:.2f})", above, f"{measured.peak:.2f}", peak,
                        " ".join(f"{loss:.4f}" for loss in measured.losses),
                    ])  # fmt: skip
                for row in rows[-len(some) :]:
                    progress.console.print(*row, sep=" | ", markup=False, soft_wrap=True)
                progress.advance(task)
            del bases
    table = (f"Training steps in turn, {recipe.stem}", provenance(__file__, "transformers", "peft"), HEADERS, rows)
    show(*table)
    if out is not None:
        write(out / "alternating_steps.md", *table)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR)
    auto_cli(main, as_positional=False)
