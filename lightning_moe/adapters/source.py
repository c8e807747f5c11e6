"""Reads an adapter for a merge: PEFT's folder, or a Lightning checkpoint that AdapterExport described."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_moe.adapters.checkpoint import ONE_FILE, read_checkpoint
from lightning_moe.adapters.files import CONFIG, WEIGHTS
from lightning_moe.adapters.reference_logits import REFERENCE, ReferenceLogits


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files have it.

    Attributes:
        tensors: by PEFT's file keys, mapped from the disk.
        config: what adapter_config.json holds.
        model_type: Transformers' name of the base's family; empty where that is not known.
        quantization: the format of the experts that it was trained over; empty where they were dense, or in a folder
            without the trained model's logits.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    model_type: str = ""
    quantization: str = ""


def read_adapter(path: Path, name: str | None = None) -> Adapter:
    """Reads an adapter's folder, or a checkpoint.

    Args:
        path: a folder in one of the layouts of `export_adapter`, or a checkpoint saved with `AdapterExport`.
        name: which adapter, where a checkpoint has more than one.

    Raises:
        ValueError: on files that lack something, or are damaged; says what.
        FileNotFoundError: if there is no such file.
    """
    if path.is_dir():
        return _read_folder(path)
    description, tensors = read_checkpoint(path, name)
    return Adapter(tensors, json.loads(description.config), description.model_type, description.quantization)


def _read_folder(folder: Path) -> Adapter:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: it is no adapter's folder; {ONE_FILE}")
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
    kept = ReferenceLogits.read(folder) if (folder / REFERENCE).is_file() else None
    return Adapter(tensors, config, "", kept.quantization if kept else "")
