"""LoRA fine-tuning of a Qwen3 Mixture-of-Experts model with lightning_moe.

    python recipes/qwen3_lora.py                                   a small random model on the CPU, in two minutes
    python recipes/qwen3_lora.py fit --config FILE                 another configuration, such as configs/*.yaml
    python recipes/qwen3_lora.py fit --config FILE --trainer.max_steps 20 --model.learning_rate 1e-4
    python recipes/qwen3_lora.py fit --config FILE --model.experts true     adapters on the experts too
    python recipes/qwen3_lora.py fit --help                        every option

Ends with a summary, an adapter-only checkpoint to resume from and a PEFT adapter folder, or one for each of
`--model.adapter_layouts "[fused, per_expert]"`.
"""

import os
import sys
import warnings
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from instruction_data import InstructionData
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_moe import MemoryMonitor, MoEGateGradCallback, export_adapter

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny.yaml"
GENERATED_TOKENS = 48
EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

UNHELPFUL_WARNINGS = (
    ".*does not have many workers",  # the data is in memory: worker processes would only cost
    # Deprecations inside the libraries, which a user of this program cannot mend:
    ".*is_gradient_checkpointing. is deprecated",
    ".*set_vital. is deprecated",
    ".*isinstance.treespec, LeafSpec.",
)


