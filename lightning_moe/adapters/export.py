"""Adapters that others can load: PEFT's files, from a model or from an adapter-only Lightning checkpoint.

`fused` is what PEFT writes: for each adapted parameter two matrices that hold all experts' factors. `per_expert` has a
pair of plain LoRA matrices for each expert's gate, up and down projection, under the names that these had before
Transformers 5; inference servers and older Transformers read them, and for most families PEFT turns them back.
"""

import json
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora import ParamWrapper
from peft.utils import transformers_weight_conversion
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from lightning_moe.integrations.peft_experts import peft_refusal, split_a, split_b
from lightning_moe.integrations.sharding import is_sharded, whole

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
        experts: for each adapted parameter of experts, its wrapper's path, that is PEFT's file key without
            `base_model.model.` and `.lora_A.weight`; the parameter's name; and the number of experts.
        tensors: for each of PEFT's file keys, the key in the checkpoint's state dict.
    """

    config: str
    model_type: str
    experts: list[tuple[str, str, int]]
    tensors: dict[str, str]

    @classmethod
    def read(cls, entry: Any) -> "Description":
        """A description out of a checkpoint. Raises ValueError unless it is one; fields of later versions are left."""
        try:
            found = cls(**{field.name: entry[field.name] for field in fields(cls)})
            plain = isinstance(json.loads(found.config), dict) and isinstance(found.model_type, str)
            experts = all(
                isinstance(path, str) and isinstance(name, str) and type(count) is int and count > 0
                for path, name, count in found.experts
            )
            tensors = bool(found.tensors) and all(
                isinstance(text, str) for pair in found.tensors.items() for text in pair
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"its entry {CHECKPOINT_KEY!r} is damaged: {error!r}") from error
        if not (plain and experts and tensors):
            raise ValueError(f"its entry {CHECKPOINT_KEY!r} is damaged")
        return found


def describe(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Describes each LoRA adapter of the PEFT model inside `model`, for a checkpoint with that state dict.

    Empty where there is no such model or more than one, where the state dict does not hold the model's own tensors, or
    where PEFT's wrappers are not understood.
    """
    found = _peft_models(model)
    if len(found) != 1 or peft_refusal():
        return {}
    if is_sharded(model):  # and what the state dict holds was gathered: its names are left to tell
        state_dict = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if key in state_dict}
    keys = {_place(tensor): key for key, tensor in state_dict.items() if isinstance(tensor, Tensor)}
    described = {}
    for name, config in found[0].peft_config.items():
        if config.peft_type != PeftType.LORA:
            continue
        tensors = get_peft_model_state_dict(
            found[0], found[0].state_dict(keep_vars=True), adapter_name=name, save_embedding_layers=False
        )
        places = {_clean(key): keys.get(_place(tensor)) for key, tensor in tensors.items()}
        if all(places.values()):
            described[name] = vars(_describe(found[0], name, places))
    return described


def export_adapter(
    model: nn.Module, folder: str | os.PathLike[str], layout: Layout = "fused", *, adapter: str | None = None
) -> None:
    """Writes a LoRA adapter as PEFT's two files, `adapter_model.safetensors` and `adapter_config.json`.

    Where several processes train, one of them calls this; where the adapter is sharded over them, each does (one waits
    for the others), and the first of them writes.

    Args:
        model: a PEFT model, or a module that holds one, patched or not.
        folder: made if it is not there. Files of an earlier export are not overwritten.
        layout: `"fused"` as PEFT writes it, or `"per_expert"` with two-dimensional matrices for each expert. PEFT reads
            the latter back for the families that it has a table of, and warns of missing keys where only some layers'
            experts have an adapter; a family that it would misread is warned about here.
        adapter: which, where the model has more than one.

    Raises:
        ValueError: on a model without a LoRA adapter, an adapter that is not there, or one that the layout cannot hold.
        FileExistsError: if the folder holds an adapter.
        OSError: if the files cannot be written; none of them is left then.
    """
    found = _peft_models(model)
    if len(found) != 1:
        remedy = "put adapters on it with peft.get_peft_model" if not found else "pass the one that is meant"
        raise ValueError(f"{type(model).__name__} holds {len(found)} PEFT models and must hold one: {remedy}")
    if layout == "per_expert" and (refusal := peft_refusal()):
        raise ValueError(f"{refusal}; use layout='fused'")
    name = _choose(adapter, list(found[0].peft_config), "the model")
    if found[0].peft_config[name].peft_type != PeftType.LORA:
        raise ValueError(f"adapter {name!r} is not LoRA but {found[0].peft_config[name].peft_type}")
    parameters = get_peft_model_state_dict(found[0], found[0].state_dict(keep_vars=True), adapter_name=name)
    tensors = {_clean(key): whole(tensor).detach().cpu() for key, tensor in parameters.items()}
    if is_sharded(found[0]) and torch.distributed.get_rank() != 0:
        return
    _write(tensors, _describe(found[0], name, dict.fromkeys(tensors)), Path(folder), layout)


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
        OSError: if the files cannot be written; none of them is left then.
    """
    path = Path(checkpoint)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, as distributed checkpoints are: make one file of it first, with "
            "`python -m lightning.fabric.utilities.consolidate_checkpoint`, or with DeepSpeed's own by "
            "lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be loaded without running its code: {error}") from error
    for key, remedy in (
        ("state_dict", "it is not a Lightning checkpoint"),
        (
            CHECKPOINT_KEY,
            "it was saved without MoEGateGradCallback, with save_weights_only=True, or of a module that holds no PEFT "
            "model or several; load the model and call export_adapter instead",
        ),
    ):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict) or not content[key]:
            raise ValueError(f"{path} lacks {key!r}: {remedy}")
    name = _choose(adapter, list(content[CHECKPOINT_KEY]), str(path))
    try:
        description = Description.read(content[CHECKPOINT_KEY][name])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    state = content["state_dict"]
    if missing := [key for key, place in description.tensors.items() if not isinstance(state.get(place), Tensor)]:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(description.tensors)} tensors of adapter {name!r}: "
            f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
        )
    tensors = {key: state[place] for key, place in description.tensors.items()}
    _write(tensors, description, Path(folder), layout)


def _peft_models(model: nn.Module) -> list[PeftModel]:
    return [module for module in model.modules() if isinstance(module, PeftModel)]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What tells one tensor's memory from another's; of a sharded one, this process's part."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.device, own.data_ptr(), own.shape, getattr(tensor, "ds_id", None)  # ZeRO-3's have no memory


def _clean(name: str) -> str:
    """A key or a path without the names that torch.compile and checkpoint wrappers put in."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _choose(adapter: str | None, names: list[str], where: str) -> str:
    if adapter is None and len(names) == 1:
        return names[0]
    if adapter not in names:
        raise ValueError(f"{where} has the adapters {', '.join(names)}: name one of them, not {adapter!r}")
    return adapter


