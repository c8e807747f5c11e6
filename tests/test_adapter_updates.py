"""The watch sees which experts' adapters got a gradient and which changed; the callback says so in time."""

import csv
import warnings

import pytest
import torch
from helpers.models import Tiny, experts_modules, qwen3, tokens, with_attention_lora, with_expert_lora
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft.tuners.lora import ParamWrapper
from torch import nn
from torch.distributed.tensor import distribute_tensor

from lightning_moe import MoEGateGradCallback
from lightning_moe.adapter_updates import AdapterUpdates, NotUpdated, format_report
from lightning_moe.integrations.peft_experts import split_a, split_b

EVERY = 2 * 8  # layers x experts


def default_init():
    """LoRA as it starts: B is zero, so that A has no gradient in the first step."""
    model = with_expert_lora(qwen3())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    return model


def train(model, watch, num_steps=3, learning_rate=0.1, parameters=None, ids=None):
    parameters = [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for step in range(num_steps):
        batch = tokens(8, 32, seed=step) if ids is None else ids
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        watch.note_gradients()
        optimizer.step()


def test_adapters_that_train_have_moved():
    model = default_init()
    watch = AdapterUpdates(model)
    assert len(watch) == 4
    train(model, watch)
    assert watch.conclude() == (0, [])


def test_before_any_step_none_has():
    watch = AdapterUpdates(default_init())
    count, unmoved = watch.conclude()
    assert count == EVERY
    assert [(u.without_gradient, u.unchanged) for u in unmoved] == [(8, 0)] * 4


def test_the_first_step_moves_b_only():
    model = default_init()
    watch = AdapterUpdates(model)
    train(model, watch, num_steps=1)
    count, unmoved = watch.conclude()
    assert count == EVERY
    assert [(u.without_gradient, u.unchanged) for u in unmoved] == [(8, 0)] * 4


@pytest.mark.parametrize("build", [default_init, lambda: with_expert_lora(qwen3())], ids=["fresh", "trained"])
@pytest.mark.parametrize("outside", ["lora_", "lora_B"])
def test_an_adapter_outside_the_optimizer_is_unchanged(build, outside):
    model = build()
    inside = [p for n, p in model.named_parameters() if p.requires_grad and f"layers.1.mlp.experts.{outside}" not in n]
    watch = AdapterUpdates(model)
    train(model, watch, parameters=inside)
    count, (unmoved,) = watch.conclude()
    assert count == 8
    assert (unmoved.layer, unmoved.parameter) == ("base_model.model.model.layers.1.mlp.experts", "down_proj")
    assert (unmoved.without_gradient, unmoved.unchanged) == (0, 8)
    assert "is the adapter in the optimizer" in unmoved.reasons


def test_factors_that_are_not_finite_have_not_moved():
    model = default_init()
    watch = AdapterUpdates(model)
    train(model, watch)
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    with torch.no_grad():
        split_b(wrapper.lora_B["default"].weight, 8)[5, 0, 0] = torch.nan
    count, (unmoved,) = watch.conclude()
    assert (count, unmoved.nonfinite, unmoved.unchanged) == (1, 1, 0)
    assert unmoved.reasons == "1 of 8 experts hold NaN or infinity"


def test_gradients_of_nan_are_none():
    model = default_init()
    watch = AdapterUpdates(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, torch.nan)
    watch.note_gradients()
    assert {u.without_gradient for u in watch.conclude()[1]} == {8}


def test_a_learning_rate_too_small_for_the_dtype_is_seen():
    model = with_expert_lora(qwen3())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    watch = AdapterUpdates(model)
    train(model, watch, learning_rate=1e-9)
    count, unmoved = watch.conclude()
    assert count == EVERY
    assert {u.without_gradient for u in unmoved} == {0}


def test_an_expert_without_a_token_is_counted_alone():
    model = default_init()
    watch = AdapterUpdates(model)
    handles = [
        module.register_forward_pre_hook(lambda _, args: (args[0], args[1].where(args[1] != 3, 4), args[2]))
        for module in experts_modules(model)
    ]
    train(model, watch)
    for handle in handles:
        handle.remove()
    count, unmoved = watch.conclude()
    assert count == 2
    assert {(u.num_experts, u.without_gradient, u.unchanged) for u in unmoved} == {(8, 1, 0)}
    assert "1 of 8 experts without a gradient (too few tokens went there" in unmoved[0].reasons


def test_one_changed_element_of_one_expert_is_seen():
    model = default_init()
    watch = AdapterUpdates(model)
    for factors in watch._factors.values():
        for factor in factors:
            factor.has_gradient[:] = True
    for number, wrapper in enumerate(m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "num_experts")):
        with torch.no_grad():
            split_a(wrapper.lora_A["default"].weight, 8)[number, 1, 2] += 1e-3
            split_b(wrapper.lora_B["default"].weight, 8)[number, 3, 1] += 1e-3
    _, unmoved = watch.conclude()
    assert [u.unchanged for u in unmoved] == [7] * 4


def test_frozen_adapters_are_not_watched():
    model = default_init().requires_grad_(False)
    assert len(AdapterUpdates(model)) == 0
    model.base_model.model.model.layers[0].mlp.experts.lora_B.requires_grad_(True)
    assert len(AdapterUpdates(model)) == 1
    assert len(AdapterUpdates(with_attention_lora(qwen3()))) == 0


