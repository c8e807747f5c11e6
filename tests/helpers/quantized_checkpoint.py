"""Writes checkpoints whose experts are in fp8, as Qwen3-30B-A3B-FP8, or in mxfp4, as gpt-oss; in two files."""

import json
import re
from collections.abc import Mapping

import torch
from helpers.bitsandbytes_checkpoint import ATTENTION, EXPERTS, save
from safetensors.torch import load_file
from torch.nn.functional import pad

FP8_CONFIG = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
MXFP4_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip


def fp8_matrix(weight, name, scale_dtype=torch.bfloat16):
    """(out, in) in float8_e4m3fn, and what its blocks of 128 x 128 are multiplied with."""
    out, width = weight.shape
    blocks = pad(weight.float(), (0, -width % 128, 0, -out % 128)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scales = (blocks.abs().amax((1, 3)) / 448).to(scale_dtype)
    values = blocks / scales.float()[:, None, :, None]
    values = values.flatten(2).flatten(0, 1)[:out, :width].clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: values, f"{name}_scale_inv": scales}


def mxfp4_weight(weight, name):
    """The tensors of an (E, in, out) weight: random codes, and each block's exponent about that of the values."""
    experts, width, out = weight.shape
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    shape = (experts, out, width // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(117, 123, shape, generator=generator, dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def _unchanged(tensors: Mapping) -> Mapping:
    return tensors


def write_fp8(model, folder, *, which=(EXPERTS, ATTENTION), change=_unchanged, scale_dtype=torch.bfloat16):
    """A checkpoint with some matrices in fp8. Returns its tensors."""

    def quantize(name, tensor):
        is_quantized = any(re.fullmatch(pattern, name) for pattern in which)
        return fp8_matrix(tensor, name, scale_dtype) if is_quantized else {name: tensor}

    return _write(model, folder, quantize, change, FP8_CONFIG)


def write_mxfp4(model, folder, *, which=("gate_up_proj", "down_proj"), change=_unchanged):
    """A checkpoint with some of the experts' weights in mxfp4. Returns its tensors."""

    def quantize(name, tensor):
        return mxfp4_weight(tensor, name) if name.endswith(which) else {name: tensor}

    return _write(model, folder, quantize, change, MXFP4_CONFIG)


def _write(model, folder, quantize, change, quantization_config):
    model.to(torch.bfloat16).save_pretrained(folder)
    dense = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors = change({key: each for name, tensor in dense.items() for key, each in quantize(name, tensor).items()})
    save(tensors, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(config))
    return tensors
