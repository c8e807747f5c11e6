"""What must be set before the tests: Triton's interpreter, threads, seeds, and how long hypothesis looks."""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # known before Triton is first imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers have the cores

settings.register_profile("few", max_examples=60, deadline=None, derandomize=True, database=None)
settings.register_profile("soak", max_examples=12_000, deadline=None, print_blob=True)
settings.load_profile("few")


@pytest.fixture(autouse=True)
def drawn_alike_in_any_order():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)
