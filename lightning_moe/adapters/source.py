"""Reads an adapter for a merge: PEFT's folder, or a Lightning checkpoint that AdapterExport described."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_moe.adapters.files import CHECKPOINT_KEY, CONFIG, WEIGHTS, Description

_ONE_FILE = (
    "make one file of a distributed checkpoint first, with `python -m "
    "lightning.fabric.utilities.consolidate_checkpoint`, or with DeepSpeed's own by "
    "lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files have it.

    Attributes:
        tensors: by PEFT's file keys, mapped from the disk.
        config: what adapter_config.json holds.
        model_type: Transformers' name of the base's family; empty where that is not known.
        quantize: the format of the experts that it was trained over; None for 16 bits, or where that is not known.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    model_type: str = ""
    quantize: str | None = None


def read_adapter(path: Path, name: str | None = None) -> Adapter:
    """Reads an adapter's folder, or a checkpoint.

    Args:
        path: a folder in one of the layouts of `export_adapter`, or a checkpoint saved with `AdapterExport`.
        name: which adapter, where a checkpoint has more than one.

    Raises:
        ValueError: on files that lack something, or are damaged; says what.
        FileNotFoundError: if there is no such file.
    """
    return _read_folder(path) if path.is_dir() else _read_checkpoint(path, name)


def _read_folder(folder: Path) -> Adapter:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: it is no adapter's folder; {_ONE_FILE}")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}; an adapter_model.bin has to be saved again as safetensors")
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from error
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} is damaged: it holds no options")
    return Adapter(tensors, config)


def _read_checkpoint(path: Path, name: str | None) -> Adapter:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be loaded without running its code: {error}") from error
    for key, remedy in (
        ("state_dict", "it is not a Lightning checkpoint"),
        (CHECKPOINT_KEY, "it was saved without the callback AdapterExport: load the model and call export_adapter"),
    ):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict) or not content[key]:
            raise ValueError(f"{path} lacks {key!r}: {remedy}")
    adapters = content[CHECKPOINT_KEY]
    if name is None and len(adapters) == 1:
        name = next(iter(adapters))
    if name not in adapters:
        raise ValueError(f"{path} has the adapters {', '.join(adapters)}: name one of them, not {name!r}")
    try:
        description = Description.read(adapters[name])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    state = content["state_dict"]
    if missing := [key for key, place in description.tensors.items() if not isinstance(state.get(place), Tensor)]:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(description.tensors)} tensors of adapter {name!r}: "
            f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
        )
    tensors = {key: state[place] for key, place in description.tensors.items()}
    options = content.get("hyper_parameters")
    quantize = options.get("quantize") if isinstance(options, dict) else None
    return Adapter(tensors, json.loads(description.config), description.model_type, quantize)
