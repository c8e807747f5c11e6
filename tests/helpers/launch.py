"""Several processes that train together, over gloo on this machine, as Lightning finds them started by a launcher."""

import os
import socket
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.multiprocessing import start_processes

multiprocessing = torch.multiprocessing.get_context("forkserver")
multiprocessing.set_forkserver_preload(
    ["lightning.pytorch", "peft", "transformers.models.qwen3_moe", "helpers.rank_fits", "helpers.recipe_ranks"]
)


def together(function, *arguments, num_processes=2, **options):
    """Calls the function in so many processes at once; what it returns in each, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _work,
            (num_processes, port, folder, partial(function, *arguments, **options)),
            nprocs=num_processes,
            start_method="forkserver",
        )
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(num_processes)]


def _work(rank, num_processes, port, folder, function):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }
    torch.set_num_threads(1)
    torch.save(function(), Path(folder, f"{rank}.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
