"""The normalisation equals its formula, forward and gradient, in one saved copy of x."""

import pytest
import torch
from builders import assert_close, assert_error_like

from moe_peft.kernels.rms_norm.op import rms_norm
from moe_peft.kernels.rms_norm.reference import rms_norm_forward

pytestmark = pytest.mark.usefixtures("poisoned_memory", "cpu_code")

EPS = 1e-5
SHAPES = [(7, 9), (1, 64), (5, 3, 8), (2, 1), (33, 576), (0, 8)]


def make(shape, dtype=torch.float64):
    """x, weight and an upstream gradient that x takes part in, so that no term of the gradient is small."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(shape[-1], generator=generator, dtype=torch.float64) + 0.5
    return 3 * x.to(dtype), weight.to(dtype), (x + noise).to(dtype)


def plain(x, weight):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def ours(x, weight):
    return rms_norm(x, weight, EPS)[0]


def both(function, x, weight, upstream):
    """Output and gradient of x."""
    x = x.clone().requires_grad_()
    y = function(x, weight)
    y.backward(upstream)
    return y.detach(), x.grad


def cancelling(x, weight, upstream):
    """Norm of the larger term of dx, of which the smaller takes away what lies along x."""
    x, weight, upstream = (tensor.double() for tensor in (x, weight, upstream))
    return (upstream * weight * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()).norm().item()


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_formula(shape):
    case = make(shape)
    for actual, expected, what in zip(both(ours, *case), both(plain, *case), ("y", "dx"), strict=True):
        assert actual.dtype == torch.float64
        assert actual.shape == shape
        if actual.numel():
            assert_close(actual, expected, 1e-12, what)


def test_gradcheck():
    x, weight, _ = make((4, 5))
    assert torch.autograd.gradcheck(lambda x: ours(x, weight), x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(33, 576), (9, 2048), (5, 3, 7), (1, 40)])  # no dtype but float64 holds sqrt(2048)
def test_error_is_at_most_the_formulas_in_the_same_dtype(shape, dtype):
    case = make(shape, dtype)
    truth = both(plain, *(tensor.double() for tensor in case))
    # In float32 the sum over a row and the cube of its norm round as often as everything else does.
    floors = 0.0, cancelling(*case) * (3 if dtype == torch.float32 else 1)
    for i, what in enumerate(("y", "dx")):
        assert_error_like(both(ours, *case)[i], both(plain, *case)[i], truth[i], dtype, what, floors[i])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_statistic_is_wide_and_not_differentiated(dtype):
    x, weight, _ = make((6, 40), dtype)
    y, rstd = rms_norm(x.requires_grad_(), weight, EPS)
    assert y.requires_grad and not rstd.requires_grad
    assert rstd.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = (x.detach().double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    assert_close(rstd, truth, 1e-12 if dtype == torch.float64 else 1e-6)


def test_a_row_of_zeros_is_held_up_by_eps():
    x, weight, upstream = make((3, 8), torch.float32)
    x[1] = 0
    for actual, expected in zip(both(ours, x, weight, upstream), both(plain, x, weight, upstream), strict=True):
        assert_close(actual, expected, 1e-6)


def test_what_is_wider_than_x_can_square():
    """The square of 300 is no float16."""
    x, weight, _ = make((3, 8), torch.float16)
    y, _ = rms_norm(x * 300, weight, EPS)
    assert_close(y, plain(x.double() * 300, weight.double()), 2e-3)


def test_nan_stays_in_its_row():
    x, weight, upstream = make((5, 9), torch.float32)
    healthy = both(ours, x, weight, upstream)
    x[2, 3] = torch.nan
    others = [0, 1, 3, 4]
    for actual, expected in zip(both(ours, x, weight, upstream), healthy, strict=True):
        assert actual[2].isnan().all()
        assert torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("layout", ["a slice of wider rows", "transposed", "expanded gradient"])
def test_any_layout(layout):
    x, weight, upstream = make((6, 8), torch.float32)
    expected = both(ours, x, weight, upstream)
    if layout == "expanded gradient":
        expected = both(ours, x, weight, torch.ones(6, 8))
        upstream = torch.ones(()).expand(6, 8)
    elif layout == "transposed":
        x, upstream = x.T.contiguous().T, upstream.T.contiguous().T
    else:
        x = torch.cat([x, x], dim=1)[:, :8]
    leaf = x.detach().requires_grad_()
    y, _ = rms_norm(leaf, weight, EPS)
    y.backward(upstream)
    assert torch.equal(y, expected[0])
    assert torch.equal(leaf.grad, expected[1])


def test_nothing_but_x_and_the_statistic_is_saved():
    x, weight, _ = make((6, 8), torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        x.requires_grad_()
        _, rstd = rms_norm(x, weight, EPS)
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in (x, weight, rstd)}
    assert len(saved) == 3


def test_a_weight_that_does_not_fit_is_refused():
    x, weight, _ = make((3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"weight \[7\] .* must be \[8\]"):
        rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match=r"torch.bfloat16 must be .* torch.float32"):
        rms_norm(x, weight.bfloat16(), EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_accepts_the_registration(dtype):
    x, weight, upstream = make((3, 2, 8), dtype)
    torch.library.opcheck(torch.ops.moe_peft.rms_norm.default, (x.requires_grad_(), weight, EPS))
    rstd = rms_norm_forward(x.detach(), weight, EPS)[1]
    torch.library.opcheck(torch.ops.moe_peft.rms_norm_backward.default, (upstream, x.detach(), weight, rstd))


def test_compiled_equals_eager():
    case = make((6, 8), torch.float32)

    def around(x, weight):
        return ours(x * 2, weight) + 1

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(both(compiled, *case), both(around, *case), strict=True):
        assert torch.equal(actual, expected)
