"""The command line: `python -m lightning_moe export CHECKPOINT FOLDER`, and so on; `lightning-moe` is the same."""

import argparse
import sys
from pathlib import Path
from typing import get_args

import torch

from lightning_moe.adapters.export import Layout, export_checkpoint
from lightning_moe.adapters.merge import Rounding, merge_adapter


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m lightning_moe", description="Tools around adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    export = commands.add_parser(
        "export", help="make a PEFT folder of a Lightning checkpoint, without the base model",
        description="Writes the adapter of a Lightning checkpoint as a PEFT folder, without the base model.",
    )  # fmt: skip
    export.add_argument("checkpoint", type=Path, help="saved by a Trainer with the callback AdapterExport")
    export.add_argument("folder", type=Path, help="made if it is not there; an adapter in it is not overwritten")
    export.add_argument(
        "--layout", choices=get_args(Layout), default="fused",
        help="fused, as PEFT writes it (default), or per_expert, as inference servers and older Transformers read it",
    )  # fmt: skip
    export.add_argument("--adapter", help="which, where there is more than one")
    export.set_defaults(run=_export)
    merge = commands.add_parser(
        "merge", help="add an adapter to a base model's weights",
        description="Writes a base model with an adapter added to its weights, shard by shard: W + scaling * B A in "
        "float32, rounded once. Files, names and config.json are the base's.",
    )  # fmt: skip
    merge.add_argument(
        "adapter", type=Path, metavar="ADAPTER_OR_CHECKPOINT", help="an adapter's folder, or a checkpoint"
    )
    merge.add_argument("base", type=Path, help="the 16-bit model, in a folder as from the hub")
    merge.add_argument("out", type=Path, help="made, with the name given when it is whole; must be new or empty")
    merge.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the merged weights (default: the base's)"
    )
    merge.add_argument(
        "--rounding", choices=get_args(Rounding), default="nearest",
        help="nearest (default), or stochastic, by which small updates are right on average",
    )  # fmt: skip
    merge.add_argument("--seed", type=int, default=0, help="of stochastic rounding")
    merge.add_argument("--adapter", dest="adapter_name", metavar="NAME", help="which, where a checkpoint has several")
    merge.add_argument(
        "--onto-16-bit", action="store_true",
        help="merge an adapter that was trained over quantized experts: the result is near the trained model only",
    )  # fmt: skip
    merge.set_defaults(run=_merge)
    options = parser.parse_args(arguments)
    options.run(options)


def _export(options: argparse.Namespace) -> None:
    try:
        export_checkpoint(options.checkpoint, options.folder, options.layout, adapter=options.adapter)
    except (ValueError, OSError) as error:
        sys.exit(f"lightning_moe export: {error}")
    print(f"{options.folder}: {options.layout} adapter written")


def _merge(options: argparse.Namespace) -> None:
    try:
        report = merge_adapter(
            options.adapter, options.base, options.out, dtype=options.dtype and getattr(torch, options.dtype),
            rounding=options.rounding, seed=options.seed, adapter_name=options.adapter_name,
            onto_16_bit=options.onto_16_bit,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print("lightning_moe merge:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("lightning_moe merge: interrupted; nothing is left of it", file=sys.stderr)
        sys.exit(130)
    print(report)