def _describe(model: PeftModel, adapter: str, tensors: dict[str, Any]) -> Description:
    base = model.get_base_model()
    experts = [
        (_clean(name), module.parameter_name, module.num_experts)
        for name, module in base.named_modules()
        if not peft_refusal() and isinstance(module, ParamWrapper) and adapter in module.lora_A
    ]
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config[adapter].save_pretrained(folder)
        config = json.loads((Path(folder) / CONFIG).read_text())
    config["inference_mode"] = True  # this and the next as PeftModel.save_pretrained has them
    if config.get("task_type") is None:
        # The class as it was before fully_shard made one of its own of it.
        own = next(one for one in type(base).__mro__ if not issubclass(one, FSDPModule))
        config["auto_mapping"] = {"base_model_class": own.__name__, "parent_library": own.__module__}
    return Description(
        config=json.dumps(config, indent=2, sort_keys=True),
        model_type=getattr(getattr(base, "config", None), "model_type", ""),
        experts=experts,
        tensors=tensors,
    )


def _write(tensors: dict[str, Tensor], description: Description, folder: Path, layout: Layout) -> None:
    if layout not in ("fused", "per_expert"):
        raise ValueError(f"layout must be 'fused' or 'per_expert', not {layout!r}")
    config = json.loads(description.config)
    if layout == "per_expert":
        tensors, config = _per_expert(tensors, config, description)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder")
    if taken := [name for name in (WEIGHTS, CONFIG) if os.path.lexists(folder / name)]:  # a link that leads nowhere too
        raise FileExistsError(f"{folder} holds {' and '.join(taken)} already: name another folder or move them")
    folder.mkdir(parents=True, exist_ok=True)
    # The names are given when all the bytes are there. They are written to a place that nobody could put a link in.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        try:
            save_file(_unshared(tensors), Path(partial, WEIGHTS), {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder}: the adapter cannot be written: {error}") from error
        Path(partial, CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(partial, name), folder / name)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each in memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    out = {}
    for key, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        out[key] = tensor.clone() if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    return out


def _per_expert(
    tensors: dict[str, Tensor], config: dict[str, Any], description: Description
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under per-expert keys, and the config that goes with them."""
    adapted = {parameter for _, parameter, _ in description.experts}
    if not adapted:
        return tensors, config
    names, renamings = _names_before_fusion(description.model_type)
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError("the per_expert layout has one rank and one alpha, and the adapter has patterns of them")
    if unknown := adapted - names.keys():
        raise ValueError(f"the per_expert layout has no place for an adapter on {', '.join(sorted(unknown))}")
    table = getattr(transformers_weight_conversion, "_MODEL_TO_CONVERSION_PATTERN", None)
    if table is None or description.model_type not in table:
        whose = "_MODEL_TO_CONVERSION_PATTERN any more" if table is None else f"table for {description.model_type!r}"
        warnings.warn(
            f"PEFT has no {whose} and would misread its per_expert layout: keep the fused one for PEFT", stacklevel=4
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
    """From Transformers' own table: what each fused parameter's parts were called, and which modules were renamed.

    Renamings by pattern are for other keys than experts'; two parts make a gated projection, the only one known here.
    """
    names: dict[str, list[str]] = {}
    renamings: list[tuple[str, str]] = []
    for entry in get_checkpoint_conversion_mapping(model_type) or ():
        targets, sources = (getattr(entry, name, None) for name in ("target_patterns", "source_patterns"))
        if not targets or not sources:
            raise ValueError(
                "the per_expert layout is not known: the entries of Transformers' table of names have no "
                "target_patterns and source_patterns any more; use layout='fused'"
            )
        target = targets[0]
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
