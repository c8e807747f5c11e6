"""Writes checkpoints that bitsandbytes quantized to nf4, one matrix for each expert, as those on the hub."""

import json
import re
from collections import defaultdict

import torch
from safetensors.torch import load_file, save_file

EXPERTS = r".*\.experts\.\d+\.\w+\.weight"
ATTENTION = r".*\.self_attn\.[qkvo]_proj\.weight"


def quantized(weight, name, nested=True, **options):
    """A matrix as a checkpoint has it, and as bitsandbytes makes it dense."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight, **{"blocksize": 64, "quant_type": "nf4", "compress_statistics": nested} | options
    )
    saved = {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {name: packed} | saved, functional.dequantize_4bit(packed, state)


def save(tensors, folder):
    """In two files, which a matrix's tensors are spread over."""
    shards = defaultdict(dict)
    for number, (key, tensor) in enumerate(tensors.items()):
        shards[f"model-{number % 2}.safetensors"][key] = tensor.contiguous()
    for file, shard in shards.items():
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {key: file for file, shard in shards.items() for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write(model, folder, *, which=(EXPERTS, ATTENTION), nested=True, change=lambda tensors: tensors):
    """A checkpoint as on the hub. Returns its tensors, and the dense ones that bitsandbytes makes of it."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    dense = dict(tensors)
    for key, tensor in dense.items():
        if any(re.fullmatch(pattern, key) for pattern in which):
            saved, dense[key] = quantized(tensor, key, nested)
            tensors |= saved
    tensors = change(tensors)
    save(tensors, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors, dense
