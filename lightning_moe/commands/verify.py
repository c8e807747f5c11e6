"""`lightning-moe verify`: whether an exported adapter, or a merged model, computes as the trained model did."""

import argparse
from pathlib import Path
from typing import Any

import torch

from lightning_moe.adapters.verify import verify_adapter


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "verify", help="compare an exported adapter, or a merged model, with the trained model",
        description="Loads an exported adapter, or a merged model, with plain PEFT and Transformers and compares its "
        "logits with the trained model's, which AdapterExport has kept. Exits with 0 for yes; 1 where it differs, or "
        "it cannot be told; 2 where something is missing.",
    )  # fmt: skip
    parser.add_argument("folder", type=Path, help="of the adapter or of the merged model")
    parser.add_argument("--base", help="folder or hub name of the base; a merged model needs none")
    parser.add_argument(
        "--reference", type=Path, help="the adapter's folder that holds the trained model's logits, if not FOLDER"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="to load in; the base's by default")
    parser.add_argument("--device", help="to load to; a GPU by default, where there is one")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verifies; 1 where it differs, or it cannot be told."""
    dtype = getattr(torch, options.dtype) if options.dtype else None
    found = verify_adapter(
        options.folder, options.base, reference=options.reference, dtype=dtype, device=options.device
    )
    print(f"{options.folder}: {found}")
    return 0 if found.ok else 1
