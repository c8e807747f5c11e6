"""Checkpoint names: where Transformers puts each tensor of a checkpoint, and the model that a config.json describes.

Hub checkpoints have a matrix for each expert's projection, models since Transformers 5 one parameter for all experts.
Read in Transformers 5.17 to 5.24: `get_model_conversion_mapping`, `rename_source_key`, and the operations of their
converters.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


class Place(NamedTuple):
    """What of a model's parameter a checkpoint's tensor is.

    Attributes:
        parameter: its name in the model.
        expert: whose matrix; None for the parameter of all experts, or without experts.
        part: which of the equal parts, along the rows, that are joined into the expert's matrix.
        parts: how many these are.
        is_transposed: whether the tensor has the last two dimensions the other way round.
        operations: the conversion, where it is none of these: what the tensor is cannot be said then.
    """

    parameter: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    is_transposed: bool = False
    operations: str | None = None


def build_on_meta(folder: Path, modules: Sequence[str]) -> PreTrainedModel:
    """The model that a folder's config.json describes, on the meta device: no weight is read.

    Args:
        folder: with the config.json.
        modules: names in the model that is meant. They choose between the class that the config names and what
            AutoModelForCausalLM makes of it, which is another one where the former also sees or hears.

    Raises:
        ValueError: if Transformers has no such model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        classes: list[Any] = [getattr(transformers, name, None) for name in config.architectures or ()][:1]
        with torch.device("meta"):
            models = [cls(config) for cls in classes if cls is not None]
            if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                models.append(AutoModelForCausalLM.from_config(config))
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: Transformers cannot make a model of its config.json: {error}") from error
    if not models:
        raise ValueError(f"{folder}: Transformers has no model {', '.join(config.architectures or ())}")
    return max(models, key=lambda model: len({name for name, _ in model.named_modules()}.intersection(modules)))


def find_places(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, Place]:
    """The place of each tensor of a checkpoint that becomes a parameter or buffer of the model, or a part of one.

    Args:
        model: may be on the meta device.
        keys: names in the checkpoint; names in the model are left as they are.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    parameters = model.state_dict()
    places = {}
    for key in sorted(keys):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters:
            name, pattern = key, None
        if name in parameters:
            places[key] = _read_place(key, name, by_pattern[pattern], pattern) if pattern else Place(name)
    return places


def _read_place(key: str, parameter: str, converter: WeightConverter, pattern: str) -> Place:
    operations: list[Any] = converter.operations
    kinds = [type(operation) for operation in operations]
    parts = len(converter.source_patterns)
    if kinds == [Transpose] and {operations[0].dim0, operations[0].dim1} == {1, 2}:
        return Place(parameter, is_transposed=True)
    is_list = bool(kinds) and kinds[0] is MergeModulelist and operations[0].dim == 0
    is_joined = kinds[1:] == [Concatenate] and operations[1].dim == 1 if parts > 1 else not kinds[1:]
    leaf = pattern.partition("*.")[2]
    expert = re.search(rf"\.(\d+)\.{re.escape(leaf)}$", key)
    if is_list and is_joined and leaf and expert:
        return Place(parameter, int(expert[1]), converter.source_patterns.index(pattern), parts)
    return Place(parameter, operations=", ".join(kind.__name__ for kind in kinds))
