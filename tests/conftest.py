"""Every test runs with two threads, a fixed seed, and uninitialised memory filled with NaN."""

import os

import pytest
import torch
from hypothesis import settings

from tests.support import skips

# without it deterministic mode refuses cuBLAS; read at the first product on a GPU
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

settings.register_profile("nitp_ops", deadline=None, max_examples=30, print_blob=True)
# where minutes are short
settings.register_profile("few", settings.get_profile("nitp_ops"), max_examples=5)
settings.load_profile("nitp_ops")
torch.set_num_threads(2)


def pytest_configure(config):
    # for benchmarks/ too, which this file does not stand above
    config.pluginmanager.register(skips)


@pytest.fixture(autouse=True)
def poisoned_memory_and_fixed_seed():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    # torch.empty then holds NaN: reading what nobody wrote shows
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)  # programs that a test calls set their own
