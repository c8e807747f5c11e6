"""MemoryMonitor on a CPU, and the saved activations of each MoE layer beside the baseline's."""

import pytest
import torch
from helpers.models import Tiny, experts_modules, qwen3, tokens, with_attention_lora
from helpers.training import LIGHTNING_WARNINGS, FailsTwice, fit, logged
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_moe import MemoryMonitor, MoEGateGradCallback, gategrad, measure_moe_activations

pytestmark = LIGHTNING_WARNINGS

NAMES = ("allocated_gib", "peak_allocated_gib", "peak_reserved_gib", "step_peak_gib")


def attention_lora(**changes):
    return with_attention_lora(qwen3(**changes))


def test_memory_of_the_process(tmp_path):
    fit(tmp_path, Tiny(attention_lora), MemoryMonitor(), log_every_n_steps=2)
    metrics = {name: logged(tmp_path, f"memory/{name}") for name in NAMES}
    assert {len(values) for values in metrics.values()} == {2}
    for allocated, peak, reserved, _ in zip(*metrics.values(), strict=True):
        assert 0 < allocated <= peak == reserved
    with open(tmp_path / "metrics.csv") as file:
        assert "moe_activations" not in file.readline()


def test_a_steps_peak_is_seen_and_forgotten(tmp_path):
    module = Tiny(attention_lora, num_batches=6)
    step, gib = module.training_step, 0.25

    def hold(batch, batch_idx):
        loss = step(batch, batch_idx)
        if batch_idx == 1:
            module.held = torch.ones(int(gib * 2**30 / 4))
        return loss

    module.training_step = hold
    module.on_train_batch_end = lambda *_: setattr(module, "held", None)
    fit(tmp_path, module, MemoryMonitor(), max_steps=6)
    rises = logged(tmp_path, "memory/step_peak_gib")
    assert rises[1] > 0.9 * gib
    assert max(rises[2:]) < 0.5 * gib


@pytest.mark.parametrize("checkpoint", [False, True])
def test_saved_activations_with_attention_lora(tmp_path, checkpoint):
    """The sizes are Qwen3-30B-A3B's over sixteen: hidden 128, intermediate 48, eight slots."""

    def build():
        model = attention_lora(hidden_size=128, moe_intermediate_size=48, num_experts=16, num_experts_per_tok=8)
        if checkpoint:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return model

    monitor = MemoryMonitor(measure_activations_at_step=1)
    measured = fit(tmp_path, Tiny(build), MoEGateGradCallback(), monitor)
    assert len(monitor.activations) == 2
    num_rows, hidden = 2 * 12 * 8, 128
    for layer in monitor.activations:
        assert layer.num_tokens == 2 * 12
        assert layer.num_bytes <= 0.45 * layer.baseline_num_bytes
        assert (num_rows, hidden) not in layer.shapes
    assert logged(tmp_path, "memory/moe_activations_mib") == [sum(t.num_bytes for t in monitor.activations) / 2**20] * 3
    assert (
        logged(tmp_path, "memory/moe_activations_baseline_mib")
        == [sum(t.baseline_num_bytes for t in monitor.activations) / 2**20] * 3
    )
    plain = fit(tmp_path / "plain", Tiny(build), MoEGateGradCallback())
    assert measured.losses == plain.losses  # measuring does not touch the training


def test_each_fit_measures_anew(tmp_path):
    monitor, module = MemoryMonitor(measure_activations_at_step=0), Tiny(attention_lora)
    fit(tmp_path / "baseline", module, monitor)
    assert all(layer.num_bytes == layer.baseline_num_bytes for layer in monitor.activations)
    fit(tmp_path / "ours", module, MoEGateGradCallback(), monitor)
    assert all(layer.num_bytes < layer.baseline_num_bytes for layer in monitor.activations)


def test_others_hooks_run_once():
    model, calls = attention_lora(), []
    experts_modules(model)[0].register_forward_hook(lambda *_: calls.append(1))
    with gategrad(model), measure_moe_activations(model):
        model(input_ids=tokens())
    assert calls == [1]


def test_no_hook_stays_where_another_callback_fails_in_turn(tmp_path):
    module = Tiny(attention_lora)
    with pytest.raises(RuntimeError, match="again"):
        fit(
            tmp_path,
            module,
            FailsTwice("on_train_start", ValueError("no")),
            MemoryMonitor(measure_activations_at_step=0),
        )
    module.training_step = lambda *_: 1 / 0
    with pytest.raises(RuntimeError, match="again"):
        fit(
            tmp_path,
            module,
            FailsTwice("on_test_start", ValueError("no")),
            MemoryMonitor(measure_activations_at_step=0),
        )
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_the_output_of_the_down_projection_is_seen_in_the_baseline():
    model = attention_lora()
    with measure_moe_activations(model) as measured:
        model(input_ids=tokens())
    assert all((2 * 12 * 2, 32) in layer.shapes for layer in measured)
    assert all(layer.num_bytes == layer.baseline_num_bytes for layer in measured)


def test_only_runs_with_gradients_are_measured_and_no_hook_stays():
    model = attention_lora()
    with gategrad(model), measure_moe_activations(model) as measured:
        with torch.no_grad():
            model(input_ids=tokens())
        assert measured == []
        for _ in range(2):
            model(input_ids=tokens())
        assert len(measured) == 2
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_hook_stays_after_an_exception(tmp_path):
    module = Tiny(attention_lora)
    module.training_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, MemoryMonitor(measure_activations_at_step=0))
    assert not any(child._forward_pre_hooks for child in module.modules())


@pytest.mark.parametrize("step", [-1, 1.5, True])
def test_arguments_out_of_range(step):
    with pytest.raises(
        MisconfigurationException, match="measure_activations_at_step must be None or an integer of at least 0"
    ):
        MemoryMonitor(measure_activations_at_step=step)


def test_a_fit_without_a_logger_warns(tmp_path):
    with pytest.warns(UserWarning, match="MemoryMonitor logs nowhere"):
        fit(tmp_path, Tiny(), MemoryMonitor(), logger=False)
