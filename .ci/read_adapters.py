"""Reads what write_adapters.py wrote, with PEFT on Transformers 4, merged, and with llama.cpp's converter.

Exits with the status 1 if any logits are more than 1e-5 off, or if the bare base's are not far off.
"""

import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-5  # of the largest logit
ATTENTION = {f"attn_{name}": f"self_attn.{name[0]}_proj" for name in ("q", "k", "v", "output")}
GGUF_NAMES = {  # llama.cpp's tensors in a layer, and the hub's
    "qwen3": ATTENTION | {"ffn_gate_inp": "mlp.gate"}
    | {f"ffn_{name}_exps": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
    "mixtral": ATTENTION | {"ffn_gate_inp": "block_sparse_moe.gate"}
    | {f"ffn_{name}_exps": f"block_sparse_moe.experts.{{}}.w{i}" for name, i in (("gate", 1), ("down", 2), ("up", 3))},
}  # fmt: skip


def load(base: Path) -> transformers.PreTrainedModel:
    """The base in float32."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def error(model: torch.nn.Module, adapter: Path) -> float:
    """The largest difference from the expected logits over the largest of these."""
    expected = load_file(adapter / "expected.safetensors")
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits
    return ((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()).item()


def read_by_llama_cpp(converter: Path, base: Path, adapter: Path) -> torch.nn.Module:
    """The base with the adapter as the converter's GGUF has it, added by llama.cpp's names."""
    out = adapter / "adapter.gguf"
    command = [sys.executable, converter, adapter, "--base", base, "--outfile", out, "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True)
    sys.path.insert(1, str(converter.parent / "gguf-py"))
    from gguf import GGUFReader

    reader = GGUFReader(out)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    model = load(base)
    weights = model.state_dict()
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        _, layer, own, _ = name.split(".")
        module = f"model.layers.{layer}.{GGUF_NAMES[base.parent.name][own]}.weight"
        update = alpha / a.shape[-2] * (b @ a)  # llama.cpp's own scaling
        for i, part in enumerate(update if update.dim() == 3 else [update]):
            weights[module.format(i)] += part
    return model


def main(folder: Path, converter: Path) -> int:
    """Reads every adapter and prints a line for each."""
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
    counts = Counter[bool]()
    for config in sorted(folder.glob("*/*/adapter_config.json")):
        adapter, base = config.parent, config.parent.parent / "base"
        model, case = base.parent.name, adapter.name
        errors = {"merged": error(load(adapter / "merged"), adapter)}
        # DeepSeek's routers are no linear layers in Transformers 4, and PEFT says so.
        if model != "deepseek" or "gate" not in json.loads(config.read_text())["target_modules"]:
            errors["PEFT"] = error(PeftModel.from_pretrained(load(base), adapter).eval(), adapter)
        # llama.cpp orders the rows of Mixtral's q_proj and k_proj in another way, which is not turned back here.
        if model in GGUF_NAMES and (model, case) != ("mixtral", "all_linear"):
            errors["llama.cpp"] = error(read_by_llama_cpp(converter, base, adapter), adapter)
        without = error(load(base), adapter)
        is_right = max(errors.values()) < TOLERANCE < 100 * TOLERANCE < without
        counts[is_right] += 1
        shown = ", ".join(f"{reader} {value:.1e}" for reader, value in errors.items())
        print(f"{'ok    ' if is_right else 'FAILED'} {model} {case}: {shown}; without it {without:.1e}", flush=True)
    print(f"{counts[True]} adapters read right, {counts[False]} wrong")
    return int(counts[False] > 0 or counts[True] == 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
