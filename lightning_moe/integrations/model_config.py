"""A model without its weights: a configuration of the hub, a folder or a file, and the model on the meta device."""

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CONFIG = "config.json"


def read_config(model: str) -> PreTrainedConfig:
    """A model's configuration. Only a hub name is looked for on the network; code of a model's own is not run.

    Args:
        model: a folder with a config.json, such a file, or a hub name.

    Raises:
        ValueError: where there is none, it is damaged, or Transformers does not know its model_type.
    """
    return config_of(_read_fields(model), f"the configuration of {model!r}")


def config_of(fields: Mapping[str, Any], source: str) -> PreTrainedConfig:
    """A configuration of `model_type` and that family's fields.

    Args:
        fields: as config.json has them.
        source: where they are from, for an error.

    Raises:
        ValueError: where Transformers makes none of them.
    """
    family = fields.get("model_type")
    if not isinstance(family, str):
        raise ValueError(f"{source} has no model_type, by which Transformers knows a model")
    if family not in CONFIG_MAPPING:
        raise ValueError(
            f"{source} is of model_type {family!r}, which Transformers {transformers.__version__} does not know; code "
            "of a model's own is not run"
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[family].from_dict(dict(fields))
    except Exception as error:  # each family checks its fields in its own way
        raise ValueError(f"{source} is damaged: {_said(error)}") from error
    return config


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: names, shapes and dtypes without memory.

    Of the class that the configuration names, or Transformers' for text, in the configuration's dtype, or bfloat16.

    Raises:
        ValueError: where Transformers cannot build it, as with sizes that do not fit each other.
    """
    auto = AutoModelForCausalLM if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel
    try:
        named: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        dtype: Any = config.dtype or config.get_text_config().dtype or torch.bfloat16
        with torch.device("meta"):
            is_model = isinstance(named, type) and issubclass(named, PreTrainedModel)
            model: Any = named(config) if is_model else auto.from_config(config)
        return model.to(dtype)
    except Exception as error:  # whatever a model's constructor raises
        raise ValueError(f"no {config.model_type} can be built of this configuration: {_said(error)}") from error


def _read_fields(model: str) -> dict[str, Any]:
    path = Path(model)
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        if path.is_dir() or path.is_absolute() or model.startswith(".") or path.suffix == ".json":
            raise ValueError(f"there is no {file}")
        try:
            return PreTrainedConfig.get_config_dict(model)[0]
        except (OSError, ValueError) as error:  # ValueError: no hub name
            raise ValueError(
                f"{model!r} is no folder here, and its configuration cannot be had from the hub ({_said(error)})"
            ) from error
    try:
        fields = json.loads(file.read_text("utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} is no model's configuration: it holds no object")
    return PreTrainedConfig.get_config_dict(str(file))[0]  # which decodes what JSON has no numbers for


def _said(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
