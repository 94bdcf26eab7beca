"""Causal attention and its own 16-bit backward equal the softmax written out."""

import pytest
import torch
from builders import assert_close, assert_error_like

from moe_peft.kernels.causal_attention.op import causal_attention
from moe_peft.kernels.causal_attention.reference import BLOCK, causal_attention_backward

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENGTHS = [1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 19]


def make(b=2, h=4, g=2, length=9, d=6, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, h, length, d), (b, g, length, d), (b, g, length, d), (b, h, length, d))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def plain(q, k, v):
    """Head by head: scores, the diagonal's mask, softmax, mean of the values."""
    share = q.shape[1] // k.shape[1]
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // share].transpose(1, 2) / q.shape[3] ** 0.5
        heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, head // share])
    return torch.stack(heads, 1)


def both(function, q, k, v, upstream):
    """Output and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", LENGTHS)
def test_wide_types(length, dtype):
    case = make(length=length, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for actual, expected in zip(both(causal_attention, *case), both(plain, *case), strict=True):
        assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("h", "g"), [(4, 2), (3, 3), (5, 1), (1, 1)])
def test_the_backward_is_exact_in_float64(length, h, g):
    """The formula itself, free of rounding."""
    q, k, v, upstream = make(b=3, h=h, g=g, length=length)
    _, *expected = both(plain, q, k, v, upstream)
    scores = q @ k.repeat_interleave(h // g, 1).transpose(2, 3) / q.shape[3] ** 0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    log_z = scores.masked_fill(future, -torch.inf).logsumexp(-1)
    found = causal_attention_backward(upstream, q, k, v, log_z, q.shape[3] ** -0.5)
    for name, actual, wanted in zip("qkv", found, expected, strict=True):
        assert_close(actual, wanted, 1e-6, f"d{name}")  # it takes the softmax and adds up in float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("h", "g", "d"), [(4, 2, 6), (6, 2, 64), (3, 1, 8), (2, 2, 2)])
def test_error_is_at_most_the_formulas_in_the_same_dtype(h, g, d, length, dtype):
    assert_error_like_the_formulas(make(h=h, g=g, length=length, d=d, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharpness", [2, 3, 8])
def test_sharp_attention(sharpness, dtype):
    """Scores of some tens, as trained models have them: their exponentials forgive no rounding, and none overflows."""
    q, k, v, upstream = make(length=BLOCK + 9, d=8, dtype=dtype)
    assert_error_like_the_formulas([q * sharpness, k * sharpness, v, upstream], dtype)


def assert_error_like_the_formulas(case, dtype):
    truth = both(plain, *(x.double() for x in case))
    ours, theirs = both(causal_attention, *case), both(plain, *case)
    for name, actual, reference, wanted in zip(("out", "dq", "dk", "dv"), ours, theirs, truth, strict=True):
        assert actual.isfinite().all(), name
        # A lone token's dq and dk are differences of equal numbers as large as its dv.
        assert_error_like(actual, reference, wanted, dtype, name, floor=truth[3].norm().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_past_never_sees_the_future(dtype):
    """Not even a NaN of it, and no gradient flows back from before a token."""
    q, k, v, upstream = make(length=BLOCK + 5, dtype=dtype)
    cut = BLOCK - 3
    healthy = both(causal_attention, q, k, v, upstream)[0]
    k[:, :, cut:], v[:, :, cut:] = 1e3, 1e3
    assert torch.equal(causal_attention(q, k, v)[:, :, :cut], healthy[:, :, :cut])
    upstream[:, :, cut:] = 0
    for name, gradient in zip("qkv", both(causal_attention, q, k, v, upstream)[1:], strict=True):
        assert not gradient[:, :, cut:].any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sick", [0, 1, 2, 3])
def test_nan_stays_in_its_sample(sick, dtype):
    case = make(b=3, length=BLOCK + 2, dtype=dtype)
    healthy = both(causal_attention, *case)
    case[sick][1] = torch.nan
    for before, after in zip(healthy, both(causal_attention, *case), strict=True):
        assert torch.equal(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype):
    """Inputs as attention has them, tokens before heads, and an upstream gradient that is one number."""
    q, k, v, _ = make(length=11, dtype=dtype)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    ones = torch.ones((), dtype=dtype).expand(q.shape)
    for actual, expected in zip(
        both(causal_attention, *apart, ones), both(causal_attention, q, k, v, ones.contiguous()), strict=True
    ):
        assert_close(actual, expected, 1e-5 if dtype == torch.float32 else 1e-2)
