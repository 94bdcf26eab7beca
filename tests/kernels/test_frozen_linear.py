"""A frozen linear layer equals its formula, and its backward keeps nothing but the weight."""

import pytest
import torch
from builders import assert_close, assert_error_like, assert_relative

from moe_peft.kernels.frozen_linear.op import frozen_linear, frozen_linears

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SIZES = [(5, 7, 3), (1, 9, 4), (33, 65, 31), (1, 1, 1)]  # rows, I, O
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows, inner, outer, dtype=torch.float64):
    """x, weight, bias and the upstream gradient."""
    generator = torch.Generator().manual_seed(rows + inner + outer)
    shapes = (rows, inner), (outer, inner), (outer,), (rows, outer)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def both(function, x, weight, bias, upstream):
    """Output and gradient of x."""
    x = x.detach().requires_grad_()
    y = function(x, weight, bias)
    y.backward(upstream)
    return y.detach(), x.grad


def truth(x, weight, bias, upstream):
    """Both by the formula, in float64."""
    x, weight, upstream = x.double(), weight.double(), upstream.double()
    return x @ weight.T + (bias.double() if bias is not None else 0), upstream @ weight


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_float64_equals_the_formula(size, with_bias):
    x, weight, bias, upstream = make(*size)
    case = x, weight, bias if with_bias else None, upstream
    for actual, expected, what in zip(both(frozen_linear, *case), truth(*case), ("y", "dx"), strict=True):
        assert actual.dtype == torch.float64
        assert_close(actual, expected, 1e-13, what)
    assert torch.autograd.gradcheck(lambda rows: frozen_linear(rows, weight, case[2]), x.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_error_is_that_of_torchs_own_linear(size, dtype):
    case = make(*size, dtype)
    x, weight, _, upstream = (tensor.double().abs() for tensor in case)
    floors = (x @ weight.T).norm().item(), (upstream @ weight).norm().item()
    theirs = both(torch.nn.functional.linear, *case)
    results = zip(both(frozen_linear, *case), theirs, truth(*case), ("y", "dx"), floors, strict=True)
    for actual, reference, wanted, what, floor in results:
        assert_error_like(actual, reference, wanted, dtype, what, floor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["transposed", "every second row", "expanded gradient"])
def test_any_layout(layout, dtype):
    x, weight, bias, upstream = make(6, 8, 5, dtype)
    if layout == "expanded gradient":
        upstream = torch.ones((), dtype=dtype).expand(6, 5)
    elif layout == "transposed":
        x, weight, upstream = (tensor.T.contiguous().T for tensor in (x, weight, upstream))
    else:
        x, weight, upstream = (tensor.repeat_interleave(2, dim=0)[::2] for tensor in (x, weight, upstream))
    case = x, weight, bias, upstream
    for actual, expected in zip(both(frozen_linear, *case), truth(*case), strict=True):
        assert_relative(actual, expected, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_rows(dtype):
    y, dx = both(frozen_linear, *make(0, 8, 5, dtype))
    assert y.shape == (0, 5)
    assert dx.shape == (0, 8)


def test_only_the_weight_is_saved_and_nothing_without_a_gradient():
    x, weight, bias, upstream = make(6, 8, 5, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        plain = frozen_linear(x, weight, bias)
        assert not saved
        y = frozen_linear(x.clone().requires_grad_(), weight, bias)
    assert not plain.requires_grad
    assert torch.equal(plain, y)
    assert [tensor.data_ptr() for tensor in saved] == [weight.data_ptr()]
    y.backward(upstream)


def test_the_weight_gets_no_gradient():
    x, weight, bias, upstream = make(6, 8, 5)
    weight.requires_grad_()
    bias.requires_grad_()
    frozen_linear(x.requires_grad_(), weight, bias).backward(upstream)
    assert weight.grad is None
    assert bias.grad is None


def test_nan_stays_in_its_row():
    case = make(5, 9, 4, torch.float32)
    healthy = both(frozen_linear, *case)
    case[0][2] = torch.nan
    case[3][2] = torch.nan
    for actual, expected in zip(both(frozen_linear, *case), healthy, strict=True):
        assert torch.equal(actual[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what dynamo itself does
def test_compiled_equals_eager(dtype, with_bias):
    x, weight, bias, upstream = make(6, 8, 5, dtype)
    case = x, weight, bias if with_bias else None, upstream

    def around(x, weight, bias):
        return frozen_linear(x * 2, weight, bias) + 1

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(both(compiled, *case), both(around, *case), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 5, 200])
@pytest.mark.parametrize("unused", [None, 1])
def test_several_layers_of_one_input(unused, rows, dtype):
    """One has no bias; the gradient of x is the sum over those that are used."""
    outers = 6, 3, 9
    x = make(rows, 7, 1, dtype)[0].requires_grad_()
    weights, biases, upstreams = zip(*(make(rows, 7, outer, dtype)[1:] for outer in outers), strict=True)
    biases = biases[0], None, biases[2]
    outputs = frozen_linears(x, weights, biases)
    used = [i for i in range(3) if i != unused]
    sum((outputs[i] * upstreams[i]).sum() for i in used).backward()
    allowed = 1e-13 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    expected = torch.zeros(rows, 7, dtype=torch.float64)
    for i in range(3):
        y, dx = truth(x.detach(), weights[i], biases[i], upstreams[i])
        assert (outputs[i].double() - y).norm() <= allowed * y.norm()
        expected += dx if i in used else 0
    assert x.grad.dtype == dtype
    assert (x.grad.double() - expected).norm() <= allowed * expected.norm()


def test_several_layers_are_an_operator():
    x, weight, bias, _ = make(5, 7, 3)
    arguments = x.requires_grad_(), [weight, weight * 2], [bias], [False, True]
    torch.library.opcheck(torch.ops.moe_peft.frozen_linears.default, arguments)
