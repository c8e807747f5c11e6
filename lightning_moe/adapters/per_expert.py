"""The per_expert layout: a pair of plain LoRA matrices for each expert's gate, up and down projection.

They are named as these projections were before Transformers 5; inference servers and older Transformers read them, and
for most families PEFT turns them back.
"""

import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_moe.adapters.files import Description
from lightning_moe.integrations.expert_names import is_known_to_peft, names_before_fusion
from lightning_moe.integrations.peft_experts import split_a, split_b

PREFIX = "base_model.model."


def check_per_expert(description: Description, config: dict[str, Any]) -> None:
    """Raises ValueError, with the remedy, where the layout cannot hold an adapter."""
    adapted = {parameter for _, parameter, _ in description.experts}
    if not adapted:
        return
    names, _ = _names_before_fusion(description.model_type)
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError("the per_expert layout has one rank and one alpha, and the adapter has patterns of them")
    if unknown := adapted - names.keys():
        raise ValueError(f"the per_expert layout has no place for an adapter on {', '.join(sorted(unknown))}")


def to_per_expert(
    tensors: dict[str, Tensor], config: dict[str, Any], description: Description
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under per-expert keys, and the config that goes with them.

    Args:
        tensors: by PEFT's file keys.
        config: PEFT's adapter_config.json.
        description: of the adapter.

    Raises:
        ValueError: where the layout cannot hold the adapter.
    """
    check_per_expert(description, config)
    adapted = {parameter for _, parameter, _ in description.experts}
    if not adapted:
        return tensors, config
    names, renamings = _names_before_fusion(description.model_type)
    if not is_known_to_peft(description.model_type):
        warnings.warn(
            f"PEFT has no table for {description.model_type!r} and would misread its per_expert layout: keep the fused "
            "one for PEFT",
            stacklevel=4,
        )
    rest = dict(tensors)
    out: dict[str, Tensor] = {}
    console = Console(stderr=True)
    for path, parameter, num_experts in track(
        description.experts, "splitting experts", console=console, transient=True, disable=not console.is_terminal
    ):
        pair: list[Any] = [rest.pop(f"{PREFIX}{path}.lora_{side}.weight", None) for side in "AB"]
        if any(half is None or half.dim() != 2 or half.shape[side] % num_experts for side, half in enumerate(pair)):
            raise ValueError(f"the adapter's matrices for the {num_experts} experts of {path} are not there")
        a, b = split_a(pair[0], num_experts), split_b(pair[1], num_experts)
        out.update(_split(path, names[parameter], a, b, renamings))
        if adapted == {"gate_up_proj"}:
            # PEFT reads gate and up into the inner of two wrappers: there has to be an outer one, which adds zero.
            zero_a = a.new_zeros(num_experts, a.shape[1], b.shape[1] // 2)
            zero_b = a.new_zeros(num_experts, a.shape[2], a.shape[1])
            out.update(_split(path, names["down_proj"], zero_a, zero_b, renamings))
    leaves = {leaf for parameter in (names if "gate_up_proj" in adapted else adapted) for leaf in names[parameter]}
    if clash := [key for key in rest if any(f".{leaf}.lora_" in key for leaf in leaves)]:
        raise ValueError(f"the per_expert layout cannot tell experts' adapters from one on another layer: {clash[0]}")
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):  # a pattern: the names that it matched
        targets = {key.partition(".lora_")[0].rpartition(".")[2] for key in rest if ".lora_" in key}
    config["target_modules"] = sorted({*targets, *leaves})
    config["target_parameters"] = None
    if config.get("use_rslora"):  # alpha / sqrt(r), said as alpha / r: gate and up are joined to twice the rank
        config["lora_alpha"] *= config["r"] ** 0.5
        config["use_rslora"] = False
    return rest | out, config


def _split(
    path: str, names: list[str], a: Tensor, b: Tensor, renamings: list[tuple[str, str]]
) -> Iterator[tuple[str, Tensor]]:
    """Each expert's pair of matrices for each of the projections that are rows of one parameter."""
    module = path.replace(".base_layer", "")
    for old, new in renamings:
        module = module.replace(new, old)
    height = b.shape[1] // len(names)
    for expert in range(a.shape[0]):
        for i, name in enumerate(names):
            key = f"{PREFIX}{module}.{expert}.{name}"
            yield f"{key}.lora_A.weight", a[expert].clone()
            yield f"{key}.lora_B.weight", b[expert, i * height : (i + 1) * height].clone()


def _names_before_fusion(model_type: str) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    if (found := names_before_fusion(model_type)) is None:
        raise ValueError(
            f"the per_expert layout is not known for the model type {model_type!r}: Transformers has no table of its "
            "experts' names from before they were fused; use layout='fused'"
        )
    return found
