"""Reads an adapter out of a Lightning checkpoint that AdapterExport described."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from lightning_moe.adapters.files import CHECKPOINT_KEY, Description

ONE_FILE = (
    "make one file of a distributed checkpoint first, with `python -m "
    "lightning.fabric.utilities.consolidate_checkpoint`, or with DeepSpeed's own by "
    "lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict"
)


def read_checkpoint(path: Path, adapter: str | None) -> tuple[Description, dict[str, Tensor]]:
    """What a checkpoint says of an adapter, and its tensors by PEFT's file keys, mapped from the disk.

    Args:
        path: saved by a Trainer with `AdapterExport`; it may hold the adapter only.
        adapter: which, where there is more than one.

    Raises:
        ValueError: on a file that lacks something; says what.
        FileNotFoundError: if there is no such file.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: {ONE_FILE}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be loaded without running its code: {error}") from error
    for key, remedy in (
        ("state_dict", "it is not a Lightning checkpoint"),
        (
            CHECKPOINT_KEY,
            "it was saved without the callback AdapterExport, or of a module that holds no PEFT "
            "model or several; load the model and call export_adapter instead",
        ),
    ):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict) or not content[key]:
            raise ValueError(f"{path} lacks {key!r}: {remedy}")
    name = choose_adapter(adapter, list(content[CHECKPOINT_KEY]), str(path))
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
    return description, {key: state[place] for key, place in description.tensors.items()}


def choose_adapter(adapter: str | None, names: list[str], where: str) -> str:
    """The adapter that is asked for, or the only one. Raises ValueError where there is no such one, or several."""
    if adapter is None and len(names) == 1:
        return names[0]
    if adapter not in names:
        raise ValueError(f"{where} has the adapters {', '.join(names)}: name one of them, not {adapter!r}")
    return adapter
