"""Experts' weights in fewer bits, for a model that is in memory; `ops.quantized` has what they become."""

from typing import Any

from torch import Tensor, nn

from lightning_moe.discovery import find_moe_layers
from lightning_moe.integrations import bitsandbytes_nf4
from lightning_moe.integrations.transformers_experts import read_spec
from lightning_moe.ops.quantized import FORMATS, QuantizedWeight


def quantize(weight: Tensor, format: str) -> QuantizedWeight:
    """A frozen (E, out, in) weight in fewer bits, on its device.

    Args:
        weight: floating.
        format: `nf4`, bitsandbytes' four bits with blocks of 64 values and nested absmax: 0.516 bytes a value.

    Raises:
        ValueError: on another format, or a shape that it does not take.
        ModuleNotFoundError: where bitsandbytes, which makes it, is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"experts can be quantized to {', '.join(FORMATS)}, not to {format!r}")
    bitsandbytes_nf4.check_installed()
    return QuantizedWeight(FORMATS[format], bitsandbytes_nf4.encode(weight), tuple(weight.shape), weight.dtype)


def quantize_experts(model: nn.Module, format: str = "nf4") -> list[str]:
    """Replaces the weights of a model's experts by frozen ones in fewer bits, layer by layer.

    Adapters are put on afterwards. The model's other weights stay as they are. Patched (`patch_moe`,
    `MoEGateGradCallback`), a layer makes a projection dense when it is used and keeps nothing dense; unpatched it
    computes with dense copies, which backward saves.

    Args:
        model: in memory, on the device where it will train or on the host; its experts in Transformers' layout.
        format: see `quantize`.

    Returns:
        The names of the parameters that are quantized now.

    Raises:
        ValueError: on another format, a model without such experts, or one in which some would stay dense, with their
            names; then nothing is changed.
        ModuleNotFoundError: where bitsandbytes, which makes nf4, is not installed.
    """
    layers = find_moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no experts to quantize")
    dense = [f"{x.shown_name} ({x.reason})" for x in layers if x.reason is not None or not x.is_dispatched]
    if dense:
        raise ValueError(f"experts that would stay dense: {'; '.join(dense)}")
    done = []
    for layer in layers:
        module: Any = layer.module
        for name in read_spec(module).stems:
            weight = getattr(module, name)
            if not isinstance(weight, QuantizedWeight):
                setattr(module, name, nn.Parameter(quantize(weight, format), requires_grad=False))
            done.append(f"{layer.name}.{name}")
    return done
