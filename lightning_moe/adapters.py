"""Adapters that others can load: PEFT's files, from a model or from an adapter-only Lightning checkpoint.

`fused` is what PEFT writes: for each adapted parameter two matrices that hold all experts' factors. `per_expert` has a
pair of plain LoRA matrices for each expert's gate, up and down projection, under the names that these had before
Transformers 5; inference servers and older Transformers read them, and PEFT turns them back.
"""

import json
import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import ParamWrapper
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from lightning_moe.lora import split_a, split_b

Layout = Literal["fused", "per_expert"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHECKPOINT_KEY = "lightning_moe_adapters"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Description:
    """What of an adapter is not a tensor, as plain as a checkpoint that is loaded with care needs it.

    Attributes:
        config: PEFT's adapter_config.json, as text.
        model_type: Transformers' name of the base model's family; empty where it has none.
        experts: for each adapted parameter of experts, the path of its wrapper under `base_model.model.`, PEFT's file
            keys without `.lora_A.weight`; the parameter's name; and the number of experts.
        keys: of the tensors that belong to the adapter, as in PEFT's file.
    """

    config: str
    model_type: str
    experts: list[tuple[str, str, int]]
    keys: list[str]


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describes each LoRA adapter of the PEFT model inside `model`, for a checkpoint; empty where there is none."""
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    if len(found) != 1:
        return {}
    return {
        name: vars(_describe(found[0], name))
        for name, config in found[0].peft_config.items()
        if isinstance(config, LoraConfig)
    }


def export_adapter(
    model: nn.Module, folder: str | os.PathLike[str], layout: Layout = "fused", *, adapter: str | None = None
) -> None:
    """Writes a LoRA adapter as PEFT's two files, `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        model: a PEFT model, or a module that holds one, patched or not.
        folder: made if it is not there. Files of an earlier export are not overwritten.
        layout: `"fused"` as PEFT writes it, or `"per_expert"` with two-dimensional matrices for each expert.
        adapter: which, where the model has more than one.

    Raises:
        ValueError: on a model without a LoRA adapter, an adapter that is not there, or one that the layout cannot hold.
        FileExistsError: if the folder holds an adapter.
    """
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    if len(found) != 1:
        raise ValueError(
            f"export_adapter: {type(model).__name__} holds {len(found)} PEFT models and must hold one; "
            "put adapters on it with peft.get_peft_model"
        )
    name = _choose(adapter, list(found[0].peft_config), "the model")
    if not isinstance(found[0].peft_config[name], LoraConfig):
        raise ValueError(f"export_adapter: adapter {name!r} is not LoRA but {found[0].peft_config[name].peft_type}")
    _write(get_peft_model_state_dict(found[0], adapter_name=name), _describe(found[0], name), Path(folder), layout)


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    layout: Layout = "fused",
    *,
    adapter: str | None = None,
) -> None:
    """`export_adapter` from a Lightning checkpoint, without the base model.

    Args:
        checkpoint: the file, saved by a Trainer with `MoEGateGradCallback`; it may hold the adapter only.
        folder: see `export_adapter`.
        layout: see `export_adapter`.
        adapter: which, where the checkpoint has more than one.

    Raises:
        ValueError: on a file that lacks something; says what.
        FileNotFoundError: if there is no such file.
        FileExistsError: if the folder holds an adapter.
    """
    path = Path(checkpoint)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, as distributed checkpoints are: make one file of it first, with "
            "`python -m lightning.pytorch.utilities.consolidate_checkpoint`"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be loaded without running its code: {error}") from error
    for key, remedy in (
        ("state_dict", "it is not a Lightning checkpoint"),
        (CHECKPOINT_KEY, "it was saved without MoEGateGradCallback; load the model and call export_adapter instead"),
    ):
        if not isinstance(content, dict) or not content.get(key):
            raise ValueError(f"{path} lacks {key!r}: {remedy}")
    name = _choose(adapter, list(content[CHECKPOINT_KEY]), str(path))
    description = Description(**content[CHECKPOINT_KEY][name])
    found = {_file_key(key, name): tensor for key, tensor in content["state_dict"].items() if PREFIX in key}
    if missing := [key for key in description.keys if key not in found]:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(description.keys)} tensors of adapter {name!r}: "
            f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
        )
    _write({key: found[key] for key in description.keys}, description, Path(folder), layout)


def _choose(adapter: str | None, names: list[str], where: str) -> str:
    if adapter is None and len(names) == 1:
        return names[0]
    if adapter not in names:
        raise ValueError(f"{where} has the adapters {', '.join(names)}: name one of them, not {adapter!r}")
    return adapter


def _describe(model: PeftModel, adapter: str) -> Description:
    base = model.get_base_model()
    experts = [
        (name, module.parameter_name, module.num_experts)
        for name, module in base.named_modules()
        if isinstance(module, ParamWrapper) and adapter in module.lora_A
    ]
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config[adapter].save_pretrained(folder)
        config = json.loads((Path(folder) / CONFIG).read_text())
    config["inference_mode"] = True  # this and the next as PeftModel.save_pretrained has them
    if config.get("task_type") is None:
        config["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return Description(
        config=json.dumps(config, indent=2, sort_keys=True),
        model_type=getattr(getattr(base, "config", None), "model_type", ""),
        experts=experts,
        keys=sorted(
            _file_key(name, adapter)
            for name, _ in model.named_parameters()
            if f".{adapter}." in name and (".lora_" in name or ".modules_to_save." in name)
        ),
    )


def _file_key(name: str, adapter: str) -> str:
    """PEFT's file key of a parameter, wherever in a module the PEFT model is."""
    name = name[name.index(PREFIX) :].replace("_orig_mod.", "")
    return name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".")


