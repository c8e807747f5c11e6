"""Tests of the speed that is logged: tokens and FLOPs over the time between two logs, validation left out."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lora import watching
from lora.watching import StepSpeed
from qwen3_lora import UNHELPFUL_WARNINGS
from torch.utils.data import DataLoader

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in UNHELPFUL_WARNINGS]


class Clock:
    now = 0.0


class Slow(LightningModule):
    """Takes a second for a training step and a hundred for one of validation."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"dtype": "bfloat16"})
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.asked = []

    def step_flops(self, num_tokens, sum_squared_lengths):
        self.asked.append((num_tokens, sum_squared_lengths))
        return 10 * num_tokens

    def training_step(self, batch, batch_idx):
        Clock.now += 1
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        Clock.now += 100

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(count):
    boundaries = torch.tensor([0, 3, 8], dtype=torch.int32)
    rows = [{"input_ids": torch.zeros(1, 8, dtype=torch.long), "cu_seq_lens_q": boundaries}] * count
    return DataLoader(rows, batch_size=None)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(watching.time, "perf_counter", lambda: Clock.now)

    def fit(**options):
        logged = []
        logger = CSVLogger(tmp_path)
        monkeypatch.setattr(logger, "log_metrics", lambda metrics, step=None: logged.append(dict(metrics)))
        module, speed = Slow(), StepSpeed()
        trainer = Trainer(
            accelerator="cpu", logger=logger, callbacks=[speed], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_epochs=1, log_every_n_steps=2, num_sanity_val_steps=0, **options,
        )  # fmt: skip
        monkeypatch.setattr(
            speed, "on_train_start", lambda *args: (StepSpeed.on_train_start(speed, *args), known(speed))
        )
        trainer.fit(module, batches(4 * options.get("accumulate_grad_batches", 1)), batches(1))
        return module, [row for row in logged if "speed/seconds_per_step" in row]

    def known(speed):
        speed._available = 1_000_000

    return fit


@pytest.mark.parametrize("accumulate", [1, 3])
def test_speed_over_two_steps_without_validation(run, accumulate):
    module, rows = run(val_check_interval=2 * accumulate, accumulate_grad_batches=accumulate)
    assert [row["speed/seconds_per_step"] for row in rows] == [accumulate] * 2
    assert [row["speed/tokens_per_second"] for row in rows] == [8, 8]
    assert [row["speed/mfu"] for row in rows] == pytest.approx([80 / 1_000_000] * 2)
    assert module.asked == [(16 * accumulate, 2 * accumulate * (3**2 + 5**2))] * 2


def test_flops_that_cannot_be_counted_end_no_run_and_warn_once(run, monkeypatch):
    monkeypatch.setattr(Slow, "step_flops", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="speed/mfu is left out: ZeroDivisionError") as warned:
        _, rows = run()
    assert len([one for one in warned if "speed/mfu" in str(one.message)]) == 1
    assert [row["speed/tokens_per_second"] for row in rows] == [8, 8]
    assert not any("speed/mfu" in row for row in rows)


def test_the_card_s_arithmetic_is_that_of_the_models_dtype(monkeypatch):
    asked = []
    monkeypatch.setattr(watching, "get_available_flops", lambda *args: asked.append(args) or 1)
    module = Slow()
    module._device = torch.device("cuda", 0)
    speed = StepSpeed()
    monkeypatch.setattr(speed, "_begin", lambda *args: None)
    speed.on_train_start(type("Trainer", (), {"global_step": 0}), module)
    assert asked == [(torch.device("cuda", 0), torch.bfloat16)]
