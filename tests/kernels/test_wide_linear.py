"""A narrow linear layer in a wider dtype equals its formula and keeps no converted copy of its input."""

import pytest
import torch
from builders import assert_close, assert_relative

from moe_peft.kernels.recompute import Recomputable, recomputed
from moe_peft.kernels.rms_norm.op import rms_norm
from moe_peft.kernels.swiglu.op import swiglu
from moe_peft.kernels.wide_linear.op import wide_linear

pytestmark = pytest.mark.usefixtures("poisoned_memory", "cpu_code")

SIZES = [(5, 7, 3), (1, 9, 4), (33, 65, 8), (1, 1, 1)]  # N, D, E
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
EPS = 1e-5


def make(rows, inner, outer, dtype=torch.float64, wide=torch.float64):
    """x, the weight and the upstream gradient."""
    generator = torch.Generator().manual_seed(rows + inner + outer)
    shapes = (rows, inner), (outer, inner), (rows, outer)
    x, weight, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x.to(dtype), weight.to(wide), upstream.to(wide)


def normed(x, norm_weight):
    """As the model builds the router's input."""
    y, rstd = rms_norm(x, norm_weight, EPS)
    return Recomputable(y, "rms_norm", (x, rstd, norm_weight))


def gated(gate, up):
    return Recomputable(swiglu(gate, up), "swiglu", (gate, up))


