"""Private names of the libraries, each hidden from us: patching says which, and training gives stock code's numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import Tiny, experts_modules, qwen3, tokens, with_expert_lora
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from peft.tuners.lora import ParamWrapper
from test_patching import agree, gradients
from transformers import Qwen3MoeConfig
from transformers.core_model_loading import WeightTransform
from transformers.integrations import moe as transformers_moe
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lightning_moe
from lightning_moe import MoEGateGradCallback, export_adapter, gategrad, patch_moe
from lightning_moe.adapter_updates import AdapterUpdates
from lightning_moe.adapters.export import describe_adapters
from lightning_moe.adapters.files import CONFIG
from lightning_moe.integrations.peft_experts import unsupported_layout
from lightning_moe.integrations.transformers_dispatch import is_expert_parallel
from lightning_moe.integrations.transformers_experts import read_spec


@pytest.fixture
def hide(monkeypatch):
    """Has lightning_moe not find a name on a class's instances; the library's own code finds it as ever."""

    def hide(cls, name):
        def is_hidden(asked):
            return asked == name and sys._getframe(2).f_globals["__name__"].startswith("lightning_moe")

        def get(self, asked):
            if is_hidden(asked):
                raise AttributeError(f"{cls.__name__} has no attribute {asked!r}")
            return found(self, asked)

        def get_after_all(self, asked):
            if is_hidden(asked):
                raise AttributeError(f"{cls.__name__} has no attribute {asked!r}")
            return found_after_all(self, asked)

        found, found_after_all = cls.__getattribute__, getattr(cls, "__getattr__", None)
        monkeypatch.setattr(cls, "__getattribute__", get)
        if found_after_all is not None:
            monkeypatch.setattr(cls, "__getattr__", get_after_all)

    return hide


def falls_back(model, name):
    """Whether every layer's reason has the name, and training gives stock code's own bits."""
    stock = gradients(model)
    with gategrad(model) as report:
        assert len(report.fallback) == len(report) == 2
        assert all(name in layer.reason for layer in report), report[0].reason
        ours = gradients(model)
    return ours.keys() == stock.keys() and all(torch.equal(ours[key], stock[key]) for key in stock)


# Transformers


@pytest.mark.parametrize("name", ["has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate"])
def test_a_name_on_the_experts_module(name, hide):
    model = qwen3()
    hide(Qwen3MoeExperts, name)
    assert falls_back(model, name)


@pytest.mark.parametrize("name", ["_experts_implementation", "_experts_implementation_internal"])
def test_a_name_on_the_config(name, hide):
    model = qwen3()
    hide(Qwen3MoeConfig, name)
    assert falls_back(model, name)


def test_an_internal_name_that_no_longer_steers_the_dispatch(monkeypatch):
    monkeypatch.setattr(Qwen3MoeConfig, "_experts_implementation", "grouped_mm")
    assert falls_back(qwen3(), "_experts_implementation_internal")


def test_the_undecorated_forward(monkeypatch):
    monkeypatch.delattr(Qwen3MoeExperts.forward, "__wrapped__")
    assert falls_back(qwen3(), "__wrapped__")


def registry_under_another_name(original):
    registry = transformers_moe.ALL_EXPERTS_FUNCTIONS

    def forward(self, *args):
        return registry.get_interface(self.config._experts_implementation, original)(self, *args)

    return forward


def choice_under_another_name(original):
    experts_interface = transformers_moe.ALL_EXPERTS_FUNCTIONS

    def forward(self, *args):
        return experts_interface.get_interface(self.config.experts_function, original)(self, *args)

    return forward


def asked_in_another_way(original):
    experts_interface = transformers_moe.ALL_EXPERTS_FUNCTIONS

    def forward(self, *args):
        return experts_interface[self.config._experts_implementation](self, *args)

    return forward


@pytest.mark.parametrize(
    ("decorated", "name"),
    [
        (registry_under_another_name, "experts_interface"),
        (choice_under_another_name, "_experts_implementation"),
        (asked_in_another_way, "get_interface"),
    ],
)
def test_the_decorated_forward(decorated, name, monkeypatch):
    forward = decorated(Qwen3MoeExperts.forward.__wrapped__)
    forward.__wrapped__ = Qwen3MoeExperts.forward.__wrapped__
    monkeypatch.setattr(Qwen3MoeExperts, "forward", forward)
    monkeypatch.setattr(Qwen3MoeConfig, "experts_function", "grouped_mm", raising=False)
    assert falls_back(qwen3(), name)


def test_the_activation_of_experts_without_a_gate_projection(hide):
    experts = NemotronHExperts(NemotronHConfig(hidden_size=32, moe_intermediate_size=16, n_routed_experts=8))
    hide(NemotronHExperts, "act_fn")
    (layer,) = patch_moe(experts).layers
    assert layer.status == "fallback"
    assert "act_fn" in layer.reason


def test_the_activation_of_experts_with_one_is_the_modules_own(hide):
    model = qwen3()
    stock = gradients(model)
    hide(Qwen3MoeExperts, "act_fn")
    with gategrad(model) as report:
        assert len(report.active) == 2
        assert agree(gradients(model), stock)


def test_the_mark_of_expert_parallel(hide):
    model = qwen3()
    stock = gradients(model)
    hide(Qwen3MoeExperts, "_is_expert_parallel")
    with gategrad(model) as report:
        assert len(report.active) == 2
        assert agree(gradients(model), stock)
    experts = experts_modules(model)[0]
    assert not is_expert_parallel(experts)
    model.config.num_experts = 16  # the module holds 8: so the experts are counted
    assert is_expert_parallel(experts)


def test_an_option_that_the_decorator_did_not_have(monkeypatch):
    def use_experts_implementation(experts_class=None, *, has_gate=True, squares_gates=False):
        raise NotImplementedError

    monkeypatch.setattr(transformers_moe, "use_experts_implementation", use_experts_implementation)
    model = qwen3()
    for experts in experts_modules(model):
        experts.squares_gates = False
    with gategrad(model) as report:
        assert len(report.active) == 2
    for experts in experts_modules(model):
        experts.squares_gates = True
    assert falls_back(model, "squares_gates")


def test_the_default_gating_costs_its_kernel(monkeypatch):
    model = qwen3()
    stock = gradients(model)
    monkeypatch.delattr(transformers_moe, "_default_apply_gate")
    with pytest.warns(UserWarning, match="no _default_apply_gate any more: activations run without their kernels"):
        report = patch_moe(model)
    assert len(report.active) == 2
    experts = experts_modules(model)[0]
    assert read_spec(experts).activation == experts._apply_gate
    assert agree(gradients(model), stock)


@pytest.mark.parametrize("name", ["target_patterns", "source_patterns"])
def test_the_table_of_names_before_fusion(name, hide, tmp_path):
    model = with_expert_lora(qwen3())
    hide(WeightTransform, name)
    with pytest.raises(ValueError, match=f"no .*{name}.* any more; use layout='fused'"):
        export_adapter(model, tmp_path / "per_expert", "per_expert")
    export_adapter(model, tmp_path / "fused")


# PEFT


@pytest.fixture
def peft_asked_again():
    unsupported_layout.cache_clear()
    yield
    unsupported_layout.cache_clear()


def leaves_adapters_to_peft(model, name, tmp_path):
    """Whether every layer says so with the name, training gives PEFT's numbers, and nothing else stumbles."""
    stock = gradients(model)
    with gategrad(model) as report:
        assert len(report.merging) == 2
        assert all(name in layer.adapters for layer in report.merging), report.merging[0].adapters
        assert not any("forward" in vars(module) for module in model.modules())
        ours = gradients(model)
        assert len(AdapterUpdates(model)) == 0
        assert describe_adapters(model, model.state_dict()) == {}
    export_adapter(model, tmp_path / "fused")
    assert json.loads((tmp_path / "fused" / CONFIG).read_text())["target_parameters"]
    with pytest.raises(ValueError, match=f"{name}.*; use layout='fused'"):
        export_adapter(model, tmp_path / "per_expert", "per_expert")
    return agree(ours, stock)


