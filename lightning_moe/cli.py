"""The command line: `python -m lightning_moe export CHECKPOINT FOLDER`."""

import argparse
import sys
from pathlib import Path
from typing import get_args

from lightning_moe.adapters.export import Layout, export_checkpoint


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
    options = parser.parse_args(arguments)
    try:
        export_checkpoint(options.checkpoint, options.folder, options.layout, adapter=options.adapter)
    except (ValueError, OSError) as error:
        sys.exit(f"lightning_moe export: {error}")
    print(f"{options.folder}: {options.layout} adapter written")
