"""What every test runs under."""

import os

import hypothesis
import pytest
import torch

# Triton reads it when it is imported itself, by whichever test comes first: without a GPU, kernels run interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms on a GPU ask for it

from moe_peft import load_base_model, load_tokenizer

# Tiny tensors gain nothing from threads, and on a busy machine every wait for a second thread costs milliseconds.
NUM_THREADS = 1
torch.set_num_threads(NUM_THREADS)

# Under pytest-xdist the processes that tests start share the cores with those of the other workers.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

# A busy machine misses any deadline, and a test that fails must fail again.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` are skipped, not passed, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def same_threads():
    """A run may set torch's threads, which would slow down all tests that come after it."""
    yield
    torch.set_num_threads(NUM_THREADS)


@pytest.fixture
def poisoned_memory():
    """Every ``torch.empty`` comes filled with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def smollm2():
    """The built-in base model in float32 on the CPU, and its tokenizer; a test leaves no adapter on it."""
    return load_base_model("smollm2-135m", dtype="float32", device="cpu"), load_tokenizer("smollm2-135m")
