"""The Triton gated product against float64, beside what the reference does in the same dtype."""

import pytest
import torch
from builders import assert_error_like
from test_swiglu import NAMES, both, make, plain, todays

from moe_peft.kernels.swiglu import reference
from moe_peft.kernels.swiglu.kernel import swiglu_backward, swiglu_forward
from moe_peft.kernels.swiglu.op import swiglu

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(gate, up, upstream, dtype, device):
    """The launchers' results on the device."""
    truth = both(plain, *(tensor.double() for tensor in (gate, up, upstream)))
    theirs = reference.swiglu_forward(gate, up), *reference.swiglu_backward(upstream, gate, up)
    gate, up, upstream = (tensor.to(device) for tensor in (gate, up, upstream))
    found = [tensor.cpu() for tensor in (swiglu_forward(gate, up), *swiglu_backward(upstream, gate, up))]
    for actual, beside, wanted, what in zip(found, theirs, truth, NAMES, strict=True):
        assert_error_like(actual, beside, wanted, dtype, what)
    return found


@pytest.mark.parametrize("shape", [(7, 9), (1, 40), (3, 2, 33), (1, 1024), (5, 821)])
def test_the_kernel_is_as_exact_as_the_reference(shape, kernel_dtype, kernel_device):
    check(*make(shape, kernel_dtype), kernel_dtype, kernel_device)


def test_any_layout(kernel_device):
    case = make((6, 8), torch.float32)
    expected = check(*case, torch.float32, kernel_device)
    gate, up, upstream = case
    views = (*torch.cat([gate, up], dim=1).chunk(2, dim=1), upstream.T.contiguous().T)
    for actual, wanted in zip(check(*views, torch.float32, kernel_device), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_no_rows(kernel_device):
    empty = torch.empty(0, 8, device=kernel_device)
    assert swiglu_forward(empty, empty).shape == (0, 8)
    assert [gradient.shape for gradient in swiglu_backward(empty, empty, empty)] == [(0, 8), (0, 8)]


@pytest.mark.parametrize("sick", range(3))
def test_nan_stays_in_its_row(sick, kernel_device):
    gate, up, upstream = case = [tensor.to(kernel_device) for tensor in make((5, 9), torch.float32)]

    def run():
        return swiglu_forward(gate, up), *swiglu_backward(upstream, gate, up)

    healthy = run()
    case[sick][2] = torch.nan
    others = [0, 1, 3, 4]
    for actual, expected in zip(run(), healthy, strict=True):
        assert torch.equal(actual[others], expected[others])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16384, 11008), (2048, 1536), (77, 8191)])
def test_the_op_on_a_gpu(shape, dtype):
    case = [tensor.cuda() for tensor in make(shape, dtype)]
    truth = both(plain, *(tensor.double() for tensor in case))
    found, again = both(swiglu, *case), both(swiglu, *case)
    for actual, repeated, beside, wanted in zip(found, again, both(todays, *case), truth, strict=True):
        assert_error_like(actual, beside, wanted, dtype)
        assert torch.equal(actual, repeated)
