"""The command line: `python -m lightning_moe plan MODEL` and `export CHECKPOINT FOLDER`."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from lightning_moe.adapters.export import Layout, export_checkpoint
from lightning_moe.planning import command as plan


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_moe", description="Memory before training, and adapters."
    )
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
    _add_plan(commands)
    options = parser.parse_args(arguments)
    if "run" in options:
        try:
            options.run(options)
        except (ValueError, OSError) as error:
            print(f"lightning_moe {options.name}: {error}", file=sys.stderr)
            sys.exit(2)
        return
    try:
        export_checkpoint(options.checkpoint, options.folder, options.layout, adapter=options.adapter)
    except (ValueError, OSError) as error:
        sys.exit(f"lightning_moe export: {error}")
    print(f"{options.folder}: {options.layout} adapter written")


def _add_plan(commands: Any) -> None:
    """The memory of a training step, before training."""
    parser = commands.add_parser(
        "plan", help="the memory of a training step, before training and without a GPU",
        description="Says what memory a training step takes, by what holds it, from a model's configuration alone: "
        "the peak, host memory, disk, which cards it fits and with what options, and seconds by a roofline.",
    )  # fmt: skip
    plan.add_options(parser)
    parser.set_defaults(run=plan.run, name="plan")
