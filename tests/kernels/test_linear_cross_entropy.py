"""Cross-entropy against the frozen head equals torch's on the full logits, which it never holds."""

import pytest
import torch
from builders import assert_close, assert_error_like
from test_registration import opcheck, recorded
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from moe_peft.kernels.linear_cross_entropy import reference
from moe_peft.kernels.linear_cross_entropy.op import _linear_cross_entropy, linear_cross_entropy
from moe_peft.kernels.linear_cross_entropy.reference import CHUNK_ROWS, linear_cross_entropy_forward
from moe_peft.kernels.products import matmul_t

pytestmark = pytest.mark.usefixtures("poisoned_memory", "cpu_code")


def make(n, d=13, v=37, *, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).mul_(scale)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64)
    targets = torch.randint(v, (n,), generator=generator)
    upstream = torch.randn(n, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), targets, upstream


def plain(hidden, weight, targets):
    return cross_entropy(
        (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)), targets, reduction="none"
    )


def both(function, hidden, weight, targets, upstream):
    """Losses and the gradient of the rows for an uneven weighting of them."""
    hidden = hidden.clone().requires_grad_()
    losses = function(hidden, weight, targets)
    (losses * upstream.to(losses.dtype)).sum().backward()
    return losses.detach(), hidden.grad


@pytest.mark.parametrize("n", [1, 2, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS, 2 * CHUNK_ROWS + 45])
def test_float64_equals_torch(n):
    case = make(n)
    losses, gradient = both(linear_cross_entropy, *case)
    expected, expected_gradient = both(plain, *case)
    assert losses.dtype == gradient.dtype == torch.float64
    assert_close(losses, expected, 1e-12, "losses")
    assert_close(gradient, expected_gradient, 1e-12, "gradient")


def test_gradcheck():
    hidden, weight, targets, _ = make(5, 4, 7)
    assert torch.autograd.gradcheck(lambda x: linear_cross_entropy(x, weight, targets), hidden.requires_grad_())


@pytest.mark.parametrize(("d", "v"), [(1, 1), (1, 5), (7, 2), (64, 3)])
def test_odd_sizes(d, v):
    case = make(3, d, v)
    for actual, expected in zip(both(linear_cross_entropy, *case), both(plain, *case), strict=True):
        assert_close(actual, expected, 1e-12)


def test_no_rows():
    hidden, weight, targets, _ = make(0)
    hidden.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, targets)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert hidden.grad.shape == (0, 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_torchs_in_the_same_dtype(dtype):
    hidden, weight, targets, upstream = make(2 * CHUNK_ROWS + 3, 48, 301, dtype=dtype)
    truth = both(plain, hidden.double(), weight.double(), targets, upstream)
    ours = both(linear_cross_entropy, hidden, weight, targets, upstream)
    theirs = both(plain, hidden, weight, targets, upstream)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    for i, name in enumerate(("losses", "gradient")):
        assert_error_like(ours[i], theirs[i], truth[i], dtype, name)


@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_extreme_logits(scale):
    """Nothing overflows: a hopeless target costs its distance, a sure one nothing."""
    case = make(9, dtype=torch.float32, scale=scale)
    for actual, expected in zip(both(linear_cross_entropy, *case), both(plain, *case), strict=True):
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_flat_distribution_over_a_large_vocabulary(dtype):
    """The sum of 70000 equal exponentials is more than float16 holds."""
    hidden, weight, targets, upstream = make(3, 4, 70_000, dtype=dtype, scale=1e-3)
    truth = both(plain, hidden.double(), weight.double(), targets, upstream)
    for actual, expected in zip(both(linear_cross_entropy, hidden, weight, targets, upstream), truth, strict=True):
        assert_close(actual, expected, 0.02)


def test_a_gradient_is_taken_only_where_one_is_needed(monkeypatch):
    taken, forward = [], reference.in_chunks
    monkeypatch.setattr(reference, "in_chunks", lambda *args: taken.append(args[3]) or forward(*args))
    hidden, weight, targets, _ = make(4)
    losses = [linear_cross_entropy(hidden, weight, targets)]
    hidden.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            losses.append(linear_cross_entropy(hidden, weight, targets))
    assert not any(one.requires_grad for one in losses)
    losses.append(linear_cross_entropy(hidden, weight, targets))
    assert losses[-1].requires_grad
    assert taken == [False, False, False, True]
    assert all(torch.equal(one, losses[0]) for one in losses)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, targets, _ = make(4)
    weight.requires_grad_()
    assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    linear_cross_entropy(hidden.requires_grad_(), weight, targets).sum().backward()
    assert weight.grad is None


def test_a_row_keeps_its_nan():
    hidden, weight, targets, upstream = make(6)
    expected, expected_gradient = both(linear_cross_entropy, hidden, weight, targets, upstream)
    hidden[2] = torch.nan
    losses, gradient = both(linear_cross_entropy, hidden, weight, targets, upstream)
    rest = [0, 1, 3, 4, 5]
    assert losses[2].isnan()
    assert torch.equal(losses[rest], expected[rest])
    assert torch.equal(gradient[rest], expected_gradient[rest])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, forward or backward."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_logits_of_all_rows_never_exist(with_gradient):
    n, d, v = 5 * CHUNK_ROWS + 7, 3, 1024
    hidden, weight, targets, _ = make(n, d, v, dtype=torch.float32)
    with LargestTensor() as watch:
        linear_cross_entropy_forward(hidden, weight, targets, with_gradient)
    assert watch.largest == CHUNK_ROWS * v
    with LargestTensor() as watch:
        plain(hidden, weight, targets)
    assert watch.largest >= n * v  # the watch sees what it should


def test_only_the_gradient_of_the_rows_is_saved():
    hidden, weight, targets, _ = make(9, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    assert [(x.shape, x.dtype) for x in kept] == [(hidden.shape, torch.bfloat16)]


def test_torch_accepts_the_operators(monkeypatch):
    case = make(5, dtype=torch.float32)
    forward, backward = recorded(monkeypatch, _linear_cross_entropy)
    both(linear_cross_entropy, *case)
    opcheck(_linear_cross_entropy, forward[0], backward[0])
    torch.library.opcheck(_linear_cross_entropy.forward.opaque, (*case[:3], False))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_compiled_equals_eager():
    case = make(9, dtype=torch.float32)

    def doubled(hidden, weight, targets):
        return 2 * linear_cross_entropy(hidden.tanh(), weight, targets)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(both(compiled, *case), both(doubled, *case), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("change", [{"hidden": (5, 12)}, {"weight": (37, 12)}, {"targets": (4,)}])
def test_shapes_that_do_not_fit_are_refused(change):
    shapes = {"hidden": (5, 13), "weight": (37, 13), "targets": (5,), **change}
    tensors = {
        name: torch.zeros(shape, dtype=torch.long if name == "targets" else None) for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match=r"must be \[N, D\], \[V, D\] and \[N\]"):
        linear_cross_entropy(**tensors)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (5, 7, 3), (64, 33, 130)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_faster_product(rows, inner, columns, dtype):
    generator = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(n, inner, generator=generator).to(dtype) for n in (rows, columns))
    for left, right in ((a, b), (a.T.contiguous().T, b), (a, b.T.contiguous().T)):
        found = matmul_t(left, right)
        assert found.dtype == dtype
        assert_close(found, a.double() @ b.double().T, {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2))
