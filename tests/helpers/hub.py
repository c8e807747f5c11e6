"""Reads adapters without PEFT and without fused experts: `W += scaling * B @ A`, by name, on the hub's tensors."""

import json

from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

from lightning_moe.adapters.files import CONFIG, WEIGHTS

PREFIX = "base_model.model."


def hub_tensors(model):
    """A base model's tensors by the hub's names, one for each expert's projection, as `save_pretrained` writes them."""
    return {name: tensor.clone() for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}


def add_adapter(tensors, folder):
    """The tensors with an adapter in them.

    As strict as the strictest program: one rank, a scaling from `r` and `lora_alpha` alone, every tensor used.
    """
    config = json.loads((folder / CONFIG).read_text())
    adapter = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    out = dict(tensors)
    while adapter:
        key = next(iter(adapter))
        module, is_lora, _ = key.partition(".lora_")
        name = f"{module}.weight" if is_lora else key
        if is_lora:
            a, b = (adapter.pop(f"{module}.lora_{side}.weight") for side in "AB")
            assert a.shape[0] == b.shape[1] == config["r"], key
            out[name] = tensors[name] + config["lora_alpha"] / config["r"] * (b @ a)
        else:
            out[name] = adapter.pop(key)
        assert out[name].shape == tensors[name].shape, key
    return out


def load_hub(model, tensors):
    """A model like this one with these tensors."""
    return type(model).from_pretrained(None, config=model.config, state_dict=tensors).train(model.training)
