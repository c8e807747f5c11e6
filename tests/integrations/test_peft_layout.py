"""The probe of PEFT's layout of factors: another layout leaves the adapters to PEFT, in the report and in exports."""

import json

import pytest
import torch
from helpers.models import experts_modules, qwen3, tokens, with_expert_lora
from helpers.patching import agree, enable_checkpointing, gradients, merging_calls
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer

from lightning_moe import export_adapter, gategrad
from lightning_moe.adapter_updates import AdapterUpdates
from lightning_moe.adapters.export import describe_adapters
from lightning_moe.adapters.files import CONFIG
from lightning_moe.integrations.peft_experts import _tried_layout, unsupported_layout
from lightning_moe.patching import touched_modules


@pytest.fixture
def unprobed():
    """As in a process that has not tried PEFT's layout yet."""
    _tried_layout.cache_clear()
    yield
    _tried_layout.cache_clear()


def test_installed_peft_has_the_layout(unprobed):
    assert unsupported_layout() is None


def test_another_layout_leaves_adapters_to_peft(unprobed, monkeypatch, tmp_path):
    """Here each expert's factors lie where its neighbour's were."""
    model = with_expert_lora(qwen3(), attention=True)
    factors = ParamWrapper.get_delta_factors

    def neighbours(self, adapter):
        lhs, rhs, scaling = factors(self, adapter)
        return lhs.roll(1, 0), rhs.roll(1, 0), scaling

    monkeypatch.setattr(ParamWrapper, "get_delta_factors", neighbours)
    baseline = gradients(model)
    with gategrad(model) as report:
        assert [reason.code for layer in report.merging for reason in layer.adapter_reasons] == ["peft_layout"] * 2
        assert "another update" in report[0].adapters
        assert touched_modules(model) == experts_modules(model)  # no wrapper
        with merging_calls(model) as merging:
            assert agree(gradients(model), baseline)
        assert merging == experts_modules(model)
        assert len(AdapterUpdates(model)) == 0
        assert describe_adapters(model, model.state_dict()) == {}
    export_adapter(model, tmp_path / "fused")
    assert json.loads((tmp_path / "fused" / CONFIG).read_text())["target_parameters"]
    with pytest.raises(ValueError, match="another update.*; use layout='fused'"):
        export_adapter(model, tmp_path / "per_expert", "per_expert")


def test_an_attribute_that_peft_no_longer_has_is_named(unprobed, monkeypatch):
    monkeypatch.delattr(BaseTunerLayer, "active_adapters")
    reason = unsupported_layout()
    assert reason.code == "peft_layout"
    assert "active_adapters" in reason.message


def test_the_probe_draws_no_random_numbers(unprobed):
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    assert unsupported_layout() is None
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta")])
def test_the_probe_runs_under_any_mode(unprobed, mode):
    with mode():
        assert unsupported_layout() is None


def test_the_probe_leaves_nothing_in_a_recomputed_forward(unprobed):
    """Where nobody has patched before, the first call probes, inside what activation checkpointing compares."""
    model = qwen3().train()
    enable_checkpointing(model, use_reentrant=False)
    with gategrad(model):
        _tried_layout.cache_clear()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
