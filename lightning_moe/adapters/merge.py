"""Merges an adapter into a base model's files, shard by shard, without a model in memory."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import safe_open
from torch import Tensor

from lightning_moe.adapters.base_files import (
    DTYPES,
    Base,
    Header,
    Shard,
    by_alignment,
    copy_others,
    read_base,
    write_shard,
)
from lightning_moe.adapters.reference_logits import REFERENCE
from lightning_moe.adapters.source import read_adapter
from lightning_moe.adapters.updates import find_updates
from lightning_moe.integrations.checkpoint_names import build_on_meta
from lightning_moe.integrations.peft_targets import module_names
from lightning_moe.ops.rounding import round_stochastic
from lightning_moe.ops.weight_update import Update, as_matrices

Round = Callable[..., Tensor]
Rounding = Literal["nearest", "stochastic"]
GIB = 2**30
# Values of one block: the few float32 copies of it that are made stay in a processor's caches.
BLOCK = 2**18
TILE_ROWS = 64


@dataclass
class MergeReport:
    """What a merge did.

    Attributes:
        folder: of the merged model.
        merged: how many of the base's tensors have an update.
        tensors: how many there are.
        nbytes: of the weights that were written.
        asked: the sum of the squares of the update's entries, <D, D>.
        arrived: the sum of each entry of the update times what rounding left of it, <D, round(W + D) - W>.
    """

    folder: Path
    merged: int
    tensors: int
    nbytes: int = 0
    asked: float = field(default=0.0, repr=False)
    arrived: float = field(default=0.0, repr=False)

    @property
    def survived(self) -> float:
        """How much of the update survived rounding: <D, round(W + D) - W> / <D, D>, over all entries that have one.

        1 where all arrived, 0 where the merged weights are the base's. An update of zeros gives 1.
        """
        return self.arrived / self.asked if self.asked else 1.0

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.merged} of {self.tensors} tensors merged, {self.nbytes / GIB:.1f} GiB",
            f"{100 * self.survived:.1f} % of the update survived rounding",
        ]
        if not self.asked:
            lines[1] = "the adapter changes nothing: its update is zero"
        elif self.survived < 0.9:
            lines.append("keep it with --rounding stochastic, which is right on average, or with --dtype float32")
        return "\n".join(lines)


def merge_adapter(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    adapter_name: str | None = None,
    onto_16_bit: bool = False,
) -> MergeReport:
    """Writes the base with the adapter's updates added: W + scaling · B A in float32, rounded once.

    The files are the base's own, with the same names in the same shards, and config.json, tokenizer and so on as they
    are. One block of one weight is in memory at a time. Without an exception the folder is whole, with one it is not
    there.

    Args:
        adapter: PEFT's folder in one of the layouts of `export_adapter`, or a checkpoint saved with `AdapterExport`.
        base: a folder as from the hub, in safetensors and not quantized.
        out: a folder that is not there or empty, with room for the model.
        dtype: torch.float32, float16 or bfloat16, in place of the dtype that most of the base's bytes have; config.json
            then names it. Tensors that the base keeps in another dtype, such as a router in float32, stay in it.
        rounding: `"nearest"`, or `"stochastic"`: up or down by chance, so that small updates are right on average.
        seed: of the latter.
        adapter_name: which, where a checkpoint has more than one.
        onto_16_bit: merge an adapter that was trained over quantized experts. It was trained to make up for their
            rounding, which the 16-bit base does not have: the merged model is near the trained one, not equal to it.

    Raises:
        ValueError: on files that do not fit each other, are damaged, or cannot be merged; says what and the remedy.
        FileNotFoundError: if there is no such checkpoint.
        FileExistsError: if `out` holds something.
        OSError: if there is no room, or the files cannot be written.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', not {rounding!r}")
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, not {dtype}")
    adapter, out = Path(adapter), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already: name another folder or move it")
    source = read_adapter(adapter, adapter_name)
    if source.quantization and not onto_16_bit:
        raise ValueError(
            f"the adapter was trained over experts in {source.quantization} and made up for their rounding; merged "
            "onto 16-bit weights it gives a model that is near the trained one, not equal to it: ask for that with "
            "--onto-16-bit"
        )
    files = read_base(Path(base))
    model = build_on_meta(files.folder, module_names(source.tensors))
    updates = find_updates(source, model, files.shapes)
    for shard in files.shards:
        for name, header in shard.headers.items():
            if name in updates and header.dtype not in DTYPES:
                raise ValueError(f"the base has {name} in {header.dtype}: give the base in 16 bits")
    headers = [_new_headers(shard, files.dtype, dtype) for shard in files.shards]
    report = MergeReport(out, len(updates), len(files.shapes))
    report.nbytes = sum(header.nbytes for shard in headers for header in shard.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_room(files, report.nbytes, out.parent)
    generator = torch.Generator().manual_seed(seed)
    round_to: Round = Tensor.to if rounding == "nearest" else partial(round_stochastic, generator=generator)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.partial-") as place:
        folder = Path(place, out.name)
        folder.mkdir()
        _write_shards(files, headers, updates, folder, round_to, report)
        old_bytes = sum(header.nbytes for shard in files.shards for header in shard.headers.values())
        total = None if report.nbytes == old_bytes else report.nbytes
        if (adapter / REFERENCE).is_file():  # by which `verify_adapter` tells whether the merge is right
            (folder / REFERENCE).parent.mkdir()
            shutil.copyfile(adapter / REFERENCE, folder / REFERENCE)
        copy_others(files, folder, total_bytes=total, dtype=None if dtype == DTYPES[files.dtype] else dtype)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    return report


def _new_headers(shard: Shard, base_dtype: str, dtype: torch.dtype | None) -> dict[str, Header]:
    """The headers of the merged file: those of the base, with `dtype` in place of the base's."""
    return by_alignment(
        {
            name: header if dtype is None or header.dtype != base_dtype else header.cast(dtype)
            for name, header in shard.headers.items()
        }
    )


def _check_room(base: Base, nbytes: int, folder: Path) -> None:
    needed = nbytes + sum((base.folder / path).stat().st_size for path in base.others)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has {free / GIB:.1f} GiB free, and the merged model takes {needed / GIB:.1f} GiB")


def _write_shards(
    base: Base, headers: list[dict[str, Header]], updates: dict[str, Update], folder: Path, round_to: Round,
    report: MergeReport,
) -> None:  # fmt: skip
    console = Console(stderr=True)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("merging", total=report.nbytes)

        def counted(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
            for block in blocks:
                yield block
                progress.advance(task, block.nbytes)

        for shard, new in zip(base.shards, headers, strict=True):
            blocks = _merged_blocks(shard, new, updates, round_to, report)
            write_shard(folder / shard.path.name, new, shard.metadata, counted(blocks))


def _merged_blocks(
    shard: Shard, headers: dict[str, Header], updates: dict[str, Update], round_to: Round, report: MergeReport
) -> Iterator[Tensor]:
    """The values of the merged file, in the order of its headers."""
    with safe_open(shard.path, "pt") as opened:
        for name, header in headers.items():
            weight = opened.get_tensor(name)
            dtype = DTYPES.get(header.dtype, weight.dtype)
            if name in updates:
                yield from _merge(name, weight, updates[name], partial(round_to, dtype=dtype), report)
            else:
                yield from (block.to(dtype) for block in weight.reshape(-1).split(BLOCK))


def _merge(
    name: str, weight: Tensor, update: Update, round_to: Callable[[Tensor], Tensor], report: MergeReport
) -> Iterator[Tensor]:
    """The new values of one tensor, in blocks of rows."""
    matrices, rows, columns = as_matrices(weight.shape)
    # Whole tiles: products of a part then add up as those of all rows do, which PEFT forms, and have their bits.
    step = max(BLOCK // max(columns, 1) // TILE_ROWS, 1) * TILE_ROWS
    for matrix, block in enumerate(weight.reshape(matrices, rows, columns)):
        for row in range(0, rows, step):
            old = block[row : row + step].float()
            new = update.apply(old, matrix, row)
            rounded = round_to(new)
            change = (new - old).flatten()
            asked, arrived = change.dot(change).item(), change.dot((rounded.float() - old).flatten()).item()
            if not math.isfinite(asked + arrived):
                raise ValueError(f"{name} would not be finite: the adapter or the base is not, or float16 is too small")
            report.asked += asked
            report.arrived += arrived
            yield rounded
