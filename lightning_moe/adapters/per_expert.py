"""The per_expert layout: plain LoRA on the model as the hub has it, a pair of matrices for each expert's projections.

It keeps to what every program reads, whatever was trained: one rank, one `lora_alpha`, no patterns, all three projections
of each adapted layer, modules by the names in the hub's checkpoints, and a configuration that restricts nothing.

`target_modules` holds the last part of the names of the modules that have tensors, as a list: SGLang takes no pattern, and
PEFT on Transformers 5 makes such names of one. In layers without tensors PEFT adapts modules of these names too, and
`init_lora_weights: true` has it start them at zero.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from peft import LoraConfig
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import pad

from lightning_moe.adapters.files import Description
from lightning_moe.integrations.expert_names import is_known_to_peft, name_on_hub, names_before_fusion
from lightning_moe.integrations.peft_experts import split_a, split_b

PREFIX = "base_model.model."
# What decides which modules PEFT adapts and how they start: the file's tensors say the first, and their values the rest.
UNRESTRICTED = {
    "alpha_pattern": {}, "corda_config": None, "eva_config": None, "exclude_modules": None, "init_lora_weights": True,
    "layers_pattern": None, "layers_to_transform": None, "rank_pattern": {}, "target_parameters": None,
    "use_rslora": False,
}  # fmt: skip
CARRIED = {
    "auto_mapping", "base_model_name_or_path", "bias", "inference_mode", "lora_alpha", "lora_dropout", "modules_to_save",
    "peft_type", "peft_version", "r", "revision", "target_modules", "task_type", "trainable_token_indices",
}  # fmt: skip
INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")  # which leave the base's weights as they are
REMEDY = "use layout='fused' for PEFT, or merge the adapter into the model"


def check_per_expert(description: Description, config: dict[str, Any]) -> None:
    """Raises ValueError, with the remedy, where the layout cannot hold an adapter.

    Args:
        description: of the adapter; of its tensors, the keys.
        config: PEFT's adapter_config.json.
    """
    defaults = LoraConfig().to_dict()
    unknown = config.keys() - UNRESTRICTED.keys() - CARRIED
    for option in sorted(name for name in unknown if (config[name] or None) != (defaults.get(name) or None)):
        raise ValueError(
            f"the per_expert layout is plain LoRA and has no place for {option}={config[option]!r}: {REMEDY}"
        )
    if (init := config.get("init_lora_weights", True)) not in INITIALIZATIONS:
        raise ValueError(f"init_lora_weights={init!r} changes the base model, and the per_expert layout is for the base as "
                         "it was: train without it, or merge the adapter into the model")  # fmt: skip
    names = names_before_fusion(description.model_type)
    for path, parameter, num_experts in description.experts:
        if _is_plain(parameter, num_experts):
            continue
        if names is None:
            raise ValueError(
                f"the per_expert layout is not known for the model type {description.model_type!r}: Transformers has no "
                f"table of its experts' names from before they were fused; {REMEDY}"
            )
        if parameter not in names:
            raise ValueError(f"the per_expert layout has no place for an adapter on {path}.{parameter}: {REMEDY}")
    experts = {f"{PREFIX}{path}" for path, parameter, count in description.experts if not _is_plain(parameter, count)}
    for key in description.tensors:
        module, is_lora, _ = key.partition(".lora_")
        name = (f"{module}.weight" if is_lora else key).removeprefix(PREFIX)
        on_hub = name_on_hub(description.model_type, name)
        is_refused = on_hub is None or not (
            is_lora or on_hub == name
        )  # PEFT turns back the names of LoRA's tensors alone
        if is_refused and module not in experts:
            raise ValueError(f"the per_expert layout has no place for {name}: {REMEDY}")


def to_per_expert(
    tensors: dict[str, Tensor], config: dict[str, Any], description: Description
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under the layout's keys, and the config that goes with them.

    Args:
        tensors: by PEFT's file keys.
        config: PEFT's adapter_config.json.
        description: of the adapter.

    Raises:
        ValueError: where the layout cannot hold the adapter.
    """
    check_per_expert(description, config)
    scaling = _scaling(config) or 1.0
    factors = {f"{PREFIX}{path}": own / scaling for path, own in description.scalings.items()}
    for key in filter(_side, tensors):
        if (module := _module(key)) not in factors:
            raise ValueError(
                f"the scaling of the adapter on {module.removeprefix(PREFIX)} was not saved: load the model and call "
                "export_adapter instead"
            )
        if tensors[key].dim() < 2:
            raise ValueError(f"{key} is no matrix")
    rest = {key: _scaled(key, tensor, factors) for key, tensor in tensors.items()}
    experts = dict(_experts(rest, description))
    others = {_key_on_hub(key, description.model_type): tensor for key, tensor in rest.items()}
    _warn_if_peft_misreads(description, set(others), are_renamed=others.keys() != rest.keys())
    out = others | experts
    rank = max((tensor.shape[0] for key, tensor in out.items() if _side(key) == "A"), default=config["r"])
    alpha = scaling * rank
    own = {
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": sorted(_leaves(out)),
    }
    return {key: _padded(key, tensor, rank) for key, tensor in out.items()}, config | UNRESTRICTED | own


