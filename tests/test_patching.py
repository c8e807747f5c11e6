"""Patching: a patched model trains as the default implementation does, and is fully restored afterwards."""

import copy

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
from helpers.patching import COPIES, agree, enable_checkpointing, equal, gradients, num_active_executions
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeForCausalLM
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_moe import gategrad, patch_moe, unpatch_moe
from lightning_moe.patch_state import default_implementation, patch_of, patched_modules


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


@pytest.mark.parametrize("build", [full, attention_lora, trained_router, mixtral, gpt_oss, qwen3_vl])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_loss_and_every_gradient_equal_the_default_implementations(build, implementation):
    model = build()
    model.set_experts_implementation(implementation)
    configs = [module.config for module in experts_modules(model)]
    baseline = gradients(model)
    with gategrad(model) as report:
        assert len(report.active) == 2
        assert agree(gradients(model), baseline)
        assert num_active_executions(model) == [1, 1]
    assert all(module.config is config for module, config in zip(experts_modules(model), configs, strict=True))
    assert equal(gradients(model), baseline)


def test_the_comparison_fails_on_a_dropped_routing_weight():
    model = with_attention_lora(qwen3())
    baseline = gradients(model)

    def drop_first_gate(module, args):
        hidden, index, gates = args
        return hidden, index, gates * torch.tensor([0.0, 1.0])

    experts_modules(model)[0].register_forward_pre_hook(drop_first_gate)
    with gategrad(model):
        assert not agree(gradients(model), baseline)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    model = qwen3().train()
    baseline = gradients(model)
    enable_checkpointing(model, use_reentrant=use_reentrant)
    if use_reentrant:
        model.enable_input_require_grads()
    with gategrad(model):
        assert agree(gradients(model), baseline)


