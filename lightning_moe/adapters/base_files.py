"""The files of a base model: what its folder holds, and shards of safetensors that are written block by block.

`safetensors` writes a file of tensors that are all in memory; here one block of one tensor is.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class Header(NamedTuple):
    """What a file says of a tensor: its dtype as safetensors calls it, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def cast(self, dtype: torch.dtype) -> "Header":
        """The same in another dtype."""
        return Header(_NAMES[dtype], self.shape, torch.Size(self.shape).numel() * dtype.itemsize)


@dataclass(frozen=True)
class Shard:
    """A file of a base's tensors.

    Attributes:
        path: of the file.
        headers: by name, in the order in which the tensors lie in the file.
        metadata: the file's own.
    """

    path: Path
    headers: dict[str, Header]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Base:
    """A model's folder in 16 bits or more, as from the hub.

    Attributes:
        folder: it.
        shards: of its weights.
        config: what config.json holds.
        others: all files that hold no weights, relative to the folder.
    """

    folder: Path
    shards: list[Shard]
    config: dict[str, Any]
    others: list[Path]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        return {name: header.shape for shard in self.shards for name, header in shard.headers.items()}

    @property
    def dtype(self) -> str:
        """The floating dtype that most of its bytes have, as safetensors calls it."""
        sizes: Counter[str] = Counter()
        for shard in self.shards:
            for header in shard.headers.values():
                sizes[header.dtype] += header.nbytes * (header.dtype in DTYPES)
        return sizes.most_common(1)[0][0]


def read_base(folder: Path) -> Base:
    """Reads what a base's folder holds, but no weights.

    Raises:
        ValueError: if it holds no model, lacks a shard, a file is damaged, or the weights are quantized; says which.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: download the base first, with `hf download NAME --local-dir FOLDER`")
    config = _read_json(folder / CONFIG)
    if quantized := config.get("quantization_config") or config.get("text_config", {}).get("quantization_config"):
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise ValueError(f"{folder} has quantized weights (quantization_config: {method}): give the 16-bit base")
    names = [SINGLE]
    indexed: dict[str, Any] = {}
    if not (folder / SINGLE).is_file():
        if not (folder / INDEX).is_file():
            raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: the base has to be in safetensors")
        indexed = _read_json(folder / INDEX).get("weight_map") or {}
        if not isinstance(indexed, dict) or not indexed:
            raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map")
        names = sorted(set(map(str, indexed.values())))
        if odd := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{folder / INDEX} names {odd[0]!r}, which is no file of the folder")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which its index names: download the base again")
    shards = [_read_shard(folder / name) for name in names]
    if lost := sorted(indexed.keys() - {name for shard in shards for name in shard.headers}):
        raise ValueError(f"{folder} lacks {lost[0]}, which its index names: download the base again")
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    others = [
        path for path in files
        if not path.name.endswith(_WEIGHTS) and not any(part.startswith(".") for part in path.parts)
    ]  # fmt: skip
    return Base(folder, shards, config, others)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: it is no model's folder")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no entries")
    return content


def _read_shard(path: Path) -> Shard:
    try:
        with safe_open(path, "pt") as opened:
            headers = {}
            for name in opened.offset_keys():
                tensor = opened.get_slice(name)
                shape = tuple(tensor.get_shape())
                headers[name] = Header(tensor.get_dtype(), shape, opened.get_tensor(name).nbytes)
            return Shard(path, headers, opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Download it again") from error


def write_shard(path: Path, headers: dict[str, Header], metadata: dict[str, str], blocks: Iterable[Tensor]) -> None:
    """Writes a file of safetensors from a stream of values.

    Args:
        path: of the new file.
        headers: by name, in the order of the values; the largest items first, so that each tensor is aligned.
        metadata: of the file.
        blocks: the tensors' values one after the other, in blocks of any size.

    Raises:
        OSError: if they cannot be written.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, header in headers.items():
        entries[name] = {"dtype": header.dtype, "shape": header.shape, "data_offsets": [end, end + header.nbytes]}
        end += header.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            file.write(block.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    assert path.stat().st_size == 8 + len(text) + end


def by_alignment(headers: dict[str, Header]) -> dict[str, Header]:
    """The same, tensors of larger items first and otherwise in their order."""

    def item_size(header: Header) -> int:
        return header.nbytes // max(torch.Size(header.shape).numel(), 1)

    return dict(sorted(headers.items(), key=lambda entry: -item_size(entry[1])))


def copy_others(base: Base, folder: Path, *, total_bytes: int | None, dtype: torch.dtype | None) -> None:
    """Copies what of a base is no weight, config.json last; byte by byte, but for what a change of dtype changes.

    Args:
        base: from where.
        folder: to where.
        total_bytes: of the new weights, for the index; None where they are as many as before.
        dtype: that config.json is to name; None for the base's.
    """
    if (base.folder / INDEX).is_file() and not (base.folder / SINGLE).is_file():
        if total_bytes is None:
            shutil.copyfile(base.folder / INDEX, folder / INDEX)
        else:
            index = _read_json(base.folder / INDEX)
            index["metadata"] = {**index.get("metadata", {}), "total_size": total_bytes}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for path in sorted(base.others, key=lambda path: path == Path(CONFIG)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path == Path(CONFIG) and dtype is not None:
            config = _with_dtype(base.config, str(dtype).removeprefix("torch."))
            (folder / path).write_text(json.dumps(config, indent=2) + "\n")
        else:
            shutil.copyfile(base.folder / path, folder / path)


def _with_dtype(config: Any, dtype: str) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else _with_dtype(value, dtype)
        for key, value in config.items()
    }
