"""Memory-lean Mixture-of-Experts training in PyTorch Lightning.

Trainer(callbacks=[MoEGateGradCallback(), MemoryMonitor()])
"""

from lightning_moe.adapters import export_adapter
from lightning_moe.callback import MoEGateGradCallback
from lightning_moe.contracts import register_experts
from lightning_moe.experts import moe_experts
from lightning_moe.lora import LowRank
from lightning_moe.memory import LayerTape, MemoryMonitor, measure_moe_tape
from lightning_moe.metrics import GateGradHealth
from lightning_moe.patching import LayerReport, PatchReport, gategrad, patch_moe, unpatch_moe

__all__ = [
    "GateGradHealth",
    "LayerReport",
    "LayerTape",
    "LowRank",
    "MemoryMonitor",
    "MoEGateGradCallback",
    "PatchReport",
    "export_adapter",
    "gategrad",
    "measure_moe_tape",
    "moe_experts",
    "patch_moe",
    "register_experts",
    "unpatch_moe",
]
