"""The recipe over the GPUs of this machine, by NCCL: no further from float32 than one GPU with the same batches."""

from functools import partial

import pytest
import torch
from helpers.launch import together
from helpers.recipe_ranks import LAST, RECIPE_WARNINGS, deviation, train, values

pytestmark = [*RECIPE_WARNINGS, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
RANKS = min(2, torch.cuda.device_count())  # with one GPU its weights are gathered and freed as with two


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_gpus_train_as_one_does(tmp_path, kind, checkpointing):
    run = partial(train, accelerator="gpu", several=RANKS, checkpointing=checkpointing)
    together(run, tmp_path / "exact", "auto", num_processes=1)
    together(run, tmp_path / "one", "auto", dtype="bfloat16", num_processes=1)
    together(run, tmp_path / "all", kind, dtype="bfloat16", num_processes=RANKS)
    exact, one, ours = (values(tmp_path / folder / LAST) for folder in ("exact", "one", "all"))
    assert deviation(ours, exact) < 1.2 * deviation(one, exact)
