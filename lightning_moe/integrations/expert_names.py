"""Expert names: what a family's expert projections were called before Transformers 5 fused them.

Read out of Transformers' own table, the entries of `get_checkpoint_conversion_mapping` in 5.17 to 5.24. PEFT's table of
the families whose per-expert names it turns back is private: `_MODEL_TO_CONVERSION_PATTERN`, read in 0.21.0 to 0.21.2.
"""

from peft.utils import transformers_weight_conversion
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming


def names_before_fusion(model_type: str) -> tuple[dict[str, list[str]], list[tuple[str, str]]] | None:
    """What each fused parameter's parts were called, and which modules were renamed; None where that is not known.

    Renamings by pattern are for other keys than experts'; two parts make a gated projection, the only one known here.
    """
    names: dict[str, list[str]] = {}
    renamings: list[tuple[str, str]] = []
    for entry in get_checkpoint_conversion_mapping(model_type) or ():
        target, sources = entry.target_patterns[0], entry.source_patterns
        if isinstance(entry, WeightRenaming) and target.strip(".").isidentifier():
            renamings.append((sources[0], target))
        elif isinstance(entry, WeightConverter) and all(".*." in source for source in sources):
            names[target.rpartition(".")[2]] = [source.split(".*.")[1].removesuffix(".weight") for source in sources]
    is_known = set(names) == {"gate_up_proj", "down_proj"} and len(names["gate_up_proj"]) == 2
    return (names, renamings) if is_known else None


def is_known_to_peft(model_type: str) -> bool:
    """Whether PEFT reads a family's per-expert names as what they were."""
    return model_type in transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN
