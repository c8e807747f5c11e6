"""A patched model trains as a stock one does, and is one again afterwards."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from helpers.models import (
    experts_modules,
    gpt_oss,
    is_patched,
    llama4,
    mixtral,
    pack,
    qwen3,
    qwen3_config,
    qwen3_vl,
    tokens,
    with_attention_lora,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, use_experts_implementation
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_moe import gategrad, patch_moe, unpatch_moe
from lightning_moe.layer_patch import default_implementation, patch_of, patched_modules


def gradients(model, ids=None, **options):
    ids = tokens() if ids is None else ids
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **options).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def agree(ours, stock, tolerance=2e-5):
    assert ours.keys() == stock.keys()
    worst = {name: ((ours[name] - g).norm() / g.norm().clamp_min(1e-12)).item() for name, g in stock.items()}
    return max(worst.values()) <= tolerance


def full():
    return qwen3()


def attention_lora():
    return with_attention_lora(qwen3())


def trained_router():
    model = qwen3().requires_grad_(False)
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            module.requires_grad_(True)
    return model


@pytest.mark.parametrize("build", [full, attention_lora, trained_router, mixtral, gpt_oss])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_loss_and_every_gradient_equal_stock_codes(build, implementation):
    model = build()
    for module in experts_modules(model):
        module.config._experts_implementation_internal = implementation
    stock = gradients(model)
    with gategrad(model) as report:
        assert len(report.active) == 2
        ours = gradients(model)
    assert agree(ours, stock)
    assert all(torch.equal(g, stock[name]) for name, g in gradients(model).items())


def test_the_comparison_sees_a_dropped_gate():
    model = with_attention_lora(qwen3())
    stock = gradients(model)

    def drop_first_gate(module, args):
        hidden, index, gates = args
        return hidden, index, gates * torch.tensor([0.0, 1.0])

    experts_modules(model)[0].register_forward_pre_hook(drop_first_gate)
    with gategrad(model):
        assert not agree(gradients(model), stock)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    model = qwen3().train()
    stock = gradients(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    with gategrad(model):
        assert agree(gradients(model), stock)


def test_bfloat16_with_float32_gates():
    model = mixtral().bfloat16()
    stock = gradients(model)
    with gategrad(model):
        assert agree(gradients(model), stock, tolerance=5e-2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_a_compiled_model():
    model = qwen3()
    stock = gradients(model)
    compiled = torch.compile(model, backend="eager")
    report = patch_moe(compiled)
    assert len(report.active) == 2
    ours = {name.removeprefix("_orig_mod."): g for name, g in gradients(compiled).items()}
    unpatch_moe(compiled)
    torch._dynamo.reset()
    assert agree(ours, stock)
    assert not is_patched(model)


class Wrapper(nn.Module):
    """Holds a model as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_wrappers_are_seen_through():
    model = Wrapper(with_attention_lora(qwen3()))
    report = patch_moe(model)
    assert [layer.name for layer in report.active] == [
        f"module.base_model.model.model.layers.{number}.mlp.experts" for number in range(2)
    ]
    assert all(model.get_submodule(layer.name) in patched_modules(model) for layer in report)


def test_patching_and_unpatching_twice():
    model = qwen3()
    config, keys = model.config, list(model.state_dict())
    patch_moe(model, output_buffer_mib=3)
    patch_moe(model, output_buffer_mib=5)
    assert [patch_of(module).output_buffer_mib for module in patched_modules(model)] == [5, 5]
    assert list(model.state_dict()) == keys
    assert model.config is config
    assert config._experts_implementation == "grouped_mm"
    unpatch_moe(model)
    unpatch_moe(model)
    assert all(module.config is config for module in experts_modules(model))
    assert not patched_modules(model)


def test_an_exception_inside_leaves_the_model_as_it_was():
    model = qwen3()
    experts_modules(model)[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), gategrad(model):
        gradients(model)
    assert all(module.config is model.config for module in experts_modules(model))


def test_a_failure_while_patching_leaves_the_model_as_it_was(monkeypatch):
    model = qwen3()
    estimates = iter([None])
    monkeypatch.setattr("lightning_moe.patching._per_token", lambda patch: (next(estimates), None))
    with pytest.raises(StopIteration):
        patch_moe(model)
    assert not patched_modules(model)
    assert all(module.config is model.config for module in experts_modules(model))


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copied, pickled, saved])
def test_a_copy_is_patched_by_itself(duplicate):
    model = qwen3()
    stock = gradients(model)
    patch_moe(model)
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert agree(gradients(twin), stock)  # its own weights, not the original's
    unpatch_moe(model)
    assert is_patched(twin)
    unpatch_moe(twin)
    assert all(module.config is twin.config for module in experts_modules(twin))
    assert all(torch.equal(g, stock[name]) for name, g in gradients(twin).items())


def test_models_that_share_a_config_are_patched_apart():
    config = qwen3_config()
    one, other = Qwen3MoeForCausalLM(config), Qwen3MoeForCausalLM(config)
    patch_moe(one)
    assert is_patched(one)
    assert not is_patched(other)


def test_generation_is_unchanged():
    model = qwen3().eval()
    options = {"max_new_tokens": 8, "do_sample": False}
    want = model.generate(tokens(), **options)
    with gategrad(model):
        assert torch.equal(model.generate(tokens(), **options), want)
    assert len(want[0].unique()) > 2


@pytest.mark.parametrize("build", [qwen3, gpt_oss])
def test_named_in_transformers_without_a_patch(build):
    model = build()
    stock = gradients(model)
    model.set_experts_implementation("gategrad")
    ours = gradients(model)
    assert agree(ours, stock)
    assert any(not torch.equal(ours[name], stock[name]) for name in stock)  # another code did run
    patch_moe(model, down_bias="fallback")
    gradients(model)
    unpatch_moe(model)
    assert is_patched(model)  # as the user set it


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda experts: setattr(experts, "has_post_expert_norm", True), "norm"),
        (lambda experts: experts.double(), "float64"),
        (lambda experts: experts.add_module("drop", nn.Dropout(0.5)), "dropout"),
        (lambda experts: experts.register_parameter("slope", nn.Parameter(torch.ones(1))), "slope"),
    ],
)
def test_a_layer_that_cannot_take_it_runs_stock_code(change, reason, monkeypatch):
    model = qwen3(num_hidden_layers=1)
    (experts,) = experts_modules(model)
    change(experts)
    calls = []
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda *args: calls.append(args) or args[1]
    )
    report = patch_moe(model)
    assert [layer.status for layer in report] == ["fallback"]
    assert reason in report[0].reason
    hidden, index = torch.zeros(3, 32, dtype=experts.down_proj.dtype), torch.zeros(3, 2, dtype=torch.int64)
    assert torch.equal(experts(hidden, index, torch.ones(3, 2, dtype=hidden.dtype)), hidden)
    assert len(calls) == 1


def test_down_bias_fallback_is_stock_code_bit_for_bit():
    model = gpt_oss()
    stock = gradients(model)
    with gategrad(model, down_bias="fallback") as report:
        assert [layer.status for layer in report] == ["fallback", "fallback"]
        assert "bias" in report[0].reason
        assert all(torch.equal(g, stock[name]) for name, g in gradients(model).items())


def test_a_reason_that_turns_up_later_is_named():
    model = qwen3(num_hidden_layers=1)
    patch_moe(model)
    with_norm(experts_modules(model)[0])
    with pytest.warns(UserWarning, match="runs the default implementation after all: a norm stands"):
        ours = gradients(model)
    assert all(torch.equal(g, ours[name]) for name, g in gradients(model).items())  # named once
    unpatch_moe(model)
    assert all(torch.equal(g, ours[name]) for name, g in gradients(model).items())


def test_parameters_of_the_activation_unfrozen_after_patching_are_trained():
    model = qwen3(num_hidden_layers=1, hidden_act="xielu")
    (experts,) = experts_modules(model)
    stock = gradients(model)
    assert sum(".act_fn." in name for name in stock) == 2
    experts.act_fn.requires_grad_(False)
    with gategrad(model) as report:
        assert report.active
        gradients(model)
        experts.act_fn.requires_grad_(True)
        with pytest.warns(
            UserWarning, match="runs the default implementation after all: the module trains parameters .*act_fn"
        ):
            assert all(torch.equal(g, stock[name]) for name, g in gradients(model).items())


