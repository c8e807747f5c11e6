"""`plan_memory`: the memory of a whole training step, by what holds it."""

import copy
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from lightning_moe.planning.layer import LayerCounter, router_module
from lightning_moe.planning.options import PlanOptions
from lightning_moe.planning.parts import ALLOCATOR, BATCH, BUCKETS, CONTEXT, GATHERED, GRADIENTS
from lightning_moe.planning.stand_ins import SMALLEST_OFFLOADED_BYTES
from lightning_moe.planning.weights import Weights, read_weights
from lightning_moe.quantization import find_quantizable

GIB = 2**30
# What code of other families raises on the meta device, or of sizes that do not go together.
PLANLESS = (RuntimeError, TypeError, AttributeError, LookupError, AssertionError)
# What a process takes of the card outside PyTorch: its context, the modules of cuBLAS and Triton. Measured on an H200.
CONTEXT_BYTES = int(0.75 * GIB)
# What PyTorch's allocator holds beside what is used at the peak. Assumed, not derived: measured, it held 0.2 to 0.6
# GiB, and more where a step takes more. Most of it comes back where the card has less.
ALLOCATOR_BYTES, ALLOCATOR_SHARE = int(0.35 * GIB), 0.06
# And where the activation has no kernel, and makes float32 tensors of many sizes: 0.4 to 0.7 GiB more for gpt-oss.
UNFUSED_BYTES = int(0.5 * GIB)


@dataclass(frozen=True)
class MemoryPlan:
    """What a training step takes, in bytes.

    Attributes:
        parts: by what holds them when the card holds most.
        moment: when that is.
        above: the most that PyTorch holds in a step above what it holds between steps.
        held: by PyTorch between steps.
        kept: by all layers from their forward to their backward, wherever it waits.
        waiting: on the host, which is copied to the device and, experts aside, was copied from there.
        host: page-locked host memory, by what it is for, rounded up to powers of two as PyTorch does.
        checkpoint: of the base's files on the disk, in the dtype or format that the configuration names.
        trained: values that train.
        traffic: bytes that a step allocates, each written and read again at least once.
        options: that were planned.
    """

    parts: dict[str, int]
    moment: str
    above: int
    held: int
    kept: int
    waiting: int
    host: dict[str, int]
    checkpoint: int
    trained: int
    traffic: int
    options: PlanOptions

    @property
    def allocated(self) -> int:
        """The most that tensors take, which `torch.cuda.max_memory_allocated` counts."""
        return self.held + self.above

    @property
    def peak(self) -> int:
        """The most that the card holds."""
        return sum(self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON, in GiB."""
        return {
            "peak_gib": round(self.peak / GIB, 3),
            "parts_gib": {name: round(size / GIB, 4) for name, size in self.parts.items()},
            "peak_in": self.moment,
            "above_weights_gib": round(self.above / GIB, 3),
            "host_gib": round(sum(self.host.values()) / GIB, 3),
            "host_parts_gib": {name: round(size / GIB, 4) for name, size in self.host.items()},
            "checkpoint_gib": round(self.checkpoint / GIB, 3),
            "trained_parameters": self.trained,
            "options": asdict(self.options),
        }


def plan_memory(config: PretrainedConfig, options: PlanOptions | None = None) -> MemoryPlan:
    """The memory of a training step of the recipe, without weights and without a GPU.

    >>> from lightning_moe import PlanOptions, plan_memory
    >>> from transformers import Qwen3MoeConfig
    >>> config = Qwen3MoeConfig(num_hidden_layers=2)  # or AutoConfig.from_pretrained("Qwen/Qwen3-30B-A3B")
    >>> plan_memory(config, PlanOptions(tokens=4096)).above > plan_memory(config, PlanOptions(tokens=1024)).above
    True

    Args:
        config: of a Mixture of Experts of Transformers.
        options: of the training; the recipe's defaults where None.

    Raises:
        ValueError: where the model has no experts that the operation runs, or the options do not fit it.
    """
    return Planner(config).plan(options or PlanOptions())


class Planner:
    """Plans one model with any options.

    Args:
        config: of a Mixture of Experts of Transformers.

    Raises:
        ValueError: where the model has no experts that the operation runs.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config: Any = copy.deepcopy(config)
        self._counters: dict[str, LayerCounter] = {}
        self._plans: dict[PlanOptions, MemoryPlan] = {}

    def plan(self, options: PlanOptions) -> MemoryPlan:
        """See `plan_memory`."""
        options = self._completed(options)
        smallest = replace(options, gpu_gib=None)  # one plan for all GPUs that make no difference
        key = smallest if smallest.workspace_bytes == options.workspace_bytes else options
        if key not in self._plans:
            self._plans[key] = _Step(self, key).plan()
        return replace(self._plans[key], options=options)

    def counter(self, dtype: str) -> LayerCounter:
        """Of the model in a dtype."""
        if dtype not in self._counters:
            self._counters[dtype] = LayerCounter(self._build(dtype))
        return self._counters[dtype]

    def weights(self, options: PlanOptions) -> Weights:
        """The model's, with the options' adapters."""
        counter = self.counter(options.dtype)
        return read_weights(counter.model, options, counter.layer_name, router_module(counter.model, options))

    def smallest_format(self) -> str | None:
        """The format of four bits that the experts' weights can have: the checkpoint's own, or nf4; None for none."""
        model = self.counter("bfloat16").model
        for format in dict.fromkeys([stored_format(self.config), "nf4", "mxfp4"]):
            if format in ("nf4", "mxfp4"):
                try:
                    find_quantizable(model, format)
                except ValueError:
                    continue
                return format
        return None

    def _build(self, dtype: str) -> Any:
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                return AutoModelForCausalLM.from_config(self.config, dtype=getattr(torch, dtype))
        except (ZeroDivisionError, ValueError, *PLANLESS) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"plan is for language models of text, and Transformers builds none of this {self.config.model_type} "
                f"configuration: {reason}"
            ) from error

    def _completed(self, options: PlanOptions) -> PlanOptions:
        return options if options.liger is not None else replace(options, liger=self.config.model_type == "qwen3_moe")


