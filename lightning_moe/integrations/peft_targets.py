"""What PEFT's adapter files mean: which parameter each pair of matrices updates, and its rank and scaling.

PEFT says so itself: the adapter is put on a model without weights. Read in 0.21.0 to 0.21.2: the wrappers' attributes,
`get_pattern_key`, and the names that a file's keys have.
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Embedding, Linear, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from lightning_moe.integrations.checkpoint_names import Place

PREFIX = "base_model.model."
LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")

# Options whose updates are no plain W + scaling · B A of the base's own weights.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "biases of its matrices (lora_bias)",
    "trainable_token_indices": "single trained tokens (trainable_token_indices)",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow's routing",
    "monteclora_config": "MonteCLoRA",
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Target(NamedTuple):
    """What a pair of an adapter's matrices updates.

    Attributes:
        place: of the update.
        rank: of the pair, for each expert.
        scaling: of the product.
        num_experts: that share the two matrices, as ParamWrapper stacks them; 1 for a plain pair.
        is_transposed: whether the update is (B A)ᵀ.
    """

    place: Place
    rank: int
    scaling: float
    num_experts: int = 1
    is_transposed: bool = False


class Targets(NamedTuple):
    """What an adapter's file has to hold.

    Attributes:
        pairs: by the path of a pair of matrices, which is its keys without the endings of `LINEAR` or `EMBEDDING`.
        whole: by key, the place of a tensor that is put in a parameter's place.
    """

    pairs: dict[str, Target]
    whole: dict[str, Place]


def module_names(keys: Iterable[str]) -> list[str]:
    """The modules that the keys of an adapter's file name."""
    return [key.removeprefix(PREFIX).partition(".lora_")[0].replace(".base_layer", "") for key in keys]


def read_config(entries: dict[str, Any]) -> LoraConfig:
    """PEFT's config out of what an adapter_config.json holds.

    Raises:
        ValueError: if it is none of LoRA's, or asks for more than plain LoRA.
    """
    if entries.get("peft_type") != "LORA":
        raise ValueError(f"the adapter's peft_type is {entries.get('peft_type')!r}, and only LORA can be merged")
    found = [words for name, words in _UNSUPPORTED.items() if entries.get(name)]
    if entries.get("bias", "none") != "none":
        found.append(f"the base's biases (bias={entries['bias']!r})")
    if found:
        raise ValueError(f"the adapter has {' and '.join(found)}: only plain LoRA can be merged here; use PEFT's merge")
    init = entries.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_THE_BASE):
        raise ValueError(
            f"the adapter began with init_lora_weights={init!r}, which changes the base's weights: convert it first, "
            "with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options of later versions
            config = LoraConfig.from_peft_type(**entries)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"the adapter's config cannot be read: {error}") from error
    config.init_lora_weights = True
    config.lora_dropout = 0.0  # ParamWrapper has none
    return config


def read_targets(model: PreTrainedModel, config: LoraConfig) -> Targets:
    """What an adapter that PEFT wrote for this model holds.

    Args:
        model: on the meta device; the adapter is put on it.
        config: the adapter's.

    Raises:
        ValueError: if the model has nothing of what the config names, or PEFT adapts a layer in another way.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that match nothing: tensors without a place are found later
            get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ValueError(f"PEFT cannot put the adapter on {type(model).__name__}: {error}") from error
    pairs: dict[str, Target] = {}
    whole: dict[str, Place] = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            inner: Any = module.modules_to_save["default"]
            whole |= {f"{PREFIX}{name}.{leaf}": Place(f"{name}.{leaf}") for leaf in inner.state_dict()}
        elif isinstance(module, BaseTunerLayer):
            pairs[PREFIX + name] = _read_layer(name, module)
    return Targets(pairs, whole)


def target_of(config: LoraConfig, path: str, place: Place, *, is_transposed: bool) -> Target:
    """What a plain pair of matrices of that path updates, by the config's patterns.

    Args:
        config: the adapter's.
        path: of the pair, without `PREFIX`.
        place: that the path's name stands for.
        is_transposed: see `Target`.
    """
    rank, alpha = (
        patterns.get(get_pattern_key(list(patterns), path), one)
        for patterns, one in ((config.rank_pattern or {}, config.r), (config.alpha_pattern or {}, config.lora_alpha))
    )
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    return Target(place, rank, scaling, is_transposed=is_transposed)


def _read_layer(name: str, layer: Any) -> Target:
    module = name.replace(".base_layer", "")
    rank, scaling = layer.r["default"], layer.scaling["default"]
    if isinstance(layer, ParamWrapper):
        is_transposed = layer.get_param().dim() == 3 and getattr(layer.get_base_layer(), "is_transposed", False)
        return Target(Place(f"{module}.{layer.parameter_name}"), rank, scaling, layer.num_experts, is_transposed)
    is_embedding = isinstance(layer, Embedding)
    if not (is_embedding or type(layer) is Linear) or layer.lora_variant:
        raise ValueError(f"PEFT adapts {module} by {type(layer).__module__}.{type(layer).__name__}: use PEFT's merge")
    return Target(Place(f"{module}.weight"), rank, scaling, is_transposed=is_embedding or layer.fan_in_fan_out)


def tied_parameters(model: nn.Module) -> dict[str, list[str]]:
    """For each parameter that has other names too, these."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: [other for other in tied if other != name] for tied in names.values() if len(tied) > 1 for name in tied
    }
