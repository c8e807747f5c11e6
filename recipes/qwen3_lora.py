"""LoRA fine-tuning of a Qwen3 Mixture-of-Experts model with lightning_moe.

    python recipes/qwen3_lora.py                                   a small random model on the CPU, in two minutes
    python recipes/qwen3_lora.py fit --config FILE                 another configuration, such as configs/*.yaml
    python recipes/qwen3_lora.py fit --config FILE --config configs/fsdp.yaml                over several GPUs
    python recipes/qwen3_lora.py fit --config FILE --data.source chats.jsonl --trainer.max_steps 200
    python recipes/qwen3_lora.py fit --config FILE --model.experts true     adapters on the experts too
    python recipes/qwen3_lora.py fit --config FILE --ckpt_path FILE         goes on where a run stopped
    python recipes/qwen3_lora.py fit --help                        every option

Ends with a summary, an adapter-only checkpoint to resume from, and a PEFT adapter folder.
"""

import os
import sys
import warnings
from pathlib import Path

from lightning.pytorch.cli import LightningCLI
from lora.data import InstructionData
from lora.module import MoELoRA

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny.yaml"

# Sequences of many lengths would fragment the GPU's memory. By one thread a GiB of page-locked memory takes 0.7 s to
# have, by eight 0.16. Read when CUDA starts.
ALLOCATOR = "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"

UNHELPFUL_WARNINGS = (
    ".*does not have many workers",  # the data are in memory: worker processes would only cost
    # Deprecations inside the libraries, which a user of this program cannot mend:
    ".*is_gradient_checkpointing. is deprecated",
    ".*set_vital. is deprecated",
    ".*isinstance.treespec, LeafSpec.",
    ".torch.jit.script_method. is deprecated",
    # What torch's compiler advises of its own code, which it compiles the loss to:
    r"\s*Online softmax is disabled",
    "TensorFloat32 tensor cores",
)


def main(args: list[str] | None = None) -> LightningCLI:
    """Runs the command line; without arguments, the tiny configuration."""
    if args is None and len(sys.argv) == 1:
        args = ["fit", "--config", str(DEFAULT_CONFIG)]
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR)
    for message in UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    return LightningCLI(
        MoELoRA,
        InstructionData,
        args=args,
        seed_everything_default=0,
        parser_kwargs={"description": f"LoRA on a Qwen3 MoE. Without arguments: fit --config {DEFAULT_CONFIG.name}."},
        save_config_kwargs={"overwrite": True},
        # What has no logger's folder goes to runs; the data module gives each rank its share of a batch.
        trainer_defaults={"default_root_dir": "runs", "use_distributed_sampler": False},
    )


if __name__ == "__main__":
    main()
