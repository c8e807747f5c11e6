"""AdapterUpdateCheck in a Trainer: it warns in time, with names, and logs."""

import csv
import warnings

import pytest
import torch
from helpers.models import Tiny, qwen3, with_attention_lora, with_expert_lora
from helpers.training import LIGHTNING_WARNINGS
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_moe import AdapterUpdateCheck

pytestmark = LIGHTNING_WARNINGS


def with_fresh_adapters():
    """LoRA as it starts: B is zero, so that A has no gradient in the first step."""
    model = with_expert_lora(qwen3())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    return model


class Trained(Tiny):
    def __init__(self, build=with_fresh_adapters, trains=lambda name: True, **options):
        super().__init__(build, **options)
        self.trains = trains

    def configure_optimizers(self):
        return torch.optim.AdamW([p for n, p in self.named_parameters() if p.requires_grad and self.trains(n)], lr=0.05)


def fit(module, tmp_path, *callbacks, max_steps=6, ckpt_path=None, **options):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = Trainer(
        max_steps=max_steps, logger=logger, callbacks=[AdapterUpdateCheck(**options), *callbacks],
        log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        limit_val_batches=0,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, ckpt_path=ckpt_path)
    said = [str(warning.message) for warning in caught if "were not updated" in str(warning.message)]
    if not (tmp_path / "metrics.csv").exists():
        return trainer, {}, said
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return trainer, {int(row["step"]) + 1: float(row["adapters/experts_not_updated"]) for row in rows}, said


def test_logs_zero_where_all_were_updated(tmp_path):
    trainer, logged, said = fit(Trained(num_batches=8), tmp_path, after_n_steps=4)
    assert not said
    assert trainer.callback_metrics["adapters/experts_not_updated"] == 0
    assert logged == {4: 0.0, 5: 0.0, 6: 0.0}


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop |= trainer.global_step >= self.step


@pytest.mark.parametrize("stop_at", [3, 99])
def test_a_shorter_fit_is_checked_at_its_end(tmp_path, stop_at):
    _, logged, said = fit(Trained(num_batches=8), tmp_path, StopAt(stop_at), max_steps=4)
    assert not said
    assert list(logged.values()) == [0.0]
    _, logged, said = fit(Trained(trains=lambda name: "layers.1.mlp" not in name), tmp_path / "b", max_steps=4)
    assert "by step 4" in said[0]


def test_a_resumed_fit_is_checked_from_where_it_resumes(tmp_path):
    torch.manual_seed(0)
    first = Trained(num_batches=20)
    trainer, *_ = fit(first, tmp_path, max_steps=6)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = Trained(num_batches=20)
    _, logged, said = fit(second, tmp_path / "b", max_steps=12, ckpt_path=tmp_path / "last.ckpt",
                          after_n_steps=4)  # fmt: skip
    assert not said
    assert logged == {10: 0.0, 11: 0.0, 12: 0.0}


def test_warns_with_the_layers_names(tmp_path):
    module = Trained(trains=lambda name: "layers.1.mlp" not in name, num_batches=8)
    trainer, logged, (said,) = fit(module, tmp_path, after_n_steps=3)
    assert trainer.callback_metrics["adapters/experts_not_updated"] == 8
    assert logged == {step: 8.0 for step in (3, 4, 5, 6)}
    assert (
        "gate_up_proj and down_proj, adapter 'default', in network.base_model.model.model.layers.1.mlp.experts" in said
    )
    assert "layers.0" not in said
    assert "by step 3" in said


def test_without_adapters_on_experts_nothing_is_logged(tmp_path):
    trainer, _, said = fit(Trained(build=lambda: with_attention_lora(qwen3())), tmp_path, max_steps=3)
    assert not said
    assert "adapters/experts_not_updated" not in trainer.callback_metrics


@pytest.mark.parametrize("value", [1, -1, 2.5, True, None])
def test_a_bad_number_of_steps_is_refused(value):
    with pytest.raises(MisconfigurationException, match="after_n_steps must be .* at least 2"):
        AdapterUpdateCheck(after_n_steps=value)
