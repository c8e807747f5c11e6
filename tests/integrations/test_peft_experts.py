"""LoRA on experts: unmerged adapters train as PEFT's merged ones do; unsupported ones use PEFT's merged path."""

import copy
import warnings
from contextlib import suppress

import pytest
import torch
from helpers.models import (
    EXPERT_TARGETS,
    Tiny,
    expert_lora_config,
    gpt_oss,
    llama4,
    pack,
    qwen3,
    tokens,
    with_expert_lora,
)
from helpers.patching import (
    COPIES,
    agree,
    enable_checkpointing,
    equal,
    gradients,
    merging_calls,
    num_active_executions,
)
from helpers.reference import LOW_PRECISION_SLACK, largest_allocation, relative_error, with_scatter
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from lightning_moe import MoEGateGradCallback, gategrad, measure_moe_activations, moe_experts, patch_moe, unpatch_moe
from lightning_moe.ops.low_rank import LowRank, join, split_gradients
from lightning_moe.patch_state import default_implementation, patch_of, patched_modules
from lightning_moe.patching import touched_modules

GATE_UP, DOWN = EXPERT_TARGETS
SUBSETS = {"gate_up": (GATE_UP,), "down": (DOWN,), "both": EXPERT_TARGETS}


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def is_unmerged(model):
    """Whether PEFT merges no adapter into a weight in the next forward."""
    with merging_calls(model) as merging, torch.no_grad():
        model(input_ids=tokens())
    return not merging


def two_adapters(targets=EXPERT_TARGETS):
    """Of different ranks and scalings, both active."""
    model = with_expert_lora(qwen3(), targets, attention=True)
    model.add_adapter("other", expert_lora_config(targets, r=3, attention=True, use_rslora=True, lora_alpha=5))
    model.base_model.set_adapter(["default", "other"])
    return model


# The factors


def test_factors_are_joined_along_the_rank_scaled_and_padded():
    updates = [
        LowRank(torch.randn(5, rank, 8), torch.randn(5, 12, rank).double(), scaling)
        for rank, scaling in ((3, 2.0), (2, 0.5))
    ]
    joined = join(updates, torch.float32)
    assert joined.a.shape == (5, 8, 8)
    assert joined.b.shape == (5, 12, 8)
    truth = sum(update.scaling * update.b.double() @ update.a.double() for update in updates)
    assert relative_error(joined.b @ joined.a, truth) < 1e-6
    assert not joined.a[:, 5:].any()
    assert not joined.b[..., 5:].any()
    assert join(updates, torch.bfloat16).a.shape == (5, 8, 8)
    assert join(updates[:1], torch.float32).a.shape == (5, 4, 8)


@pytest.mark.parametrize(
    ("dtype", "factor_dtype", "b", "scaling", "expected"),
    [
        (torch.float32, torch.bfloat16, 1.0078125, 1.5, 1.51171875),  # bfloat16 has 1.515625
        (torch.bfloat16, torch.float16, 1500.0, 64.0, 96_256.0),  # float16 has infinity; bfloat16 rounds 96,000
    ],
)
def test_a_scaling_is_multiplied_in_a_dtype_that_holds_the_product(dtype, factor_dtype, b, scaling, expected):
    update = LowRank(torch.ones(1, 4, 8, dtype=factor_dtype), torch.full((1, 8, 4), b, dtype=factor_dtype), scaling)
    assert (join([update], dtype).b[..., :4] == expected).all()


def test_a_scaling_that_is_a_tensor_is_an_error():
    with pytest.raises(TypeError, match="scaling must be a number"):
        LowRank(torch.ones(1, 4, 8), torch.ones(1, 8, 4), torch.tensor(2.0))


