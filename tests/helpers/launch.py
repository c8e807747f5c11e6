"""Several processes that train together, over gloo on this machine, as Lightning finds them started by a launcher."""

import os
import socket
import sys
import tempfile
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import start_processes

multiprocessing = torch.multiprocessing.get_context("forkserver")
multiprocessing.set_forkserver_preload(["helpers.rank_fits", "helpers.recipe_ranks", "transformers.models.qwen3_moe"])


def _start_server():
    """Has the server find what it imports for all processes: of this one's sys.path it knows what the environment has.

    A module that it does not find is no error, but is imported anew in each process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def process(function, *arguments):
    """A process that runs the function; started."""
    _start_server()
    started = multiprocessing.Process(target=function, args=arguments)
    started.start()
    return started


def together(function, *arguments, num_processes=2, **options):
    """Calls the function in so many processes at once; what it returns in each, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _start_server()
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
