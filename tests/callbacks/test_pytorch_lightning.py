"""The callbacks in a Trainer of `pytorch_lightning`, Lightning's other name, which `lightning` depends on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_moe
from lightning_moe.integrations.lightning_strategies import is_strategy

ROOT = Path(lightning_moe.__file__).parents[1]

# In a process of its own: whichever of the two is imported last takes both's messages.
PROGRAM = """
import json, sys
import torch
{first}
{second}
from helpers.models import expert_lora_config, experts_modules, qwen3
from helpers.training import is_restored
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_moe.integrations.lightning_strategies import is_strategy
from peft import get_peft_model

class Module(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = get_peft_model(qwen3(), expert_lora_config())

    def loss(self, batch):
        return self.network(input_ids=batch["ids"], labels=batch["ids"]).loss

    def training_step(self, ids, batch_idx):
        if batch_idx == 0:
            report.extend(layer.status for layer in callbacks[0].report)
        return self.loss({{"ids": ids}})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

report, module = [], Module()
callbacks = [
    lightning_moe.MoEGateGradCallback(), lightning_moe.MemoryMonitor(), lightning_moe.ExpertLoadMonitor(),
    lightning_moe.AdapterUpdateCheck(), lightning_moe.CUDAGraphCallback(), lightning_moe.AdapterExport(),
]
trainer = pytorch_lightning.Trainer(
    max_steps=10, log_every_n_steps=2, callbacks=list(callbacks), default_root_dir=sys.argv[1], accelerator="cpu",
    logger=pytorch_lightning.loggers.CSVLogger(sys.argv[1]), enable_checkpointing=False, enable_progress_bar=False,
)
sharding = pytorch_lightning.strategies.ModelParallelStrategy()
assert is_strategy(sharding, "ModelParallelStrategy") and not isinstance(sharding, ModelParallelStrategy)
assert not is_strategy(sharding, "DDPStrategy", "SingleDeviceStrategy", "DeepSpeedStrategy")
trainer.fit(module, torch.randint(0, 64, (10, 2, 16)))
print(json.dumps({{
    "report": report, "restored": is_restored(module), "metrics": sorted(trainer.logged_metrics),
    "reference": sorted(path.name for path in callbacks[-1].folders["fused"].iterdir()),
}}))
"""


@pytest.mark.parametrize("first", ["pytorch_lightning", "lightning_moe"])
def test_every_callback_works_in_its_trainer(first, tmp_path):
    second = {"pytorch_lightning": "lightning_moe", "lightning_moe": "pytorch_lightning"}[first]
    code = PROGRAM.format(first=f"import {first}", second=f"import {second}")
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", path + code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["report"] == ["active", "active"]
    assert found["restored"]
    rooms = {name.partition("/")[0] for name in found["metrics"]}
    assert rooms == {"gategrad", "memory", "moe", "adapters"}
    assert "adapter_model.safetensors" in found["reference"]
    assert len(found["reference"]) == 3, found["reference"]  # and the trained model's logits, as one device keeps them
    assert "MoE layers: 2 active, 0 fallback" in done.stderr
    assert "AdapterUpdateCheck: by step 10 every expert's adapter was updated" in done.stderr


def test_a_subclass_is_one_and_a_class_of_the_same_name_elsewhere_is_not():
    base = type("DDPStrategy", (), {"__module__": "pytorch_lightning.strategies.ddp"})
    stranger = type("DDPStrategy", (), {"__module__": "pytorch_lightning_extensions.ddp"})
    assert is_strategy(type("Own", (base,), {})(), "DDPStrategy")
    assert not is_strategy(base(), "ModelParallelStrategy")
    assert not is_strategy(stranger(), "DDPStrategy")