def test_the_listing_names_reasons_parameters_and_layers_once():
    unmoved = [
        NotUpdated(f"layers.{i}", name, "default", 8, 2, 3) for i in range(2) for name in ("up_proj", "down_proj")
    ]
    (line,) = format_report(unmoved).splitlines()
    assert line.startswith("- 2 of 8 experts without a gradient")
    assert "; 3 of 8 experts with a gradient but unchanged" in line
    assert line.endswith("up_proj and down_proj, adapter 'default', in layers.0, layers.1")
    assert len(format_report([*unmoved, NotUpdated("layers.2", "up_proj", "default", 8, 8, 0)]).splitlines()) == 2


class Trained(Tiny):
    def __init__(self, build=default_init, trains=lambda name: True, **options):
        super().__init__(build, **options)
        self.trains = trains

    def configure_optimizers(self):
        return torch.optim.AdamW([p for n, p in self.named_parameters() if p.requires_grad and self.trains(n)], lr=0.05)


def fit(module, tmp_path, *callbacks, max_steps=6, ckpt_path=None, **options):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = Trainer(
        max_steps=max_steps, logger=logger, callbacks=[MoEGateGradCallback(**options), *callbacks],
        log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        limit_val_batches=0,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, ckpt_path=ckpt_path)
    said = [str(warning.message) for warning in caught if "have not moved" in str(warning.message)]
    if not (tmp_path / "metrics.csv").exists():
        return trainer, [], said
    with open(tmp_path / "metrics.csv") as file:
        logged = [row.get("adapters/experts_not_updated") for row in csv.DictReader(file)]
    return trainer, [float(value) if value else None for value in logged], said


def test_the_callback_logs_a_zero_where_all_have_moved(tmp_path):
    trainer, logged, said = fit(Trained(num_batches=8), tmp_path, after_n_steps=4)
    assert not said
    assert trainer.callback_metrics["adapters/experts_not_updated"] == 0
    assert logged == [None] * 3 + [0.0] * 3


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop |= trainer.global_step >= self.step


@pytest.mark.parametrize("stop_at", [3, 99])
def test_a_fit_too_short_says_it_at_the_end(tmp_path, stop_at):
    _, logged, said = fit(Trained(num_batches=8), tmp_path, StopAt(stop_at), max_steps=4)
    assert not said
    assert logged[-1] == 0.0
    assert not any(value is not None for value in logged[:-1])
    _, logged, said = fit(Trained(trains=lambda name: "layers.1.mlp" not in name), tmp_path / "b", max_steps=4)
    assert "by step 4" in said[0]


def test_a_resumed_fit_is_watched_from_where_it_resumes(tmp_path):
    torch.manual_seed(0)
    first = Trained(num_batches=20)
    trainer, *_ = fit(first, tmp_path, max_steps=6, after_n_steps=0)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = Trained(num_batches=20)
    _, logged, said = fit(second, tmp_path / "b", max_steps=12, ckpt_path=tmp_path / "last.ckpt",
                          after_n_steps=4)  # fmt: skip
    assert not said
    assert logged == [None] * 3 + [0.0] * 3


def test_sharded_factors_are_gathered():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = with_expert_lora(qwen3())
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for wrapper in (module for module in model.modules() if isinstance(module, ParamWrapper)):
            for linear in (*wrapper.lora_A.values(), *wrapper.lora_B.values()):
                linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh))
        watch = AdapterUpdates(model)
        for factors in watch._factors.values():
            for factor in factors:
                factor.parameter.grad = torch.ones_like(factor.parameter)
        watch.note_gradients()
        assert watch.conclude()[0] == EVERY
        for factors in watch._factors.values():
            for factor in factors:
                with torch.no_grad():
                    factor.parameter += 1.0
        assert watch.conclude() == (0, [])
    finally:
        torch.distributed.destroy_process_group()


def test_the_callback_warns_with_the_layers_names(tmp_path):
    module = Trained(trains=lambda name: "layers.1.mlp" not in name, num_batches=8)
    trainer, logged, (said,) = fit(module, tmp_path, after_n_steps=3)
    assert trainer.callback_metrics["adapters/experts_not_updated"] == 8
    assert logged == [None, None, 8.0, 8.0, 8.0, 8.0]
    assert (
        "gate_up_proj and down_proj, adapter 'default', in network.base_model.model.model.layers.1.mlp.experts" in said
    )
    assert "layers.0" not in said
    assert "by step 3" in said


@pytest.mark.parametrize("options", [{"after_n_steps": 0}, {"enabled": False}])
def test_the_check_can_be_left_out(tmp_path, options):
    trainer, logged, said = fit(Trained(), tmp_path, max_steps=3, **options)
    assert not said
    assert "adapters/experts_not_updated" not in trainer.callback_metrics


def test_without_adapters_on_experts_nothing_is_logged(tmp_path):
    trainer, _, said = fit(Trained(build=lambda: with_attention_lora(qwen3())), tmp_path, max_steps=3)
    assert not said
    assert "adapters/experts_not_updated" not in trainer.callback_metrics


@pytest.mark.parametrize("value", [1, -1, 2.5, True, None])
def test_a_bad_number_of_steps_is_refused(value):
    with pytest.raises(MisconfigurationException, match="after_n_steps must be .* at least 2"):
        MoEGateGradCallback(after_n_steps=value)