@pytest.mark.parametrize("chosen", ["eager", "batched_mm"])
def test_an_implementation_that_is_set_on_a_patched_model_is_said_to_wait(chosen):
    model = qwen3(num_hidden_layers=1)
    patch_moe(model)
    ours = gradients(model)
    model.set_experts_implementation(chosen)
    with pytest.warns(UserWarning, match=f"set to '{chosen}' while it is patched.*after unpatch_moe"):
        assert agree(gradients(model), ours, tolerance=1e-12)
    gradients(model)  # said once
    assert num_active_executions(model) == [3]
    unpatch_moe(model)
    assert model.config._experts_implementation == chosen
    assert experts_modules(model)[0].config is model.config


def test_what_generate_sets_while_it_decodes_is_no_choice():
    model = qwen3(num_hidden_layers=1).eval()
    patch_moe(model)
    with torch.no_grad():
        model.set_experts_implementation("batched_mm")
        model(input_ids=tokens())
    model.set_experts_implementation("grouped_mm")
    gradients(model)


def test_a_replaced_forward_is_reported_and_kept():
    model = qwen3(num_hidden_layers=1)
    (experts,) = experts_modules(model)
    experts.forward = lambda hidden, index, gates: hidden
    report = patch_moe(model)
    assert "replaced the module's forward" in report[0].reason
    unpatch_moe(model)
    assert "forward" in vars(experts)
    hidden = torch.zeros(3, 32)
    assert experts(hidden, None, None) is hidden


def test_stock_code_for_a_while():
    model = qwen3(num_hidden_layers=1)
    (experts,) = experts_modules(model)
    with default_implementation(experts):
        assert experts.config is model.config
    patch_moe(model)
    with default_implementation(experts):
        assert experts.config is model.config
    assert is_patched(model)


def test_the_report_prints_as_a_table():
    printed = str(patch_moe(gpt_oss(), down_bias="fallback"))
    assert "MoE layers: 0 active, 2 fallback" in printed
    assert "model.layers.*.mlp.experts (2 layers)" in printed
    assert "down_bias" in printed
    lines = str(patch_moe(qwen3())).splitlines()
    assert "reason" not in "".join(lines)
    assert all("…" not in line for line in lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"down_bias": "approximate"}, "down_bias must be 'exact' or 'fallback', not 'approximate'"),
        ({"output_buffer_mib": 0}, "output_buffer_mib must be a positive number, not 0"),
    ],
)
def test_options_out_of_range(options, words):
    model = qwen3()
    with pytest.raises(ValueError, match=words):
        patch_moe(model, **options)
    assert not is_patched(model)


def num_active_executions(model):
    """How often the operation ran in each layer, by what its backward counted."""
    return [patch_of(module).health.drain(micro_batches=8).active_layers for module in patched_modules(model)]


