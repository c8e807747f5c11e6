"""The recipe over two ranks: as one with the same batches, checkpoints of either read by the other."""

import json
import warnings
from functools import partial

import pytest
import torch
from helpers.ranks import together
from helpers.recipe import data, module, trainer
from helpers.reference import relative_error
from helpers.training import logged
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lora.fault_tolerance import AtomicCheckpointIO
from lora.sharding import FullyShardStrategy, check_strategy
from qwen3_lora import UNHELPFUL_WARNINGS
from safetensors.torch import load_file

from lightning_moe import AdapterExport, AdapterUpdateCheck, ExpertLoadMonitor, MoEGateGradCallback
from lightning_moe.adapters.export import export_checkpoint
from lightning_moe.adapters.files import CONFIG, WEIGHTS
from lightning_moe.integrations.sharding import is_sharded

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in UNHELPFUL_WARNINGS),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]

STRATEGIES = {
    "auto": lambda devices: "auto",
    "ddp": lambda devices: DDPStrategy(),
    "fsdp": lambda devices: FullyShardStrategy(devices),
}


def train(folder, kind, ckpt_path=None, accelerator="cpu", several=2, **options):
    """Four steps on this rank, alone if `kind` is "auto"; a checkpoint after the second and the last."""
    warnings.simplefilter("ignore")
    devices = 1 if kind == "auto" else several
    network = module(**{"experts": True} | options)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    run = trainer(
        folder, 4, MoEGateGradCallback(), ExpertLoadMonitor(), AdapterUpdateCheck(2), AdapterExport(),
        saving, enable_checkpointing=True,
        logger=CSVLogger(folder, "", version=""), log_every_n_steps=1, strategy=STRATEGIES[kind](devices),
        accelerator=accelerator, devices=devices, use_distributed_sampler=False, gradient_clip_val=0.5,
        limit_val_batches=2, val_check_interval=2, check_val_every_n_epoch=None,
        plugins=[AtomicCheckpointIO()], precision="bf16-mixed" if options.get("dtype") == "bfloat16" else "32-true",
    )  # fmt: skip
    run.fit(network, data(batch_size=4 // devices), ckpt_path=ckpt_path)
    assert is_sharded(network) == (kind == "fsdp")


def values(checkpoint):
    """What a checkpoint has for the model and the optimizer, by name."""
    content = torch.load(checkpoint, "cpu", weights_only=True)
    state = content["optimizer_states"][0]["state"]
    moments = {f"{name}.{what}": value for name, each in state.items() for what, value in each.items()}
    return content["state_dict"] | moments


def deviation(ours, wanted):
    assert ours.keys() == wanted.keys()
    return max(relative_error(ours[name], value) for name, value in wanted.items())


LIMIT = 1e-5
HALFWAY, LAST = "step=2.ckpt", "step=4.ckpt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of one rank, and of two."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "auto", "auto")
    for kind in ("ddp", "fsdp"):
        together(train, folder / kind, kind, checkpointing="full")
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_does(runs, kind):
    """With the same documents in the same order, batches of four become two on each rank; each token counts once."""
    assert deviation(values(runs / kind / LAST), values(runs / "auto" / LAST)) < LIMIT
    for name in ("train/loss", "train/grad_norm", "val/loss", "moe/load_max_over_mean", "moe/idle_experts"):
        assert logged(runs / kind, name) == pytest.approx(logged(runs / "auto", name), rel=LIMIT), name


def test_the_limit_tells_other_steps_apart(runs):
    assert deviation(values(runs / "auto" / HALFWAY), values(runs / "auto" / LAST)) > 100 * LIMIT


def test_the_adapter_is_exported_whole(runs, tmp_path):
    ours, wanted = (load_file(runs / kind / "adapter" / WEIGHTS) for kind in ("fsdp", "auto"))
    assert deviation(ours, wanted) < LIMIT
    export_checkpoint(runs / "fsdp" / LAST, tmp_path)
    again = load_file(tmp_path / WEIGHTS)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], value) for name, value in ours.items())
    configs = [json.loads((folder / CONFIG).read_text()) for folder in (tmp_path, runs / "auto" / "adapter")]
    for config in configs:
        for targets in (config["target_modules"], config["target_parameters"]):
            targets.sort()  # PEFT has sets of them
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("saved", "resumed"), [("auto", "ddp"), ("auto", "fsdp"), ("ddp", "fsdp"), ("fsdp", "auto"), ("fsdp", "fsdp")]
)
def test_checkpoints_move_between_one_and_two_ranks(runs, tmp_path, saved, resumed):
    start = partial(train, tmp_path, resumed, ckpt_path=runs / saved / HALFWAY)
    start() if resumed == "auto" else together(start)
    assert deviation(values(tmp_path / LAST), values(runs / "auto" / LAST)) < LIMIT
    assert logged(tmp_path, "train/loss") == pytest.approx(logged(runs / "auto", "train/loss")[2:], rel=LIMIT)


def test_bfloat16_is_no_further_from_float32_than_on_one_rank(runs, tmp_path):
    train(tmp_path / "auto", "auto", dtype="bfloat16")
    together(train, tmp_path / "fsdp", "fsdp", dtype="bfloat16")
    exact, errors = values(runs / "auto" / LAST), {}
    for kind in ("auto", "fsdp"):
        ours = values(tmp_path / kind / LAST)
        assert {value.dtype for value in ours.values()} == {torch.float32}
        errors[kind] = deviation(ours, exact)
    assert errors["fsdp"] < 1.2 * errors["auto"]


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_cannot_train_or_resume_are_refused(kind):
    with pytest.raises(ValueError, match=f"trainer.strategy {kind.__name__} is not supported: .*FullyShardStrategy"):
        check_strategy(kind.__new__(kind))  # two of them cannot be made without a GPU
