"""The command line: `lightning-moe export | merge | verify`, also as `python -m lightning_moe`."""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch

from lightning_moe.adapters.export import Layout, export_checkpoint
from lightning_moe.adapters.merge import Rounding, merge_adapter
from lightning_moe.adapters.verify import verify_adapter


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="lightning-moe", description="Tools around adapters.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_export(commands)
    _add_merge(commands)
    _add_verify(commands)
    options = parser.parse_args(arguments)
    options.run(options)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export", help="make a PEFT folder of a Lightning checkpoint, without the base model",
        description="Writes the adapter of a Lightning checkpoint as a PEFT folder, without the base model.",
    )  # fmt: skip
    export.add_argument("checkpoint", type=Path, help="saved by a Trainer with the callback AdapterExport")
    export.add_argument("folder", type=Path, help="made if it is not there; an adapter in it is not overwritten")
    export.add_argument(
        "--layout", choices=get_args(Layout), default="fused",
        help="fused, as PEFT writes it (default), or per_expert, for vLLM, SGLang, llama.cpp and older PEFT",
    )  # fmt: skip
    export.add_argument("--adapter", help="which, where there is more than one")
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    try:
        export_checkpoint(options.checkpoint, options.folder, options.layout, adapter=options.adapter)
    except (ValueError, OSError) as error:
        _fail("export", error)
    print(f"{options.folder}: {options.layout} adapter written")


def _add_merge(commands: Any) -> None:
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


def _merge(options: argparse.Namespace) -> None:
    try:
        report = merge_adapter(
            options.adapter, options.base, options.out, dtype=options.dtype and getattr(torch, options.dtype),
            rounding=options.rounding, seed=options.seed, adapter_name=options.adapter_name,
            onto_16_bit=options.onto_16_bit,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        _fail("merge", error)
    except KeyboardInterrupt:
        print("lightning-moe merge: interrupted; nothing is left of it", file=sys.stderr)
        sys.exit(130)
    print(report)


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
        _fail("verify", error)
    print(f"{options.folder}: {found}")
    sys.exit(0 if found.ok else 1)


def _fail(command: str, error: Exception) -> NoReturn:
    """Ends with one line, and the status of bad input."""
    print(f"lightning-moe {command}:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)
