"""The base model: whether there is room for it, and how it comes onto the device without a second copy on the host."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import huggingface_hub
import psutil
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lightning_moe import QuantizedExpertsConfig, QuantizedWeight, quantize_experts
from lora import packed_masks
from lora.attention import NAME as VARLEN
from lora.attention import check_config, register
from lora.host_experts import move_but_experts, on_host

GIB = 2**30
CPU = torch.device("cpu")
WEIGHTS = ("*.safetensors", "*.json")

# Fields that configurations read without a declaration.
TAKEN_TOO = ("head_dim", "rope_theta", "rope_scaling")

# What --model.quantize reads as it is, by what config.json calls its method.
QUANTIZE = {"bitsandbytes": "nf4", "fp8": "fp8", "mxfp4": "mxfp4"}

# What a GPU process takes beside tensors: its context, cuBLAS workspaces, the allocator's rounding.
CONTEXT_BYTES = GIB


def read_config(name: str | None, architecture: dict[str, Any], quantize: bool = False) -> PretrainedConfig:
    """The configuration of a pretrained model, or of a random one.

    Args:
        name: a hub name or a folder; None for a random model.
        architecture: `model_type` and fields of that family's configuration, for a random model.
        quantize: whether the experts are quantized; what config.json says of the checkpoint's own is then left out.

    Raises:
        ValueError: where there is no such family, or a field is none of its configuration's; where the checkpoint is
            quantized and `quantize` is false.
    """
    if name is None:
        fields = dict(architecture)
        family = fields.pop("model_type", None)
        if family not in CONFIG_MAPPING:
            raise ValueError(f"model.architecture.model_type is {family!r}, which Transformers does not know")
        known = {*CONFIG_MAPPING[family]().to_dict(), *CONFIG_MAPPING[family].attribute_map, *TAKEN_TOO}
        if unknown := sorted(fields.keys() - known):
            raise ValueError(f"model.architecture has {', '.join(unknown)}, which no {family} has")
        return CONFIG_MAPPING[family](**fields)
    config = AutoConfig.from_pretrained(
        name, trust_remote_code=False, **({"quantization_config": None} if quantize else {})
    )
    if own := getattr(config, "quantization_config", None):
        method = own["quant_method"]
        remedy = f"set --model.quantize {QUANTIZE[method]}" if method in QUANTIZE else "give the 16-bit model"
        raise ValueError(f"{name!r} has quantized weights (quantization_config in config.json: {method}): {remedy}")
    return config


def check_weights(name: str) -> None:
    """Whether a folder is complete, or the disk has room for what the hub would send.

    Raises:
        ValueError: naming the files that are missing, or the bytes that are wanted and free.
    """
    folder = Path(name)
    if folder.is_dir():
        index = folder / "model.safetensors.index.json"
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        if missing := sorted(file for file in files if not (folder / file).is_file()):
            listed = ", ".join(missing)
            raise ValueError(f"{folder} lacks weights: {listed}. Copy the model again, or give another model.name")
        return
    if huggingface_hub.constants.HF_HUB_OFFLINE:  # what is in the cache is read
        return
    try:
        files_ = huggingface_hub.snapshot_download(name, allow_patterns=list(WEIGHTS), dry_run=True)
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"model.name {name!r} is no folder, and the hub does not say how large it is ({type(error).__name__}): "
            "connect to it, give a folder with the weights, or train without them: --model.init random"
        ) from error
    wanted = sum(file.file_size or 0 for file in files_ if file.will_download)  # type: ignore[union-attr]
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if wanted > free:
        raise ValueError(
            f"{name!r} would download {wanted / GIB:.1f} GiB and {cache} has {free / GIB:.1f} GiB free: "
            "make room, or set HF_HOME to a folder on a larger disk"
        )


def place_experts(
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: QuantizedExpertsConfig | None = None,
    wanted: Literal["auto", "device", "host"] = "device",
) -> bool:
    """Whether the experts wait in host memory: if that is wanted or, with `auto`, if a GPU does not hold the weights.

    Raises:
        ValueError: with the bytes that are wanted and free, or where the experts cannot be quantized.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    quantized = set() if quantization is None else set(quantization.find_parameters(model))
    sizes = {
        name: int(parameter.numel() * (quantization.bytes_per_value if name in quantized else dtype.itemsize))  # type: ignore[union-attr]
        for name, parameter in model.named_parameters()
    }
    whole, experts = sum(sizes.values()), sum(sizes[name] for name in names_of_experts(model))
    # PyTorch rounds page-locked memory up to powers of two.
    pinned = sum(1 << (sizes[name] - 1).bit_length() for name in names_of_experts(model))
    free_on_host = psutil.virtual_memory().available
    free = torch.cuda.mem_get_info(device)[0] - CONTEXT_BYTES if device.type == "cuda" else free_on_host
    waits = wanted == "host" or (wanted == "auto" and device.type == "cuda" and whole > free and experts > 0)
    # Two layers' experts are on the device at a time.
    needed = whole - experts + 2 * experts // config.num_hidden_layers if waits else whole
    places = [(needed, str(device), free)] + [(pinned, "the host, page-locked and rounded up", free_on_host)] * waits
    for size, place, room in places:
        if size > room:
            kept = str(dtype) if quantization is None else f"{dtype} and {quantization.format}"
            remedy = "train a smaller model" if quantization else "quantize the experts (--model.quantize nf4)"
            if device.type == "cuda" and not waits:
                remedy = f"on one GPU have the experts wait in host memory (--model.experts_on host), or {remedy}"
            raise ValueError(
                f"the weights take {whole / GIB:.1f} GiB ({model.num_parameters() / 1e9:.2f} billion parameters in "
                f"{kept}), {size / GIB:.1f} GiB on {place}, which has {room / GIB:.1f} GiB free: end what else "
                f"runs there, take a larger device, or {remedy}"
            )
    return waits


