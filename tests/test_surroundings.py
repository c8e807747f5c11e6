"""Patched models under loss scaling, threads, weight averaging, torch.compile, torch.export and generate."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.models import (
    Tiny,
    experts_modules,
    gpt_oss,
    is_patched,
    mixtral,
    qwen3,
    tokens,
    with_attention_lora,
    with_expert_lora,
)
from helpers.patching import agree, equal, gradients, merging_calls, num_active_executions
from helpers.reference import relative_error
from helpers.training import LIGHTNING_WARNINGS
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch.optim.swa_utils import AveragedModel
from transformers import CompileConfig

from lightning_moe import MoEGateGradCallback, gategrad, patch_moe, unpatch_moe
from lightning_moe.patch_state import patched_modules

pytestmark = LIGHTNING_WARNINGS


def scaled_steps(model, scale):
    """Three steps in float16 autocast under a GradScaler; the losses, the scale afterwards and the weights."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=scale), []
    for seed in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses, scaler.get_scale(), [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [2.0**10, 2.0**40])
def test_grad_scaler_takes_and_skips_the_same_steps(scale, dtype):
    def model():
        torch.manual_seed(0)
        made = with_attention_lora(qwen3())
        for experts in experts_modules(made):
            experts.to(dtype)
        return made

    start = [p.detach() for p in model().parameters()]
    losses, baseline_scale, baseline_weights = scaled_steps(model(), scale)
    ours = model()
    with gategrad(ours):
        our_losses, our_scale, our_weights = scaled_steps(ours, scale)
    assert our_scale == baseline_scale
    assert our_losses == pytest.approx(losses, rel=2e-3)
    moved = [not torch.equal(a, b) for a, b in zip(baseline_weights, start, strict=True)]
    assert moved == [not torch.equal(a, b) for a, b in zip(our_weights, start, strict=True)]
    assert any(moved) == (scale < 2**20)  # the large scale overflows: every step is skipped
    for a, b in zip(our_weights, baseline_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


def test_threads_and_models_do_not_share_state():
    models = [qwen3(), mixtral(), gpt_oss(), copy.deepcopy(qwen3())]

    def run(model):
        return [gradients(model, tokens(seed=seed)) for seed in range(4)]

    baseline = [run(model) for model in models]
    for model in models[:3]:  # the last one runs the default implementation beside them
        patch_moe(model)
    serial = [run(model) for model in models]
    with ThreadPoolExecutor(len(models)) as pool:
        together = list(pool.map(run, models))
    for model, threaded, alone, expected in zip(models, together, serial, baseline, strict=True):
        assert all(map(equal, threaded, alone))
        assert all(map(agree, threaded, expected))
        unpatch_moe(model)
        assert not is_patched(model)


def test_patching_in_one_thread_does_not_change_another_models_run():
    busy, other = qwen3(), qwen3()
    expected = gradients(busy)

    def patch_and_unpatch(_):
        with gategrad(other):
            gradients(other)

    with ThreadPoolExecutor(1) as pool:
        patching = pool.map(patch_and_unpatch, range(5))
        found = [gradients(busy) for _ in range(10)]
        list(patching)
    assert all(equal(run, expected) for run in found)
    assert not is_patched(other)


def average(_):
    return EMAWeightAveraging(decay=0.5)


def average_late(_):
    return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)


