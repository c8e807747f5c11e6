"""What a run of the recipe goes on from: the values of a checkpoint, of the finder, of the run before."""

import pytest
import torch
from helpers.recipe import data, module, trained, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder
from qwen3_lora import UNHELPFUL_WARNINGS

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in UNHELPFUL_WARNINGS),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
]

BF16 = {"precision": "bf16-mixed"}


@pytest.fixture
def four_steps(tmp_path):
    """A module on a bfloat16 base after four steps, and a checkpoint of it."""
    network = module(dtype="bfloat16")
    run = trainer(tmp_path, 4, **BF16)
    run.fit(network, data())
    run.save_checkpoint(tmp_path / "four.ckpt")
    return network, str(tmp_path / "four.ckpt")


def test_a_second_fit_starts_where_the_first_ended(four_steps, tmp_path):
    _, checkpoint = four_steps
    network = module(dtype="bfloat16")
    trainer(tmp_path, 8, **BF16).fit(network, data(), ckpt_path=checkpoint)
    ended = trained(network)
    start = Start()
    trainer(tmp_path, 1, start, **BF16).fit(network, data())
    assert all(map(torch.equal, start.values.values(), ended.values()))


class Start(Callback):
    """What the model holds as training starts; a search for the learning rate starts it too."""

    def on_train_start(self, trainer, pl_module):
        self.values = trained(pl_module)


def test_the_learning_rate_finder_leaves_the_values_as_they_were(tmp_path):
    start, fresh = Start(), Start()
    trainer(tmp_path, 1, fresh, **BF16).fit(module(dtype="bfloat16"), data())
    finder = LearningRateFinder(num_training_steps=8, update_attr=False)
    trainer(tmp_path, 1, start, finder, **BF16).fit(module(dtype="bfloat16"), data())
    assert all(torch.equal(start.values[name], want) for name, want in fresh.values.items())


def test_what_was_loaded_to_validate_is_what_is_saved(four_steps, tmp_path):
    network, checkpoint = four_steps
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    run = trainer(tmp_path, 4, limit_val_batches=1, **BF16)
    run.fit(network, data())
    values = trained(network)
    assert not any(torch.equal(value, values[name]) for name, value in saved.items())
    run.validate(network, data(), ckpt_path=checkpoint, verbose=False)
    run.save_checkpoint(tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in saved.items())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 1}, "data: batch_size x .* is 1 and was 2. Set it as it was"),
        ({"max_length": 48}, "data: max_length is 48 and was 32. Set"),
        ({"seed": 3}, "data: seed is 3 and was 0. Set"),
        ({"validation_every": 2}, r"data: number of sequences is \d+ and was \d+. Set"),
    ],
)
def test_training_does_not_go_on_with_other_data(four_steps, tmp_path, changed, words):
    _, checkpoint = four_steps
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, 5, **BF16).fit(module(dtype="bfloat16"), data(**changed), ckpt_path=checkpoint)


def test_other_data_may_validate(four_steps, tmp_path):
    network, checkpoint = four_steps
    run = trainer(tmp_path, 4, limit_val_batches=1, **BF16)
    assert run.validate(network, data(batch_size=1, max_length=48), ckpt_path=checkpoint, verbose=False)
