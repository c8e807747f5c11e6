"""What device and host hold while a checkpoint is read and its experts quantized: a made-up one, in the hub's layout.

    python recipes/benchmarks/loading.py                                   the tiny model, also on a CPU
    python recipes/benchmarks/loading.py --recipe recipes/configs/qwen3_30b_a3b.yaml --layers 24 --folder /large/disk
    ... --format fp8 --stored true                                         a checkpoint that has its experts in fp8

README.md beside this file says what each column means.
"""

import gc
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any, Literal

import psutil
import torch
import yaml
from jsonargparse import auto_cli
from rich.progress import track
from safetensors.torch import save_file
from tables import provenance, show, write
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from lightning_moe import QuantizedExpertsConfig

sys.path.append(str(Path(__file__).parents[1]))  # where the recipe is
from lora.base_model import read_config

HEADERS = [
    "checkpoint GiB", "shard GiB", "s", "device: stays GiB", "device: peak above", "device: holes", "host: peak GiB",
]  # fmt: skip
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


# A tensor's shape, its dtype, and what its values are drawn by.
Drawn = tuple[tuple[int, ...], torch.dtype]
EXPERT = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # of Qwen3-MoE, before they were fused


def tensors_of(name: str, parameter: Tensor, format: str | None) -> Iterator[tuple[str, Drawn]]:
    """What the hub has of a parameter of Qwen3-MoE in 16 bits or fp8, or of gpt-oss in mxfp4."""
    path, _, stem = name.rpartition(".")
    is_experts = stem in EXPERT and parameter.ndim == 3
    if is_experts and format == "mxfp4":
        experts, width, out = parameter.shape
        yield f"{name}_blocks", ((experts, out, width // 32, 16), torch.uint8)
        yield f"{name}_scales", ((experts, out, width // 32), torch.uint8)
    elif is_experts:
        experts, out, width = parameter.shape
        parts = EXPERT[stem]
        for expert in range(experts):
            for part in parts:
                yield from matrix(f"{path}.{expert}.{part}.weight", (out // len(parts), width), format)
    elif format == "fp8" and path.endswith("_proj"):
        yield from matrix(name, tuple(parameter.shape), format)
    else:
        yield name, (tuple(parameter.shape), torch.bfloat16)


def matrix(name: str, shape: tuple[int, ...], format: str | None) -> Iterator[tuple[str, Drawn]]:
    """In 16 bits, or in fp8 and its scales."""
    yield name, (shape, torch.float8_e4m3fn if format == "fp8" else torch.bfloat16)
    if format == "fp8":
        yield f"{name}_scale_inv", (tuple(-(-side // 128) for side in shape), torch.bfloat16)


def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random values, of a size that weights have when they are made dense."""
    if dtype == torch.uint8:  # mxfp4's exponents are + 127
        ends = (0, 256) if name.endswith("_blocks") else (117, 123)
        return torch.randint(*ends, shape, dtype=dtype, device=device).cpu()
    size = 1e-4 if name.endswith("_scale_inv") else 100 if dtype == torch.float8_e4m3fn else 0.02
    return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(size).to(dtype).cpu()


def write_checkpoint(config: PretrainedConfig, folder: Path, device: torch.device, format: str | None = None) -> int:
    """Random weights, a file for each layer; the bytes of the largest file.

    Args:
        config: of Qwen3-MoE, or of gpt-oss.
        folder: that is there.
        device: where the values are drawn.
        format: None for bfloat16, with one weight for each expert; or `fp8` of Qwen3-MoE, `mxfp4` of gpt-oss.
    """
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files: dict[str, dict[str, Drawn]] = {}
    for name, parameter in model.named_parameters():
        layer = re.match(r"model\.layers\.\d+\.", name)
        files.setdefault(layer.group() if layer else "", {}).update(tensors_of(name, parameter, format))
    where: dict[str, str] = {}
    largest = 0
    for number, shapes in enumerate(track(files.values(), "writing", transient=True)):
        file = f"model-{number:05}.safetensors"
        tensors = {name: draw(name, *drawn, device) for name, drawn in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        largest = max(largest, (folder / file).stat().st_size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return largest


class HostPeak:
    """The most memory of its own that the process holds meanwhile, in bytes above what it held: files it maps aside."""

    def __enter__(self) -> "HostPeak":
        self._start, self.bytes, self._ended = self._held(), 0, Event()
        self._thread = Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _held(self) -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - getattr(memory, "shared", 0)

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.bytes = max(self.bytes, self._held() - self._start)


def main(
    recipe: Path = TINY,
    layers: int | None = None,
    folder: Path | None = None,
    format: Literal["nf4", "fp8", "mxfp4"] = "nf4",
    stored: bool = False,
    linear: bool = False,
    out: Path | None = None,
) -> None:
    """Writes a checkpoint, reads it quantized, and measures.

    Args:
        recipe: a configuration of qwen3_lora.py, of a Qwen3-MoE or of gpt-oss.
        layers: of the model, where not all of them.
        format: that the experts get.
        stored: whether the checkpoint has it already: fp8 of a Qwen3-MoE, or mxfp4 of gpt-oss.
        folder: where there is room for the checkpoint, which is removed in the end; that of temporary files by default.
        linear: quantize the other linear layers too.
        out: a folder for loading.md.
    """
    architecture = yaml.safe_load(recipe.read_text())["model"]["architecture"]
    if layers is not None:
        architecture["num_hidden_layers"] = layers
    config: Any = read_config(None, architecture)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory(dir=folder) as place:
        shard = write_checkpoint(config, Path(place), device, format if stored else None)
        size = sum(file.stat().st_size for file in Path(place).glob("*.safetensors"))
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if on_gpu else 0
        start = perf_counter()
        with HostPeak() as host:
            model = AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.bfloat16, device_map={"": device},
                quantization_config=QuantizedExpertsConfig(format, linear=linear),
            )  # fmt: skip
        seconds = perf_counter() - start
    stays = torch.cuda.memory_allocated() - held if on_gpu else sum(p.nbytes for p in model.parameters())
    above = torch.cuda.max_memory_allocated() - held - stays if on_gpu else float("nan")
    holes = float("nan")
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        holes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    sizes = [f"{number / 2**30:.3g}" for number in (size, shard, stays, above, holes, host.bytes)]
    rows = [[*sizes[:2], f"{seconds:.3g}", *sizes[2:]]]
    table = (f"Loading with experts in {format}, {recipe.stem}", provenance(__file__, "transformers"), HEADERS, rows)
    show(*table)
    if out is not None:
        write(out / "loading.md", *table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
