"""LoRA on the base model, as the options have it; what is misspelt, or not what a checkpoint is of, is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ROUTER, ROUTER_PARAMETER = "mlp.gate", "mlp.gate.weight"

# Options without which a checkpoint's values mean something else, beside those of the base.
ADAPTER_OPTIONS = ("rank", "alpha", "target_modules", "modules_to_save", "experts", "router")


def put_adapters(base: Qwen3MoeForCausalLM, options: Mapping[str, Any]) -> PeftModel:
    """The base with adapters, as the module's options have it."""
    parameters = list(EXPERT_PARAMETERS) if options["experts"] else []
    modules_to_save = list(options["modules_to_save"])
    if options["router"] == "lora":
        parameters.append(ROUTER_PARAMETER)
    elif options["router"] == "trained":
        modules_to_save.append(ROUTER)
    adapter = LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        target_modules=list(options["target_modules"]),
        target_parameters=parameters or None,
        modules_to_save=modules_to_save or None,
        task_type="CAUSAL_LM",
    )
    with base.device:  # whose random state then draws the adapters, under whatever strategy
        network = get_peft_model(base, adapter, autocast_adapter_dtype=False)
    assert isinstance(network, PeftModel)
    return network


def check_names(config: Qwen3MoeConfig, options: Mapping[str, Any]) -> None:
    """Whether each module that is to be adapted or trained is there; PEFT passes over what it does not find.

    Raises:
        ValueError: naming what matches nothing, and what there is.
    """
    with torch.device("meta"):
        names = [name for name, _ in Qwen3MoeForCausalLM(config).named_modules() if name]
    for option, dot in (("target_modules", "."), ("modules_to_save", "")):  # PEFT's two ways to match an ending
        for wanted in options[option]:
            if not any(f".{name}".endswith(dot + wanted) for name in names):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()}))
                raise ValueError(f"model.{option} names {wanted!r}, and the model has no such module; it has {known}")


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
    if chosen["init"] == "pretrained":
        return chosen | {"name": options.get("name")}
    architecture = {f"architecture.{name}": value for name, value in options.get("architecture", {}).items()}
    return chosen | architecture | {"init_seed": options.get("init_seed")}


def trained_products(options: Mapping[str, Any]) -> dict[str, int | Literal["full"]]:
    """What trains, by the names that `flops.model_flops` has: a rank, or `full`. One layer's alone keeps its path."""
    rank = options["rank"]
    trained: dict[str, int | Literal["full"]] = {_last(name): rank for name in options["target_modules"]}
    if options["experts"]:
        trained |= {name.removeprefix("mlp."): rank for name in EXPERT_PARAMETERS}
    if options["router"] != "frozen":
        trained["gate"] = "full" if options["router"] == "trained" else rank
    for name in options["modules_to_save"]:
        if not name.endswith(("norm", "embed_tokens")):  # which take no products
            trained[_last(name)] = "full"
    return trained


def _last(name: str) -> str:
    return name if any(part.isdigit() for part in name.split(".")) else name.rpartition(".")[2]