class _Step:
    """One plan in the making."""

    def __init__(self, planner: Planner, options: PlanOptions) -> None:
        self.planner, self.options = planner, options
        self.counter = planner.counter(options.dtype)
        self.weights = planner.weights(options)
        self.num_layers = self.counter.num_layers
        try:
            self.layer = self.counter.count_layer(options)
            self.loss = self.counter.count_loss(options)
        except PLANLESS as error:
            raise ValueError(f"a layer of {planner.config.model_type} cannot be planned: {error}") from error

    def plan(self) -> MemoryPlan:
        held = self._held()
        moments = self._moments()
        above, (parts, moment) = max(((sum(at.values()), (at, name)) for at, name in moments), key=lambda one: one[0])
        unused = ALLOCATOR_BYTES + int(ALLOCATOR_SHARE * above)
        unused += UNFUSED_BYTES * (not self.counter.has_fused_activation)
        outside = {CONTEXT: CONTEXT_BYTES, ALLOCATOR: unused}
        everything = held + parts + Counter(outside)
        return MemoryPlan(
            parts={name: size for name, size in everything.items() if size},
            moment=moment,
            above=above,
            held=held.total(),
            kept=self.num_layers * self.layer.num_kept,
            waiting=self._waiting(),
            host=self._host,
            checkpoint=self._checkpoint(),
            trained=self.weights.num_trained,
            traffic=self.layer.traffic * self.num_layers + self.loss.traffic,
            options=self.options,
        )

    def _held(self) -> Counter[str]:
        """Between steps."""
        options, weights = self.options, self.weights
        shares = options.gpus if options.is_sharded else 1
        format = {"experts": options.quantize or options.dtype}
        base = Counter(weights.base)
        if options.experts_on == "host":
            base["experts"] += 2 * weights.largest_experts - weights.num_expert_bytes
        held = Counter({f"{part}, {format.get(part, options.dtype)}": size // shares for part, size in base.items()})
        held["adapters"] = 4 * weights.num_trained // shares
        held["optimizer"] = weights.optimizer_bytes(options.optimizer) // shares
        if options.is_sharded:
            held[GATHERED] = 2 * weights.largest_layer + weights.base["embeddings and head"]
        elif options.gpus > 1:
            held[BUCKETS] = 4 * weights.num_trained
        return held

    def _moments(self) -> list[tuple[Counter[str], str]]:
        """What is held above that: in the loss, in the last layer's backward and in the second layer's."""
        last, batch = self.num_layers - 1, Counter({BATCH: self.counter.batch_bytes(self.options)})
        on_device = min(2 // self.layer.num_blocks, last + 1) if self.options.offload else last + 1
        moments = [
            (self._kept_by(on_device, last + 1) + self.loss.peak, self.loss.moment),
            self._in_layer(last),
            self._in_layer(min(1, last)),
            (Counter({GRADIENTS: self._gradient_bytes(self.num_layers)}), "the optimizer's step"),
        ]
        return [(held + batch, moment) for held, moment in moments]

    def _in_layer(self, number: int) -> tuple[Counter[str], str]:
        """In one layer's backward, counted from 0."""
        done = self.num_layers - 1 - number
        held = self._kept_by(0 if self.options.offload else number, number)
        held[GRADIENTS] += self._gradient_bytes(done)
        return held + self.layer.peak, f"{self.layer.moment}, layer {number + 1} of {self.num_layers}"

    def _gradient_bytes(self, layers: int) -> int:
        """Of what trains after the layers, and of so many of these, from the last one on."""
        shares = self.options.gpus if self.options.is_sharded else 1
        in_layer = self.weights.trained_in_layer
        outside = max(0, self.weights.num_trained - in_layer * self.num_layers)
        return 4 * (outside + in_layer * layers) // shares

    def _kept_by(self, on_device: int, layers: int) -> Counter[str]:
        """What layers keep on the device: some all of it, the others what is too small to be offloaded."""
        kept = Counter[str]()
        for tag, size in self.layer.kept:
            is_small = size < SMALLEST_OFFLOADED_BYTES
            kept[tag] += size * (layers if is_small else on_device)
        return kept

    def _waiting(self) -> int:
        kept = sum(size for _, size in self.layer.kept if size >= SMALLEST_OFFLOADED_BYTES) * self.num_layers
        on_host = self.options.experts_on == "host"
        return kept * self.options.offload + self.weights.num_expert_bytes * on_host

    @cached_property
    def _host(self) -> dict[str, int]:
        host: dict[str, int] = {}
        if self.options.offload:
            sizes = [size for _, size in self.layer.kept if size >= SMALLEST_OFFLOADED_BYTES]
            host["kept by layers"] = self.num_layers * sum(map(_power_of_two, sizes))
        if self.options.experts_on == "host":
            host["experts"] = sum(_power_of_two(size) for layer in self.weights.experts for size in layer)
        return host

    def _checkpoint(self) -> int:
        """Of the base's files: what config.json says it is in, or 16 bits."""
        options = PlanOptions(quantize=stored_format(self.planner.config), target_modules=())
        return self.planner.weights(options).base.total()


def stored_format(config: Any) -> str | None:
    """The format that config.json says the checkpoint's experts are in; None for 16 bits, or one that is not known."""
    own = getattr(config, "quantization_config", None) or {}
    method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", None)
    return {"bitsandbytes": "nf4", "fp8": "fp8", "mxfp4": "mxfp4"}.get(str(method))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
