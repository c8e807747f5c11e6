"""What a recipe's configuration says of its model, and of the options of a plan."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from lightning_moe.integrations.model_config import config_of, read_config

# Fields of a recipe's `model` section that are the plan's own.
MODEL_FIELDS = (
    "dtype", "experts", "rank", "target_modules", "router", "router_module", "modules_to_save", "quantize",
    "quantize_linear", "experts_on", "checkpointing", "offload", "optimizer", "tile_tokens", "liger",
)  # fmt: skip
# What the recipe's module and data module have where a configuration says nothing.
DEFAULTS = {
    "dtype": "float32", "checkpointing": "none", "experts_on": "auto", "offload": None, "tokens": 256, "batch": 8,
    "router_module": "mlp.gate", "output_buffer_mib": 512,
}  # fmt: skip


def read_recipe(files: str) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The model and the plan's options of a recipe's configuration.

    Args:
        files: a yaml file, and after commas those that go on top of it.

    Raises:
        ValueError: naming what is wrong.
    """
    settings: dict[str, Any] = {}
    for file in files.split(","):
        try:
            part = yaml.safe_load(Path(file).read_text("utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"the recipe {file} cannot be read: {_first_line(error)}") from error
        if not isinstance(part, dict):
            raise ValueError(f"the recipe {file} is no configuration")
        _put(settings, part)
    if not settings.get("trainer"):
        raise ValueError(f"{files} goes on top of another configuration: give both, --recipe FIRST,{files}")
    model, data, trainer = (settings.get(section) or {} for section in ("model", "data", "trainer"))
    given = DEFAULTS | {name: model[name] for name in MODEL_FIELDS if name in model}
    for name in ("target_modules", "modules_to_save"):
        if name in given:
            given[name] = tuple(given[name])
    given |= {ours: data[its] for ours, its in (("tokens", "max_length"), ("batch", "batch_size")) if its in data}
    for callback in trainer.get("callbacks") or ():
        if callback["class_path"].endswith("MoEGateGradCallback"):
            buffer = (callback.get("init_args") or {}).get("output_buffer_mib")
            given |= {"output_buffer_mib": buffer} if buffer else {}
    given |= _strategy(trainer)
    if model.get("architecture"):
        return config_of(model["architecture"], f"model.architecture of {files}"), given
    if not model.get("name"):
        raise ValueError(f"the recipe {files} names no model: it has neither model.architecture nor model.name")
    return read_config(model["name"]), given


def _strategy(trainer: Mapping[str, Any]) -> dict[str, Any]:
    strategy, devices = trainer.get("strategy") or "auto", trainer.get("devices")
    gpus = {"gpus": devices} if isinstance(devices, int) and devices > 0 else {}
    if isinstance(strategy, dict):
        ranks = (strategy.get("init_args") or {}).get("num_ranks")
        return gpus | ({"gpus": ranks} if ranks else {}) | {"strategy": "fsdp"}
    return gpus


def _put(settings: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Puts a configuration on top of another, section by section; a field's value replaces the other's whole."""
    for section, fields in part.items():
        if isinstance(fields, dict) and isinstance(settings.get(section), dict):
            settings[section] |= fields
        else:
            settings[section] = fields


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