class Wrapper(nn.Module):
    """Holds a model as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_layers_inside_wrapper_modules_are_patched():
    model = Wrapper(with_attention_lora(qwen3()))
    report = patch_moe(model)
    assert [layer.name for layer in report.active] == [
        f"module.base_model.model.model.layers.{number}.mlp.experts" for number in range(2)
    ]
    assert all(model.get_submodule(layer.name) in patched_modules(model) for layer in report)


def test_patch_twice_and_unpatch_twice():
    model = qwen3()
    config, keys = model.config, list(model.state_dict())
    patch_moe(model, output_buffer_mib=3)
    patch_moe(model, output_buffer_mib=5)
    assert [patch_of(module).options.output_buffer_mib for module in patched_modules(model)] == [5, 5]
    assert list(model.state_dict()) == keys
    assert model.config is config
    assert config._experts_implementation == "grouped_mm"
    unpatch_moe(model)
    unpatch_moe(model)
    assert all(module.config is config for module in experts_modules(model))
    assert not patched_modules(model)


def test_an_exception_in_forward_leaves_the_model_fully_restored():
    model = qwen3()
    baseline = gradients(model)
    handle = experts_modules(model)[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), gategrad(model):
        gradients(model)
    handle.remove()
    assert all(module.config is model.config for module in experts_modules(model))
    assert equal(gradients(model), baseline)


def test_a_failure_while_patching_restores_the_model():
    """The activation is run on one row to measure what it saves."""
    model = qwen3()
    experts_modules(model)[1]._apply_gate = lambda h: 1 / 0
    with pytest.raises(ZeroDivisionError):
        patch_moe(model)
    assert not patched_modules(model)
    assert all(module.config is model.config for module in experts_modules(model))


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_of_a_patched_model_runs_its_own_weights(duplicate):
    model = qwen3()
    baseline = gradients(model)
    patch_moe(model)
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert agree(gradients(twin), baseline)  # its own weights, not the original's
    unpatch_moe(model)
    assert is_patched(twin)
    unpatch_moe(twin)
    assert all(module.config is twin.config for module in experts_modules(twin))
    assert equal(gradients(twin), baseline)


def test_models_that_share_a_config_are_patched_independently():
    config = qwen3_config()
    one, other = Qwen3MoeForCausalLM(config), Qwen3MoeForCausalLM(config)
    patch_moe(one)
    assert is_patched(one)
    assert not is_patched(other)


def test_generate_gives_the_same_tokens():
    model = qwen3().eval()
    options = {"max_new_tokens": 8, "do_sample": False}
    want = model.generate(tokens(), **options)
    with gategrad(model):
        assert torch.equal(model.generate(tokens(), **options), want)
    assert len(want[0].unique()) > 2


@pytest.mark.parametrize("build", [qwen3, gpt_oss])
def test_set_experts_implementation_gategrad_without_a_patch(build):
    model = build()
    baseline = gradients(model)
    model.set_experts_implementation("gategrad")
    ours = gradients(model)
    assert agree(ours, baseline)
    assert any(not torch.equal(ours[name], baseline[name]) for name in baseline)  # another code did run
    patch_moe(model, down_bias="fallback")
    gradients(model)
    unpatch_moe(model)
    assert is_patched(model)  # as the user set it


def test_down_bias_fallback_equals_the_default_implementation_bit_for_bit():
    model = gpt_oss()
    baseline = gradients(model)
    with gategrad(model, down_bias="fallback") as report:
        assert [layer.reason.code for layer in report.fallback] == ["down_proj_bias"] * 2
        assert equal(gradients(model), baseline)


def test_a_layer_changed_after_patching_falls_back_and_warns_once():
    model = qwen3(num_hidden_layers=1)
    patch_moe(model)
    with_norm(experts_modules(model)[0])
    with pytest.warns(UserWarning, match="runs the default implementation after all: .*post_expert_norm"):
        ours = gradients(model)
    assert equal(gradients(model), ours)  # named once
    unpatch_moe(model)
    assert equal(gradients(model), ours)


def test_activation_parameters_unfrozen_after_patching_are_trained():
    model = qwen3(num_hidden_layers=1, hidden_act="xielu")
    (experts,) = experts_modules(model)
    baseline = gradients(model)
    assert sum(".act_fn." in name for name in baseline) == 2
    experts.act_fn.requires_grad_(False)
    with gategrad(model) as report:
        assert report.active
        gradients(model)
        experts.act_fn.requires_grad_(True)
        with pytest.warns(UserWarning, match="the default implementation after all: .*act_fn.*trained_parameters"):
            assert equal(gradients(model), baseline)


@pytest.mark.parametrize("chosen", ["eager", "batched_mm"])
def test_set_experts_implementation_on_a_patched_model_warns_and_applies_after_unpatching(chosen):
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


def test_batched_mm_set_by_generate_does_not_warn():
    model = qwen3(num_hidden_layers=1).eval()
    patch_moe(model)
    with torch.no_grad():
        model.set_experts_implementation("batched_mm")
        model(input_ids=tokens())
    model.set_experts_implementation("grouped_mm")
    gradients(model)


def test_a_forward_replaced_on_the_module_is_reported_and_kept():
    model = qwen3(num_hidden_layers=1)
    (experts,) = experts_modules(model)
    experts.forward = lambda hidden, index, gates: hidden
    report = patch_moe(model)
    assert report[0].reason.code == "replaced_forward"
    unpatch_moe(model)
    assert "forward" in vars(experts)
    hidden = torch.zeros(3, 32)
    assert experts(hidden, None, None) is hidden


def test_default_implementation_inside_a_block():
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
    assert "[down_proj_bias]" in printed  # which is no markup
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
def test_options_out_of_range_are_errors(options, words):
    model = qwen3()
    with pytest.raises(ValueError, match=words):
        patch_moe(model, **options)
    assert not is_patched(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_layers_compiled_before_patching_run_the_operation():
    model = qwen3(num_hidden_layers=1)
    model.model.layers[0].compile(backend="eager")
    try:
        baseline = gradients(model)
        with gategrad(model):
            ours = gradients(model)
            assert num_active_executions(model) == [1]
        again = gradients(model)
    finally:
        torch._dynamo.reset()
    assert agree(ours, baseline)
    assert equal(again, baseline)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel():
    model = with_attention_lora(qwen3())
    baseline = gradients(model)
    parallel = DistributedDataParallel(model)
    with gategrad(parallel) as report:
        assert [layer.name.partition(".")[0] for layer in report.active] == ["module", "module"]
        ours = {name.removeprefix("module."): g for name, g in gradients(parallel).items()}
        assert num_active_executions(parallel) == [1, 1]
    assert agree(ours, baseline)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_experts_without_a_gate_projection(implementation):
    torch.manual_seed(0)
    experts = NemotronHExperts(NemotronHConfig(hidden_size=32, moe_intermediate_size=16, n_routed_experts=8))
    experts.config._experts_implementation = implementation
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden, index = torch.randn(24, 32, requires_grad=True), torch.rand(24, 8).topk(2).indices
    gates = torch.randn(24, 2, requires_grad=True)
    inputs, weight = (hidden, gates, *experts.parameters()), torch.randn(24, 32)

    def run():
        output = experts(hidden, index, gates)
        return dict(enumerate((output.detach(), *torch.autograd.grad((output * weight).sum(), inputs))))

    baseline = run()
    with gategrad(experts) as report:
        assert [(layer.status, layer.class_name) for layer in report] == [("active", "NemotronHExperts")]
        assert agree(run(), baseline)
        assert num_active_executions(experts) == [1]


def test_bfloat16_is_as_accurate_as_the_default_implementation():
    exact = gradients(mixtral().bfloat16().float())
    model = mixtral().bfloat16()
    dtypes = []
    experts_modules(model)[0].register_forward_pre_hook(lambda _, args: dtypes.append(args[2].dtype))
    baseline = gradients(model)
    with gategrad(model):
        ours = gradients(model)
    assert dtypes == [torch.float32] * 2  # Mixtral's gates

    def error(found):
        distance = sum((found[name].float() - g).square().sum() for name, g in exact.items() if name != "loss")
        return (distance / sum(g.square().sum() for name, g in exact.items() if name != "loss")).sqrt()

    assert 0 < error(ours) <= 1.1 * error(baseline)
    assert error({name: torch.zeros_like(g) for name, g in baseline.items()}) > 10 * error(baseline)


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
    experts.config._experts_implementation = "eager"  # the only default implementation that takes it
    experts.double()
    experts.register_forward_pre_hook(lambda _, args: (args[0].double(), *args[1:]))
    experts.register_forward_hook(lambda *args: args[-1].float())


def of_odd_sizes(experts):
    experts.config._experts_implementation = "eager"  # as above
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


def with_another_parameter(experts):
    experts.register_parameter("slope", nn.Parameter(torch.ones(1)))


FALLBACKS = [
    (with_norm, "post_expert_norm", ""),
    (with_dropout, "dropout", ""),
    (with_trained_activation, "trained_parameters", "act_fn.weight"),
    (with_another_parameter, "trained_parameters", "slope"),
    (with_forward_of_its_own, "replaced_forward", ""),
    (in_double, "weights", "float64"),
    (of_odd_sizes, "weights", "multiples of 16 bytes"),
    (in_a_registry_of_its_own, "other_registry", ""),
    (pack, "parametrized", "gate_up_proj is parametrized by Dequantize"),
    (lambda experts: pack(experts, "down_proj"), "parametrized", "down_proj is parametrized by Dequantize"),
    (of_a_tensor_class_of_its_own, "tensor_class", "down_proj is a Packed"),
]


@pytest.mark.parametrize(("change", "code", "named"), FALLBACKS, ids=[code for _, code, _ in FALLBACKS])
def test_fallback_equals_the_default_implementation_bit_for_bit(change, code, named):
    model = qwen3(num_hidden_layers=1).train()
    (experts,) = experts_modules(model)
    change(experts)

    def run():
        torch.manual_seed(0)  # the dropout's
        return gradients(model)

    baseline = run()
    with gategrad(model) as report:
        (layer,) = report.fallback
        assert layer.reason.code == code
        assert named in layer.reason.message
        assert equal(run(), baseline)
    assert equal(run(), baseline)


@pytest.mark.parametrize(("change", "code"), [(pack, "parametrized"), (of_a_tensor_class_of_its_own, "tensor_class")])
def test_weights_quantized_after_patching_fall_back_with_a_warning(change, code):
    model = qwen3(num_hidden_layers=1)
    patch_moe(model)
    change(experts_modules(model)[0])
    with pytest.warns(UserWarning, match=rf"runs the default implementation after all: .*\[{code}\]"):
        ours = gradients(model)
    assert num_active_executions(model) == [0]
    unpatch_moe(model)
    baseline = gradients(model)
    assert equal(baseline, ours)


def test_a_family_outside_the_registry_is_reported_and_unchanged():
    model = llama4()
    baseline = gradients(model)
    with gategrad(model) as report:
        assert [layer.class_name for layer in report.fallback] == ["Llama4TextExperts"] * 2
        assert report[0].reason.code == "outside_registry"
        assert "Llama4TextExperts does not go through Transformers' experts registry" in report[0].reason.message
        assert not patched_modules(model)
        assert equal(gradients(model), baseline)


@pytest.mark.parametrize(
    ("change", "code"),
    [(with_norm, "post_expert_norm"), (with_dropout, "dropout"), (with_trained_activation, "trained_parameters")],
)
def test_fallback_of_a_model_named_gategrad_without_a_patch(change, code):
    model = qwen3(num_hidden_layers=1).train()
    change(experts_modules(model)[0])
    torch.manual_seed(0)
    baseline = gradients(model)
    model.set_experts_implementation("gategrad")
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=rf"runs the default implementation after all: .*\[{code}\]"):
        assert equal(gradients(model), baseline)


def test_an_instances_own_apply_gate_is_used():
    model = qwen3(num_hidden_layers=1)
    (experts,) = experts_modules(model)
    experts._apply_gate = lambda h: h.chunk(2, dim=-1)[0].relu() * h.chunk(2, dim=-1)[1]
    baseline = gradients(model)
    with gategrad(model):
        assert agree(gradients(model), baseline)


def test_the_report_is_the_same_under_inference_mode():
    model = qwen3()
    report = patch_moe(model)
    with torch.inference_mode():
        assert list(patch_moe(model)) == list(report)


@pytest.mark.parametrize("duplicate", COPIES)
def test_unpatching_a_copy_leaves_the_original_patched(duplicate):
    model = qwen3()
    baseline = gradients(model)
    patch_moe(model)
    unpatch_moe(duplicate(model))
    assert is_patched(model)
    assert agree(gradients(model), baseline)
    assert num_active_executions(model) == [1, 1]


def test_state_dict_of_a_patched_model_loads_into_an_unpatched_one():
    model = qwen3()
    ids = tokens()
    want = model(input_ids=ids).logits
    with gategrad(model):
        state = model.state_dict()
    other = Qwen3MoeForCausalLM(qwen3_config())
    assert other.load_state_dict(state, strict=True) == ([], [])
    assert torch.equal(other(input_ids=ids).logits, want)


def test_a_config_replaced_while_patched_is_kept():
    model = qwen3()
    patch_moe(model)
    experts, other = experts_modules(model)
    experts.config = mine = copy.copy(model.config)
    unpatch_moe(model)
    assert experts.config is mine
    assert other.config is model.config