@pytest.mark.usefixtures("peft_asked_again")
@pytest.mark.parametrize(
    "name",
    [
        "parameter_name", "num_experts", "lora_A", "lora_B", "scaling", "lora_variant", "lora_bias",
        "disable_adapters", "merged", "active_adapters", "base_layer", "get_base_layer",
    ],
)  # fmt: skip
def test_a_name_on_pefts_wrapper(name, hide, tmp_path):
    model = with_expert_lora(qwen3(), attention=True)
    hide(ParamWrapper, name)
    assert leaves_adapters_to_peft(model, name, tmp_path)


@pytest.mark.usefixtures("peft_asked_again")
def test_another_layout_of_the_factors(monkeypatch, tmp_path):
    """Each expert's factors lie where its neighbour's were."""
    factors = ParamWrapper.get_delta_factors

    def of_the_neighbour(self, adapter):
        lhs, rhs, scaling = factors(self, adapter)
        return lhs.roll(1, 0), rhs.roll(1, 0), scaling

    monkeypatch.setattr(ParamWrapper, "get_delta_factors", of_the_neighbour)
    assert leaves_adapters_to_peft(with_expert_lora(qwen3(), attention=True), "lora_A and lora_B", tmp_path)


@pytest.mark.usefixtures("peft_asked_again")
def test_asking_peft_draws_no_random_numbers():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    assert unsupported_layout() is None
    assert torch.equal(torch.rand(3), want)


