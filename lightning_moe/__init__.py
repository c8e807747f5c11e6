"""Memory-lean Mixture-of-Experts training in PyTorch Lightning.

Trainer(callbacks=[MoEGateGradCallback(), MemoryMonitor()])
"""

from typing import Any

from lightning_moe.ops.experts import moe_experts
from lightning_moe.ops.low_rank import LowRank
from lightning_moe.ops.quantized import QuantizedWeight
from lightning_moe.version import __version__ as __version__

try:
    from lightning_moe.adapters.export import export_adapter
    from lightning_moe.adapters.merge import MergeReport, merge_adapter
    from lightning_moe.adapters.verify import verify_adapter
    from lightning_moe.callbacks.adapter_export import AdapterExport
    from lightning_moe.callbacks.adapter_updates import AdapterUpdateCheck
    from lightning_moe.callbacks.cuda_graph import CUDAGraphCallback
    from lightning_moe.callbacks.expert_load import ExpertLoadMonitor
    from lightning_moe.callbacks.gate_grad import MoEGateGradCallback
    from lightning_moe.callbacks.memory import MemoryMonitor
    from lightning_moe.captured_step import replayed_bytes
    from lightning_moe.cuda_graph import GraphedFunction
    from lightning_moe.expert_load import plot_expert_load
    from lightning_moe.integrations.transformers_experts import register_experts
    from lightning_moe.integrations.unsupported import Unsupported
    from lightning_moe.metrics import ExpertLoad, GateGradHealth
    from lightning_moe.patch_report import LayerReport, PatchReport
    from lightning_moe.patching import gategrad, patch_moe, unpatch_moe
    from lightning_moe.planning.options import PlanOptions
    from lightning_moe.planning.step import MemoryPlan, plan_memory
    from lightning_moe.quantization import QuantizedExpertsConfig, quantize_experts
    from lightning_moe.saved_activations import SavedActivations, measure_moe_activations
except ModuleNotFoundError as error:  # the operation, in `lightning_moe.ops`, needs torch alone
    if error.name is None or error.name.partition(".")[0] == "lightning_moe":
        raise
    _missing = error

    def __getattr__(name: str) -> Any:
        if name in __all__:
            package = str(_missing.name).partition(".")[0]
            raise ImportError(f"lightning_moe.{name} needs {package}: pip install lightning_moe") from _missing
        raise AttributeError(f"module 'lightning_moe' has no attribute {name!r}")


__all__ = [
    "AdapterExport",
    "AdapterUpdateCheck",
    "CUDAGraphCallback",
    "ExpertLoad",
    "ExpertLoadMonitor",
    "GateGradHealth",
    "GraphedFunction",
    "LayerReport",
    "LowRank",
    "MemoryMonitor",
    "MemoryPlan",
    "MergeReport",
    "MoEGateGradCallback",
    "PatchReport",
    "PlanOptions",
    "QuantizedExpertsConfig",
    "QuantizedWeight",
    "SavedActivations",
    "Unsupported",
    "export_adapter",
    "gategrad",
    "measure_moe_activations",
    "merge_adapter",
    "moe_experts",
    "patch_moe",
    "plan_memory",
    "plot_expert_load",
    "quantize_experts",
    "register_experts",
    "replayed_bytes",
    "unpatch_moe",
    "verify_adapter",
]
