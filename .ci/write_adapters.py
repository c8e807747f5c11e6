"""Writes what `.ci/readers` reads: `FOLDER/MODEL/base` as the hub has it, and for each kind of adapter a folder.

An adapter's folder has the per_expert adapter, beside it the logits of the model that it comes from, in float32, and
the base that it is merged into.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from helpers.adapter_cases import CASES, MODELS, adapted
from helpers.models import tokens
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from lightning_moe import export_adapter, merge_adapter


def for_transformers_4(config: PreTrainedConfig) -> dict[str, Any]:
    """What Transformers 4 reads under other names than Transformers 5 writes, as a base's own config.json has it."""
    return {"rope_theta": config.rope_parameters["rope_theta"], "num_experts": config.num_local_experts}


def main(folder: Path) -> None:
    """Writes them all."""
    warnings.simplefilter("ignore")
    for name, build in MODELS.items():
        base = build()
        base.save_pretrained(folder / name / "base")
        config = folder / name / "base" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | for_transformers_4(base.config)))
        for case in CASES:
            model = adapted(build, case).eval()
            export_adapter(model, folder / name / case, "per_expert")
            merge_adapter(folder / name / case, folder / name / "base", folder / name / case / "merged")
            with torch.no_grad():
                logits = model(input_ids=tokens()).logits
            save_file({"input_ids": tokens(), "logits": logits}, folder / name / case / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