def kept_by(function):
    """Result of a call and the storages it saved, by address."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        result = function()
    return result, {tensor.untyped_storage().data_ptr() for tensor in saved}


def address(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_gradients_equal_the_formula(size, dtype, wide):
    x, weight, upstream = make(*size, dtype, wide)
    x.requires_grad_()
    weight.requires_grad_()
    y = wide_linear(Recomputable(x), weight)
    y.backward(upstream)
    rows, factors, grads = x.detach().double(), weight.detach().double(), upstream.double()
    for actual, expected, expected_dtype, what in (
        (y, rows @ factors.T, wide, "y"),
        (x.grad, grads @ factors, dtype, "dx"),
        (weight.grad, grads.T @ rows, wide, "d_weight"),
    ):
        assert actual.dtype == expected_dtype
        assert_relative(actual, expected, 8 * torch.finfo(expected_dtype).eps, what, floor=expected.numel() ** 0.5)
    assert weight.grad.is_contiguous()


def test_gradcheck():
    x, weight, _ = make(4, 5, 3)
    assert torch.autograd.gradcheck(
        lambda x, weight: wide_linear(Recomputable(x), weight), (x.requires_grad_(), weight.requires_grad_())
    )


@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
@pytest.mark.parametrize("recipe", ["rms_norm", "swiglu"])
def test_a_recipe_changes_no_bit(recipe, dtype, wide):
    """Gradients of what stands before it included, with and without the recipe."""
    x, weight, upstream = make(6, 9, 4, dtype, wide)
    generator = torch.Generator().manual_seed(1)
    shape = (9,) if recipe == "rms_norm" else (6, 9)
    other = torch.randn(shape, generator=generator).to(dtype)
    results = []
    for known in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        built = normed(leaves[0] * 1.5, other) if recipe == "rms_norm" else gated(leaves[0] * 1.5, other)
        y = wide_linear(built if known else Recomputable(built.value), leaves[1])
        y.backward(upstream)
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
        assert actual.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved(dtype):
    x, weight, upstream = make(6, 9, 4, dtype, torch.float32)
    norm_weight = torch.ones(9, dtype=dtype)
    x.requires_grad_()
    weight.requires_grad_()
    y, saved = kept_by(lambda: wide_linear(Recomputable(x), weight))
    assert saved == {address(x), address(weight)}
    built = normed(x, norm_weight)
    y, saved = kept_by(lambda: wide_linear(built, weight))
    assert saved == {address(weight), *(address(source) for source in built.sources)}
    assert address(built.value) not in saved
    y.backward(upstream)


def test_no_gradient_reaches_the_sources_around_the_value():
    x, weight, upstream = make(6, 9, 4)
    x.requires_grad_()
    value = (x.detach() * 1).requires_grad_()
    norm_weight = torch.ones(9, dtype=x.dtype)
    _, rstd = rms_norm(x.detach(), norm_weight, EPS)
    wide_linear(Recomputable(value, "rms_norm", (x, rstd, norm_weight)), weight).backward(upstream)
    assert x.grad is None
    assert value.grad is not None


def test_dx_is_not_computed_for_an_input_that_needs_none():
    x, weight, upstream = make(6, 9, 4)
    weight.requires_grad_()
    y = wide_linear(Recomputable(x), weight)
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                products.append(function)
            return function(*args, **(kwargs or {}))

    with Count():
        y.backward(upstream)
    assert len(products) == 1
    assert_close(weight.grad, upstream.T @ x, 1e-13)


@pytest.mark.parametrize("layout", ["transposed", "every second row", "expanded gradient"])
@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
def test_any_layout(dtype, wide, layout):
    x, weight, upstream = make(6, 8, 5, dtype, wide)
    if layout == "expanded gradient":
        upstream = torch.ones((), dtype=wide).expand(6, 5)
    elif layout == "transposed":
        x, weight, upstream = (tensor.T.contiguous().T for tensor in (x, weight, upstream))
    else:
        x, weight, upstream = (tensor.repeat_interleave(2, dim=0)[::2] for tensor in (x, weight, upstream))
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight)]
    y = wide_linear(Recomputable(leaves[0]), leaves[1])
    y.backward(upstream)
    rows, factors, grads = x.double(), weight.double(), upstream.double()
    assert_relative(y, rows @ factors.T, 8 * torch.finfo(wide).eps)
    assert_relative(leaves[0].grad, grads @ factors, 8 * torch.finfo(dtype).eps)
    assert_relative(leaves[1].grad, grads.T @ rows, 8 * torch.finfo(wide).eps)


@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
@pytest.mark.parametrize("recipe", [True, False])
def test_no_rows(recipe, dtype, wide):
    x, weight, upstream = make(0, 9, 4, dtype, wide)
    x.requires_grad_()
    weight.requires_grad_()
    rows = normed(x, torch.ones(9, dtype=dtype)) if recipe else Recomputable(x)
    y = wide_linear(rows, weight)
    y.backward(upstream)
    assert y.shape == (0, 4)
    assert x.grad.shape == (0, 9)
    assert torch.equal(weight.grad, torch.zeros(4, 9, dtype=wide))


@pytest.mark.parametrize("positions", [None, torch.tensor([4, 1]), torch.tensor([], dtype=torch.long)])
def test_rows_of_a_recomputable(positions):
    x, weight, _ = make(6, 9, 4)
    norm_weight = 1 + x[0]
    for whole in (normed(x.requires_grad_(), norm_weight), gated(x, x + 1), Recomputable(x)):
        part = whole.rows(positions)
        expected = whole.value if positions is None else whole.value[positions]
        assert torch.equal(part.value, expected)
        if part.recipe:
            assert torch.equal(recomputed(part.recipe, part.kept), expected)
        assert part.value.requires_grad
        y = wide_linear(part, weight.requires_grad_())
        assert_close(y, expected @ weight.T, 1e-13) if y.numel() else None


@pytest.mark.parametrize("lengths", [[6], [2, 4], [0, 5, 0, 1]])
def test_parts_of_a_recomputable(lengths):
    x, _, _ = make(6, 9, 4)
    norm_weight = 1 + x[0]
    for whole in (normed(x, norm_weight), gated(x, x + 1), Recomputable(x)):
        parts = whole.split(lengths)
        assert [len(part.value) for part in parts] == lengths
        for part, expected in zip(parts, whole.value.split(lengths), strict=True):
            assert torch.equal(part.value, expected)
            if part.recipe:
                assert torch.equal(recomputed(part.recipe, part.kept), expected)


@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what dynamo itself does
def test_compiled_equals_eager(dtype, wide):
    x, weight, upstream = make(6, 8, 5, dtype, wide)
    norm_weight = torch.ones(8, dtype=dtype)

    def plain(x, weight):
        return wide_linear(Recomputable(x * 2), weight) + 1

    def with_recipe(x, weight):
        return wide_linear(normed(x * 2, norm_weight), weight) + 1

    for around in (plain, with_recipe):
        results = []
        for function in (around, torch.compile(around, fullgraph=True, backend="aot_eager")):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
            y = function(*leaves)
            y.backward(upstream)
            results.append((y.detach(), *(leaf.grad for leaf in leaves)))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
