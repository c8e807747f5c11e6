"""LoRA fine-tuning of a Qwen3 Mixture-of-Experts model with lightning_moe.

    python recipes/qwen3_lora.py                                   a small random model on the CPU, in two minutes
    python recipes/qwen3_lora.py fit --config FILE                 another configuration, such as configs/*.yaml
    python recipes/qwen3_lora.py fit --config FILE --data.source chats.jsonl --trainer.max_steps 200
    python recipes/qwen3_lora.py fit --config FILE --model.experts true     adapters on the experts too
    python recipes/qwen3_lora.py fit --config FILE --ckpt_path FILE         goes on where a run stopped
    python recipes/qwen3_lora.py fit --help                        every option

Ends with a summary and a report with plots, an adapter-only checkpoint to resume from, and a PEFT adapter folder, or
one for each of `--model.adapter_layouts "[fused, per_expert]"`.
"""

import os
import sys
import warnings
from pathlib import Path
from types import MethodType
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.precision import HalfPrecision
from lora.adapters import check_checkpoint, check_names, put_adapters, trained_products
from lora.attention import NAME as DOCUMENTS
from lora.base_model import apply_liger, build, check_memory, check_weights, describe_attention, read_config
from lora.checkpointing import Mode, enable_checkpointing
from lora.data import InstructionData
from lora.flops import model_flops
from lora.loss import Path as LossPath
from lora.loss import choose_path, losses
from lora.masters import Masters, by_name
from lora.sharding import check_strategy, shard
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Qwen3MoeForCausalLM

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny.yaml"
GENERATED_TOKENS = 48

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
        dtype: of the base and of the adapters. The optimizer works on float32 copies of what has fewer bits.
        rank: LoRA's rank.
        alpha: LoRA's alpha; the update is scaled by alpha / rank.
        target_modules: the linear layers that get an adapter.
        experts: put adapters on the experts' projections too; most of the model's weights are there.
        router: what happens to the router: it stays `frozen`, is `trained` in full, or gets `lora`.
        router_aux_loss: weight of the load-balancing loss, 0 for none.
        modules_to_save: modules that train in full beside the adapters, such as the head of a random base.
        learning_rate: of AdamW, after the warm-up.
        warmup_steps: over which the learning rate rises from 0.
        checkpointing: what each layer computes again in backward: `full` all of it, `selective` all but the experts,
            which takes more memory and less time, `none` nothing.
        offload: keep each layer's input in host memory until backward; with `full` checkpointing on a GPU.
        tile_tokens: where a sequence is longer, the experts work on this many tokens at a time and once more in
            backward. 0 for never.
        attention: `documents`, the recipe's own, or a name that Transformers knows: `sdpa`, `flash_attention_2`, ...
        liger: Liger's RMSNorm and rotary embedding: `true`, `false`, or null for where they can be had.
        loss: how the loss does without the full logits: `torch`, `liger`, `chunks`, or `auto` for the first that can.
        adapter_layouts: in which layouts the adapter is written at the end: `fused`, as PEFT has it, and `per_expert`,
            as inference servers and older Transformers read adapters on experts. A list: `"[fused, per_expert]"`.
    """

    def __init__(
        self,
        architecture: dict[str, Any],
        init: Literal["random", "pretrained"] = "random",
        name: str | None = None,
        init_seed: int = 0,
        dtype: Literal["bfloat16", "float32"] = "float32",
        rank: int = 16,
        alpha: int = 32,
        target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
        experts: bool = False,
        router: Literal["frozen", "trained", "lora"] = "frozen",
        router_aux_loss: float = 0.0,
        modules_to_save: tuple[str, ...] = (),
        learning_rate: float = 1e-4,
        warmup_steps: int = 10,
        checkpointing: Mode = "none",
        offload: bool = False,
        tile_tokens: int = 32_768,
        attention: str = DOCUMENTS,
        liger: bool | None = None,
        loss: LossPath | Literal["auto"] = "auto",
        adapter_layouts: tuple[Literal["fused", "per_expert"], ...] = ("fused",),
    ) -> None:
        super().__init__()
        if init == "pretrained" and not name:
            raise ValueError("model.init is 'pretrained': set model.name to a hub name or a folder")
        for option, value in (("rank", rank), ("alpha", alpha), ("learning_rate", learning_rate)):
            if value <= 0:
                raise ValueError(f"model.{option} must be positive, not {value}")
        for option, value in (
            ("warmup_steps", warmup_steps), ("tile_tokens", tile_tokens), ("router_aux_loss", router_aux_loss)
        ):  # fmt: skip
            if value < 0:
                raise ValueError(f"model.{option} must be at least 0, not {value}")
        if offload and checkpointing != "full":
            raise ValueError("model.offload keeps the layers' inputs: it needs --model.checkpointing full")
        self.save_hyperparameters()
        self.network: PeftModel | None = None
        self.description: dict[str, str] = {}
        self.strict_loading = False  # checkpoints hold the adapter only
        self._saved_masters: dict[str, Tensor] = {}
        self._masters: Masters | None = None
        self._loss_path: LossPath = "chunks"

    @property
    def _name(self) -> str | None:
        return self.hparams["name"] if self.hparams["init"] == "pretrained" else None

    def prepare_data(self) -> None:
        """Looks for the weights and room for them, before data or minutes are spent."""
        if self._name is not None:
            check_weights(self._name)

    def setup(self, stage: str) -> None:
        """Looks for what is misspelt, and for room on the device."""
        if isinstance(self.trainer.precision_plugin, HalfPrecision):
            raise ValueError(
                "trainer.precision bf16-true and 16-true round all that the model holds, its rotary frequencies too, "
                "which spoils positions: leave trainer.precision at 32-true and set --model.dtype bfloat16"
            )
        if self.hparams["dtype"] == "bfloat16" and getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "trainer.precision 16-mixed scales gradients, which bfloat16 does not need and the optimizer's copies "
                "would not be told of: leave trainer.precision at 32-true, or set --model.dtype float32"
            )
        check_strategy(self.trainer.strategy)
        if self.network is None:
            config = read_config(self._name, self.hparams["architecture"])
            check_names(config, self.hparams)
            check_memory(config, getattr(torch, self.hparams["dtype"]), self.trainer.strategy.root_device)

    def configure_model(self) -> None:
        """Builds the base, puts the adapters on it, and spreads it where the strategy has a mesh for that; once."""
        if self.network is not None:
            return
        options = self.hparams
        base = self.build_base()
        base.config.use_cache = False
        norms = apply_liger(base, options["liger"])
        self.network = put_adapters(base, options)
        self.network.train()  # a base that was read comes in eval mode
        enable_checkpointing(base.model.layers, options["checkpointing"], options["offload"], options["tile_tokens"])
        self._loss_path = choose_path(options["loss"], base.lm_head, base.device)
        base.losses = MethodType(losses, base)  # type: ignore[assignment]
        self.description = {
            "base": f"{self._name or 'random weights'}, {options['dtype']}",
            "attention": describe_attention(base),
            "norms and rotary embedding": norms,
            "loss": f"{self._loss_path}, without the full logits",
            "recomputed in backward": {"full": "each layer", "selective": "all but the experts", "none": "nothing"}[
                options["checkpointing"]
            ]
            + (", its input in host memory" if options["offload"] else ""),
            "router": self._describe_router(),
        }
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            shard(self.network, mesh)
            self.description["sharded"] = f"over {mesh.size()} processes, layer by layer"

    def build_base(self) -> Qwen3MoeForCausalLM:
        """The model without adapters, on the Trainer's device."""
        options = self.hparams
        device = torch.get_default_device() if self._trainer is None else self.trainer.strategy.root_device
        config = read_config(self._name, options["architecture"])
        dtype = getattr(torch, options["dtype"])
        return build(self._name, config, dtype, device, options["attention"], options["init_seed"])

    def _describe_router(self) -> str:
        balance = f", load-balancing loss x {self.hparams['router_aux_loss']:g}" * bool(self.hparams["router_aux_loss"])
        said = {"frozen": "frozen", "trained": "trained in full", "lora": f"LoRA of rank {self.hparams['rank']}"}
        # PEFT adds the update to the router's weight, and rounds the sum.
        rounds = ", small updates round away in bfloat16" * (self.hparams["dtype"] == "bfloat16")
        return said[self.hparams["router"]] + rounds * (self.hparams["router"] == "lora") + balance

    def cpu(self) -> Self:
        """Leaves the model where it is.

        Lightning moves a model to the host at the end of every run, and a base that was made on its device may have no
        room there. `to("cpu")` moves it.
        """
        return self

    def step_flops(self, num_tokens: int, sum_squared_lengths: int) -> int:
        """Model FLOPs of a step; see `flops.model_flops`."""
        assert self.network is not None
        config: Any = self.network.get_base_model().config
        return model_flops(config, num_tokens, sum_squared_lengths, trained_products(self.hparams))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The mean loss over all processes' tokens that have a label, logged, and the router's on top if asked for."""
        loss, balance = self._losses(batch)
        logged = self._mean(loss)
        self.log("train/loss", logged, prog_bar=True)
        total = loss
        if balance is not None:
            self.log("train/router_aux_loss", self._mean(balance))
            total = loss + self.hparams["router_aux_loss"] * balance
        return {"loss": total, "train/loss": logged}

    def _mean(self, value: Tensor) -> Tensor:
        """Over the processes, as the strategy does with their gradients; no process waits for it."""
        mean = value.detach().clone()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(mean)
        return mean / self.trainer.world_size

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As training_step, on the held-out documents."""
        self.log("val/loss", self._losses(batch)[0], prog_bar=True, sync_dist=True, batch_size=1)

    def _losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        assert self.network is not None
        causal: Any = self.network.get_base_model()
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "weight")}
        balances = bool(self.hparams["router_aux_loss"]) and self.training
        loss, balance = causal.losses(inputs, batch["labels"], self._loss_path, balances=balances)
        return loss * batch["weight"], balance

    def configure_optimizers(self) -> Any:
        """AdamW over what trains, with a linear warm-up."""
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        masters = self._masters = Masters(trained, self._saved_masters)
        optimizer = torch.optim.AdamW(
            masters.by_name.values(), lr=self.hparams["learning_rate"], weight_decay=0.0,
            fused=self.device.type == "cuda",
        )  # fmt: skip
        optimizer.register_step_post_hook(lambda *_: masters.after_step())
        warmup = self.hparams["warmup_steps"]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _adds_gradients(self) -> bool:
        # Between several processes it is the model's own gradients that are averaged, with all that they hold.
        return self.trainer.accumulate_grad_batches > 1 and self.trainer.world_size == 1

    def on_before_backward(self, loss: Tensor) -> None:
        """Leaves room for the micro-batch's gradients."""
        if self._adds_gradients:
            assert self._masters is not None
            self._masters.before_backward()

    def on_after_backward(self) -> None:
        """Adds the micro-batch's gradients up in float32."""
        if self._adds_gradients:
            assert self._masters is not None
            self._masters.after_backward()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Hands the gradients to the optimizer's parameters and logs their norm, before clipping."""
        assert self._masters is not None
        self._masters.take_gradients()
        grads = [p.grad for p in self._masters.by_name.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen base out; keeps what trains as the optimizer has it.

        Lightning counts an epoch as over where `fit` returns: a checkpoint that is saved after that, by
        `trainer.save_checkpoint`, goes on with the next epoch's order.
        """
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        if self._masters is None:
            return
        if self.device_mesh is None:  # else it is gathered, and float32, already
            checkpoint["state_dict"].update({k: v.detach() for k, v in self._masters.by_name.items()})
        checkpoint["optimizer_states"] = [
            by_name(state, list(self._masters.by_name)) for state in checkpoint.get("optimizer_states", [])
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gives the optimizer the values, or keeps them for the one to come; the model gets them rounded.

        Raises:
            ValueError: where the values are another model's, naming the options that differ.
        """
        check_checkpoint(self.hparams, checkpoint["hyper_parameters"])
        if self.device_mesh is not None:
            return  # the strategy has loaded them
        self._saved_masters = checkpoint["state_dict"]
        if self._masters is not None:
            self._masters.load(self._saved_masters)

    def on_train_start(self) -> None:
        """Forgets the checkpoint: the next fit starts from what the model holds then."""
        self._saved_masters = {}

    @torch.no_grad()
    def answer(self, data: InstructionData, prompt: str) -> str:
        """What the model answers to a prompt, or to the end of one longer than the data's documents, greedily."""
        assert self.network is not None
        was_training = self.network.training
        self.network.eval()
        encoded = data.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(self.device)
        tokens = {name: encoded[name][:, -data.max_length :] for name in ("input_ids", "attention_mask")}
        generated = self.network.generate(
            **tokens, max_new_tokens=GENERATED_TOKENS, do_sample=False, use_cache=True,
            pad_token_id=data.tokenizer.pad_token_id, eos_token_id=data.tokenizer.eos_token_id,
            synced_gpus=self.device_mesh is not None,  # a process that has ended gathers on for the others
        )  # fmt: skip
        self.network.train(was_training)
        base: Any = self.network.get_base_model()
        if isinstance(base, FSDPModule):  # which leaves gathered what is in no layer
            base.reshard()
        answer = data.tokenizer.decode(generated[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        assert isinstance(answer, str)
        return answer


class CommandLine(LightningCLI):
    """Lightning's, where an option that is given counts beside a checkpoint too, and not what the checkpoint has."""

    def _parse_ckpt_path(self) -> None:
        pass


def main(args: list[str] | None = None) -> LightningCLI:
    """Runs the command line; without arguments, the embedded default."""
    if args is None and len(sys.argv) == 1:
        args = ["fit", "--config", str(DEFAULT_CONFIG)]
    # Sequences of many lengths would leave the GPU's memory in pieces. Read when CUDA starts.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for message in UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    return CommandLine(
        Qwen3LoRA,
        InstructionData,
        args=args,
        seed_everything_default=0,
        parser_kwargs={"description": f"LoRA on a Qwen3 MoE. Without arguments: fit --config {DEFAULT_CONFIG.name}."},
        save_config_kwargs={"overwrite": True},
        # What has no logger's folder goes to runs; the data module shares its batches out itself.
        trainer_defaults={"default_root_dir": "runs", "use_distributed_sampler": False},
    )


if __name__ == "__main__":
    main()