class Qwen3LoRA(LightningModule):
    """A Qwen3-MoE causal language model with LoRA adapters; only the adapters train.

    Args:
        architecture: fields of `Qwen3MoeConfig`; used where `init` is random.
        init: `"random"` draws the base from `init_seed`; `"pretrained"` loads `name`.
        name: a hub name or a folder with the base's weights.
        init_seed: of the random base, apart from the run's own seed, so that an adapter finds its base again.
        rank: LoRA's rank.
        alpha: LoRA's alpha; the update is scaled by alpha / rank.
        target_modules: the linear layers that get an adapter.
        experts: put adapters on the experts' projections too; most of the model's weights are there.
        modules_to_save: modules that train in full beside the adapters, such as the head of a random base.
        learning_rate: of AdamW, after the warm-up.
        warmup_steps: over which the learning rate rises from 0.
        activation_checkpointing: recompute each layer in backward.
        adapter_layouts: in which layouts the adapter is written at the end: `fused`, as PEFT has it, and `per_expert`,
            as inference servers and older Transformers read adapters on experts. A list: `"[fused, per_expert]"`.
    """

    def __init__(
        self,
        architecture: dict[str, Any],
        init: Literal["random", "pretrained"] = "random",
        name: str | None = None,
        init_seed: int = 0,
        rank: int = 16,
        alpha: int = 32,
        target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
        experts: bool = False,
        modules_to_save: tuple[str, ...] = (),
        learning_rate: float = 1e-4,
        warmup_steps: int = 10,
        activation_checkpointing: bool = False,
        adapter_layouts: tuple[Literal["fused", "per_expert"], ...] = ("fused",),
    ) -> None:
        super().__init__()
        if init == "pretrained" and not name:
            raise ValueError("model.init is 'pretrained': set model.name to a hub name or a folder")
        for option, value in (("rank", rank), ("alpha", alpha), ("learning_rate", learning_rate)):
            if value <= 0:
                raise ValueError(f"model.{option} must be positive, not {value}")
        if warmup_steps < 0:
            raise ValueError(f"model.warmup_steps must be at least 0, not {warmup_steps}")
        self.save_hyperparameters()
        self.network: PeftModel | None = None
        self.strict_loading = False  # checkpoints hold the adapter only

    def configure_model(self) -> None:
        """Builds the base and puts the adapters on it, once."""
        if self.network is not None:
            return
        options = self.hparams
        base = self.build_base()
        base.config.use_cache = False
        if options["activation_checkpointing"]:
            # Transformers 5.17 knows only the older name, 5.23 deprecates it.
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        adapter = LoraConfig(
            r=options["rank"],
            lora_alpha=options["alpha"],
            target_modules=list(options["target_modules"]),
            target_parameters=list(EXPERT_PARAMETERS) if options["experts"] else None,
            modules_to_save=list(options["modules_to_save"]) or None,
            task_type="CAUSAL_LM",
        )
        self.network = get_peft_model(base, adapter)

    def build_base(self) -> Qwen3MoeForCausalLM:
        """The model without adapters, in PyTorch's default dtype."""
        options = self.hparams
        if options["init"] == "pretrained":
            return Qwen3MoeForCausalLM.from_pretrained(options["name"], dtype=torch.get_default_dtype())
        with torch.random.fork_rng():
            torch.manual_seed(options["init_seed"])
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(**options["architecture"]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss over the answers' tokens."""
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """As training_step, on the held-out pairs."""
        self.log("val/loss", self._loss(batch), prog_bar=True, sync_dist=True)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        assert self.network is not None
        return self.network(**batch).loss

    def configure_optimizers(self) -> Any:
        """AdamW over what trains, with a linear warm-up."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.hparams["learning_rate"], weight_decay=0.0)
        warmup = self.hparams["warmup_steps"]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen base out."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    @torch.no_grad()
    def answer(self, data: InstructionData, prompt: str) -> str:
        """What the model answers to a prompt, greedily."""
        assert self.network is not None
        was_training = self.network.training
        self.network.eval()
        tokens = data.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(self.device)
        generated = self.network.generate(
            **tokens, max_new_tokens=GENERATED_TOKENS, do_sample=False, use_cache=True,
            pad_token_id=data.tokenizer.pad_token_id, eos_token_id=data.tokenizer.eos_token_id,
        )  # fmt: skip
        self.network.train(was_training)
        answer = data.tokenizer.decode(generated[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        assert isinstance(answer, str)
        return answer


class RunSummary(Callback):
    """Prints the patch report and a held-out answer before and after, writes the adapter folder, ends with a table."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._peak_gib: float | None = None
        self._before = self._after = self._device = ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The patch report, and the answer before training."""
        console = Console()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MoEGateGradCallback) and callback.report is not None:
                console.print(callback.report)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data.num_skipped:
            console.print(f"{data.num_skipped} pairs are longer than {data.max_length} tokens and left out")
        assert isinstance(pl_module, Qwen3LoRA)
        self._before = pl_module.answer(data, data.held_out[0].prompt)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the loss, left on its device, and the peak that MemoryMonitor logged."""
        self._losses.append(outputs["loss"].detach())
        peak = trainer.callback_metrics.get("memory/peak_allocated_gib")
        if peak is not None:
            self._peak_gib = max(self._peak_gib or 0.0, peak.item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The answer after training, while the model is still on its device."""
        assert isinstance(pl_module, Qwen3LoRA)
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._after, self._device = pl_module.answer(data, data.held_out[0].prompt), pl_module.device.type

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The adapter folder and the table."""
        assert isinstance(pl_module, Qwen3LoRA)
        assert pl_module.network is not None
        if not trainer.is_global_zero or not self._losses:
            return
        adapters = self._write_adapters(Path(trainer.log_dir or trainer.default_root_dir), pl_module)
        data = trainer.datamodule  # type: ignore[attr-defined]

        table = Table(title="Summary", title_justify="left", title_style="bold", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        table.add_row("loss, first and last", f"{self._losses[0].item():.4f} → {self._losses[-1].item():.4f}")
        if self._peak_gib is not None:
            kind = "allocated" if self._device == "cuda" else "resident"
            table.add_row(f"peak memory ({kind})", f"{self._peak_gib:.2f} GiB")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MemoryMonitor) and callback.tape:
                kept = sum(layer.num_bytes for layer in callback.tape)
                stock = sum(layer.stock_num_bytes for layer in callback.tape)
                table.add_row(
                    "MoE tape, stock and now",
                    f"{stock / 2**20:.2f} → {kept / 2**20:.2f} MiB ({kept / stock:.2f}), {len(callback.tape)} layers",
                )
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in pl_module.parameters())
        on_experts = sum(p.numel() for n, p in pl_module.named_parameters() if p.requires_grad and ".experts." in n)
        table.add_row("parameters that train", f"{trained:,} of {total:,} ({trained / total:.2%})")
        if on_experts:
            table.add_row("of these on experts", f"{on_experts:,}")
        table.add_row("prompt held out", data.held_out[0].prompt.strip())
        table.add_row("answer wanted", data.held_out[0].answer)
        table.add_row("answer before", self._before)
        table.add_row("answer after", self._after)
        for logger in trainer.loggers:
            table.add_row(type(logger).__name__, os.path.relpath(logger.log_dir or logger.save_dir or "."))
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.last_model_path:
            table.add_row("checkpoint", os.path.relpath(checkpoint.last_model_path))
        for layout, folder in adapters.items():
            table.add_row(f"PEFT adapter, {layout}", os.path.relpath(folder))
        Console().print(table)

    def _write_adapters(self, folder: Path, module: Qwen3LoRA) -> dict[str, Path]:
        """One folder for each layout, under a name that is free: an earlier run's adapter stays."""
        written = {}
        for layout in dict.fromkeys(module.hparams["adapter_layouts"]):
            stem = "adapter" if layout == "fused" else f"adapter_{layout}"
            names = (stem if number == 0 else f"{stem}-{number}" for number in count())
            written[layout] = next(folder / name for name in names if not (folder / name).exists())
            export_adapter(module, written[layout], layout)
        return written


def main(args: list[str] | None = None) -> LightningCLI:
    """Runs the command line; without arguments, the embedded default."""
    if args is None and len(sys.argv) == 1:
        args = ["fit", "--config", str(DEFAULT_CONFIG)]
    for message in UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    return LightningCLI(
        Qwen3LoRA,
        InstructionData,
        args=args,
        seed_everything_default=0,
        parser_kwargs={"description": f"LoRA on a Qwen3 MoE. Without arguments: fit --config {DEFAULT_CONFIG.name}."},
        save_config_kwargs={"overwrite": True},
    )


if __name__ == "__main__":
    main()
