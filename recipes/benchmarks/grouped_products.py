"""Products of rows with their experts' weights: by descriptors, by pointers, and by PyTorch.

    python recipes/benchmarks/grouped_products.py                               Qwen3-30B-A3B's, 1,024 to 16,384 tokens
    DISABLE_MMA_V3=1 python recipes/benchmarks/grouped_products.py              with Ampere's instructions on a Hopper
    python recipes/benchmarks/grouped_products.py --out runs/grouped_products   writes grouped_products.md there

README.md beside this file says what each column means and how it is measured.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from experts_layer import MODELS
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from rich.progress import track
from tables import provenance, show, write
from torch import Tensor

HEADERS = ["tokens", "product", "variant", "ms", "TFLOP/s", "error"]
Call = Callable[[], Tensor]


class Product(NamedTuple):
    """One of a layer's products.

    Attributes:
        rows: (S, in), sorted by expert; or (T, in) where they are gathered.
        weight: (E, in, out).
        tokens: (S,), where rows are gathered.
    """

    rows: Tensor
    weight: Tensor
    tokens: Tensor | None = None

    def gathered(self) -> Tensor:
        """The rows, written out."""
        return self.rows if self.tokens is None else self.rows[self.tokens]


def products(sizes: dict[str, int], tokens: Tensor, num_tokens: int, dtype: torch.dtype) -> dict[str, Product]:
    """The four of a layer with frozen experts; `tokens` (S,) is the token of each row."""
    hidden, intermediate, experts = sizes["hidden_size"], sizes["moe_intermediate_size"], sizes["num_experts"]
    device, num_rows = tokens.device, tokens.shape[0]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    per_token = normal(num_tokens, hidden)
    gate_up, down = normal(experts, 2 * intermediate, hidden), normal(experts, hidden, intermediate)
    return {
        "gate_up, gathered": Product(per_token, gate_up.mT, tokens),
        "down": Product(normal(num_rows, intermediate), down.mT),
        "down backward, gathered": Product(per_token, down, tokens),
        "gate_up backward": Product(normal(num_rows, 2 * intermediate), gate_up),
    }


def loop_of_mm(product: Product, ends: list[int]) -> Tensor:
    """A matrix product for each expert that has rows, which the host knows."""
    rows = product.gathered()
    out = rows.new_empty(rows.shape[0], product.weight.shape[2])
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start < end:
            torch.mm(rows[start:end], product.weight[expert], out=out[start:end])
    return out


def variants(product: Product, offsets: Tensor, tiles: Any, *, has_descriptors: bool) -> dict[str, Call]:
    """What computes a product, the baseline first."""
    from lightning_moe.ops import triton_kernels  # which imports Triton

    rows, weight, tokens = product
    kernel = partial(triton_kernels.grouped_linear, rows, weight, offsets, tiles, tokens=tokens)
    found: dict[str, Call] = {
        "loop of mm": partial(loop_of_mm, product, offsets.tolist()),
        "grouped_mm": lambda: F.grouped_mm(product.gathered(), weight, offs=offsets),
        "pointers": partial(kernel, pointers=True),
    }
    return {**found, "descriptors": partial(kernel, pointers=False)} if has_descriptors else found


def error(found: Tensor, product: Product, offsets: Tensor) -> float:
    """Relative, against the same product in float32."""
    exact = product._replace(rows=product.rows.float(), weight=product.weight.float())
    wanted = loop_of_mm(exact, offsets.tolist())
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def milliseconds(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, float]:
    """Medians over rounds of each call in turn, between CUDA events, after the caches were emptied."""
    emptied = torch.empty(2**28, dtype=torch.int8, device=device)
    events: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            emptied.zero_()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: median(start.elapsed_time(end) for start, end in pairs[1:]) for name, pairs in events.items()}


def bench(sizes: dict[str, int], num_tokens: int, rounds: int, device: torch.device) -> list[list[str]]:
    """The table's rows at one number of tokens."""
    from lightning_moe.ops import triton_kernels

    generator = torch.Generator(device).manual_seed(1)
    scores = torch.rand(num_tokens, sizes["num_experts"], device=device, generator=generator)
    index = scores.topk(sizes["num_experts_per_tok"]).indices
    permutation, _, offsets, tiles, _ = triton_kernels.route(
        index, sizes["num_experts"], is_expert_parallel=False, needs_tiles=True, compact_dtype=None
    )
    cells = []
    made = products(sizes, permutation // index.shape[1], num_tokens, torch.bfloat16)
    has_descriptors = triton_kernels.has_tensor_memory_accelerator(device)
    for name, product in track(made.items(), description=f"{num_tokens} tokens", transient=True):
        calls = variants(product, offsets, tiles, has_descriptors=has_descriptors)
        errors = {variant: error(call(), product, offsets) for variant, call in calls.items()}
        times, baseline = milliseconds(calls, rounds, device), 0.0
        for variant, time in times.items():
            baseline = baseline or time
            rate = 2 * index.numel() * product.weight[0].numel() / time / 1e9
            ratio = f"{time:.3f} ({time / baseline:.2f})"
            cells.append([f"{num_tokens:,}", name, variant, ratio, f"{rate:.0f}", f"{errors[variant]:.1e}"])
    return cells


def main(
    tokens: tuple[PositiveInt, ...] = (1024, 4096, 16384),
    rounds: int = 30,
    out: Path | None = None,
) -> None:
    """Times the products of Qwen3-30B-A3B's layer on a GPU.

    Args:
        tokens: the sizes.
        rounds: of each variant in turn; the first is warm-up.
        out: a folder for grouped_products.md.
    """
    if not torch.cuda.is_available():
        sys.exit("grouped_products measures a GPU and there is none here")
    if rounds < 2:
        sys.exit("grouped_products needs at least two rounds")
    sizes, device = MODELS["qwen3_30b_a3b"], torch.device("cuda", torch.cuda.current_device())
    rows = [row for size in tokens for row in bench(sizes, size, rounds, device)]
    table = ("qwen3_30b_a3b, bfloat16, frozen experts", provenance(__file__, "triton"), HEADERS, rows)
    show(*table)
    if out is not None:
        write(out / "grouped_products.md", *table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
