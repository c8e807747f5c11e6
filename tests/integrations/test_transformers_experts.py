"""Registering a class of one's own: its instances are patched, the others are not, and what is missing is named."""

import copy
import pickle

import pytest
import torch
from helpers.models import Tiny, expert_lora_config, qwen3
from helpers.reference import LAYOUTS, assert_agrees, make_problem
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from peft import get_peft_model
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_moe import MoEGateGradCallback, gategrad, patch_moe, register_experts, unpatch_moe
from lightning_moe.integrations import transformers_experts as contracts
from lightning_moe.integrations.transformers_experts import read_spec
from lightning_moe.ops.grouped import silu_gated


@pytest.fixture(autouse=True)
def registrations_of_one_test(monkeypatch):
    monkeypatch.setattr(contracts, "_registered", dict(contracts._registered))


class OwnExperts(nn.Module):
    """A user's own: stock PyTorch, a loop over the experts."""

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
    register_experts(experts_class, has_gate=made.is_gated, has_bias=made.has_bias, is_transposed=made.is_transposed)


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
    stock = gradients(experts, layout)
    with gategrad(experts) as report:
        assert [layer.status for layer in report] == ["active"]
        ours = gradients(experts, layout)
    assert_agrees(ours, stock)
    assert any(not torch.equal(ours[name], stock[name]) for name in stock)  # another code did run
    assert "forward" not in vars(experts)
    after = gradients(experts, layout)
    assert all(torch.equal(after[name], stock[name]) for name in stock)


def test_what_is_not_registered_is_reported_with_the_remedy():
    experts = OwnExperts()
    report = patch_moe(experts)
    assert [layer.status for layer in report] == ["fallback"]
    assert "register_experts may take its experts" in report[0].reason
    assert "forward" not in vars(experts)


def test_a_subclass_with_a_forward_of_its_own_is_another_class():
    class Scaled(OwnExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * super().forward(hidden_states, top_k_index, top_k_weights)

    class Renamed(OwnExperts):
        pass

    register()
    assert [layer.status for layer in patch_moe(Scaled()).layers] == ["fallback"]
    assert [layer.status for layer in patch_moe(Renamed()).layers] == ["active"]


@pytest.mark.parametrize("missing", ["num_experts", "_apply_gate", "down_proj", "gate_up_proj"])
def test_what_an_instance_lacks_is_named(missing):
    register()
    experts = OwnExperts()
    delattr(experts, missing)
    (layer,) = patch_moe(experts).layers
    assert layer.status == "fallback"
    assert {"_apply_gate": "act_fn"}.get(missing, missing) in layer.reason


def test_act_fn_alone_is_gated_as_transformers_does():
    register()
    experts = OwnExperts()
    del experts._apply_gate
    experts.act_fn = nn.SiLU()
    assert read_spec(experts).activation is silu_gated
    experts.act_fn = nn.Tanh()
    h = torch.randn(3, 8)
    assert torch.equal(read_spec(experts).activation(h), h[:, :4].tanh() * h[:, 4:])


def test_copies_and_pickles_run_their_own_weights():
    register()
    experts = OwnExperts()
    patch_moe(experts)
    for duplicate in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        with torch.no_grad():
            duplicate.down_proj.zero_()
        assert gradients(duplicate)["output"].count_nonzero() == 0
        unpatch_moe(duplicate)
        assert "forward" not in vars(duplicate)
    assert gradients(experts)["output"].count_nonzero() > 0


def test_a_forward_put_on_while_patched_survives():
    register()
    experts = OwnExperts()
    patch_moe(experts)
    experts.forward = another = lambda *args: args[0]
    unpatch_moe(experts)
    assert experts.forward is another


def test_adapters_on_it_stay_apart():
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
    stock = gradients(model)
    with gategrad(model) as report:
        assert [layer.adapters for layer in report] == ["apart"]
        assert_agrees(gradients(model), stock, tolerance=2e-5)  # PEFT rounds the merged weight


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.")
def test_it_trains_under_the_callback(tmp_path):
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
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], logger=CSVLogger(tmp_path), log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)
    assert trainer.logged_metrics["gategrad/active_layers"] == 1
    assert trainer.logged_metrics["gategrad/audit_rel_error"] < 1e-5
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
def test_what_cannot_be_registered_is_refused(experts_class, error, words):
    with pytest.raises(error, match=words):
        register_experts(experts_class)


