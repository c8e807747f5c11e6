"""The files of an adapter: what of it is not a tensor, and how both files are written, wholly or not at all."""

import json
import os
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHECKPOINT_KEY = "lightning_moe_adapters"
QUANTIZATION = "lightning_moe_quantization"


@dataclass(frozen=True)
class Description:
    """What of an adapter is not a tensor, as plain as a checkpoint that is loaded with care needs it.

    Attributes:
        config: PEFT's adapter_config.json, as text.
        model_type: Transformers' name of the base model's family; empty where it has none.
        experts: for each adapted parameter of experts, its wrapper's path, that is PEFT's file key without
            `base_model.model.` and `.lora_A.weight`; the parameter's name; and the number of experts.
        tensors: for each of PEFT's file keys, the key in the checkpoint's state dict.
        scalings: what each adapted module multiplies `B @ A` by, by its path as in `experts`; empty in checkpoints of
            versions that did not save it.
        quantization: the format of the experts that it was trained over; empty where they were dense.
    """

    config: str
    model_type: str
    experts: list[tuple[str, str, int]]
    tensors: dict[str, str]
    scalings: dict[str, float] = field(default_factory=dict)
    quantization: str = ""

    @classmethod
    def read(cls, entry: Any) -> "Description":
        """A description out of a checkpoint. Raises ValueError unless it is one; fields of later versions are left."""
        try:
            later = ("scalings", "quantization")  # which earlier versions did not save
            own = {one.name: entry[one.name] for one in fields(cls) if one.name in entry or one.name not in later}
            found = cls(**own)
            texts = all(isinstance(text, str) for text in (found.model_type, found.quantization))
            plain = isinstance(json.loads(found.config), dict) and texts
            experts = all(
                isinstance(path, str) and isinstance(name, str) and type(count) is int and count > 0
                for path, name, count in found.experts
            )
            tensors = bool(found.tensors) and all(
                isinstance(text, str) for pair in found.tensors.items() for text in pair
            )
            scalings = all(isinstance(path, str) and type(own) is float for path, own in found.scalings.items())
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"its entry {CHECKPOINT_KEY!r} is damaged: {error!r}") from error
        if not (plain and experts and tensors and scalings):
            raise ValueError(f"its entry {CHECKPOINT_KEY!r} is damaged")
        return found


def write_adapter(tensors: dict[str, Tensor], config: dict[str, Any], folder: Path, quantization: str) -> None:
    """Writes PEFT's two files.

    Args:
        tensors: by PEFT's file keys.
        config: PEFT's adapter_config.json.
        folder: made if it is not there.
        quantization: see `Description`; noted beside the tensors where it is not empty.

    Raises:
        FileExistsError: if the folder holds an adapter, or is a file.
        OSError: if the files cannot be written; none of them is left then.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder")
    if taken := [name for name in (WEIGHTS, CONFIG) if os.path.lexists(folder / name)]:  # a link that leads nowhere too
        raise FileExistsError(f"{folder} holds {' and '.join(taken)} already: name another folder or move them")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({QUANTIZATION: quantization} if quantization else {})
    # The names are given when all the bytes are there. They are written to a place that nobody could put a link in.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        try:
            save_file(_unshared(tensors), Path(partial, WEIGHTS), metadata)
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
