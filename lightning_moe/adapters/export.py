"""Adapters that others can load: PEFT's files, from a model or from an adapter-only Lightning checkpoint.

`fused` is what PEFT writes: for each adapted parameter two matrices that hold all experts' factors. The other layout is
in per_expert.py.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_moe.adapters.checkpoint import choose_adapter, read_checkpoint
from lightning_moe.adapters.files import CONFIG, Description, write_adapter
from lightning_moe.adapters.per_expert import check_per_expert, to_per_expert
from lightning_moe.integrations.peft_experts import unsupported_layout
from lightning_moe.integrations.sharding import full_tensor, is_sharded
from lightning_moe.integrations.torch_modules import without_wrappers
from lightning_moe.quantization import format_of_experts

Layout = Literal["fused", "per_expert"]


def describe_adapters(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Describes each LoRA adapter of the PEFT model inside `model`, for a checkpoint with that state dict.

    Empty where there is no such model or more than one, where the state dict does not hold the model's own tensors, or
    where PEFT's wrappers cannot be read.
    """
    found = _peft_models(model)
    if len(found) != 1 or unsupported_layout():
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
        places = {without_wrappers(key): keys.get(_place(tensor)) for key, tensor in tensors.items()}
        if all(places.values()):
            described[name] = vars(_describe(found[0], name, places))
    return described


def export_adapter(
    model: nn.Module, folder: str | os.PathLike[str], layout: Layout = "fused", *, adapter: str | None = None
) -> None:
    """Writes a LoRA adapter as PEFT's two files, `adapter_model.safetensors` and `adapter_config.json`.

    Where several ranks train, one of them calls this; where the adapter is sharded over them, each does (one waits for
    the others), and the first of them writes.

    Args:
        model: a PEFT model, or a module that holds one, patched or not.
        folder: made if it is not there. Files of an earlier export are not overwritten.
        layout: `"fused"` as PEFT writes it on Transformers 5, or `"per_expert"`: plain LoRA on the model as the hub has
            it, for PEFT on Transformers 4, vLLM, SGLang and llama.cpp. PEFT on Transformers 5 reads the latter for the
            families that it has a table of; a family that it would misread is warned about here. lightning_moe's
            README says which program reads which.
        adapter: which, where the model has more than one.

    Raises:
        ValueError: on a model without a LoRA adapter, an adapter that is not there, or one that the layout cannot hold.
        FileExistsError: if the folder holds an adapter.
        OSError: if the files cannot be written; none of them is left then.
    """
    found, name = _find_adapter(model, layout, adapter)
    tensors = {key: full_tensor(tensor).detach().cpu() for key, tensor in _tensors(found, name).items()}
    if is_sharded(found) and torch.distributed.get_rank() != 0:
        return
    _write(tensors, _describe(found, name, dict.fromkeys(tensors)), Path(folder), layout)


def check_export(model: nn.Module, layout: Layout) -> None:
    """Raises ValueError, as `export_adapter` would, where the model's adapter cannot be written in that layout."""
    found, name = _find_adapter(model, layout, None)
    if layout == "per_expert":
        description = _describe(found, name, dict.fromkeys(_tensors(found, name), ""))
        check_per_expert(description, json.loads(description.config))


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    layout: Layout = "fused",
    *,
    adapter: str | None = None,
) -> None:
    """`export_adapter` from a Lightning checkpoint, without the base model.

    Args:
        checkpoint: the file, saved by a Trainer with `AdapterExport`; it may hold the adapter only.
        folder: see `export_adapter`.
        layout: see `export_adapter`.
        adapter: which, where the checkpoint has more than one.

    Raises:
        ValueError: on a file that lacks something; says what.
        FileNotFoundError: if there is no such file.
        FileExistsError: if the folder holds an adapter.
        OSError: if the files cannot be written; none of them is left then.
    """
    description, tensors = read_checkpoint(Path(checkpoint), adapter)
    _write(tensors, description, Path(folder), layout)


def _find_adapter(model: nn.Module, layout: Layout, adapter: str | None) -> tuple[PeftModel, str]:
    """The PEFT model inside a model, and the name of its LoRA adapter."""
    found = _peft_models(model)
    if len(found) != 1:
        remedy = "put adapters on it with peft.get_peft_model" if not found else "pass the one that is meant"
        raise ValueError(f"{type(model).__name__} holds {len(found)} PEFT models and must hold one: {remedy}")
    if layout == "per_expert" and (reason := unsupported_layout()):
        raise ValueError(f"{reason}; use layout='fused'")
    name = choose_adapter(adapter, list(found[0].peft_config), "the model")
    if found[0].peft_config[name].peft_type != PeftType.LORA:
        raise ValueError(f"adapter {name!r} is not LoRA but {found[0].peft_config[name].peft_type}")
    return found[0], name


def _peft_models(model: nn.Module) -> list[PeftModel]:
    return [module for module in model.modules() if isinstance(module, PeftModel)]


def _tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """An adapter's tensors, not yet gathered, by PEFT's file keys."""
    found = get_peft_model_state_dict(model, model.state_dict(keep_vars=True), adapter_name=adapter)
    return {without_wrappers(key): tensor for key, tensor in found.items()}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What tells one tensor's memory from another's; of a sharded one, this process's part."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.device, own.data_ptr(), own.shape, getattr(tensor, "ds_id", None)  # ZeRO-3's have no memory


def _describe(model: PeftModel, adapter: str, tensors: dict[str, Any]) -> Description:
    base = model.get_base_model()
    experts = [
        (without_wrappers(name), module.parameter_name, module.num_experts)
        for name, module in base.named_modules()
        if unsupported_layout() is None and isinstance(module, ParamWrapper) and adapter in module.lora_A
    ]
    scalings = {
        without_wrappers(name): float(module.scaling[adapter])
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.scaling
    }
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
        scalings=scalings,
        quantization=format_of_experts(base),
    )


def _write(tensors: dict[str, Tensor], description: Description, folder: Path, layout: Layout) -> None:
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be 'fused' or 'per_expert', not {layout!r}")
    config = json.loads(description.config)
    if layout == "per_expert":
        tensors, config = to_per_expert(tensors, config, description)
    write_adapter(tensors, config, folder)