def test_registering_changes_no_decorated_class():
    register()
    assert [layer.status for layer in patch_moe(qwen3()).layers] == ["active"] * 2


def wants_bias(experts):
    experts.down_proj_bias = nn.Parameter(torch.ones(5, 16), requires_grad=False)


def forward_of_another_library(experts):
    own = experts.forward
    experts.forward = lambda *args: 2 * own(*args)


def bound_to_another(experts):
    experts.forward = OwnExperts().forward


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (wants_bias, "its class says that it has no bias"),
        (forward_of_another_library, "forward"),
        (bound_to_another, "forward"),
    ],
)
def test_what_differs_from_the_registered_class_stays_as_it_is(change, words):
    register()
    experts = OwnExperts()
    change(experts)
    before, stock = dict(vars(experts)), gradients(experts)
    with gategrad(experts) as report:
        assert [layer.status for layer in report] == ["fallback"]
        assert words in report[0].reason
        assert all(torch.equal(result, stock[name]) for name, result in gradients(experts).items())
    assert vars(experts) == before


def make(layout):
    class Local(OwnExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights)

    return Local


def test_classes_of_one_name_are_registered_apart():
    biased, plain = make("biased"), make("default")
    assert biased.__qualname__ == plain.__qualname__
    register("biased", biased)
    assert [layer.status for layer in patch_moe(plain()).layers] == ["fallback"]
    register("default", plain)
    for layout, experts_class in (("biased", biased), ("default", plain)):
        experts = experts_class(layout)
        stock = gradients(experts, layout)
        with gategrad(experts) as report:
            assert [layer.status for layer in report] == ["active"]
            assert_agrees(gradients(experts, layout), stock)


def test_a_forward_replaced_on_the_class_is_not_the_registered_one(monkeypatch):
    class Replaced(make("default")):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights)

    register("default", Replaced)
    assert [layer.status for layer in patch_moe(Replaced()).layers] == ["active"]
    monkeypatch.setattr(Replaced, "forward", lambda *args: 3 * OwnExperts.forward(*args))
    assert [layer.status for layer in patch_moe(Replaced()).layers] == ["fallback"]


def test_a_subclass_with_another_method_is_another_class():
    class Base(OwnExperts):
        def rows(self, rows):
            return rows

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return self.rows(super().forward(hidden_states, top_k_index, top_k_weights))

    class Doubled(Base):
        def rows(self, rows):
            return 2 * rows

    register("default", Base)
    assert [layer.status for layer in patch_moe(Base()).layers] == ["active"]
    assert [layer.status for layer in patch_moe(Doubled()).layers] == ["fallback"]


def test_a_forward_that_another_library_kept_runs_stock_code_after_unpatching():
    register()
    experts = OwnExperts()
    stock = gradients(experts)
    patch_moe(experts)
    kept = experts.forward
    experts.forward = lambda *args: kept(*args)
    unpatch_moe(experts)
    assert all(torch.equal(result, stock[name]) for name, result in gradients(experts).items())


def test_adapters_on_transposed_weights_are_pefts():
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
    stock = gradients(model)
    with gategrad(model) as report:
        assert "it reads is_transposed off the module" in report[0].adapters
        assert_agrees(gradients(model), stock)


def test_a_down_bias_can_be_left_to_stock_code():
    register("biased")
    experts = OwnExperts("biased")
    stock = gradients(experts, "biased")
    with gategrad(experts, down_bias="fallback") as report:
        assert [layer.status for layer in report] == ["fallback"]
        assert all(torch.equal(result, stock[name]) for name, result in gradients(experts, "biased").items())


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