@pytest.mark.parametrize("build", [full, attention_lora, mixtral, gpt_oss, qwen3_vl])
def test_the_operation_is_what_runs(build):
    model = build()
    stock = gradients(model)
    configs = [module.config for module in experts_modules(model)]
    with gategrad(model):
        assert agree(gradients(model), stock)
        assert num_active_executions(model) == [1, 1]
    assert all(module.config is config for module, config in zip(experts_modules(model), configs, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_code_compiled_before_patching_is_not_reused():
    model = qwen3()
    compiled = torch.compile(model, backend="eager")
    try:
        stock = gradients(compiled)
        with gategrad(compiled):
            ours = gradients(compiled)
            assert num_active_executions(compiled) == [1, 1]
        again = gradients(compiled)
    finally:
        torch._dynamo.reset()
    assert agree(ours, stock)
    assert all(torch.equal(g, stock[name]) for name, g in again.items())


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel():
    model = with_attention_lora(qwen3())
    stock = gradients(model)
    parallel = DistributedDataParallel(model)
    with gategrad(parallel) as report:
        assert [layer.name.partition(".")[0] for layer in report.active] == ["module", "module"]
        ours = {name.removeprefix("module."): g for name, g in gradients(parallel).items()}
        assert num_active_executions(parallel) == [1, 1]
    assert agree(ours, stock)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_experts_without_a_gate_projection(implementation):
    torch.manual_seed(0)
    experts = NemotronHExperts(NemotronHConfig(hidden_size=32, moe_intermediate_size=16, n_routed_experts=8))
    experts.config._experts_implementation_internal = implementation
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden, index = torch.randn(24, 32, requires_grad=True), torch.rand(24, 8).topk(2).indices
    gates = torch.randn(24, 2, requires_grad=True)
    inputs, weight = (hidden, gates, *experts.parameters()), torch.randn(24, 32)

    def run():
        output = experts(hidden, index, gates)
        return dict(enumerate((output.detach(), *torch.autograd.grad((output * weight).sum(), inputs))))

    stock = run()
    with gategrad(experts) as report:
        assert [(layer.status, layer.class_name) for layer in report] == [("active", "NemotronHExperts")]
        assert agree(run(), stock)
        assert num_active_executions(experts) == [1]


def test_bfloat16_is_no_further_from_float32_than_stock_code():
    exact = gradients(mixtral().bfloat16().float())
    model = mixtral().bfloat16()
    dtypes = []
    experts_modules(model)[0].register_forward_pre_hook(lambda _, args: dtypes.append(args[2].dtype))
    stock = gradients(model)
    with gategrad(model):
        ours = gradients(model)
    assert dtypes == [torch.float32] * 2  # Mixtral's gates

    def error(found):
        distance = sum((found[name].float() - g).square().sum() for name, g in exact.items() if name != "loss")
        return (distance / sum(g.square().sum() for name, g in exact.items() if name != "loss")).sqrt()

    assert 0 < error(ours) <= 1.1 * error(stock)
    assert error({name: torch.zeros_like(g) for name, g in stock.items()}) > 10 * error(stock)


def with_norm(experts):
    # Without a weight: a trained one would be a reason of its own.
    experts.has_post_expert_norm, experts.post_expert_norm = True, nn.RMSNorm(32, elementwise_affine=False)


def with_dropout(experts):
    experts.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))


def with_trained_activation(experts):
    experts.act_fn = nn.PReLU()


def with_forward_of_its_own(experts):
    forward = experts.forward
    experts.forward = lambda *args: 2 * forward(*args)


def in_double(experts):
    experts.config._experts_implementation_internal = "eager"  # the only stock code that takes it
    experts.double()
    experts.register_forward_pre_hook(lambda _, args: (args[0].double(), *args[1:]))
    experts.register_forward_hook(lambda *args: args[-1].float())


def of_odd_sizes(experts):
    experts.config._experts_implementation_internal = "eager"  # as above
    experts.gate_up_proj = nn.Parameter(torch.randn(8, 20, 32) / 4)
    experts.down_proj = nn.Parameter(torch.randn(8, 32, 10) / 4)


class Packed(torch.Tensor):
    """A tensor of a class that computes in a way of its own, as those that hold quantized weights."""

    @staticmethod
    def __new__(cls, dense):
        return torch.Tensor._make_wrapper_subclass(cls, dense.shape, strides=dense.stride(), dtype=dense.dtype)

    def __init__(self, dense):
        self.dense = dense

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        result = func(*(getattr(arg, "dense", arg) for arg in args), **(kwargs or {}))
        return cls(result) if func is torch.ops.aten.detach.default else result


def of_a_tensor_class_of_its_own(experts):
    experts.down_proj = nn.Parameter(Packed(experts.down_proj.detach()), requires_grad=False)


