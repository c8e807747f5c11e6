"""Merging in every family: PEFT's own merge bit for bit, in the names and layout of the family's hub checkpoints.

The adapter has the hub's names too, where the family has the per_expert layout.
"""

import importlib

import pytest
import torch
from helpers.families import adapted, build, experts_classes, family_names
from safetensors.torch import load_file

from lightning_moe import export_adapter, merge_adapter
from lightning_moe.integrations.expert_names import names_before_fusion

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and of families; what is asserted is the files

CLASSES = [
    (family, experts_class)
    for family in family_names()
    for experts_class in experts_classes(importlib.import_module(f"transformers.models.{family}.modeling_{family}"))
]
INTERLEAVED = ("inkling2", "inkling2_loop")  # gate and up row by row in turn


def make_exact(parameters):
    """Values of few bits: float32 has their products and sums exactly, in whatever order a processor adds them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randint(-31, 32, parameter.shape, generator=generator) / 16)


def tensors_in(folder):
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize(("family", "experts_class"), CLASSES, ids=[f"{name}-{cls.__name__}" for name, cls in CLASSES])
def test_experts_of_every_family_merge_as_peft_merges_them(tmp_path, family, experts_class):
    base = build(family, experts_class)
    make_exact(base.parameters())
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, "experts")
    make_exact(parameter for parameter in model.parameters() if parameter.requires_grad)
    layout = "per_expert" if names_before_fusion(base.config.model_type) else "fused"
    export_adapter(model, tmp_path / "adapter", layout)
    if family in INTERLEAVED:
        with pytest.raises(ValueError, match="in a form that cannot be merged here .*Interleave"):
            merge_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
        return
    report = merge_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    before, ours, wanted = (tensors_in(tmp_path / name) for name in ("base", "out", "peft"))
    assert ours.keys() == wanted.keys()
    assert [key for key in ours if not torch.equal(ours[key], wanted[key])] == []
    assert sum(not torch.equal(ours[key], before[key]) for key in ours) == report.merged > 0
