"""The rotation equals complex multiplication, and its backward turns back."""

import pytest
import torch
from builders import assert_close, assert_error_like

from moe_peft.kernels.rotary.op import rotary

pytestmark = pytest.mark.usefixtures("poisoned_memory", "cpu_code")

SHAPES = [(7, 3, 10), (1, 9, 64), (5, 1, 2), (11, 2, 96), (0, 2, 8)]


def make(shape, dtype=torch.float64):
    """x, cos, sin and the upstream gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    angles = 6 * torch.rand(shape[0], 1, shape[2] // 2, generator=generator, dtype=torch.float64).repeat(1, 1, 2)
    wide = torch.promote_types(dtype, torch.float32)
    return x, angles.cos().to(wide), angles.sin().to(wide), upstream


def plain(x, cos, sin):
    """The pairs as complex numbers, each times its own of the unit circle (or of a larger one, under yarn)."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[..., :half]
    return torch.cat([turned.real, turned.imag], dim=-1)


def todays(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def both(function, x, cos, sin, upstream):
    """Output and gradient of x."""
    x = x.clone().requires_grad_()
    y = function(x, cos, sin)
    y.backward(upstream)
    return y.detach(), x.grad


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_formula(shape, factor):
    x, cos, sin, upstream = make(shape)
    case = (x, cos * factor, sin * factor, upstream)
    for actual, expected, what in zip(both(rotary, *case), both(plain, *case), ("y", "dx"), strict=True):
        assert actual.dtype == torch.float64
        assert actual.shape == shape
        assert actual.is_contiguous()
        if actual.numel():
            assert_close(actual, expected, 1e-14, what)


def test_gradcheck_and_gradgradcheck():
    x, cos, sin, _ = make((3, 2, 6))
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), x.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: rotary(x.sin(), cos, sin), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(33, 9, 64), (5, 3, 10), (1, 4, 16)])
def test_error_is_at_most_the_formulas_in_the_same_dtype(shape, dtype):
    case = make(shape, dtype)
    truth = both(plain, *(tensor.double() for tensor in case))
    for actual, theirs, wanted, what in zip(both(rotary, *case), both(todays, *case), truth, ("y", "dx"), strict=True):
        assert_error_like(actual, theirs, wanted, dtype, what)


def test_a_view_into_a_wider_projection():
    x, cos, sin, upstream = make((6, 3, 8), torch.float32)
    expected = both(rotary, x, cos, sin, upstream)
    wide = torch.cat([x.flatten(1), x.flatten(1)], dim=1).requires_grad_()
    y = rotary(wide[:, 24:].unflatten(1, (3, 8)), cos, sin)
    y.backward(upstream.transpose(0, 1).contiguous().transpose(0, 1))
    assert y.is_contiguous()
    assert torch.equal(y, expected[0])
    assert torch.equal(wide.grad[:, 24:], expected[1].flatten(1))
    assert not wide.grad[:, :24].any()


def test_nan_stays_in_its_token_and_head():
    x, cos, sin, _ = make((5, 3, 8), torch.float32)
    healthy = rotary(x, cos, sin)
    x[2, 1] = torch.nan
    y = rotary(x, cos, sin)
    sick = torch.zeros_like(y, dtype=torch.bool)
    sick[2, 1] = True
    assert torch.equal(y.isnan(), sick)
    assert torch.equal(y[~sick], healthy[~sick])


def test_nothing_but_the_tables_is_saved():
    x, cos, sin, _ = make((5, 3, 8), torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        rotary(x.requires_grad_(), cos, sin)
    assert [tensor.data_ptr() for tensor in saved] == [cos.data_ptr(), sin.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_arguments_are_left_alone(dtype):
    case = make((5, 3, 8), dtype)
    copies = [tensor.clone() for tensor in case]
    both(rotary, *case)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(case, copies, strict=True))


def test_sizes_that_do_not_fit_are_refused():
    x, cos, sin, _ = make((5, 3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"d=7 must be even"):
        rotary(x[..., :7], cos[..., :7], sin[..., :7])
    with pytest.raises(ValueError, match=r"sin \[4, 1, 8\] must be \[T, 1, d\] = \[5, 1, 8\]"):
        rotary(x, cos, sin[:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_accepts_the_registration(dtype):
    x, cos, sin, _ = make((5, 3, 8), dtype)
    for back in (False, True):
        torch.library.opcheck(torch.ops.moe_peft.rotary.default, (x.clone().requires_grad_(), cos, sin, back))


def test_compiled_equals_eager():
    case = make((5, 3, 8), torch.float32)

    def around(x, cos, sin):
        return rotary(x * 2, cos, sin) + 1

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(both(compiled, *case), both(around, *case), strict=True):
        assert torch.equal(actual, expected)