def test_gradients_are_split_as_the_factors_were_joined():
    updates = [
        LowRank(torch.randn(5, r, 8).double().requires_grad_(), torch.randn(5, 12, r).double().requires_grad_(), s)
        for r, s in ((3, 2.0), (2, 0.5))
    ]
    truth = sum(update.scaling * update.b @ update.a for update in updates)
    grad = torch.randn(5, 12, 8).double()
    truth.backward(grad)
    joined = join([LowRank(u.a.detach(), u.b.detach(), u.scaling) for u in updates], torch.float64)
    split = list(split_gradients(joined.b.mT @ grad, grad @ joined.a.mT, updates))
    for update, (grad_a, grad_b) in zip(updates, split, strict=True):
        assert relative_error(grad_a, update.a.grad) < 1e-12
        assert relative_error(grad_b, update.b.grad) < 1e-12
    assert relative_error(split[0][0], updates[0].a.grad.roll(1, 1)) > 0.5
    assert list(split_gradients(None, None, updates)) == [(None, None)] * 2


# Unmerged and merged train alike


@pytest.mark.parametrize("recompute_gate_up", [False, True])
@pytest.mark.parametrize("targets", SUBSETS)
@pytest.mark.parametrize(("rank", "use_rslora"), [(4, False), (3, True)])
def test_loss_and_every_gradient_equal_pefts(targets, rank, use_rslora, recompute_gate_up):
    model = with_expert_lora(qwen3(), SUBSETS[targets], r=rank, attention=True, use_rslora=use_rslora)
    baseline = gradients(model)
    with gategrad(model, recompute_gate_up=recompute_gate_up) as report:
        assert all(layer.has_adapters and not layer.adapter_reasons for layer in report.active)
        assert is_unmerged(model)
        ours = gradients(model)
    assert agree(ours, baseline)
    assert not is_unmerged(model)
    assert equal(gradients(model), baseline)


@pytest.mark.parametrize("targets", SUBSETS)
def test_two_active_adapters(targets):
    model = two_adapters(SUBSETS[targets])
    baseline = gradients(model)
    assert sum("other" in name for name in baseline) == sum("default" in name for name in baseline) > 0
    with gategrad(model):
        assert is_unmerged(model)
        assert agree(gradients(model), baseline)


@pytest.mark.parametrize("targets", SUBSETS)
def test_hidden_states_and_routing_weights_get_pefts_gradients(targets):
    model = with_expert_lora(qwen3(), SUBSETS[targets])
    experts = model.base_model.model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 32, generator=generator, requires_grad=True)
    gates = torch.randn(24, 2, generator=generator, requires_grad=True)
    index = torch.rand(24, 8, generator=generator).topk(2).indices
    grad = torch.randn(24, 32, generator=generator)
    results = []
    for patch in (unpatch_moe, patch_moe):
        patch(model)
        output = experts(hidden, index, gates)
        results.append([output, *torch.autograd.grad(output, (hidden, gates), grad)])
    assert all(relative_error(ours, baseline) < 2e-6 for baseline, ours in zip(*results, strict=True))


def test_a_transposed_interleaved_family_with_biases():
    model = with_expert_lora(gpt_oss(), attention=True)
    baseline = gradients(model)
    with gategrad(model):
        assert is_unmerged(model)
        assert agree(gradients(model), baseline)


