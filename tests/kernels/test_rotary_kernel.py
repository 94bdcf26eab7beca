"""The Triton rotation against float64, beside what the reference does in the same dtype."""

import pytest
import torch
from builders import assert_error_like
from test_rotary import both, make, plain, todays

from moe_peft.kernels.rotary import reference
from moe_peft.kernels.rotary.kernel import rotary_forward
from moe_peft.kernels.rotary.op import rotary

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(x, cos, sin, dtype, device):
    """The launcher's results on the device, there and back."""
    results = []
    for back in (False, True):
        truth = plain(x.double(), cos.double(), -sin.double() if back else sin.double())
        beside = reference.rotary_forward(x, cos, sin, back=back)
        y = rotary_forward(x.to(device), cos.to(device), sin.to(device), back=back)
        assert y.is_contiguous()
        assert_error_like(y.cpu(), beside, truth, dtype, f"back={back}")
        results.append(y.cpu())
    return results


@pytest.mark.parametrize("shape", [(7, 3, 10), (1, 9, 64), (25, 1, 2), (3, 5, 96)])
def test_the_kernel_is_as_exact_as_the_reference(shape, kernel_dtype, kernel_device):
    x, cos, sin, _ = make(shape, kernel_dtype)
    check(x, cos, sin, kernel_dtype, kernel_device)


@pytest.mark.parametrize("layout", ["a slice of wider rows", "heads outermost", "features outermost"])
def test_x_is_read_where_it_lies(layout, kernel_device):
    x, cos, sin, _ = make((6, 3, 8), torch.float32)
    expected = check(x, cos, sin, torch.float32, kernel_device)
    if layout == "a slice of wider rows":
        view = torch.cat([x.flatten(1), x.flatten(1)], dim=1).to(kernel_device)[:, 24:].unflatten(1, (3, 8))
    else:
        first = 1 if layout == "heads outermost" else 2
        view = x.to(kernel_device).transpose(0, first).contiguous().transpose(0, first)
    assert not view.is_contiguous()
    for back, wanted in zip((False, True), expected, strict=True):
        y = rotary_forward(view, cos.to(kernel_device), sin.to(kernel_device), back=back)
        assert torch.equal(y.cpu(), wanted)


def test_no_tokens(kernel_device):
    x, cos, sin, _ = (tensor.to(kernel_device) for tensor in make((0, 2, 8), torch.float32))
    assert rotary_forward(x, cos, sin).shape == (0, 2, 8)


def test_nan_stays_in_its_token_and_head(kernel_device):
    x, cos, sin, _ = (tensor.to(kernel_device) for tensor in make((5, 3, 8), torch.float32))
    healthy = rotary_forward(x, cos, sin)
    x[2, 1] = torch.nan
    y = rotary_forward(x, cos, sin)
    sick = torch.zeros_like(y, dtype=torch.bool)
    sick[2, 1] = True
    assert torch.equal(y.isnan(), sick)
    assert torch.equal(y[~sick], healthy[~sick])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16384, 32, 128), (2048, 9, 64), (77, 71, 80)])
def test_the_op_on_a_gpu(shape, dtype):
    case = [tensor.cuda() for tensor in make(shape, dtype)]
    truth = both(plain, *(tensor.double() for tensor in case))
    found, again = both(rotary, *case), both(rotary, *case)
    for actual, repeated, beside, wanted in zip(found, again, both(todays, *case), truth, strict=True):
        assert_error_like(actual, beside, wanted, dtype)
        assert torch.equal(actual, repeated)
