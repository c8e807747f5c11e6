"""The command that makes a PEFT folder of a Lightning checkpoint, without the base model.

python -m lightning_moe.export CHECKPOINT FOLDER --layout per_expert
"""

import argparse
import sys
from pathlib import Path

from lightning_moe.adapters.export import export_checkpoint


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_moe.export",
        description="Writes the adapter of a Lightning checkpoint as a PEFT folder, without the base model.",
    )
    parser.add_argument("checkpoint", type=Path, help="saved by a Trainer with MoEGateGradCallback")
    parser.add_argument("folder", type=Path, help="made if it is not there; an adapter in it is not overwritten")
    parser.add_argument(
        "--layout", choices=("fused", "per_expert"), default="fused",
        help="fused, as PEFT writes it (default), or per_expert, as inference servers and older Transformers read it",
    )  # fmt: skip
    parser.add_argument("--adapter", help="which, where there is more than one")
    options = parser.parse_args(arguments)
    try:
        export_checkpoint(options.checkpoint, options.folder, options.layout, adapter=options.adapter)
    except (ValueError, OSError) as error:
        sys.exit(f"lightning_moe.export: {error}")
    print(f"{options.folder}: {options.layout} adapter written")


if __name__ == "__main__":
    main()