class Holder(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts


def test_a_family_without_a_gate_projection():
    config = NemotronHConfig(hidden_size=16, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    model = Holder(NemotronHExperts(config))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    targets = ["experts.up_proj", "experts.down_proj"]
    inject_adapter_in_model(
        LoraConfig(r=4, target_modules=[], target_parameters=targets, init_lora_weights=False), model
    )
    hidden, gates = torch.randn(6, 16, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    index = torch.rand(6, 4).topk(2).indices
    wanted = [hidden, gates, *(p for p in model.parameters() if p.requires_grad)]
    assert len(wanted) == 6
    baseline = torch.autograd.grad(model.experts(hidden, index, gates).square().sum(), wanted)
    with gategrad(model) as report:
        assert report[0].has_adapters
        assert not report.merging
        ours = torch.autograd.grad(model.experts(hidden, index, gates).square().sum(), wanted)
    assert all(relative_error(a, b) < 2e-5 for a, b in zip(ours, baseline, strict=True))


def test_the_comparison_fails_on_a_missing_update_and_on_swapped_layouts(monkeypatch):
    model = with_expert_lora(qwen3(), attention=True)
    baseline = gradients(model)
    for broken in (
        lambda wrapper, name: LowRank(
            wrapper.lora_A[name].weight.reshape(-1, wrapper.num_experts, wrapper.in_features).transpose(0, 1),
            wrapper.lora_B[name].weight.reshape(-1, wrapper.r[name], wrapper.num_experts).permute(2, 0, 1),
            wrapper.scaling[name],
        ),
        lambda wrapper, name: LowRank(
            wrapper.lora_A[name].weight.reshape(wrapper.num_experts, -1, wrapper.in_features),
            wrapper.lora_B[name].weight.reshape(-1, wrapper.num_experts, wrapper.r[name]).permute(1, 0, 2),
            wrapper.scaling[name],
        ),
    ):
        with monkeypatch.context() as patch, gategrad(model):
            patch.setattr("lightning_moe.dispatch.low_rank", broken)
            assert not agree(gradients(model), baseline, tolerance=1e-2)
    with monkeypatch.context() as patch, gategrad(model):
        patch.setattr("lightning_moe.dispatch.moe_experts", without_updates)
        assert not agree({**baseline, **gradients(model)}, baseline, tolerance=1e-2)


def without_updates(*args, gate_up_updates, down_updates, **options):
    return moe_experts(*args, **options)


# Adapters that are switched, disabled, merged or added


def test_losses_with_switched_disabled_and_merged_adapters_equal_pefts():
    model = two_adapters()

    def life():
        """The losses of one life."""
        losses = []

        def note():
            with torch.no_grad():
                losses.append(model(input_ids=tokens(), labels=tokens()).loss.item())

        note()
        model.set_adapter("other")
        note()
        model.set_adapter("default")
        note()
        with model.disable_adapter():
            note()
        note()
        model.merge_adapter()
        note()
        model.unmerge_adapter()
        note()
        model.merge_adapter()
        with model.disable_adapter():  # PEFT unmerges
            note()
        note()
        model.base_model.set_adapter(["default", "other"])
        note()
        return losses

    baseline = life()
    with gategrad(model):
        ours = life()
    assert ours == pytest.approx(baseline, rel=1e-5)
    assert len({round(loss, 3) for loss in baseline}) >= 4  # the four states differ


@pytest.mark.parametrize("state", ["switched", "disabled", "merged"])
def test_gradients_after_switching_disabling_and_merging_equal_pefts(state):
    results = []
    for patch in (unpatch_moe, patch_moe):
        model = two_adapters()
        patch(model)
        gradients(model)
        if state == "switched":
            model.set_adapter("other")
            results.append(gradients(model))
        elif state == "disabled":
            with model.disable_adapter():
                model(input_ids=tokens())
            results.append(gradients(model))
        else:
            model.merge_adapter()
            model.unmerge_adapter()
            results.append(gradients(model))
    assert agree(results[1], results[0])


def test_an_adapter_added_while_patched_stays_unmerged(tmp_path):
    model = with_expert_lora(qwen3(), attention=True)
    with gategrad(model):
        model.add_adapter("other", expert_lora_config(r=3, attention=True))
        model.base_model.set_adapter(["default", "other"])
        assert is_unmerged(model)
        ours = gradients(model)
    assert agree(ours, gradients(model))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    model = with_expert_lora(qwen3()).eval()
    with mode():
        baseline = model(input_ids=tokens()).logits
        with gategrad(model):
            assert is_unmerged(model)
            assert relative_error(model(input_ids=tokens()).logits, baseline) < 1e-5


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recompute_gate_up", [False, True])
def test_activation_checkpointing(use_reentrant, recompute_gate_up):
    model = with_expert_lora(qwen3(), attention=True).train()
    baseline = gradients(model)
    enable_checkpointing(model.base_model.model, use_reentrant=use_reentrant)
    if use_reentrant:
        model.enable_input_require_grads()
    with gategrad(model, recompute_gate_up=recompute_gate_up):
        assert agree(gradients(model), baseline)


@pytest.mark.parametrize("autocast_adapters", [True, False])
def test_adapters_over_a_bfloat16_base_are_as_accurate_as_pefts(autocast_adapters):
    """The truth: the same rounded base and adapters in float64, the experts one by one."""
    errors, sizes = {True: {}, False: {}}, {}
    num_draws = 16
    for seed in range(num_draws):
        model = qwen3(hidden_size=64, moe_intermediate_size=64, num_experts=4, num_hidden_layers=1).bfloat16()
        torch.manual_seed(seed)
        options = expert_lora_config(r=16, lora_alpha=16)
        holder = Holder(model.model.layers[0].mlp.experts)
        options.target_parameters = ["experts.gate_up_proj", "experts.down_proj"]
        inject_adapter_in_model(options, holder)
        factors = {name: p for name, p in holder.named_parameters() if "lora_" in name}
        for name, factor in factors.items():
            with torch.no_grad():
                factor.normal_(std=0.3 if "lora_A" in name else 0.01)
            if autocast_adapters:
                factor.data = factor.data.float()
        for parameter in (holder.experts.get_base_layer().gate_up_proj, holder.experts.get_base_layer().down_proj):
            nn.init.normal_(parameter, std=0.125)
        hidden = torch.randn(160, 64).bfloat16().requires_grad_()
        gates = torch.rand(160, 2).bfloat16().requires_grad_()
        index, grad = torch.rand(160, 4).topk(2).indices, torch.randn(160, 64).bfloat16()
        wanted = [hidden, gates, *factors.values()]

        def run(module, hidden, gates, wanted, grad, index=index):
            output = module.experts(hidden, index, gates)
            return [output, *torch.autograd.grad(output, wanted, grad)]

        exact = copy.deepcopy(holder).double()
        exact.experts.get_base_layer().config._experts_implementation = "eager"
        exact_inputs = [hidden.detach().double().requires_grad_(), gates.detach().double().requires_grad_()]
        exact_factors = [p for name, p in exact.named_parameters() if "lora_" in name]
        truth = run(exact, *exact_inputs, [*exact_inputs, *exact_factors], grad.double())
        for patched in (False, True):
            if patched:
                patch_moe(holder)
            for i, (got, want) in enumerate(zip(run(holder, hidden, gates, wanted, grad), truth, strict=True)):
                errors[patched].setdefault(i, []).append(relative_error(got, want) ** 2)
                sizes[i] = num_draws * want.numel()
    for i, ours in errors[True].items():
        baseline = errors[False][i]
        allowed = with_scatter(LOW_PRECISION_SLACK, sizes[i]) * sum(baseline) ** 0.5
        assert 0 < sum(ours) ** 0.5 <= allowed < 0.5  # zeros, or the rows of others, are off by 1 and more in each draw


# Unsupported adapters


def test_an_adapter_on_a_bias_is_unsupported_and_merged_by_peft():
    targets = (GATE_UP, "mlp.experts.gate_up_proj_bias")
    model = with_expert_lora(gpt_oss(), targets, attention=True)
    baseline = gradients(model)
    with gategrad(model) as report:
        assert len(report.active) == len(report.merging) == 2
        (reason,) = report.merging[0].adapter_reasons
        assert reason.code == "lora_parameter"
        assert "gate_up_proj_bias" in reason.message
        assert "gate_up_proj_bias" in str(report)
        assert agree(gradients(model), baseline)


def replaced_forward(wrapper):
    original = wrapper.forward
    wrapper.forward = lambda *args, **kwargs: original(*args, **kwargs)
    return "lora_forward"


def other_class(wrapper):
    class Other(ParamWrapper):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    wrapper.__class__ = Other
    return "lora_forward"


def lora_with_a_bias(wrapper):
    wrapper.lora_bias["default"] = True
    return "lora_variant"


def other_linear(wrapper):
    class Linear(nn.Linear):
        pass

    wrapper.lora_A["default"].__class__ = Linear
    return "lora_factors"


def scaling_is_a_tensor(wrapper):
    wrapper.scaling["default"] = torch.tensor(wrapper.scaling["default"])
    return "lora_scaling"


@pytest.mark.parametrize("change", [replaced_forward, other_class, lora_with_a_bias, other_linear, scaling_is_a_tensor])
@pytest.mark.parametrize("position", [0, 1], ids=["outer", "inner"])
def test_unsupported_adapters_are_merged_by_peft_and_reported(change, position):
    model = with_expert_lora(qwen3(), attention=True)
    baseline = gradients(model)
    changed = wrappers(model)[position]
    code = change(changed)
    before = vars(changed).get("forward")
    with gategrad(model) as report:
        assert len(report.active) == 2
        (merging,) = report.merging
        reasons = {reason.code: reason.message for reason in merging.adapter_reasons}
        assert reasons.keys() - {"lora_inner_forward"} == {code}  # the outer wrapper cannot reach past the inner
        assert changed.parameter_name in reasons[code]
        assert agree(gradients(model), baseline)
    assert vars(changed).get("forward") is before


def test_an_adapter_that_becomes_unsupported_warns_once():
    model = with_expert_lora(qwen3(), attention=True)
    baseline = gradients(model)
    with gategrad(model) as report:
        assert not report.merging
        lora_with_a_bias(wrappers(model)[0])
        with pytest.warns(UserWarning, match=r"PEFT merges adapters into .*down_proj.*lora_variant"):
            assert agree(gradients(model), baseline)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradients(model)


def test_adapters_of_a_fallback_layer_are_merged_by_peft():
    model = with_expert_lora(gpt_oss(), attention=True)
    baseline = gradients(model)
    with gategrad(model, down_bias="fallback") as report:
        assert len(report.fallback) == 2
        assert [reason.code for reason in report[0].adapter_reasons] == ["lora_layer_falls_back"]
        ours = gradients(model)
    assert equal(ours, baseline)


def test_a_layer_that_falls_back_after_patching_merges_its_adapters():
    model = two_adapters()
    baseline = gradients(model)
    with gategrad(model):
        for module in patched_modules(model):
            module.has_post_expert_norm = True  # which the default implementation takes for one that is not there
            module.post_expert_norm = nn.Identity()
        with pytest.warns(UserWarning, match="runs the default implementation after all: .*post_expert_norm"):
            ours = gradients(model)
        again = gradients(model)
    assert agree(ours, baseline)
    assert equal(again, baseline)


def test_mixed_adapter_batches_raise_pefts_error():
    model = with_expert_lora(qwen3())
    with gategrad(model), pytest.raises(ValueError, match="mixed"):
        wrappers(model)[0](torch.zeros(2, 32), torch.zeros(2, 2).long(), torch.zeros(2, 2), adapter_names=["a", "b"])


def test_patching_a_wrapper_itself():
    model = with_expert_lora(qwen3())
    experts = model.base_model.model.model.layers[0].mlp.experts
    with gategrad(experts) as report:
        assert not report.merging
        assert len(touched_modules(experts)) == 3


def test_an_adapter_put_on_after_patching_warns_once_and_merges():
    model = qwen3()
    patch_moe(model)
    adapted = with_expert_lora(model, attention=True)
    with pytest.warns(UserWarning, match="_proj was put on after patch_moe; patch again"):
        ours = gradients(adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(adapted)
    assert not patch_moe(adapted).merging
    assert agree(gradients(adapted), ours)
    unpatch_moe(adapted)
    assert agree(gradients(adapted), ours)


def test_adapters_on_a_family_outside_the_registry_are_reported():
    targets = ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
    report = patch_moe(with_expert_lora(llama4(), targets))
    assert {layer.class_name for layer in report.fallback} == {"Llama4TextExperts"}
    assert all(layer.adapter_reasons[0].code == "lora_layer_falls_back" for layer in report)
    assert len(report.fallback) == len(report.merging) == 2


def test_weights_that_are_not_three_dimensional_fall_back():
    model = qwen3()
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().flatten(1))
    (layer,) = patch_moe(model).fallback
    assert layer.reason.code == "weights"
    assert "gate_up_proj must be three-dimensional" in layer.reason.message


def test_flat_weights_are_judged_at_the_call_as_fsdp_may_gather_them():
    model = qwen3()
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().flatten())
    assert not patch_moe(model).fallback
    with (
        pytest.warns(UserWarning, match="runs the default implementation after all: gate_up_proj must be three-"),
        suppress(Exception),
    ):
        model(input_ids=tokens())
    assert patch_of(experts).reason.code == "weights"


# The patch itself


def test_wrappers_are_fully_restored_and_keep_their_state_dict_keys():
    model = with_expert_lora(qwen3())
    keys = list(model.state_dict())
    with gategrad(model):
        assert len(touched_modules(model)) == 2 + 4
        assert list(model.state_dict()) == keys
    assert not touched_modules(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_of_a_patched_model_runs_its_own_weights(duplicate):
    model = with_expert_lora(qwen3(), attention=True)
    with gategrad(model):
        other = duplicate(model)
    assert not touched_modules(model)
    with torch.no_grad():
        for parameter in wrappers(other)[0].lora_B.parameters():
            parameter.mul_(3.0)
    ours = gradients(other)
    unpatch_moe(other)
    assert not touched_modules(other)
    assert agree(ours, gradients(other))
    assert not agree(ours, gradients(model), tolerance=1e-3)


def test_the_default_implementation_merges():
    model = with_expert_lora(qwen3())
    patch_moe(model)
    inner, outer = patched_modules(model)[0], model.base_model.model.model.layers[0].mlp.experts
    inputs = torch.randn(4, 32), torch.zeros(4, 2).long(), torch.rand(4, 2)
    with merging_calls(model) as merging, default_implementation(inner):
        baseline = outer(*inputs)
    assert merging == [inner]
    with merging_calls(model) as merging:
        assert relative_error(outer(*inputs), baseline) < 1e-5
    assert merging == []
    unpatch_moe(model)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_audit_compares_with_merged_adapters(autocast):
    model = two_adapters()
    patch_moe(model)
    patch = patch_of(patched_modules(model)[0])
    patch.health.audit_due = True
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        gradients(model)
    assert patch.health.drain(micro_batches=8).audit_rel_error < 1e-5  # NaN, had there been no audit
    unpatch_moe(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_adapters_stay_unmerged_in_compiled_layers():
    """The whole model is compiled in tests/test_surroundings.py."""
    model = with_expert_lora(qwen3(num_hidden_layers=1), attention=True)
    baseline = gradients(model)
    model.base_model.model.model.layers[0].compile(backend="eager")
    with gategrad(model) as report:
        assert not report.merging
        ours = gradients(model)
        assert num_active_executions(model) == [1]
    torch._dynamo.reset()
    assert agree(ours, baseline)


def test_no_operation_allocates_a_merged_weight():
    model = with_expert_lora(qwen3(num_experts=64, hidden_size=64, num_hidden_layers=1, vocab_size=64), r=2)
    ids = tokens(1, 4)
    num_weights = model.base_model.model.model.layers[0].mlp.experts.get_base_layer().down_proj.numel()
    gradients(model, ids)  # grads exist from here on
    with gategrad(model), largest_allocation() as ours:
        gradients(model, ids)
    with largest_allocation() as baseline:
        gradients(model, ids)
    assert ours.elements < num_weights / 2
    assert baseline.elements >= num_weights


def test_activation_bytes_saved_count_the_weights_that_are_not_merged():
    model = with_expert_lora(qwen3(), attention=True)
    merged = sum(parameter.numel() * 4 for parameter in expert_weights(model, 0))
    patch_moe(model)
    gradients(model)
    saved = patch_of(patched_modules(model)[0]).health.drain(micro_batches=8).activation_bytes_saved
    with model.disable_adapter():
        embeddings = torch.randn(2, 12, 32, requires_grad=True)
        model(inputs_embeds=embeddings, labels=tokens()).loss.backward()
    without = patch_of(patched_modules(model)[0]).health.drain(micro_batches=8).activation_bytes_saved
    assert saved - without == merged
    unpatch_moe(model)


def expert_weights(model, layer):
    experts = model.base_model.model.model.layers[layer].mlp.experts.get_base_layer()
    return experts.gate_up_proj, experts.down_proj


def test_estimated_activations_are_the_measured_ones():
    for recompute_gate_up in (False, True):
        model = with_expert_lora(qwen3(), attention=True)
        ids = torch.randint(0, 64, (4, 64))
        report = patch_moe(model, recompute_gate_up=recompute_gate_up)
        with measure_moe_activations(model) as measured:
            model(input_ids=ids, labels=ids)
        assert len(measured) == 2
        for found, layer in zip(measured, report.active, strict=True):
            token_level = ids.numel() * 32 * 4  # the layer's input, which baseline code and the operation need as well
            kept = layer.saved_bytes * ids.numel()
            routing = ids.numel() * 2 + 8 * 4  # a byte for each id, and where each of 8 experts' rows end
            assert found.num_bytes == kept + token_level + routing
            baseline = layer.baseline_bytes * ids.numel() + layer.merged_bytes
            assert baseline <= found.baseline_num_bytes <= 1.2 * (baseline + token_level)
        unpatch_moe(model)


# Weights over which PEFT's adapters do not train


def over_packed():
    model = qwen3(num_hidden_layers=1)
    pack(model.model.layers[0].mlp.experts)
    return with_expert_lora(model, [f"model.layers.0.{target}" for target in EXPERT_TARGETS])


def over_fp8():
    model = qwen3(num_hidden_layers=1)
    own = type("OwnFP8Experts", (FP8Experts,), {"forward": FP8Experts.forward})
    own = use_experts_implementation(own, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    model.model.layers[0].mlp.experts = own(model.config, block_size=(16, 16)).requires_grad_(False)
    return with_expert_lora(model)


@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization")
def test_pefts_adapters_over_a_parametrized_weight_are_broken():
    """If this fails they are not any more, and need no error."""
    model = over_packed()
    with torch.no_grad():
        first, second = (model(input_ids=tokens()).logits for _ in range(2))
    assert relative_error(second, first) > 1e-3
    model = over_packed()
    gradients(model)
    with pytest.raises(RuntimeError, match="floating point"):
        gradients(model)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (over_packed, r"gate_up_proj is parametrized by Dequantize, and .*\[lora_over_parametrization\]"),
        (over_fp8, r"gate_up_proj holds quantized values \(torch.float8_e4m3fn\), .*\[lora_over_quantized\]"),
    ],
)
def test_adapters_over_quantized_experts_are_an_error(build, words, tmp_path):
    model = build()
    forwards = {module: vars(module).get("forward") for module in model.modules()}
    with pytest.raises(ValueError, match=words) as raised:
        patch_moe(model)
    assert "model.layers.0.mlp.experts: gate_up_proj" in str(raised.value)
    assert "target_parameters" in str(raised.value)
    assert touched_modules(model) == []
    assert all(vars(module).get("forward") is forward for module, forward in forwards.items())
    module, callback = Tiny(lambda: model), MoEGateGradCallback(on_missing="warn")
    trainer = Trainer(
        callbacks=[callback], logger=DummyLogger(), max_steps=1, accelerator="cpu", default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match=words):
        trainer.fit(module)
    assert callback.report is None
    assert module.losses == []
    assert "on_exception" not in vars(trainer.strategy)


def test_a_deleted_adapter_over_quantized_experts_is_no_error():
    model = over_packed()
    model.base_model.delete_adapter("default")
    (layer,) = patch_moe(model)
    assert layer.reason.code == "parametrized"


def test_a_weight_quantized_under_an_adapter_after_patching_is_an_error():
    model = with_expert_lora(qwen3(num_hidden_layers=1))
    patch_moe(model)
    pack(wrappers(model)[0].get_base_layer(), "gate_up_proj")
    with pytest.raises(ValueError, match="gate_up_proj is parametrized by Dequantize"):
        gradients(model)


def test_bitsandbytes_experts_fall_back_and_adapters_over_them_are_an_error():
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize", reason="bitsandbytes is not installed")

    def build():
        model = qwen3(num_hidden_layers=1, hidden_size=64, moe_intermediate_size=64)
        for name in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(model.model.layers[0].mlp.experts, name, quant_type="nf4")
        return model

    model = build()
    baseline = gradients(model)
    with gategrad(model) as report:
        assert "gate_up_proj is parametrized by Bnb4bitParametrization" in report.fallback[0].reason.message
        assert equal(gradients(model), baseline)
    adapted = with_expert_lora(build(), [f"model.layers.0.{target}" for target in EXPERT_TARGETS])
    with pytest.raises(ValueError, match="gate_up_proj is parametrized by Bnb4bitParametrization, and over"):
        patch_moe(adapted)
