"""What a run of the recipe goes on from: the float32 values of a checkpoint, of the finder, of the run before."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lora.data import InstructionData
from qwen3_lora import UNHELPFUL_WARNINGS, Qwen3LoRA

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in UNHELPFUL_WARNINGS),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
]

ARCHITECTURE = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def module(**options):
    torch.manual_seed(0)
    return Qwen3LoRA(ARCHITECTURE, **{"rank": 4, "learning_rate": 1e-2, "warmup_steps": 0} | options)


def trainer(folder, steps, *callbacks, **options):
    defaults = {"accelerator": "cpu", "logger": False, "limit_val_batches": 0, "enable_checkpointing": False}
    return Trainer(
        max_steps=steps, default_root_dir=folder, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **defaults | options,
    )  # fmt: skip


def data(**options):
    return InstructionData(**{"batch_size": 2, "max_length": 32} | options)


def trained(network):
    return {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}


@pytest.fixture
def four_steps(tmp_path):
    """A module in bfloat16 after four steps, and a checkpoint of it."""
    network = module(dtype="bfloat16")
    run = trainer(tmp_path, 4)
    run.fit(network, data())
    run.save_checkpoint(tmp_path / "four.ckpt")
    return network, str(tmp_path / "four.ckpt")


def test_a_second_fit_starts_where_the_first_ended(four_steps, tmp_path):
    _, checkpoint = four_steps
    network = module(dtype="bfloat16")
    trainer(tmp_path, 8).fit(network, data(), ckpt_path=checkpoint)
    ended = trained(network)
    network.hparams["learning_rate"] = 1e-9
    trainer(tmp_path, 1).fit(network, data())
    assert all(map(torch.equal, trained(network).values(), ended.values()))


class Start(Callback):
    """What the model and its optimizer hold as training starts; a search for the learning rate starts it too."""

    def on_train_start(self, trainer, pl_module):
        self.model = trained(pl_module)
        self.masters = {name: master.detach().clone() for name, master in pl_module._masters.by_name.items()}


def test_the_learning_rate_finder_leaves_the_optimizers_values_as_they_were(tmp_path):
    start, fresh = Start(), Start()
    trainer(tmp_path, 1, fresh).fit(module(dtype="bfloat16"), data())
    network = module(dtype="bfloat16")
    run = trainer(tmp_path, 1, start, LearningRateFinder(num_training_steps=8, update_attr=False))
    run.fit(network, data())
    for name, want in fresh.masters.items():
        assert torch.equal(start.masters[name], want)
        assert torch.equal(start.model[name].float(), want)
    ended = trained(network)
    network.hparams["learning_rate"] = 1e-9
    trainer(tmp_path, 1).fit(network, data())  # from here, not from where the search began
    assert all(map(torch.equal, trained(network).values(), ended.values()))


def test_what_was_loaded_to_validate_is_what_is_saved(four_steps, tmp_path):
    network, checkpoint = four_steps
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    run = trainer(tmp_path, 4, limit_val_batches=1)
    run.fit(network, data())
    assert not any(torch.equal(value, network._masters.by_name[name]) for name, value in saved.items())
    run.validate(network, data(), ckpt_path=checkpoint, verbose=False)
    run.save_checkpoint(tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in saved.items())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 1}, "data: batch_size x processes is 1 and was 2. Set it as it was"),
        ({"max_length": 48}, "data: max_length is 48 and was 32; number of sequences is "),
        ({"packing": "separate"}, "packing is 'separate' and was 'none'"),
        ({"seed": 3}, "data: seed is 3 and was 0. Set"),
        ({"validation_every": 2}, r"data: number of sequences is \d+ and was \d+. Set"),
    ],
)
def test_training_does_not_go_on_with_other_data(four_steps, tmp_path, changed, words):
    _, checkpoint = four_steps
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, 5).fit(module(dtype="bfloat16"), data(**changed), ckpt_path=checkpoint)


def test_other_data_may_validate(four_steps, tmp_path):
    network, checkpoint = four_steps
    run = trainer(tmp_path, 4, limit_val_batches=1)
    assert run.validate(network, data(batch_size=1, max_length=48), ckpt_path=checkpoint, verbose=False)