def _write(tensors: dict[str, Tensor], description: Description, folder: Path, layout: Layout) -> None:
    if layout not in ("fused", "per_expert"):
        raise ValueError(f"layout must be 'fused' or 'per_expert', not {layout!r}")
    config = json.loads(description.config)
    if layout == "per_expert":
        tensors, config = _per_expert(tensors, description)
    if taken := [name for name in (WEIGHTS, CONFIG) if (folder / name).exists()]:
        raise FileExistsError(f"{folder} holds {' and '.join(taken)} already: name another folder or move them")
    folder.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: the names are given when the bytes are there.
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f".{WEIGHTS}", {"format": "pt"})
    (folder / f".{CONFIG}").write_text(json.dumps(config, indent=2, sort_keys=True))
    for name in (WEIGHTS, CONFIG):
        os.replace(folder / f".{name}", folder / name)


def _per_expert(tensors: dict[str, Tensor], description: Description) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under per-expert keys, and the config that goes with them."""
    config = json.loads(description.config)
    names, renamings = _names_before_fusion(description.model_type)
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError("the per_expert layout has one rank and one alpha, and the adapter has patterns of them")
    rest = dict(tensors)
    out: dict[str, Tensor] = {}
    adapted = {parameter for _, parameter, _ in description.experts}
    if unknown := adapted - names.keys():
        raise ValueError(f"the per_expert layout has no place for an adapter on {', '.join(sorted(unknown))}")
    for path, parameter, num_experts in track(
        description.experts, "splitting experts", console=Console(stderr=True), transient=True
    ):
        a, b = (rest.pop(f"{PREFIX}{path}.lora_{side}.weight") for side in "AB")
        a, b = split_a(a, num_experts), split_b(b, num_experts)
        out.update(_split(path, names[parameter], a, b, renamings))
        if adapted == {"gate_up_proj"}:
            # PEFT reads gate and up into the inner of two wrappers: there has to be an outer one, which adds zero.
            zero_a, zero_b = (
                a.new_zeros(*a.shape[:2], b.shape[1] // 2),
                a.new_zeros(num_experts, a.shape[2], a.shape[1]),
            )
            out.update(_split(path, names["down_proj"], zero_a, zero_b, renamings))
    leaves = {leaf for parameter in (names if "gate_up_proj" in adapted else adapted) for leaf in names[parameter]}
    if clash := [key for key in rest if any(f".{leaf}.lora_" in key for leaf in leaves)]:
        raise ValueError(f"the per_expert layout cannot tell experts' adapters from one on another layer: {clash[0]}")
    if adapted:
        config["target_modules"] = sorted({*(config.get("target_modules") or ()), *leaves})
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
    """From Transformers' own table: what each fused parameter's parts were called, and which modules were renamed."""
    names: dict[str, list[str]] = {}
    renamings: list[tuple[str, str]] = []
    for entry in get_checkpoint_conversion_mapping(model_type) or ():
        (target, *_), sources = entry.target_patterns, entry.source_patterns
        if isinstance(entry, WeightRenaming) and target.strip(".").isidentifier():
            renamings.append((sources[0], target))
        elif isinstance(entry, WeightConverter) and all(".*." in source for source in sources):
            names[target.rpartition(".")[2]] = [source.split(".*.")[1].removesuffix(".weight") for source in sources]
    if set(names) != {"gate_up_proj", "down_proj"} or len(names["gate_up_proj"]) != 2:
        raise ValueError(
            f"the per_expert layout is not known for the model type {model_type!r}: Transformers has no table of its "
            "experts' names from before they were fused; use layout='fused'"
        )
    return names, renamings
