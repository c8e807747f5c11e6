"""register_experts: instances of a registered class are patched, others are not, and the report names the reason."""

import pytest
import torch
from helpers.models import Tiny, expert_lora_config, qwen3
from helpers.patching import COPIES, equal
from helpers.reference import LAYOUTS, assert_agrees, make_problem
from helpers.training import LIGHTNING_WARNINGS, trainer
from peft import get_peft_model
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_moe import MoEGateGradCallback, gategrad, patch_moe, register_experts, unpatch_moe
from lightning_moe.integrations.transformers_experts import read_spec
from lightning_moe.ops.grouped import silu_gated

pytestmark = LIGHTNING_WARNINGS


class OwnExperts(nn.Module):
    """A user's own, in plain PyTorch: a loop over the experts."""

    def __init__(self, layout="default", num_experts=5, hidden_size=16, intermediate_size=24):
        super().__init__()
        self.layout = LAYOUTS[layout]
        problem = make_problem(
            layout, num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size
        )
        self.num_experts = num_experts
        for name, tensor in problem.tensors.items():
            if name not in ("hidden_states", "top_k_weights"):
                own = name if self.layout.is_gated else name.replace("gate_up", "up")
                self.register_parameter(own, nn.Parameter(tensor))
        if self.layout.is_gated:
            self._apply_gate = self.layout.activation
        else:
            self.act_fn = self.layout.activation

    def forward(self, hidden_states, top_k_index, top_k_weights):
        up_name = "gate_up_proj" if self.layout.is_gated else "up_proj"
        up, down = getattr(self, up_name), self.down_proj
        if self.layout.is_transposed:
            up, down = up.mT, down.mT
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            hidden = hidden_states[token] @ up[expert].t()
            if self.layout.has_bias:
                hidden = hidden + getattr(self, f"{up_name}_bias")[expert]
            rows = self.layout.activation(hidden) @ down[expert].t()
            if self.layout.has_bias:
                rows = rows + self.down_proj_bias[expert]
            output = output.index_add(0, token, rows * top_k_weights[token, slot, None])
        return output


def register(layout="default", experts_class=OwnExperts):
    made = LAYOUTS[layout]
    register_experts(experts_class, is_gated=made.is_gated, has_bias=made.has_bias, is_transposed=made.is_transposed)


