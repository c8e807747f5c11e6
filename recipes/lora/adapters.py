"""LoRA on the base model, as the options have it; checks that name what is misspelt or does not fit a checkpoint."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lora.linear import fuse_updates

# Options without which a checkpoint's values mean something else, beside those of the base.
ADAPTER_OPTIONS = (
    "quantize", "quantize_linear", "rank", "alpha", "target_modules", "modules_to_save", "experts", "router",
    "router_module",
)  # fmt: skip


def expert_parameters(model: nn.Module) -> list[str]:
    """The names of the experts' projections within a decoder layer, such as `mlp.experts.down_proj`."""
    pattern = re.compile(r"layers\.\d+\.(.*\bexperts\.(?:gate_up_proj|up_proj|down_proj))$")
    found = (pattern.search(name) for name, _ in model.named_parameters())
    return list(dict.fromkeys(match[1] for match in found if match))


def add_adapters(base: PreTrainedModel, options: Mapping[str, Any]) -> PeftModel:
    """The base with float32 adapters, as the module's options have it."""
    parameters = expert_parameters(base) if options["experts"] else []
    modules_to_save = list(options["modules_to_save"])
    if options["router"] == "lora":
        parameters.append(f"{options['router_module']}.weight")
    elif options["router"] == "trained":
        modules_to_save.append(options["router_module"])
    adapter = LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        target_modules=list(options["target_modules"]),
        target_parameters=parameters or None,
        modules_to_save=modules_to_save or None,
        task_type="CAUSAL_LM",
    )
    with base.device:  # whose random state then draws the adapters, under whatever strategy
        network = get_peft_model(base, adapter)
    assert isinstance(network, PeftModel)
    for layer in network.modules():
        if isinstance(layer, ModulesToSaveWrapper):
            layer.modules_to_save.float()  # PEFT does that for adapters only
        elif isinstance(layer, BaseTunerLayer):
            # As peft.helpers.disable_input_dtype_casting, for good: autocast chooses the dtype, and a float32 copy of
            # each adapted layer's input would be kept for backward.
            layer.cast_input_dtype_enabled = False  # type: ignore[assignment]
    if options["fused_lora"]:
        fuse_updates(network)
    return network


def check_names(config: PretrainedConfig, options: Mapping[str, Any]) -> None:
    """Whether each module that is to be adapted or trained is there; PEFT passes over what it does not find.

    Raises:
        ValueError: naming what matches nothing, and what there is.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = [name for name, _ in model.named_modules() if name]
    wanted = [("target_modules", ".", name) for name in options["target_modules"]]
    wanted += [("modules_to_save", "", name) for name in options["modules_to_save"]]  # PEFT's two ways to match
    if options["router"] != "frozen":
        wanted.append(("router_module", ".", options["router_module"]))
    for option, dot, ending in wanted:
        if not any(f".{name}".endswith(dot + ending) for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()}))
            raise ValueError(f"model.{option} names {ending!r}, and the model has no such module; it has {known}")
    if options["experts"] and not expert_parameters(model):
        raise ValueError(f"model.experts: {config.model_type} has no experts with gate_up_proj and down_proj to adapt")
    if options["router_aux_loss"] and not hasattr(config, "output_router_logits"):
        raise ValueError(f"model.router_aux_loss: {config.model_type} gives no router logits; set it to 0")


def check_checkpoint(options: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Whether a checkpoint's values are of this model. A folder with the base's weights may have moved.

    Args:
        options: the module's.
        saved: the checkpoint's.

    Raises:
        ValueError: naming the options that differ, with the checkpoint's values.
    """
    mine, theirs = _weights(options), _weights(saved)
    if "name" in mine and Path(mine["name"]).is_dir():
        theirs["name"] = mine["name"]
    differing = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
    if differing:
        said = "; ".join(f"model.{n} is {mine.get(n)!r} and was {theirs.get(n)!r}" for n in differing)
        raise ValueError(f"the checkpoint is of another model: {said}. Set it as it was, or train anew: no --ckpt_path")


def _weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a checkpoint's values depend on, in a form to compare."""
    chosen = {name: options.get(name) for name in ("init", *ADAPTER_OPTIONS)}
    for name in ("target_modules", "modules_to_save"):
        chosen[name] = sorted(chosen[name] or ())
    chosen["quantize_linear"] = bool(chosen["quantize_linear"])  # which earlier checkpoints do not name
    if chosen["init"] == "pretrained":
        return chosen | {"name": options.get("name")}
    architecture = {f"architecture.{name}": value for name, value in options.get("architecture", {}).items()}
    # Experts that go to the host are drawn one layer after the other, from other random numbers.
    drawn = {"init_seed": options.get("init_seed"), "experts_on": options.get("experts_on") or "device"}
    return chosen | architecture | drawn