@pytest.mark.usefixtures("peft_asked_again")
@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta")])
def test_peft_can_be_asked_anywhere(mode):
    with mode():
        assert unsupported_layout() is None


def test_pefts_table_of_families(monkeypatch, tmp_path):
    model = with_expert_lora(qwen3())
    monkeypatch.delattr("peft.utils.transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN")
    with pytest.warns(UserWarning, match="PEFT has no _MODEL_TO_CONVERSION_PATTERN any more"):
        export_adapter(model, tmp_path, "per_expert")


# Lightning


def train(folder):
    module = Tiny(num_batches=8)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=CSVLogger(folder, name="", version=""), default_root_dir=folder,
        log_every_n_steps=3, callbacks=[MoEGateGradCallback()], enable_progress_bar=False, limit_val_batches=0,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module)
    return module.losses, (folder / "metrics.csv").read_text()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.")
def test_lightnings_log_steps(hide, tmp_path):
    want = train(tmp_path / "with")
    hide(Trainer, "_logger_connector")
    with pytest.warns(UserWarning, match="no _logger_connector.should_update_logs any more"):
        assert train(tmp_path / "without") == want
    assert want[1].count("\n") == 3  # the names, and steps 3 and 6


# PyTorch


def test_whether_the_graph_is_kept(monkeypatch):
    model = qwen3()
    stock = gradients(model)
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    with pytest.warns(UserWarning, match="no torch._C._autograd._get_current_graph_task_keep_graph any more"):
        patch_moe(model)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        ours = {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert agree(ours, stock)


# Names without which nothing is imported

IMPORTS = """
import importlib, sys
for module, name in (
    ("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS"),
    ("transformers.utils.generic", "GeneralInterface.register"),
    ("transformers.activations", "GELUTanh"),
    ("transformers.core_model_loading", "WeightConverter"),
    ("transformers.conversion_mapping", "get_checkpoint_conversion_mapping"),
    ("peft.tuners.lora", "ParamWrapper"),
    ("lightning.pytorch.utilities", "rank_zero_warn"),
    ("peft.utils.transformers_weight_conversion", ""),
):
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    kept = vars(owner).get(name)
    if name:
        delattr(owner, name)
    else:
        name = module.rpartition(".")[2]
        sys.modules[module] = None
        del sys.modules["peft.utils"].transformers_weight_conversion
    for ours in [m for m in sys.modules if m.startswith("lightning_moe")]:
        del sys.modules[ours]
    try:
        import lightning_moe
    except ImportError as error:
        assert name in str(error), (name, error)
        assert "lightning_moe needs torch>=" in str(error) and "transformers>=" in str(error), error
        assert "finds torch 2" in str(error) and "peft 0" in str(error) and "lightning 2" in str(error), error
    else:
        raise AssertionError(name)
    if kept is not None:
        setattr(owner, name, kept)
"""


def test_an_import_says_what_is_gone_and_which_versions_are_needed():
    root = Path(lightning_moe.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_trying_peft_leaves_nothing_in_a_recomputed_forward():
    """Where nobody has asked before, the first call does, inside what activation checkpointing compares."""
    model = qwen3()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()
    with gategrad(model):
        unsupported_layout.cache_clear()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
