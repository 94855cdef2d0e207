import os
import tempfile

os.environ["MEMARCH_CACHE"] = tempfile.mkdtemp(prefix="memarch-tests-")  # a native library that the user has built would be picked
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported: Triton kernels run on the CPU when forced

torch.set_num_threads(1)  # two OpenMP pools under two test processes are many times slower than one thread each


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def native_library(pytestconfig, monkeypatch):
    """The C++ kernels may be built: into pytest's cache, once per source, and no other test picks them."""
    from memarch.kernels import native

    monkeypatch.setenv("MEMARCH_CACHE", str(pytestconfig.cache.mkdir("native")))
    native._state.cache_clear()
    yield
    native._state.cache_clear()
