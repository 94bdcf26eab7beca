"""The Triton normalisation against float64, beside what the reference does in the same dtype."""

import pytest
import torch
from builders import assert_error_like
from test_rms_norm import EPS, both, cancelling, make, ours, plain

from moe_peft.kernels.rms_norm import reference
from moe_peft.kernels.rms_norm.kernel import rms_norm_backward, rms_norm_forward

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(x, weight, upstream, dtype, device):
    """The launchers' results on the device."""
    truth = both(plain, *(tensor.double() for tensor in (x, weight, upstream)))
    floors = 0.0, cancelling(x, weight, upstream)
    y, rstd = reference.rms_norm_forward(x, weight, EPS)
    theirs = y, reference.rms_norm_backward(upstream, x, weight, rstd)
    x, weight, upstream = (tensor.to(device) for tensor in (x, weight, upstream))
    y, rstd = rms_norm_forward(x, weight, EPS)
    assert rstd.dtype == torch.float32
    found = y.cpu(), rms_norm_backward(upstream, x, weight, rstd).cpu()
    for actual, beside, wanted, floor in zip(found, theirs, truth, floors, strict=True):
        assert_error_like(actual, beside, wanted, dtype, floor=floor)
    return found


@pytest.mark.parametrize("shape", [(7, 9), (1, 64), (3, 2, 33), (2, 5000), (300, 12)])
def test_the_kernel_is_as_exact_as_the_reference(shape, kernel_dtype, kernel_device):
    check(*make(shape, kernel_dtype), kernel_dtype, kernel_device)


def test_any_layout(kernel_device):
    x, weight, upstream = make((6, 8), torch.float32)
    expected = check(x, weight, upstream, torch.float32, kernel_device)
    views = torch.cat([x, x], dim=1)[:, :8], torch.stack([weight, weight], 1)[:, 0], upstream.T.contiguous().T
    for actual, wanted in zip(check(*views, torch.float32, kernel_device), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_no_rows(kernel_device):
    x, weight, _ = (tensor.to(kernel_device) for tensor in make((0, 8), torch.float32))
    y, rstd = rms_norm_forward(x, weight, EPS)
    assert y.shape == (0, 8) and rstd.shape == (0, 1)
    assert rms_norm_backward(y, x, weight, rstd).shape == (0, 8)


def test_nan_stays_in_its_row(kernel_device):
    x, weight, upstream = (tensor.to(kernel_device) for tensor in make((5, 9), torch.float32))

    def run():
        y, rstd = rms_norm_forward(x, weight, EPS)
        return y, rstd, rms_norm_backward(upstream, x, weight, rstd)

    healthy = run()
    x[2, 3] = torch.nan
    others = [0, 1, 3, 4]
    for actual, expected in zip(run(), healthy, strict=True):
        assert actual[2].isnan().all()
        assert torch.equal(actual[others], expected[others])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16384, 4096), (2048, 576), (4096, 9, 64), (77, 8191)])
def test_the_op_on_a_gpu(shape, dtype):
    case = [tensor.cuda() for tensor in make(shape, dtype)]
    truth = both(plain, *(tensor.double() for tensor in case))
    floors = 0.0, cancelling(*case)
    found, again = both(ours, *case), both(ours, *case)
    for i, beside in enumerate(both(plain, *case)):
        assert_error_like(found[i], beside, truth[i], dtype, floor=floors[i])
        assert torch.equal(found[i], again[i])
