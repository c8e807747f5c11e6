"""CUDAGraphCallback with a stand-in for the graphs: a fit trains as without it, and nothing is left after it."""

import pytest
import torch
from helpers.graphs import StandIn
from helpers.training import LIGHTNING_WARNINGS, Fails, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_moe import CUDAGraphCallback, cuda_graph

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*does not have a .LearningRateScheduler"),
]


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.lr = 0.1
        self.seen = []

    def loss(self, batch):
        return (self.network(batch["x"]) - batch["y"]).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        """Of 15 samples, whose last batch is a smaller one."""
        draws = torch.Generator().manual_seed(0)
        samples = [{"x": torch.randn(4, generator=draws), "y": torch.randn(1, generator=draws)} for _ in range(15)]
        return DataLoader(samples, batch_size=2)

    val_dataloader = train_dataloader


@pytest.fixture
def recorders(monkeypatch):
    """The stand-ins that are made."""
    made = []

    def make():
        made.append(StandIn())
        return made[-1]

    monkeypatch.setattr(cuda_graph, "Recorder", make)
    return made


OPTIONS = {
    "max_steps": 16, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "limit_val_batches": 1, "logger": False,
    "val_check_interval": 3,
}  # fmt: skip


def test_two_fits_train_as_without(tmp_path, recorders):
    alone, module = Regression(), Regression()
    plain, callback = trainer(tmp_path, **OPTIONS), CUDAGraphCallback(mode=True)
    graphed = trainer(tmp_path, callback, **OPTIONS)
    for steps in (16, 24):
        for run, found in ((plain, alone), (graphed, module)):
            run.fit_loop.epoch_loop.max_steps = steps
            run.fit(found)
        assert recorders[-1].replays
        assert recorders[-1].resets == 2 * len(callback.lines)
        assert callback.graphed is None
        assert "loss" not in vars(module)
        assert any(line.startswith("captured x (2, 4), y (2, 1)") for line in callback.lines)
    assert len(recorders) == 2
    assert module.seen == alone.seen
    assert all(map(torch.equal, module.parameters(), alone.parameters()))


@pytest.mark.parametrize("error", [RuntimeError("the step fails"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_what_ends_a_fit_restores(tmp_path, recorders, error):
    module = Regression()
    run = trainer(
        tmp_path, CUDAGraphCallback(mode=True), Fails("on_validation_end", error), **OPTIONS | {"val_check_interval": 5}
    )
    with pytest.raises((RuntimeError, SystemExit)):
        run.fit(module)
    assert "loss" not in vars(module)
    assert recorders[0].resets == 2


def test_averaged_weights_are_those_without(tmp_path, recorders):
    found = []
    for callbacks in ([], [CUDAGraphCallback(mode=True)]):
        module = Regression()
        trainer(tmp_path, *callbacks, EMAWeightAveraging(), **OPTIONS).fit(module)
        found.append([parameter.detach().clone() for parameter in module.parameters()])
    assert recorders[0].replays
    assert all(map(torch.equal, *found))


def test_a_learning_rate_is_searched_as_without(tmp_path, recorders):
    found = []
    for callbacks in ([], [CUDAGraphCallback(mode=True)]):
        module = Regression()
        run = trainer(tmp_path, *callbacks, logger=False)
        search = Tuner(run).lr_find(module, num_training=20, early_stop_threshold=None)
        found.append((search.results["loss"], search.suggestion()))
        assert "loss" not in vars(module)
    assert recorders[0].replays
    assert found[0] == found[1]


def test_validation_alone_is_left_alone(tmp_path, recorders):
    trainer(tmp_path, CUDAGraphCallback(), logger=False, limit_val_batches=1).validate(Regression(), verbose=False)
    assert not recorders


def test_a_module_without_the_method_is_named(tmp_path):
    module = Regression()
    with pytest.raises(MisconfigurationException, match="Regression has no method 'losses'"):
        trainer(tmp_path, CUDAGraphCallback("losses"), logger=False).fit(module)
    with pytest.raises(MisconfigurationException, match="Regression has no method 'network'"):  # a criterion, say
        trainer(tmp_path, CUDAGraphCallback("network"), logger=False).fit(module)
    with pytest.raises(MisconfigurationException, match="mode must be 'auto' or True"):
        CUDAGraphCallback(mode=False)
