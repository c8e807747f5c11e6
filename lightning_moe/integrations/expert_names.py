"""Hub names: what the hub's checkpoints, older Transformers and other programs call a family's parameters.

Transformers 5 fused each layer's experts and renamed some modules. Its own table says what they were called before:
`get_checkpoint_conversion_mapping`, and the patterns and `reverse_transform` of its entries, read in 5.17 to 5.24.
PEFT's table of the families whose hub names it turns back is private: `_MODEL_TO_CONVERSION_PATTERN`, read in 0.21.0
to 0.21.2.
"""

from functools import cache
from typing import Any

from peft.utils import transformers_weight_conversion
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, WeightTransform


def names_before_fusion(model_type: str) -> dict[str, list[str]] | None:
    """What the parts of each fused expert parameter are called, such as `{"down_proj": ["w2"], ...}`.

    None where that is not known. Two parts make a gated projection, the only one known here.
    """
    names = {}
    for entry in _mapping(model_type):
        if _is_experts(entry):
            sources = entry.source_patterns
            names[_leaf(entry)] = [source.split(".*.")[1].removesuffix(".weight") for source in sources]
    is_known = set(names) == {"gate_up_proj", "down_proj"} and len(names["gate_up_proj"]) == 2
    return names if is_known else None


def name_on_hub(model_type: str, name: str) -> str | None:
    """A parameter's name in the hub's checkpoints; None where they do not hold it in one piece.

    Args:
        model_type: Transformers' name of the family. Without `names_before_fusion`, no name is taken to differ.
        name: in the model, such as `model.layers.0.mlp.gate.weight`; of one expert's projection, with its index and its
            name before fusion: `model.layers.0.mlp.experts.5.w2.weight`.
    """
    if names_before_fusion(model_type) is None:
        return name
    fused = (_leaf(entry) for entry in _mapping(model_type) if isinstance(entry, WeightConverter))
    if any(f".{name}".endswith(f".{target}") for target in fused):
        return None
    for renaming in _renamings_to_hub(model_type):
        name, _ = renaming.rename_source_key(name)
    return name


def is_known_to_peft(model_type: str) -> bool:
    """Whether PEFT reads a family's hub names of experts and routers as what they are."""
    return model_type in transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN


@cache
def _mapping(model_type: str) -> tuple[Any, ...]:
    return tuple(get_checkpoint_conversion_mapping(model_type) or ())


@cache
def _renamings_to_hub(model_type: str) -> tuple[WeightTransform, ...]:
    """In the order of Transformers' own saving, which leaves changed prefixes out too."""
    entries = [e for e in _mapping(model_type) if isinstance(e, WeightRenaming) and not isinstance(e, PrefixChange)]
    return tuple(entry.reverse_transform() for entry in reversed(entries))


def _is_experts(entry: Any) -> bool:
    return isinstance(entry, WeightConverter) and all(".*." in source for source in entry.source_patterns)


def _leaf(entry: WeightConverter) -> str:
    """The end of a fused parameter's name."""
    target = entry.target_patterns[0]
    return target.rpartition(".")[2] if _is_experts(entry) else target.lstrip(".")
