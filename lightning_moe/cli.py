"""The command line: `python -m lightning_moe export CHECKPOINT FOLDER`, `verify FOLDER --base BASE`."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

import torch

from lightning_moe.adapters.export import Layout, export_checkpoint
from lightning_moe.adapters.verify import verify_adapter


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
    _add_verify(commands)
    options = parser.parse_args(arguments)
    options.run(options)


def _export(options: argparse.Namespace) -> None:
    try:
        export_checkpoint(options.checkpoint, options.folder, options.layout, adapter=options.adapter)
    except (ValueError, OSError) as error:
        sys.exit(f"lightning_moe export: {error}")
    print(f"{options.folder}: {options.layout} adapter written")


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify", help="compare an exported adapter, or a merged model, with the trained model",
        description="Loads an exported adapter, or a merged model, with plain PEFT and Transformers and compares its "
        "logits with the trained model's, which AdapterExport has kept. Exits with 0 for yes; 1 where it differs, or "
        "it cannot be told; 2 where something is missing.",
    )  # fmt: skip
    verify.add_argument("folder", type=Path, help="of the adapter or of the merged model")
    verify.add_argument("--base", help="folder or hub name of the base; a merged model needs none")
    verify.add_argument(
        "--reference", type=Path, help="the adapter's folder that holds the trained model's logits, if not FOLDER"
    )
    verify.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="to load in; the base's by default")
    verify.add_argument("--device", help="to load to; a GPU by default, where there is one")
    verify.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> None:
    dtype = getattr(torch, options.dtype) if options.dtype else None
    try:
        found = verify_adapter(
            options.folder, options.base, reference=options.reference, dtype=dtype, device=options.device
        )
    except (ValueError, OSError) as error:
        print(f"lightning_moe verify: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{options.folder}: {found}")
    sys.exit(0 if found.ok else 1)
