"""What device and host hold while a checkpoint is read and its experts quantized: a made-up one, in the hub's layout.

    python recipes/benchmarks/loading.py                                   the tiny model, also on a CPU
    python recipes/benchmarks/loading.py --recipe recipes/configs/qwen3_30b_a3b.yaml --layers 24 --folder /large/disk

README.md beside this file says what each column means.
"""

import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

import psutil
import torch
import yaml
from jsonargparse import auto_cli
from rich.progress import track
from safetensors.torch import save_file
from tables import provenance, show, write
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3MoeConfig

from lightning_moe import QuantizedExpertsConfig

HEADERS = ["checkpoint GiB", "shard GiB", "s", "device: stays GiB", "device: peak above", "host: peak GiB"]
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


def layer_tensors(config: Any, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a decoder layer of Qwen3-MoE, as the hub has them."""
    hidden, head, intermediate = config.hidden_size, config.head_dim, config.moe_intermediate_size
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield from {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "self_attn.q_norm": (head,), "self_attn.k_norm": (head,),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "mlp.gate": (config.num_experts, hidden),
    }.items()  # fmt: skip
    for expert in range(config.num_experts):
        for name in ("gate_proj", "up_proj"):
            yield f"mlp.experts.{expert}.{name}", (intermediate, hidden)
        yield f"mlp.experts.{expert}.down_proj", (hidden, intermediate)


def write_checkpoint(config: PretrainedConfig, folder: Path, device: torch.device) -> int:
    """Random weights in bfloat16, a file for each layer; the bytes of the largest file."""
    config.save_pretrained(folder)
    outside = {"model.embed_tokens": (config.vocab_size, config.hidden_size), "model.norm": (config.hidden_size,),
               "lm_head": (config.vocab_size, config.hidden_size)}  # fmt: skip
    files: list[dict[str, tuple[int, ...]]] = [outside]
    for layer in range(config.num_hidden_layers):
        files.append({f"model.layers.{layer}.{name}": shape for name, shape in layer_tensors(config, layer)})
    where: dict[str, str] = {}
    largest = 0
    for number, shapes in enumerate(track(files, "writing", transient=True)):
        name = f"model-{number:05}.safetensors"
        tensors: dict[str, Tensor] = {
            f"{key}.weight": torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(0.02).cpu()
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        largest = max(largest, (folder / name).stat().st_size)
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
    linear: bool = False,
    out: Path | None = None,
) -> None:
    """Writes a checkpoint, reads it quantized, and measures.

    Args:
        recipe: a configuration of qwen3_lora.py, of a Qwen3-MoE.
        layers: of the model, where not all of them.
        folder: where there is room for the checkpoint, which is removed in the end; that of temporary files by default.
        linear: quantize the other linear layers too.
        out: a folder for loading.md.
    """
    architecture = yaml.safe_load(recipe.read_text())["model"]["architecture"]
    architecture.pop("model_type")
    if layers is not None:
        architecture["num_hidden_layers"] = layers
    config: Any = Qwen3MoeConfig(**architecture)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory(dir=folder) as place:
        shard = write_checkpoint(config, Path(place), device)
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
                quantization_config=QuantizedExpertsConfig("nf4", linear=linear),
            )  # fmt: skip
        seconds = perf_counter() - start
    stays = torch.cuda.memory_allocated() - held if on_gpu else sum(p.nbytes for p in model.parameters())
    above = torch.cuda.max_memory_allocated() - held - stays if on_gpu else float("nan")
    numbers = [size / 2**30, shard / 2**30, seconds, stays / 2**30, above / 2**30, host.bytes / 2**30]
    rows = [[f"{number:.3g}" for number in numbers]]
    table = (f"Loading with experts in nf4, {recipe.stem}", provenance(__file__, "transformers"), HEADERS, rows)
    show(*table)
    if out is not None:
        write(out / "loading.md", *table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