def _is_plain(parameter: str, num_experts: int) -> bool:
    """Whether an adapted parameter is a module's one matrix, such as a router's: a linear layer to other programs."""
    return parameter == "weight" and num_experts == 1


def _scaling(config: dict[str, Any]) -> float:
    """What the modules of no pattern multiply `B @ A` by."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
        raise ValueError(f"the adapter's configuration has no rank and alpha, but r={rank!r} and lora_alpha={alpha!r}")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _module(key: str) -> str:
    """The module that a tensor of LoRA belongs to."""
    return key.partition(".lora_")[0]


def _leaves(keys: Iterable[str]) -> set[str]:
    """The last parts of the names of the modules that have an adapter."""
    return {_module(key).rpartition(".")[2] for key in keys if ".lora_" in key}


def _key_on_hub(key: str, model_type: str) -> str:
    module, is_lora, end = key.partition(".lora_")
    if not is_lora:
        return key
    on_hub = str(name_on_hub(model_type, f"{module}.weight".removeprefix(PREFIX)))
    return f"{PREFIX}{on_hub.removesuffix('.weight')}.lora_{end}"


def _side(key: str) -> str:
    """Which of a pair a tensor is: A, B or neither."""
    return key.partition(".lora_")[2].removeprefix("embedding_")[:1]


def _scaled(key: str, tensor: Tensor, factors: dict[str, float]) -> Tensor:
    factor = factors[_module(key)] if _side(key) == "B" else 1.0
    return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)


def _padded(key: str, tensor: Tensor, rank: int) -> Tensor:
    """One of a pair, with zeros up to that rank."""
    if not (side := _side(key)):
        return tensor
    dim = "AB".index(side)
    missing = rank - tensor.shape[dim]
    return pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]) if missing else tensor


def _experts(rest: dict[str, Tensor], description: Description) -> Iterator[tuple[str, Tensor]]:
    """The pairs of all experts' projections, which `rest` loses. A projection that has no adapter gets one of zeros."""
    pairs: dict[str, dict[str, tuple[Tensor, Tensor]]] = defaultdict(dict)
    for path, parameter, num_experts in description.experts:
        if _is_plain(parameter, num_experts):
            continue
        found: list[Any] = [rest.pop(f"{PREFIX}{path}.lora_{side}.weight", None) for side in "AB"]
        if any(half is None or half.dim() != 2 or half.shape[side] % num_experts for side, half in enumerate(found)):
            raise ValueError(f"the adapter's matrices for the {num_experts} experts of {path} are not there")
        pairs[path.replace(".base_layer", "")][parameter] = (
            split_a(found[0], num_experts),
            split_b(found[1], num_experts),
        )
    names = names_before_fusion(description.model_type) or {}
    console = Console(stderr=True)
    for module, adapted in track(
        pairs.items(), "splitting experts", console=console, transient=True, disable=not console.is_terminal
    ):
        if "gate_up_proj" not in adapted:
            a, b = adapted["down_proj"]
            adapted["gate_up_proj"] = (
                b.new_zeros(*a.shape[:2], b.shape[1]),
                a.new_zeros(len(b), 2 * a.shape[2], b.shape[2]),
            )
        if "down_proj" not in adapted:
            a, b = adapted["gate_up_proj"]
            adapted["down_proj"] = (
                b.new_zeros(*a.shape[:2], b.shape[1] // 2),
                a.new_zeros(len(b), a.shape[2], b.shape[2]),
            )
        for parameter, (a, b) in adapted.items():
            for expert in range(len(a)):
                parts = b[expert].chunk(len(names[parameter]))  # rows of one parameter, which share A
                for name, part in zip(names[parameter], parts, strict=True):
                    on_hub = name_on_hub(description.model_type, f"{module}.{expert}.{name}.weight")
                    key = f"{PREFIX}{str(on_hub).removesuffix('.weight')}"
                    yield f"{key}.lora_A.weight", a[expert].clone()
                    yield f"{key}.lora_B.weight", part.clone()


def _warn_if_peft_misreads(description: Description, others: set[str], *, are_renamed: bool) -> None:
    """Where PEFT on Transformers 5 does not turn the names back, or takes other layers for experts.

    Args:
        description: of the adapter.
        others: the keys of what is not on experts.
        are_renamed: whether some of those have another name in the model.
    """
    if is_known_to_peft(description.model_type):
        names = names_before_fusion(description.model_type) or {}
        clash = _leaves(others) & {name for parts in names.values() for name in parts}
        reason = f"takes {', '.join(sorted(clash))} for experts'" if clash else None
    else:
        are_renamed |= bool(description.experts)
        reason = f"has no table for {description.model_type!r}" if are_renamed else None
    if reason:
        warnings.warn(
            f"PEFT on Transformers 5 {reason} and would misread the per_expert layout: keep the fused one for PEFT",
            stacklevel=5,
        )
