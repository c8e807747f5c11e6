"""MoELoRA: a Mixture-of-Experts language model with LoRA adapters as a LightningModule."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from types import MethodType
from typing import Any, Literal, Self

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import ParallelStrategy
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_moe import (
    CUDAGraphCallback,
    MemoryPlan,
    PlanOptions,
    QuantizedExpertsConfig,
    plan_memory,
    verify_adapter,
)
from lora.adapters import add_adapters, check_checkpoint, check_names
from lora.attention import NAME as VARLEN
from lora.attention import kernels_run
from lora.base_model import (
    apply_liger,
    build,
    check_weights,
    liger_unsupported_reason,
    place_experts,
    read_config,
)
from lora.checkpointing import (
    TWO_BLOCKS,
    Mode,
    Recomputing,
    choose_checkpointing,
    draws_random_numbers,
    enable_checkpointing,
)
from lora.data import COUNTS, InstructionData
from lora.host_experts import HostExperts, keep_on_host
from lora.loss import losses
from lora.sharding import check_strategy, rename_optimizer_state, shard

GENERATED_TOKENS = 48
RECOMPUTED: dict[Mode, str] = {
    "selective": "each layer but attention", "full": "each layer", "none": "nothing"
}  # fmt: skip


class MoELoRA(LightningModule):
    """A causal language model of Transformers with LoRA adapters; only the adapters train.

    Adapters are float32 and the base may be bfloat16. Under `trainer.precision bf16-mixed` a layer computes with
    bfloat16 copies of its adapters, and the optimizer sees float32 gradients and steps on float32 values: a step of
    1e-4 on a bfloat16 weight of 0.05 would be lost.

    Attributes:
        checkpointing: the mode in effect, and whether what it keeps is offloaded.

    Args:
        architecture: `model_type` and fields of that family's configuration; used where `init` is random.
        init: `"random"` draws the base from `init_seed`; `"pretrained"` loads `name`.
        name: a hub name or a folder with the base's weights.
        init_seed: of the random base, apart from the run's own seed, so that an adapter finds its base again.
        dtype: of the base. bfloat16 needs `trainer.precision bf16-mixed`.
        quantize: keep the experts' frozen weights in `nf4` or `mxfp4`, four bits a value, or `fp8`, eight. In nf4
            Qwen3-30B-A3B takes 16.8 GiB in place of 57. Not with FSDP; nf4 needs bitsandbytes. A checkpoint whose
            experts are in that format is read as it is: in nf4 as bitsandbytes quantizes them one by one, in fp8 as
            Qwen3-30B-A3B-FP8's, in mxfp4 as gpt-oss's. Linear layers that are in fp8 there become dense.
        quantize_linear: a pretrained model's attention and other linear layers in nf4 as well, 1.2 GiB less.
        experts_on: where the frozen experts wait: on the `device`, or on the `host`, from where each layer's are copied
            ahead of the computation in forward and in backward; `auto` is the host where a GPU does not hold them. One
            GPU; not with `cuda_graph`.
        rank: LoRA's rank.
        alpha: LoRA's alpha; the update is scaled by alpha / rank.
        target_modules: the linear layers that get an adapter.
        experts: put adapters on the experts' projections too; most of the model's weights are there.
        router: what happens to the router: it stays `frozen`, is `trained` in full, or gets `lora`.
        router_module: the name that the family gives to a layer's router.
        router_aux_loss: weight of the load-balancing loss, 0 for none.
        modules_to_save: modules that train in full beside the adapters, such as the head of a random base.
        learning_rate: of AdamW, after the warm-up.
        optimizer: `adamw`, or bitsandbytes' `adamw_8bit`, whose two moments take a quarter of the memory: 1.2 GiB for
            adapters on Qwen3-30B-A3B's experts in place of 4.7. On a GPU.
        warmup_steps: over which the learning rate rises from 0.
        checkpointing: what each layer computes again in backward: `selective` all but attention, which needs
            `attention` to be `varlen`; `full` all of it; `none` nothing; `auto` the first of `selective` and `full`
            whose memory fits, on the device or, offloaded, on the host.
        offload: have what checkpointing keeps wait in host memory; `auto` decides on its own where this is null.
        tile_tokens: where a sequence is longer, the experts work on this many tokens at a time and once more in
            backward. 0 for never.
        attention: `varlen`, the recipe's own, or a name that Transformers knows: `sdpa`, `flash_attention_2`, ...
        fused_lora: have the products of adapted linear layers add their updates; PEFT's own passes where false.
        liger: Liger's RMSNorm and rotary embedding: `true`, `false`, or null for where they can be had, with PyTorch's
            fused RMSNorm for the hidden size, which is faster there.
        cuda_graph: capture a training step's forward and backward and replay them, which for up to some 8,192 tokens
            saves most of the time: `auto` where a short trial on the GPU says that it is faster. Packs (`packing: bfd`)
            are filled up to one length then, with text of their own that counts in the experts' load and the router's
            loss. Not with `offload`, nor on several GPUs.
    """

    flops_per_batch = None  # Lightning's ThroughputMonitor asks for it

    def __init__(
        self,
        architecture: dict[str, Any],
        init: Literal["random", "pretrained"] = "random",
        name: str | None = None,
        init_seed: int = 0,
        dtype: Literal["bfloat16", "float32"] = "float32",
        quantize: Literal["nf4", "fp8", "mxfp4"] | None = None,
        quantize_linear: bool = False,
        experts_on: Literal["device", "host", "auto"] = "auto",
        rank: PositiveInt = 16,
        alpha: PositiveInt = 32,
        target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
        experts: bool = False,
        router: Literal["frozen", "trained", "lora"] = "frozen",
        router_module: str = "mlp.gate",
        router_aux_loss: NonNegativeFloat = 0.0,
        modules_to_save: tuple[str, ...] = (),
        learning_rate: PositiveFloat = 1e-4,
        optimizer: Literal["adamw", "adamw_8bit"] = "adamw",
        warmup_steps: NonNegativeInt = 10,
        checkpointing: Mode | Literal["auto"] = "none",
        offload: bool | None = None,
        tile_tokens: NonNegativeInt = 32_768,
        attention: str = VARLEN,
        fused_lora: bool = True,
        liger: bool | None = None,
        cuda_graph: Literal["auto"] | bool = "auto",
    ) -> None:
        super().__init__()
        if init == "pretrained" and not name:
            raise ValueError("model.init is 'pretrained': set model.name to a hub name or a folder")
        if quantize_linear and (quantize is None or init != "pretrained"):
            raise ValueError(
                "model.quantize_linear is for a pretrained model whose experts are quantized: set --model.quantize nf4"
            )
        if offload and checkpointing == "none":
            raise ValueError(
                "model.offload brings to the host what checkpointing keeps: set --model.checkpointing auto"
            )
        if checkpointing == "selective" and attention != VARLEN:
            raise ValueError(
                f"model.checkpointing selective keeps the results of model.attention {VARLEN}, not of {attention!r}: "
                "set --model.checkpointing full"
            )
        self.save_hyperparameters()
        self.network: PeftModel | None = None
        self._description: dict[str, str] = {}
        self.checkpointing: tuple[Mode, bool] = "none", False
        self._experts_on_host = experts_on == "host"
        self._host_experts: HostExperts | None = None
        self.strict_loading = False  # checkpoints hold the adapter only

    @property
    def _name(self) -> str | None:
        return self.hparams["name"] if self.hparams["init"] == "pretrained" else None

    @property
    def _quantization(self) -> QuantizedExpertsConfig | None:
        options = self.hparams
        return options["quantize"] and QuantizedExpertsConfig(options["quantize"], options["quantize_linear"])

    @property
    def description(self) -> dict[str, str]:
        """What a report says of the model, by name."""
        attention = ", ".join([self.hparams["attention"], *sorted(kernels_run)])
        return self._description | {"attention": attention}

    def configure_callbacks(self) -> list[Callback]:
        """The one that captures `graphed_losses`, where that is asked for."""
        wanted = self.hparams["cuda_graph"]
        if wanted is True or (wanted == "auto" and self.trainer.strategy.root_device.type == "cuda"):
            return [CUDAGraphCallback("graphed_losses", wanted)]
        return []

    def prepare_data(self) -> None:
        """Looks for the weights, and for room on the disk, before data are read."""
        if self._name is not None:
            check_weights(self._name)

    def setup(self, stage: str) -> None:
        """Checks precision, strategy, names and memory before the model is built."""
        precision = self.trainer.precision_plugin
        if isinstance(precision, HalfPrecision):
            raise ValueError(
                "trainer.precision bf16-true and 16-true round all that the model holds, its rotary frequencies too, "
                "which spoils positions: set --trainer.precision bf16-mixed and --model.dtype bfloat16"
            )
        if self.hparams["dtype"] == "bfloat16" and precision.precision != "bf16-mixed":
            raise ValueError(
                f"model.dtype bfloat16 has float32 adapters on a bfloat16 base, which trainer.precision "
                f"{precision.precision} does not compute with: set --trainer.precision bf16-mixed"
            )
        check_strategy(self.trainer.strategy, self.hparams)
        if self.network is None:
            config = read_config(self._name, self.hparams["architecture"], self.hparams["quantize"] is not None)
            check_names(config, self.hparams)
            device = self.trainer.strategy.root_device
            dtype, wanted = getattr(torch, self.hparams["dtype"]), self.hparams["experts_on"]
            if wanted == "auto" and isinstance(self.trainer.strategy, ParallelStrategy):
                wanted = "device"
            self._experts_on_host = place_experts(config, dtype, device, self._quantization, wanted)
            self.hparams["experts_on"] = "host" if self._experts_on_host else "device"
            if self._experts_on_host and self.hparams["checkpointing"] == "none":
                reason = "is set" if wanted == "host" else "was chosen, for the device does not hold the weights"
                raise ValueError(
                    f"model.experts_on host {reason}: each layer's experts are on the device twice in a step, and "
                    "without checkpointing all would stay there until backward. Set --model.checkpointing auto"
                )

    def configure_model(self) -> None:
        """Builds the base, adds the adapters, and shards it where the strategy has a mesh for that; once."""
        if self.network is not None:
            return
        options = self.hparams
        base: Any = self.build_base()
        base.config.use_cache = False
        norms = apply_liger(base, options["liger"])
        self.network = add_adapters(base, options)
        self.network.train()  # a base that was read comes in eval mode
        layers = base.get_decoder().layers
        if self._experts_on_host:
            self._host_experts = keep_on_host(layers, base.device)
        self.checkpointing = mode, offload = self._choose_checkpointing(base)
        enable_checkpointing(
            layers, mode, has_two_blocks=base.config.model_type in TWO_BLOCKS, offload=offload,
            tile_tokens=options["tile_tokens"], router=options["router_module"], is_random=draws_random_numbers(base),
        )  # fmt: skip
        base.losses = MethodType(losses, base)
        self._description = {
            "base": f"{self._name or 'random weights'}, {base.config.model_type}, {options['dtype']}"
            + (f", experts in {options['quantize']}" if options["quantize"] else "")
            + ", experts in host memory" * self._experts_on_host
            + ", linear layers too" * getattr(base, "is_loaded_in_4bit", False),
            "norms and rotary embedding": norms,
            "recomputed in backward": RECOMPUTED[mode] + ", what is kept waits in host memory" * offload,
            "router": self._describe_router(),
        }
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            shard(self.network, mesh)
            self._description["sharded"] = f"over {mesh.size()} ranks, layer by layer"

    def build_base(self) -> PreTrainedModel:
        """The model without adapters, on the module's device."""
        options = self.hparams
        config = read_config(self._name, options["architecture"], options["quantize"] is not None)
        dtype = getattr(torch, options["dtype"])
        return build(
            self._name, config, dtype, self.device, options["attention"], options["init_seed"], self._quantization,
            self._experts_on_host,
        )  # fmt: skip

    def _choose_checkpointing(self, base: PreTrainedModel) -> tuple[Mode, bool]:
        """The mode, and whether to offload, once it is known what memory the base leaves."""
        mode, offload = self.hparams["checkpointing"], self.hparams["offload"]
        if mode != "auto":
            return mode, bool(offload)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        modes: tuple[Recomputing, ...] = ("selective", "full") if self.hparams["attention"] == VARLEN else ("full",)
        return choose_checkpointing(
            base.config, data.batch_size * data.max_length, base.dtype, base.device, modes=modes, offload=offload
        )

    def planned_memory(self, data: InstructionData, output_buffer_mib: float) -> MemoryPlan | None:
        """What a step of the data's longest batch takes on a GPU by `lightning-moe plan`; None where it has no plan."""
        assert self.network is not None
        options, (mode, offload) = self.hparams, self.checkpointing
        base: Any = self.network.get_base_model()
        try:
            planned = plan_options(
                options, tokens=data.max_length, batch=data.batch_size, checkpointing=mode, offload=offload,
                experts_on="host" if self._experts_on_host else "device", gpus=self.trainer.world_size,
                strategy="ddp" if self.device_mesh is None else "fsdp", output_buffer_mib=output_buffer_mib,
                liger=options["liger"] is not False and liger_unsupported_reason(base) is None,
                gpu_gib=gpu_gib(self.device),
            )  # fmt: skip
            return plan_memory(
                read_config(self._name, options["architecture"], options["quantize"] is not None), planned
            )
        except ValueError:
            return None

    def _describe_router(self) -> str:
        balance = f", load-balancing loss x {self.hparams['router_aux_loss']:g}" * bool(self.hparams["router_aux_loss"])
        said = {"frozen": "frozen", "trained": "trained in full", "lora": f"LoRA of rank {self.hparams['rank']}"}
        # PEFT adds the update to the router's weight, and rounds the sum.
        rounds = ", small updates round away in bfloat16" * (self.hparams["dtype"] == "bfloat16")
        return said[self.hparams["router"]] + rounds * (self.hparams["router"] == "lora") + balance

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves or casts all but experts that wait in host memory."""
        with self._host_experts.left_out() if self._host_experts is not None else nullcontext():
            return super().to(*args, **kwargs)

    def cpu(self) -> Self:
        """Leaves the model where it is.

        Lightning moves a model to the host at the end of every run, and a base that was made on its device may have no
        room there. `to("cpu")` moves it.
        """
        return self

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The mean loss over all ranks' tokens that have a label, logged, and the router's on top if asked for."""
        inputs = {name: value for name, value in batch.items() if name not in COUNTS}
        total, loss, *balance = self.graphed_losses(inputs)
        logged = self._mean(loss)
        self.log("train/loss", logged, prog_bar=True)
        if balance:
            self.log("train/router_aux_loss", self._mean(balance[0]))
        return {"loss": total, "train/loss": logged}

    def graphed_losses(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """What training minimizes, the loss in it, and the router's where it is asked for: () each."""
        return self._losses(batch)

    def _mean(self, value: Tensor) -> Tensor:
        """Over the ranks, as the strategy does with their gradients; the host waits for nothing."""
        mean = value.detach().clone()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(mean)
        return mean / self.trainer.world_size

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As training_step, on the held-out documents."""
        self.log("val/loss", self._losses(batch)[1], prog_bar=True, sync_dist=True, batch_size=1)

    def _losses(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        assert self.network is not None
        causal: Any = self.network.get_base_model()
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "weight")}
        balances = bool(self.hparams["router_aux_loss"]) and self.training
        loss, balance = causal.losses(inputs, batch["labels"], balances=balances)
        loss = loss * batch["weight"]
        if balance is None:
            return loss, loss.detach()
        return loss + self.hparams["router_aux_loss"] * balance, loss.detach(), balance.detach()

    def configure_optimizers(self) -> Any:
        """AdamW over what trains, with a linear warm-up."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        options = {"lr": self.hparams["learning_rate"], "weight_decay": 0.0}
        optimizer: torch.optim.Optimizer
        if self.hparams["optimizer"] == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit  # an optional extra

            optimizer = AdamW8bit(trained, **options)
        else:
            optimizer = torch.optim.AdamW(trained, fused=True, **options)
        # Lightning would hold the gradients until the next backward.
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad(set_to_none=True))
        warmup = self.hparams["warmup_steps"]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning's, which refuses a fused optimizer under bf16-mixed: no scaler unscales gradients there."""
        if gradient_clip_val:
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            if gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(trained, gradient_clip_val)
            else:
                torch.nn.utils.clip_grad_norm_(trained, gradient_clip_val)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the gradients' norm, before clipping."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen base out, and names what the optimizer's state is of.

        The options go under a name of their own: LightningCLI takes those under `hyper_parameters` for more than the
        ones that are given beside a checkpoint.

        Lightning counts an epoch as over where `fit` returns: a checkpoint that is saved after that, by
        `trainer.save_checkpoint`, goes on with the next epoch's order.
        """
        trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in set(trained)}
        checkpoint["optimizer_states"] = [
            rename_optimizer_state(state, trained) for state in checkpoint.get("optimizer_states", [])
        ]
        checkpoint["options"] = checkpoint.pop("hyper_parameters")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the values are this model's.

        Raises:
            ValueError: where they are another model's, naming the options that differ.
        """
        check_checkpoint(self.hparams, checkpoint["options"])

    @torch.no_grad()
    def generate(self, data: InstructionData, prompt: str) -> str:
        """What the model answers to a prompt, or to the end of one longer than the data's documents, greedily."""
        assert self.network is not None
        was_training = self.network.training
        self.network.eval()
        encoded = data.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(self.device)
        tokens = {name: encoded[name][:, -data.max_length :] for name in ("input_ids", "attention_mask")}
        with self.trainer.precision_plugin.forward_context():
            generated = self.network.generate(
                **tokens, max_new_tokens=GENERATED_TOKENS, do_sample=False, use_cache=True,
                pad_token_id=data.tokenizer.pad_token_id, eos_token_id=data.tokenizer.eos_token_id,
                synced_gpus=self.device_mesh is not None,  # a rank that is done gathers on for the others
            )  # fmt: skip
        self.network.train(was_training)
        base: Any = self.network.get_base_model()
        if isinstance(base, FSDPModule):  # which leaves gathered what is in no layer
            base.reshard()
        answer = data.tokenizer.decode(generated[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        assert isinstance(answer, str)
        return answer

    def verify(self, folder: str) -> str:
        """Whether an exported adapter, loaded by PEFT onto a second base, computes as this model: in words.

        Where the device has no room for that base, what to run elsewhere.
        """
        options = self.hparams
        config = read_config(self._name, options["architecture"], options["quantize"] is not None)
        dtype = getattr(torch, options["dtype"])
        try:
            place_experts(config, dtype, self.device, self._quantization)
            has_room = not self._experts_on_host
        except ValueError:
            has_room = False
        if not has_room:
            command = f": python -m lightning_moe verify {folder} --base {self._name}" if self._name else ""
            return f"not verified, there is no room here for a second base{command}"
        if self._name:
            return str(verify_adapter(folder, self._name, dtype=dtype, device=self.device))
        base = self.build_base()
        base.set_attn_implementation("eager")
        return str(verify_adapter(folder, base))


def gpu_gib(device: torch.device) -> float | None:
    """What PyTorch may have of a GPU's memory; None of another device."""
    if device.type != "cuda":
        return None
    share = torch.cuda.get_per_process_memory_fraction(device.index)
    return share * torch.cuda.get_device_properties(device).total_memory / 2**30


def plan_options(options: Mapping[str, Any], **known: Any) -> PlanOptions:
    """A plan's options: those of the module, and what is known of the step, which goes before them."""
    named = {field.name: options[field.name] for field in fields(PlanOptions) if field.name in options}
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}
    return PlanOptions(**given | known)
