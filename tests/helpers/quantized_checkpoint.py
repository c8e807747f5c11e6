"""Checkpoints whose experts are in fp8, as Qwen3-30B-A3B-FP8, or in mxfp4, as gpt-oss: written, loaded, compared."""

import json
import re

import pytest
import torch
from helpers.bitsandbytes_checkpoint import ATTENTION, EXPERTS, save
from helpers.models import tokens, with_expert_lora
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from lightning_moe import QuantizedExpertsConfig, QuantizedWeight, patch_moe

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


def _unchanged(tensors):
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


def load(folder, format, *, dtype=torch.bfloat16, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, config=AutoConfig.from_pretrained(folder, quantization_config=None),
        quantization_config=QuantizedExpertsConfig(format, **options),
    )  # fmt: skip


def load_dense(folder, *, dtype=torch.bfloat16):
    """The same checkpoint with all that Transformers makes dense."""
    config = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    own = config[method](dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=own)


def assert_same_values(model, dense):
    """Every parameter has the dense model's bits, the experts' in fewer bits."""
    expected = dict(dense.named_parameters())
    found = {name: p.dequantize() if isinstance(p, QuantizedWeight) else p for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    assert {name for name, value in found.items() if value.dtype != expected[name].dtype} == set()
    assert {name for name, value in found.items() if not torch.equal(value, expected[name])} == set()
    quantized = {name for name, p in model.named_parameters() if isinstance(p, QuantizedWeight)}
    assert quantized == {name for name in expected if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert not any(model.get_parameter(name).requires_grad for name in quantized)


def training_step(model):
    """The loss of a patched step and what it makes of the adapters, on the experts and on attention."""
    adapted = with_expert_lora(model, attention=True).train()
    assert all(layer.status == "active" for layer in patch_moe(adapted))
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    ids = tokens()
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in trained.items())
    return {"loss": loss.detach()} | trained


def without(*endings):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(endings)}


def replacing(name, tensor):
    return lambda tensors: tensors | {name: tensor}


def assert_refused(monkeypatch, folder, format, message, **options):
    """Before any weight is read."""
    read = "transformers.core_model_loading.spawn_materialize"
    monkeypatch.setattr(read, lambda *_, **__: pytest.fail("a tensor is read"))
    with pytest.raises(ValueError, match=message):
        load(folder, format, **options)
