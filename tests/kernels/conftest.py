"""Kernels run on a GPU when there is one, else on CPU tensors through Triton's interpreter."""

import pytest
import torch

from moe_peft.kernels.compiled import compiled_library, references_only


@pytest.fixture
def kernel_device():
    """Where a kernel's own tests put their tensors."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.gpu)])
def kernel_dtype(request):
    """Every dtype a kernel takes; in bfloat16 Triton's interpreter is silently wrong, so that one waits for a GPU."""
    return getattr(torch, request.param)


@pytest.fixture(params=["compiled", "reference"])
def cpu_code(request):
    """Both ways in which an operation runs on a CPU; its reference alone where nothing can be compiled."""
    if request.param == "reference":
        with references_only():
            yield
    elif compiled_library().functions is None:
        pytest.skip(compiled_library().problem)
    else:
        yield
