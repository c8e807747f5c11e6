"""Memory-lean Mixture-of-Experts training in PyTorch Lightning.

Trainer(callbacks=[MoEGateGradCallback(), MemoryMonitor()])
"""

from importlib.metadata import PackageNotFoundError, requires, version

try:
    from lightning_moe.adapters.export import export_adapter
    from lightning_moe.callbacks.gate_grad import MoEGateGradCallback
    from lightning_moe.callbacks.memory import LayerTape, MemoryMonitor, measure_moe_tape
    from lightning_moe.integrations.transformers_experts import register_experts
    from lightning_moe.metrics import GateGradHealth
    from lightning_moe.ops.experts import moe_experts
    from lightning_moe.ops.low_rank import LowRank
    from lightning_moe.patch_report import LayerReport, PatchReport
    from lightning_moe.patching import gategrad, patch_moe, unpatch_moe
except (ImportError, AttributeError) as error:
    try:
        needs = [need for need in requires("lightning_moe") or () if "extra ==" not in need]
    except PackageNotFoundError:  # a clone that is not installed
        needs = ["what pyproject.toml lists"]
    found = []
    for name in ("torch", "transformers", "peft", "lightning"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    raise ImportError(
        f"{error}. lightning_moe needs {', '.join(needs)} and finds {', '.join(found)}. Where these agree, one of "
        "the packages is newer than this version of lightning_moe knows: take an older one, or a newer lightning_moe"
    ) from error

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
