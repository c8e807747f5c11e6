"""Parameters that are quantized while Transformers loads a checkpoint, each as soon as it is complete.

`from_pretrained(quantization_config=...)` makes a quantizer of a config and asks it which parameters to quantize, and
how. It reads a checkpoint's tensors when their parameter's turn comes, fuses the experts' into one, and hands it over.

Read in Transformers 5.17 to 5.24: `HfQuantizer` with its hooks `_process_model_before_weight_loading` and
`_process_model_after_weight_loading`, `Bnb4BitHfQuantizer`, whose hooks of the same names are called here, and
`get_device`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.accelerate import get_device
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_moe.integrations.bitsandbytes_nf4 import check_installed
from lightning_moe.integrations.fp8_checkpoint import FP8Checkpoint
from lightning_moe.integrations.mxfp4_checkpoint import MXFP4Checkpoint
from lightning_moe.integrations.nf4_checkpoint import NF4Checkpoint
from lightning_moe.integrations.quantized_checkpoint import Layout, find_quantized, fusing
from lightning_moe.integrations.transformers_experts import read_flags
from lightning_moe.ops.nf4 import NF4
from lightning_moe.ops.quantized import QuantizedWeight

logger = logging.get_logger(__name__)

METHOD = "lightning_moe_experts"  # what Transformers knows it by

# Of checkpoints that are quantized already, by format.
LAYOUTS: dict[str, Layout] = {layout.format: layout for layout in (NF4Checkpoint(), FP8Checkpoint(), MXFP4Checkpoint())}

# What device_map="auto" may fill: the rest is for the tensors that a parameter is made of.
SHARE_OF_MEMORY = 0.9


class LoadedQuantizedConfig(QuantizationConfigMixin, ABC):
    """What becomes of a model's parameters while it is loaded.

    Attributes:
        format: of a weight that is quantized.
        linear: whether linear layers become bitsandbytes' own, in nf4.
        bytes_per_value: of a weight that is quantized.
    """

    format: str
    linear: bool
    bytes_per_value: float

    @abstractmethod
    def find_parameters(self, model: nn.Module) -> list[str]:
        """The names of the parameters to quantize, in a model on the meta device. Raises ValueError if it cannot be."""

    @abstractmethod
    def allocate(self, model: nn.Module, device_of: Callable[[str], torch.device]) -> dict[str, QuantizedWeight]:
        """Memory for the parameters to quantize, by name."""

    @abstractmethod
    def quantize(self, weight: Tensor, is_transposed: bool) -> QuantizedWeight:
        """What takes the place of a weight (E, out, in) or, transposed, (E, in, out)."""


@register_quantizer(METHOD)
class LoadingQuantizer(HfQuantizer):
    """Transformers' side of a `LoadedQuantizedConfig`."""

    quantization_config: LoadedQuantizedConfig

    def __init__(self, quantization_config: LoadedQuantizedConfig, **_: Any) -> None:
        # Not what config.json says but the tensors that are read: a dense checkpoint may have this config.
        super().__init__(quantization_config, pre_quantized=False)
        self.names: list[str] = []
        self.device_map: dict[str, Any] | None = None
        self.room: dict[str, QuantizedWeight] | None = None
        self.linear = linear_quantizer(pre_quantized=False) if quantization_config.linear else None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises ModuleNotFoundError where nf4 lacks bitsandbytes, ValueError where experts would move to and fro."""
        if self.linear is not None or self.quantization_config.format == NF4.name:
            check_installed()
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict):  # Transformers comes again when it has made one of "auto" and the like
            self.device_map = device_map
        devices = set(map(str, (self.device_map or {}).values()))
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise ValueError(
                "quantized experts stay where they are loaded, and the device map leaves some modules on the CPU or on "
                'disk: give one device, device_map={"": "cuda"}, or a smaller model'
            )
        if self.linear is not None:
            self.linear.validate_environment(*args, **kwargs)

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Leaves room for the tensors that a parameter is made of."""
        return {device: size * SHARE_OF_MEMORY for device, size in max_memory.items()}

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per value: what Transformers allocates in advance."""
        if self.param_needs_quantization(model, param_name):
            return self.quantization_config.bytes_per_value
        return super().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether a parameter is quantized when its tensors are complete."""
        if param_name in self.names:
            return True
        return self.linear is not None and self.linear.param_needs_quantization(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        """What Transformers calls with each parameter that needs it."""
        return Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Has a checkpoint's quantized experts taken over as they are."""
        if not self.pre_quantized:
            return weight_conversions
        layout = LAYOUTS[self.quantization_config.format]
        return [
            fusing(each, layout, self) if self._makes_experts(each) else each for each in weight_conversions
        ] + layout.conversions(self, self.names)

    def place(self, name: str, weight: QuantizedWeight, model: PreTrainedModel) -> QuantizedWeight:
        """A parameter in its memory. All of them get theirs when the first one comes.

        Transformers has taken what it allocates in advance by then, and given it back to PyTorch.
        """
        if self.room is None:
            device_map = self.device_map or {"": weight.device}
            self.room = {}  # tried once
            self.room = self.quantization_config.allocate(
                model, lambda name: torch.device(get_device(device_map, name, valid_torch_device=True))
            )
        room = self.room.pop(name, None)
        return weight if room is None else weight.copy_into(room)

    def _makes_experts(self, conversion: Any) -> bool:
        """Whether a conversion's results are parameters that are quantized."""
        is_converter = isinstance(conversion, WeightConverter)
        return is_converter and any(name.endswith(conversion.target_patterns[0]) for name in self.names)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.names = self.quantization_config.find_parameters(model)
        format = self.quantization_config.format
        quantized = find_quantized(model, kwargs.get("checkpoint_files") or (), self.names, LAYOUTS, format)
        self.pre_quantized = quantized is not None
        if quantized is not None:
            linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
            in_nf4 = quantized if format == NF4.name else set()
            if self.linear is not None and not linear & in_nf4:
                raise ValueError(
                    f"the checkpoint has its experts in {format} and its linear layers not in nf4: leave linear out"
                )
            self.linear = linear_quantizer(pre_quantized=True) if in_nf4 else None
            skipped = [rf"{re.escape(name)}$" for name in linear - in_nf4]
        elif self.linear is not None:
            routers = [rf"{re.escape(name)}$" for name in routers_beside(model, self.names)]
            skipped = self.get_modules_to_not_convert(model, routers, add_default_skips=True)
        if self.linear is not None:
            self.linear.quantization_config.llm_int8_skip_modules = skipped
            self.linear._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        dense = [name for name in self.names if not isinstance(model.get_parameter(name), QuantizedWeight)]
        if dense:
            raise ValueError(f"experts stayed dense, for the checkpoint has no values of theirs: {', '.join(dense)}")
        if self.linear is not None:
            self.linear._process_model_after_weight_loading(model, **kwargs)

    def is_serializable(self) -> bool:
        """No; Transformers then raises ValueError and points to the warning."""
        logger.warning(
            "Quantized experts cannot be saved: no layout of a checkpoint has them. Save the adapters, and load the "
            "experts from the checkpoint that they came from."
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters are."""
        return True


class Quantize(ConversionOps):
    """The last step in the loading of a parameter that needs quantization.

    Args:
        quantizer: that the model is loaded with.
    """

    def __init__(self, quantizer: LoadingQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The parameters in place of the tensors, by name.

        Raises:
            ValueError: if a tensor's shape is not its parameter's, which Transformers does not compare.
        """
        converted: dict[str, Any] = {}
        model = kwargs["model"]
        for name in list(input_dict):
            value = input_dict.pop(name)  # so that nothing else holds it
            weight = value[0] if isinstance(value, list) else value
            if name in self.quantizer.names:
                wanted = model.get_parameter(name).shape
                if weight.shape != wanted:
                    raise ValueError(f"{name} is {tuple(weight.shape)} in the checkpoint, {tuple(wanted)} in the model")
                is_transposed = read_flags(model.get_submodule(name.rpartition(".")[0])).is_transposed
                quantized = self.quantizer.quantization_config.quantize(weight, is_transposed)
                converted[name] = nn.Parameter(self.quantizer.place(name, quantized, model), requires_grad=False)
            elif self.quantizer.param_needs_quantization(model, name):
                linear: Any = self.quantizer.linear
                converted |= linear.get_quantize_ops().convert({name: weight}, *args, **kwargs)
            else:
                converted[name] = value
        return converted


def linear_quantizer(pre_quantized: bool) -> Bnb4BitHfQuantizer:
    """What has linear layers in nf4, quantized while they are loaded or in the checkpoint."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return Bnb4BitHfQuantizer(config, pre_quantized=pre_quantized)


def routers_beside(model: nn.Module, names: list[str]) -> list[str]:
    """The names of the linear layers in the blocks of experts that choose among the experts, or weigh them.

    Args:
        model: that has them.
        names: the experts' parameters.
    """
    experts = {name.rpartition(".")[0]: model.get_parameter(name).shape[0] for name in names}
    found = []
    for path, num_experts in experts.items():
        block = path.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            is_inside = name.rpartition(".")[0] == block
            if isinstance(module, nn.Linear) and (is_inside or module.out_features == num_experts):
                found.append(name)
    return found
