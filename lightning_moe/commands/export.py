"""`lightning-moe export`: a PEFT folder out of a Lightning checkpoint."""

import argparse
from pathlib import Path
from typing import Any, get_args

from lightning_moe.adapters.export import Layout, export_checkpoint


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "export", help="make a PEFT folder of a Lightning checkpoint, without the base model",
        description="Writes the adapter of a Lightning checkpoint as a PEFT folder, without the base model.",
    )  # fmt: skip
    parser.add_argument("checkpoint", type=Path, help="saved by a Trainer with the callback AdapterExport")
    parser.add_argument("folder", type=Path, help="made if it is not there; an adapter in it is not overwritten")
    parser.add_argument(
        "--layout", choices=get_args(Layout), default="fused",
        help="fused, as PEFT writes it (default), or per_expert, for vLLM, SGLang, llama.cpp and older PEFT",
    )  # fmt: skip
    parser.add_argument("--adapter", help="which, where there is more than one")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Exports."""
    export_checkpoint(options.checkpoint, options.folder, options.layout, adapter=options.adapter)
    print(f"{options.folder}: {options.layout} adapter written")
    return 0
