"""The per_expert layout: plain LoRA on the hub's layout of the model, a pair of matrices for each expert's projections.

It keeps to what every program reads, whatever was trained: one rank, one `lora_alpha`, no patterns, all three
projections of each adapted layer, the modules' names in the hub's checkpoints, a configuration that restricts nothing.

`target_modules` lists the last parts of the names of the modules that have tensors. A pattern could leave out modules
without tensors, but PEFT on Transformers 5 turns a pattern back into such a list, and llama.cpp and vLLM go by the
tensors' names. In modules without tensors PEFT's adapter adds zero, as `init_lora_weights: true` has its B at zero.
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
# Options that say which modules are adapted, how they scale and how they start; here the tensors say it.
UNRESTRICTED: dict[str, Any] = {
    "alpha_pattern": {}, "corda_config": None, "eva_config": None, "exclude_modules": None, "init_lora_weights": True,
    "layers_pattern": None, "layers_to_transform": None, "rank_pattern": {}, "target_parameters": None,
    "use_rslora": False,
}  # fmt: skip
CARRIED = {  # the others have to be at their defaults, and are left out: older versions of PEFT warn of newer options
    "auto_mapping", "base_model_name_or_path", "bias", "inference_mode", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "peft_version", "r", "revision", "target_modules", "task_type",
    "trainable_token_indices",
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
    for option in sorted(config.keys() - UNRESTRICTED.keys() - CARRIED):
        if (config[option] or None) != (defaults.get(option) or None):
            what = f"{option}={config[option]!r}"
            raise ValueError(f"the per_expert layout is plain LoRA and has no place for {what}: {REMEDY}")
    if (init := config.get("init_lora_weights", True)) not in INITIALIZATIONS:
        raise ValueError(
            f"init_lora_weights={init!r} may change the base, and the per_expert layout is for the base as it was: "
            "train without it, or merge the adapter into the model"
        )
    names, experts = names_before_fusion(description.model_type), set()
    for path, parameter, num_experts in description.experts:
        if _is_plain(parameter, num_experts):
            continue
        if names is None:
            raise ValueError(
                f"the per_expert layout is not known for the model type {description.model_type!r}: Transformers has "
                f"no table of its experts' names from before they were fused; {REMEDY}"
            )
        if parameter not in names:
            raise ValueError(f"the per_expert layout has no place for an adapter on {path}.{parameter}: {REMEDY}")
        experts.add(f"{PREFIX}{path}")
    for key in description.tensors:
        if (module := _module(key)) not in experts:
            name = (f"{module}.weight" if _side(key) else key).removeprefix(PREFIX)
            on_hub = name_on_hub(description.model_type, name)
            # PEFT on Transformers 5 turns the names of LoRA's tensors back, and no others.
            if on_hub is None or not (_side(key) or on_hub == name):
                raise ValueError(f"the per_expert layout has no place for an adapter on {name}: {REMEDY}")


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
            raise ValueError(f"the adapter's {key} is not a matrix")
    rest = {key: _scaled(key, tensor, factors) for key, tensor in tensors.items()}
    experts = dict(_experts(rest, description))
    others = {_key_on_hub(key, description.model_type): tensor for key, tensor in rest.items()}
    _warn_if_peft_misreads(description, others, are_renamed=others.keys() != rest.keys())
    out = others | experts
    rank = max((tensor.shape[0] for key, tensor in out.items() if _side(key) == "A"), default=config["r"])
    alpha = scaling * rank
    own = {"r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "target_modules": sorted(_leaves(out))}
    carried = {option: config[option] for option in sorted(CARRIED & config.keys())}
    return {key: _padded(key, tensor, rank) for key, tensor in out.items()}, carried | UNRESTRICTED | own


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


def _side(key: str) -> str:
    """Which of LoRA's pair a tensor is: A, B, or neither."""
    return key.partition(".lora_")[2].removeprefix("embedding_")[:1]


def _leaves(keys: Iterable[str]) -> set[str]:
    """The last parts of the names of the modules that have an adapter."""
    return {_module(key).rpartition(".")[2] for key in keys if _side(key)}