def in_a_registry_of_its_own(experts):
    undecorated = Qwen3MoeExperts.forward.__wrapped__
    own = type("OwnExperts", (Qwen3MoeExperts,), {"forward": undecorated})
    experts.__class__ = use_experts_implementation(own, experts_interface=ExpertsInterface())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_norm, "a norm stands between"),
        (with_dropout, "dropout"),
        (with_trained_activation, "act_fn.weight"),
        (with_forward_of_its_own, "replaced the module's forward"),
        (in_double, "float64"),
        (of_odd_sizes, "multiples of 16 bytes"),
        (in_a_registry_of_its_own, "a registry of its own"),
        (pack, "gate_up_proj is parametrized by Dequantize"),
        (lambda experts: pack(experts, "down_proj"), "down_proj is parametrized by Dequantize"),
        (of_a_tensor_class_of_its_own, "down_proj is a Packed"),
    ],
)
def test_fallback_is_stock_code_bit_for_bit(change, reason):
    model = qwen3(num_hidden_layers=1).train()
    (experts,) = experts_modules(model)
    change(experts)

    def run():
        torch.manual_seed(0)  # the dropout's
        return gradients(model)

    stock = run()
    with gategrad(model) as report:
        assert [layer.status for layer in report] == ["fallback"]
        assert reason in report[0].reason
        found = run()
    assert found.keys() == stock.keys()
    assert all(torch.equal(g, stock[name]) for name, g in found.items())
    assert all(torch.equal(g, stock[name]) for name, g in run().items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [(pack, "gate_up_proj is parametrized by Dequantize"), (of_a_tensor_class_of_its_own, "down_proj is a Packed")],
)
def test_weights_that_are_quantized_after_patching_are_named(change, reason):
    model = qwen3(num_hidden_layers=1)
    patch_moe(model)
    change(experts_modules(model)[0])
    with pytest.warns(UserWarning, match=f"runs the default implementation after all: {reason}"):
        ours = gradients(model)
    assert num_active_executions(model) == [0]
    unpatch_moe(model)
    stock = gradients(model)
    assert ours.keys() == stock.keys()
    assert all(torch.equal(g, ours[name]) for name, g in stock.items())


def test_a_family_outside_the_registry_is_reported_and_kept():
    model = llama4()
    stock = gradients(model)
    with gategrad(model) as report:
        assert [layer.class_name for layer in report.fallback] == ["Llama4TextExperts"] * 2
        assert "does not go through Transformers' experts registry" in report[0].reason
        assert not patched_modules(model)
        assert all(torch.equal(g, stock[name]) for name, g in gradients(model).items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_norm, "a norm stands between"),
        (with_dropout, "dropout"),
        (with_trained_activation, "act_fn"),
    ],
)
def test_named_without_a_patch_a_layer_that_cannot_take_it_runs_stock_code(change, reason):
    model = qwen3(num_hidden_layers=1).train()
    change(experts_modules(model)[0])
    torch.manual_seed(0)
    stock = gradients(model)
    model.set_experts_implementation("gategrad")
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"runs the default implementation after all: .*{reason}"):
        found = gradients(model)
    assert found.keys() == stock.keys()
    assert all(torch.equal(g, stock[name]) for name, g in found.items())


def test_an_instances_own_gating_is_kept():
    model = qwen3(num_hidden_layers=1)
    (experts,) = experts_modules(model)
    experts._apply_gate = lambda h: h.chunk(2, dim=-1)[0].relu() * h.chunk(2, dim=-1)[1]
    stock = gradients(model)
    with gategrad(model):
        assert agree(gradients(model), stock)


def test_the_report_is_the_same_under_inference_mode():
    model = qwen3()
    report = patch_moe(model)
    with torch.inference_mode():
        assert patch_moe(model) == report


@pytest.mark.parametrize("duplicate", [copied, pickled, saved])
def test_unpatching_a_copy_leaves_the_original_patched(duplicate):
    model = qwen3()
    stock = gradients(model)
    patch_moe(model)
    unpatch_moe(duplicate(model))
    assert is_patched(model)
    assert agree(gradients(model), stock)
    assert num_active_executions(model) == [1, 1]


def test_an_exception_in_forward_and_a_plain_unpatch():
    model = qwen3()
    stock = gradients(model)
    patch_moe(model)
    handle = experts_modules(model)[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradients(model)
    handle.remove()
    unpatch_moe(model)
    assert all(torch.equal(g, stock[name]) for name, g in gradients(model).items())


def test_a_checkpoint_of_a_patched_model_loads_into_a_stock_one():
    model = qwen3()
    ids = tokens()
    want = model(input_ids=ids).logits
    with gategrad(model):
        state = model.state_dict()
    other = Qwen3MoeForCausalLM(qwen3_config())
    assert other.load_state_dict(state, strict=True) == ([], [])
    assert torch.equal(other(input_ids=ids).logits, want)


def test_a_config_that_the_user_put_in_while_patched_stays():
    model = qwen3()
    patch_moe(model)
    experts, other = experts_modules(model)
    experts.config = mine = copy.copy(model.config)
    unpatch_moe(model)
    assert experts.config is mine
    assert other.config is model.config
