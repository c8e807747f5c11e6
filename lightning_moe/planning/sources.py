"""Where a plan's model and options come from: a hub name, a folder, a config.json, or a recipe's configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

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


def read_model(name: str) -> PretrainedConfig:
    """The configuration of a hub name, a folder, or a config.json. What is local is read without the network.

    Raises:
        ValueError: naming what is wrong.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"{name} has no config.json")
    if path.is_file():
        try:
            fields = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if not isinstance(fields, dict) or "model_type" not in fields:
            raise ValueError(f"{path} is no model's configuration: it has no model_type")
        return of_family(fields, str(path))
    if path.suffix == ".json" or name.startswith((".", "/", "~")):
        raise ValueError(f"there is no file or folder {name}")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no model {name!r}: no folder, and the hub does not give it ({_first_line(error)})"
        ) from error


def of_family(fields: Mapping[str, Any], source: str) -> PretrainedConfig:
    """A configuration of `model_type` and that family's fields.

    Raises:
        ValueError: naming the source, where Transformers makes none of them.
    """
    fields = dict(fields)
    family = fields.pop("model_type", None)
    if family not in CONFIG_MAPPING:
        raise ValueError(f"{source}: model_type is {family!r}, which Transformers does not know")
    try:
        return CONFIG_MAPPING[family].from_dict(fields)
    except Exception as error:  # of any kind: each field is checked by a library's own means
        raise ValueError(f"{source} is damaged: {_first_line(error)}") from error


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
        return of_family(model["architecture"], f"model.architecture of {files}"), given
    if not model.get("name"):
        raise ValueError(f"the recipe {files} names no model: it has neither model.architecture nor model.name")
    return read_model(model["name"]), given


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
