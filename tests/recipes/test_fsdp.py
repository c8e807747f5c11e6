"""The recipe over two ranks: as one with the same batches, checkpoints of either read by the other."""

import json
from functools import partial

import pytest
import torch
from helpers.launch import together
from helpers.recipe_ranks import HALFWAY, LAST, RECIPE_WARNINGS, deviation, train, values
from helpers.training import logged
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from lora.sharding import check_strategy
from safetensors.torch import load_file

from lightning_moe.adapters.export import export_checkpoint
from lightning_moe.adapters.files import CONFIG, WEIGHTS

pytestmark = RECIPE_WARNINGS

LIMIT = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of one rank, and of two."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "auto", "auto")
    for kind, mode in (("ddp", "full"), ("fsdp", "selective")):
        together(train, folder / kind, kind, checkpointing=mode)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_does(runs, kind):
    """With the same documents in the same order, batches of four become two on each rank; each token counts once."""
    assert deviation(values(runs / kind / LAST), values(runs / "auto" / LAST)) < LIMIT
    for name in ("train/loss", "train/grad_norm", "val/loss", "moe/load_max_over_mean", "moe/idle_experts"):
        assert logged(runs / kind, name) == pytest.approx(logged(runs / "auto", name), rel=LIMIT), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_head_that_trains_does_so_over_two_ranks(kind, tmp_path):
    start = partial(train, modules_to_save=["lm_head"])
    start(tmp_path / "auto", "auto")
    together(start, tmp_path / kind, kind)
    wanted = values(tmp_path / "auto" / LAST)
    assert any("lm_head" in name for name in wanted)
    assert deviation(values(tmp_path / kind / LAST), wanted) < LIMIT


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
    # The largest of some fifty errors each, which rounding spreads: the ratio was 1.26, and 1.0 for other random bases.
    assert errors["fsdp"] < 2 * errors["auto"]
    one_rank, half = values(tmp_path / "auto" / LAST), values(tmp_path / "fsdp" / HALFWAY)
    assert deviation(values(tmp_path / "fsdp" / LAST), one_rank) < deviation(half, one_rank) / 10


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_cannot_train_or_resume_are_refused(kind):
    with pytest.raises(ValueError, match=f"trainer.strategy {kind.__name__} is not supported: .*FullyShardStrategy"):
        check_strategy(
            kind.__new__(kind), {"quantize": None, "optimizer": "adamw"}
        )  # two of them cannot be made without a GPU