def names_of_experts(model: nn.Module) -> list[str]:
    """Of the parameters that are one weight for all experts of a layer."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3]


def build(
    name: str | None,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    init_seed: int,
    quantization: QuantizedExpertsConfig | None = None,
    experts_on_host: bool = False,
) -> PreTrainedModel:
    """The model, made or read shard by shard on its device.

    Args:
        name: a hub name or a folder; None for random weights.
        config: its configuration.
        dtype: of the weights.
        device: where they go.
        attention: a name that Transformers knows, or `varlen`.
        init_seed: of random weights; the run's own random state stays as it is.
        quantization: of the experts' weights, which are then never all there in `dtype`, and of what else it names.
        experts_on_host: whether the experts' weights go to host memory, each as soon as it is made.

    Raises:
        ValueError: where the attention does not do what the model's own does.
    """
    if attention == VARLEN:
        check_config(config)
        register()
    if name is not None:
        read_to = CPU if experts_on_host else device
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, device_map={"": read_to}, attn_implementation=attention,
            use_safetensors=True, trust_remote_code=False, quantization_config=quantization,
        )  # fmt: skip
        if experts_on_host:
            move_but_experts(model, device)
        return _with_separate_documents(model, attention)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(init_seed)
        by_module = quantization is not None or experts_on_host
        with torch.device("meta") if by_module else device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if by_module:
            _make_by_module(model, device, quantization, experts_on_host)
        return _with_separate_documents(model, attention)


def _with_separate_documents(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    if model.config.model_type == packed_masks.MODEL_TYPE and attention != VARLEN:  # which needs no masks
        packed_masks.separate_documents(model.get_decoder())
    return model


def _make_by_module(
    model: PreTrainedModel, device: torch.device, quantization: QuantizedExpertsConfig | None, experts_on_host: bool
) -> None:
    """Draws the weights module by module: the dense experts of one layer are on the device at a time."""
    names = names_of_experts(model) if quantization is None else quantization.find_parameters(model)
    room = {} if quantization is None or experts_on_host else quantization.allocate(model, lambda _: device)
    experts: dict[str, list[str]] = {}
    for name in names:
        path, _, stem = name.rpartition(".")
        experts.setdefault(path, []).append(stem)
    modules = dict(model.named_modules())
    for name in modules.keys() - experts.keys():
        modules[name].to_empty(device=device, recurse=False)
    for name, module in reversed(modules.items()):  # some draw their children's weights anew
        if name in experts:
            module.to_empty(device=device, recurse=False)
        with torch.no_grad():
            model._init_weights(module)
        if name in experts and quantization is not None:
            quantize_experts(module, quantization.format)
        for stem in experts.get(name, ()):
            if experts_on_host:
                setattr(module, stem, on_host(getattr(module, stem), device))
            else:
                setattr(module, stem, _moved(getattr(module, stem), room.pop(f"{name}.{stem}")))
    model.tie_weights()


def _moved(weight: Any, room: QuantizedWeight) -> nn.Parameter:
    return nn.Parameter(weight.detach().copy_into(room), requires_grad=False)


def liger_unsupported_reason(model: PreTrainedModel) -> str | None:
    """Why a model cannot have Liger's kernels, in words; None where it can."""
    if model.device.type != "cuda":
        return "they need a GPU"
    if model.config.model_type != "qwen3_moe":
        return f"they are applied to qwen3_moe only, not to {model.config.model_type}"
    return None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def apply_liger(model: PreTrainedModel, wanted: bool | None) -> str:
    """Puts Liger's RMSNorm and rotary embedding into the model; its experts stay as they are.

    Args:
        model: on its device.
        wanted: None for wherever it can be had, but for the norms that PyTorch's own is faster for.

    Returns:
        What became of it, for the summary.

    Raises:
        ValueError: where it is wanted and cannot be had.
    """
    reason = liger_unsupported_reason(model)
    if wanted and reason:
        raise ValueError(f"model.liger asks for Liger's kernels: {reason}. Leave the option out, or: "
                         'pip install "liger-kernel>=0.8"')  # fmt: skip
    if reason or wanted is False:
        return f"Transformers' ({reason or 'as asked'})"
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

    # swiglu=True would rebind the experts' forward, and go past every experts implementation.
    apply_liger_kernel_to_qwen3_moe(
        rope=True, rms_norm=True, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=False, model=model
    )
    if wanted:
        return "Liger's"
    use_fused_norms(model)
    return "Liger's, and PyTorch's fused norms of the hidden size"


def use_fused_norms(model: PreTrainedModel) -> None:
    """Has norms of the hidden size run PyTorch's fused RMSNorm, which makes no gradient of a frozen weight.

    On an H200 that is faster than Liger's for them; for queries' and keys', of many short rows, it is not.
    """
    module: Any
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and module.weight.shape == (model.config.hidden_size,):
            module.forward = MethodType(_fused_norm, module)


def _fused_norm(norm: Any, hidden_states: Tensor) -> Tensor:
    with torch.autocast(hidden_states.device.type, enabled=False):  # which has it in float32 from PyTorch 2.12 on
        return F.rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)