def _key_on_hub(key: str, model_type: str) -> str:
    if not _side(key):
        return key
    module = _module(key)
    on_hub = str(name_on_hub(model_type, f"{module}.weight".removeprefix(PREFIX)))
    return PREFIX + on_hub.removesuffix(".weight") + key.removeprefix(module)


def _scaled(key: str, tensor: Tensor, factors: dict[str, float]) -> Tensor:
    factor = factors[_module(key)] if _side(key) == "B" else 1.0
    return tensor if factor == 1.0 else tensor * factor


def _padded(key: str, tensor: Tensor, rank: int) -> Tensor:
    """One of a pair, with zeros up to that rank."""
    if not (side := _side(key)):
        return tensor
    dim = "AB".index(side)
    missing = rank - tensor.shape[dim]
    return pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]) if missing else tensor


def _experts(rest: dict[str, Tensor], description: Description) -> Iterator[tuple[str, Tensor]]:
    """The pairs of all experts' projections, which `rest` loses. A projection that has no adapter gets one of zeros."""
    layers: dict[str, dict[str, tuple[Tensor, Tensor]]] = defaultdict(dict)
    for path, parameter, num_experts in description.experts:
        if _is_plain(parameter, num_experts):
            continue
        pair: list[Any] = [rest.pop(f"{PREFIX}{path}.lora_{side}.weight", None) for side in "AB"]
        if any(half is None or half.dim() != 2 or half.shape[side] % num_experts for side, half in enumerate(pair)):
            raise ValueError(f"the adapter's matrices for the {num_experts} experts of {path} are not there")
        a, b = split_a(pair[0], num_experts), split_b(pair[1], num_experts)
        layers[path.replace(".base_layer", "")][parameter] = a, b
    names = names_before_fusion(description.model_type) or {}
    console = Console(stderr=True)
    for module, adapted in track(
        layers.items(), "splitting experts", console=console, transient=True, disable=not console.is_terminal
    ):
        if "gate_up_proj" not in adapted:
            a, b = adapted["down_proj"]
            adapted["gate_up_proj"] = _zeros(a, a.shape[1], b.shape[1]), _zeros(a, 2 * a.shape[2], a.shape[1])
        if "down_proj" not in adapted:
            a, b = adapted["gate_up_proj"]
            adapted["down_proj"] = _zeros(a, a.shape[1], b.shape[1] // 2), _zeros(a, a.shape[2], a.shape[1])
        for parameter, (a, b) in adapted.items():
            for expert in range(len(a)):
                parts = b[expert].chunk(len(names[parameter]))  # rows of one parameter, which share A
                for name, part in zip(names[parameter], parts, strict=True):
                    key = f"{PREFIX}{module}.{expert}.{name}"
                    yield _key_on_hub(f"{key}.lora_A.weight", description.model_type), a[expert].clone()
                    yield _key_on_hub(f"{key}.lora_B.weight", description.model_type), part.clone()


def _zeros(factors: Tensor, *shape: int) -> Tensor:
    """Zeros of that shape for each expert."""
    return factors.new_zeros(len(factors), *shape)


def _warn_if_peft_misreads(description: Description, others: Iterable[str], *, are_renamed: bool) -> None:
    """Where PEFT on Transformers 5 does not turn the names back, or takes other layers for experts.

    Args:
        description: of the adapter.
        others: the keys of what is not on experts.
        are_renamed: whether some of those are other than in the model.
    """
    if is_known_to_peft(description.model_type):
        names = names_before_fusion(description.model_type) or {}
        clash = _leaves(others) & {name for parts in names.values() for name in parts}
        reason = f"takes {', '.join(sorted(clash))} on other layers for experts'" if clash else None
    else:
        is_converted = are_renamed or bool(description.experts)
        reason = f"has no table for {description.model_type!r}" if is_converted else None
    if reason:
        warnings.warn(
            f"PEFT on Transformers 5 {reason} and would misread the per_expert layout: keep the fused one for PEFT",
            stacklevel=5,
        )