@pytest.mark.filterwarnings("ignore:.*overrides the configure_model")
@pytest.mark.filterwarnings("ignore:.*Swapping scheduler")
@pytest.mark.parametrize("averaging", [average, average_late])
def test_weight_averaging_gives_the_default_implementations_weights(tmp_path, averaging):
    def fit(*callbacks):
        torch.manual_seed(0)
        module, other = Tiny(), averaging(None)
        Trainer(
            max_epochs=3, accelerator="cpu", callbacks=[other, *callbacks], logger=CSVLogger(tmp_path),
            log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        ).fit(module)  # fmt: skip
        return module

    baseline, ours = fit(), fit(MoEGateGradCallback())
    start = Tiny()
    assert ours.was_patched[0]
    assert not patched_modules(ours)
    for (name, a), b, c in zip(ours.named_parameters(), baseline.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
        assert not torch.equal(b, c), name


def test_an_averaged_copy_of_a_patched_model_runs_its_own_weights():
    model = qwen3()
    patch_moe(model)
    averaged = AveragedModel(model)
    unpatch_moe(model)
    assert not is_patched(model)
    assert is_patched(averaged)
    with torch.no_grad():
        for experts in experts_modules(model):
            experts.down_proj.zero_()
        expected = qwen3()(input_ids=tokens()).logits
        torch.testing.assert_close(averaged(input_ids=tokens()).logits, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(model(input_ids=tokens()).logits, expected, atol=1e-3)
    unpatch_moe(averaged)
    assert not is_patched(averaged)


def one_layer():
    return qwen3(num_hidden_layers=1).eval()


def with_disabled_adapters():
    model = with_expert_lora(one_layer()).eval()
    model.base_model.disable_adapter_layers()
    return model


def with_merged_adapters():
    model = with_expert_lora(one_layer()).eval()
    model.merge_adapter()
    return model


@pytest.fixture
def fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("build", "implementation"),
    [
        (one_layer, "grouped_mm"),
        (one_layer, "batched_mm"),
        (gpt_oss, "grouped_mm"),
        (with_disabled_adapters, "grouped_mm"),
        (with_merged_adapters, "grouped_mm"),
    ],
)
def test_compile_fullgraph_where_nothing_needs_a_gradient(build, implementation):
    model = build()
    for experts in experts_modules(model):
        experts.config._experts_implementation = implementation
    patch_moe(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens()).logits
        unpatch_moe(model)
        assert torch.equal(compiled, model(input_ids=tokens()).logits)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_fullgraph_of_a_frozen_model_outside_of_no_grad():
    model = one_layer().requires_grad_(False)
    baseline = model(input_ids=tokens()).logits
    patch_moe(model)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens()).logits, baseline)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_a_model_compiled_for_inference_runs_the_operation_in_training():
    """Layer by layer, which has one break of the graph to trace around and not one in every frame above it."""
    model = one_layer()
    baseline = gradients(model)
    patch_moe(model)
    model.model.layers[0].compile(backend="eager")
    with torch.no_grad():
        model(input_ids=tokens())
    ours = gradients(model)
    assert num_active_executions(model) == [1]
    assert agree(ours, baseline)


@pytest.mark.usefixtures("fresh_compiler")
def test_adapters_stay_unmerged_in_a_compiled_model_without_gradients():
    """PEFT's own forward breaks the graph there too, so nothing is lost by computing without a merged weight."""
    model = with_expert_lora(one_layer()).eval()
    with torch.no_grad():
        with merging_calls(model) as merging:
            baseline = model(input_ids=tokens()).logits
            assert merging == experts_modules(model)
        patch_moe(model)
        with merging_calls(model) as merging:
            compiled = torch.compile(model, backend="eager")(input_ids=tokens()).logits
        assert merging == []
    assert relative_error(compiled, baseline) < 1e-5


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # of Transformers' own
@pytest.mark.parametrize(
    ("build", "mode", "strict"),
    [
        (one_layer, torch.no_grad, False),
        (one_layer, torch.no_grad, True),
        (one_layer, torch.enable_grad, False),
        (lambda: with_expert_lora(one_layer()).eval(), torch.no_grad, False),
    ],
)
def test_export_of_a_patched_model_equals_that_of_an_unpatched_one(build, mode, strict):
    model = build()
    options = {"input_ids": tokens(), "use_cache": False}
    with mode():
        baseline = model(**options).logits
        patch_moe(model)
        exported = torch.export.export(model, (), options, strict=strict)
        assert torch.equal(exported.module()(**options).logits, baseline)


@pytest.mark.usefixtures("fresh_compiler")
def test_generate_with_a_static_cache_and_a_compiled_forward():
    model = one_layer()
    options = {
        "max_new_tokens": 4, "do_sample": False, "cache_implementation": "static",
        "compile_config": CompileConfig(fullgraph=True, backend="eager", mode=None),
    }  # fmt: skip
    options["compile_config"]._compile_all_devices = True
    want = model.generate(tokens(), **options)
    torch._dynamo.reset()
    with gategrad(model):
        assert torch.equal(model.generate(tokens(), **options), want)
