"""What is planned: the recipe's options as far as memory depends on them."""

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_moe.ops.quantized import workspace_bytes
from lightning_moe.quantization import check_format

Router = Literal["frozen", "trained", "lora"]
Checkpointing = Literal["selective", "full", "none"]
Optimizer = Literal["adamw", "adamw_8bit"]
Strategy = Literal["ddp", "fsdp"]

# Of a step: more are counted too slowly, tile by tile.
MOST_TOKENS = 2**20


@dataclass(frozen=True)
class PlanOptions:
    """A training step as `recipes/qwen3_lora.py` runs it: one row of documents, a frozen base, float32 adapters.

    Attributes:
        tokens: of a sequence.
        batch: sequences in a step, of each GPU.
        dtype: of the base and of what is computed.
        experts: LoRA on the experts' projections too.
        rank: LoRA's.
        target_modules: the linear layers that get an adapter.
        router: what happens to the router.
        router_module: the name that the family gives it in a layer.
        modules_to_save: modules that train in full, in float32.
        quantize: `nf4`, `fp8` or `mxfp4` for the experts' weights; None for `dtype`.
        quantize_linear: the other linear layers in nf4 too.
        gpu_gib: of a GPU's memory that PyTorch may have: what quantized weights are made dense to at a time grows with
            it. None for one of 24 GB or less.
        experts_on: where the experts' weights wait.
        checkpointing: what layers compute again: `selective` all but attention, `full` all, `none` nothing.
        offload: what layers keep waits in host memory.
        optimizer: PyTorch's AdamW, or bitsandbytes' with moments of 8 bits.
        tile_tokens: the experts work on so many tokens at a time where there are more; 0 for never.
        output_buffer_mib: of the callback.
        liger: Liger's RMSNorm and rotary embedding; None for where the recipe has them, on Qwen3-MoE.
        gpus: that train.
        strategy: how they share the work.

    Raises:
        ValueError: on options that do not go together, or are none.
    """

    tokens: int = 4096
    batch: int = 1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    experts: bool = False
    rank: int = 16
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    router: Router = "frozen"
    router_module: str | None = None
    modules_to_save: tuple[str, ...] = ()
    quantize: str | None = None
    quantize_linear: bool = False
    gpu_gib: float | None = None
    experts_on: Literal["device", "host"] = "device"
    checkpointing: Checkpointing = "selective"
    offload: bool = False
    optimizer: Optimizer = "adamw"
    tile_tokens: int = 32_768
    output_buffer_mib: float = 256
    liger: bool | None = None
    gpus: int = 1
    strategy: Strategy = "ddp"

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "rank", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it is at least 1")
        if self.row_tokens > MOST_TOKENS:
            raise ValueError(f"a step of {self.row_tokens:,} tokens is not planned: at most {MOST_TOKENS:,}")
        known = {
            "dtype": ("bfloat16", "float32"), "router": get_args(Router), "experts_on": ("device", "host"),
            "checkpointing": get_args(Checkpointing), "optimizer": get_args(Optimizer),
            "strategy": get_args(Strategy),
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it is one of {', '.join(values)}")
        if self.quantize is not None:
            check_format(self.quantize)
        if self.offload and self.checkpointing == "none":
            raise ValueError("offload brings to the host what checkpointing keeps: not with checkpointing none")
        if self.experts_on == "host" and self.checkpointing == "none":
            raise ValueError("experts on the host need checkpointing: selective or full")
        if self.gpus > 1 and self.experts_on == "host":
            raise ValueError("experts on the host are for one GPU")
        if self.is_sharded and (self.quantize or self.optimizer == "adamw_8bit"):
            raise ValueError("fsdp shards 16-bit weights and AdamW's states: not with quantize or adamw_8bit")

    @property
    def row_tokens(self) -> int:
        """Tokens of a step, on each GPU."""
        return self.tokens * self.batch

    @property
    def workspace_bytes(self) -> int:
        """What a quantized weight is made dense to at a time; 0 where the weights are dense."""
        return workspace_bytes(int((self.gpu_gib or 0) * 2**30)) if self.quantize else 0

    @property
    def is_sharded(self) -> bool:
        """Whether each GPU holds a part of the weights."""
        return self.gpus > 1 and self.strategy == "fsdp"