def gradients(module, layout="default"):
    problem = make_problem(layout)
    hidden, gates = problem.tensors["hidden_states"].clone(), problem.tensors["top_k_weights"].clone()
    module.zero_grad()
    output = module(hidden.requires_grad_(), problem.top_k_index, gates.requires_grad_())
    output.backward(problem.grad_output)
    own = {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {"output": output.detach(), "hidden_states": hidden.grad, "top_k_weights": gates.grad, **own}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_registered_class_runs_the_operation(layout):
    register(layout)
    experts = OwnExperts(layout)
    baseline = gradients(experts, layout)
    with gategrad(experts) as report:
        assert [layer.status for layer in report] == ["active"]
        ours = gradients(experts, layout)
    assert_agrees(ours, baseline)
    assert any(not torch.equal(ours[name], baseline[name]) for name in baseline)  # another code did run
    assert "forward" not in vars(experts)
    assert equal(gradients(experts, layout), baseline)


def test_an_unregistered_class_is_reported_with_the_remedy():
    class LocalExperts(nn.Module):
        pass

    (layer,) = patch_moe(LocalExperts())
    assert layer.status == "fallback"
    assert layer.reason.code == "outside_registry"
    assert "register_experts may take its experts" in layer.reason.message


def test_a_subclass_with_a_forward_of_its_own_falls_back():
    class Scaled(OwnExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * super().forward(hidden_states, top_k_index, top_k_weights)

    class Renamed(OwnExperts):
        pass

    register()
    assert [layer.status for layer in patch_moe(Scaled())] == ["fallback"]
    assert [layer.status for layer in patch_moe(Renamed())] == ["active"]


@pytest.mark.parametrize("missing", ["num_experts", "_apply_gate", "down_proj", "gate_up_proj"])
def test_a_missing_attribute_is_named(missing):
    register()
    experts = OwnExperts()
    delattr(experts, missing)
    (layer,) = patch_moe(experts)
    assert layer.status == "fallback"
    assert layer.reason.code == "missing_attribute"
    assert {"_apply_gate": "act_fn"}.get(missing, missing) in layer.reason.message


def test_act_fn_alone_is_gated_as_transformers_does():
    register()
    experts = OwnExperts()
    del experts._apply_gate
    experts.act_fn = nn.SiLU()
    assert read_spec(experts).activation is silu_gated
    experts.act_fn = nn.Tanh()
    h = torch.randn(3, 8)
    assert torch.equal(read_spec(experts).activation(h), h[:, :4].tanh() * h[:, 4:])


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_of_a_patched_module_runs_its_own_weights(duplicate):
    register()
    experts = OwnExperts()
    patch_moe(experts)
    twin = duplicate(experts)
    with torch.no_grad():
        twin.down_proj.zero_()
    assert gradients(twin)["output"].count_nonzero() == 0
    unpatch_moe(twin)
    assert "forward" not in vars(twin)
    assert gradients(experts)["output"].count_nonzero() > 0


def test_a_forward_put_on_while_patched_is_kept():
    register()
    experts = OwnExperts()
    patch_moe(experts)
    experts.forward = another = lambda *args: args[0]
    unpatch_moe(experts)
    assert experts.forward is another


def test_adapters_on_a_registered_class_stay_unmerged():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = OwnExperts()

        def forward(self, *args):
            return self.experts(*args)

    register()
    config = expert_lora_config(("experts.gate_up_proj", "experts.down_proj"))
    torch.manual_seed(1)
    model = get_peft_model(Block(), config)
    baseline = gradients(model)
    with gategrad(model) as report:
        (layer,) = report.active
        assert layer.has_adapters
        assert not layer.adapter_reasons
        assert_agrees(gradients(model), baseline, tolerance=2e-5)  # PEFT rounds the merged weight


def test_a_registered_class_trains_under_the_callback(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.router, self.experts = nn.Embedding(64, 16), nn.Linear(16, 5), OwnExperts()

        def forward(self, input_ids):
            hidden = self.embed(input_ids.flatten())
            gates, index = self.router(hidden).softmax(-1).topk(2)
            return self.experts(hidden, index, gates).square().mean()

    class Module(Tiny):
        def step(self, batch):
            return self.network(*batch)

    register()
    module = Module(Own)
    callback = MoEGateGradCallback(audit_every_n_steps=1)
    fitting = trainer(tmp_path, callback)
    fitting.fit(module)
    assert fitting.logged_metrics["gategrad/active_layers"] == 1
    assert fitting.logged_metrics["gategrad/audit_rel_error"] < 1e-5
    assert "forward" not in vars(module.network.experts)


@pytest.mark.parametrize(
    ("experts_class", "error", "words"),
    [
        (OwnExperts(), TypeError, "takes a class of modules"),
        (dict, TypeError, "takes a class of modules"),
        (Qwen3MoeExperts, ValueError, "nothing to register"),
        (nn.Linear, TypeError, r"Linear.forward must take \(hidden_states, top_k_index, top_k_weights\)"),
    ],
)
def test_registering_what_is_no_experts_class_is_an_error(experts_class, error, words):
    with pytest.raises(error, match=words):
        register_experts(experts_class)


def test_registering_changes_no_decorated_class():
    register()
    assert [layer.status for layer in patch_moe(qwen3())] == ["active"] * 2


def wants_bias(experts):
    experts.down_proj_bias = nn.Parameter(torch.ones(5, 16), requires_grad=False)


def forward_of_another_library(experts):
    own = experts.forward
    experts.forward = lambda *args: 2 * own(*args)


def bound_to_another(experts):
    experts.forward = OwnExperts().forward


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (wants_bias, "undeclared_bias"),
        (forward_of_another_library, "replaced_forward"),
        (bound_to_another, "instance_forward"),
    ],
)
def test_an_instance_that_differs_from_its_registered_class_falls_back_unchanged(change, code):
    register()
    experts = OwnExperts()
    change(experts)
    before, baseline = dict(vars(experts)), gradients(experts)
    with gategrad(experts) as report:
        assert [layer.reason.code for layer in report.fallback] == [code]
        assert equal(gradients(experts), baseline)
    assert vars(experts) == before


def make(layout):
    class Local(OwnExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights)

    return Local


def test_two_classes_of_one_name_are_registered_separately():
    biased, plain = make("biased"), make("default")
    assert biased.__qualname__ == plain.__qualname__
    register("biased", biased)
    assert [layer.status for layer in patch_moe(plain())] == ["fallback"]
    register("default", plain)
    for layout, experts_class in (("biased", biased), ("default", plain)):
        experts = experts_class(layout)
        baseline = gradients(experts, layout)
        with gategrad(experts) as report:
            assert [layer.status for layer in report] == ["active"]
            assert_agrees(gradients(experts, layout), baseline)


def test_a_forward_replaced_on_the_class_falls_back(monkeypatch):
    class Replaced(make("default")):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights)

    register("default", Replaced)
    assert [layer.status for layer in patch_moe(Replaced())] == ["active"]
    monkeypatch.setattr(Replaced, "forward", lambda *args: 3 * OwnExperts.forward(*args))
    assert [layer.status for layer in patch_moe(Replaced())] == ["fallback"]


def test_a_subclass_that_overrides_a_method_falls_back():
    class Base(OwnExperts):
        def rows(self, rows):
            return rows

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return self.rows(super().forward(hidden_states, top_k_index, top_k_weights))

    class Doubled(Base):
        def rows(self, rows):
            return 2 * rows

    register("default", Base)
    assert [layer.status for layer in patch_moe(Base())] == ["active"]
    assert [layer.status for layer in patch_moe(Doubled())] == ["fallback"]


def test_a_forward_kept_by_another_library_runs_the_classs_after_unpatching():
    register()
    experts = OwnExperts()
    baseline = gradients(experts)
    patch_moe(experts)
    kept = experts.forward
    experts.forward = lambda *args: kept(*args)
    unpatch_moe(experts)
    assert equal(gradients(experts), baseline)


def test_adapters_on_transposed_weights_are_merged_by_peft():
    """PEFT reads how the weights lie off the module, where a registered class says nothing."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = OwnExperts("transposed", hidden_size=16, intermediate_size=16)

        def forward(self, *args):
            return self.experts(*args)

    register("transposed")
    torch.manual_seed(1)
    model = get_peft_model(Block(), expert_lora_config(("experts.down_proj",)))
    baseline = gradients(model)
    with gategrad(model) as report:
        assert [reason.code for reason in report[0].adapter_reasons] == ["lora_transposed"]
        assert_agrees(gradients(model), baseline)


def test_down_bias_fallback_of_a_registered_class():
    register("biased")
    experts = OwnExperts("biased")
    baseline = gradients(experts, "biased")
    with gategrad(experts, down_bias="fallback") as report:
        assert [layer.status for layer in report] == ["fallback"]
        assert equal(gradients(experts, "biased"), baseline)


def test_a_registered_class_may_be_expert_parallel():
    register()
    experts = OwnExperts()
    experts._is_expert_parallel = True
    problem = make_problem()
    index = problem.top_k_index.clone()
    index[0, 0] = 5
    hidden, gates = problem.tensors["hidden_states"], problem.tensors["top_k_weights"]
    expected = experts(hidden, index, gates)
    with gategrad(experts):
        torch.testing.assert_close(experts(hidden, index, gates), expected)
