"""Causal attention over samples laid end to end equals the softmax written out, forward and every gradient."""

from itertools import accumulate, pairwise

import pytest
import torch
from builders import assert_close, assert_error_like
from test_registration import opcheck, recorded

from moe_peft.kernels.causal_attention import reference
from moe_peft.kernels.causal_attention.op import _causal_attention, causal_attention
from moe_peft.kernels.causal_attention.reference import BLOCK
from moe_peft.kernels.rectangles import LONE, MOST_PADDING, rectangles

pytestmark = pytest.mark.usefixtures("poisoned_memory", "cpu_code")

BATCHES = [
    [1],
    [7],
    [BLOCK] * 2,
    [BLOCK - 1, BLOCK + 1, 1, 2 * BLOCK + 19],
    [1, 2, 7, 15, 16, 17, 3, 7, 1, 32],
    [9, 9, 9, 5],
    [LONE, 3, LONE + 5, LONE],
]


def make(lengths, h=4, g=2, d=6, *, dtype=torch.float64, seed=0):
    """q, k, v, the upstream gradient and the samples' boundaries."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(sum(lengths), heads, d, generator=generator, dtype=torch.float64) for heads in (h, g, g, h)]
    return *(x.to(dtype) for x in tensors), (0, *accumulate(lengths))


def plain(q, k, v, boundaries, window=None):
    """Sample by sample and head by head: scores, mask, softmax, mean of the values."""
    share = q.shape[1] // k.shape[1]
    samples = []
    for start, end in pairwise(boundaries):
        position = torch.arange(end - start)
        back = position[:, None] - position
        hidden = (back < 0) | (back >= (window or end))
        heads = []
        for head in range(q.shape[1]):
            scores = q[start:end, head] @ k[start:end, head // share].T / q.shape[2] ** 0.5
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[start:end, head // share])
        samples.append(torch.stack(heads, 1))
    return torch.cat(samples)


def both(function, q, k, v, upstream, *settings):
    """Output and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, *settings)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", BATCHES)
@pytest.mark.parametrize(("h", "g"), [(4, 2), (3, 3), (5, 1)])
def test_wide_types(lengths, h, g, dtype):
    case = make(lengths, h, g, dtype=dtype)
    before = [x.clone() for x in case[:4]]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    found = both(causal_attention, *case)
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), found, both(plain, *case), strict=True):
        assert_close(actual, expected, tolerance, name)
    assert all(map(torch.equal, case[:4], before))


@pytest.mark.parametrize("window", [1, 2, 9, BLOCK - 1, BLOCK, BLOCK + 1, 150, 10_000])
def test_window(window):
    case = make([BLOCK + 9, 5, 2 * BLOCK + 3, 5, 1, LONE])
    for actual, expected in zip(both(causal_attention, *case, window), both(plain, *case, window), strict=True):
        assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_long_samples(monkeypatch, window, dtype):
    """Their heads run one by one and their blocks are larger."""
    monkeypatch.setattr(reference, "LONG", 40)
    monkeypatch.setattr(reference, "LONG_BLOCK", 32)
    case = make([100, 39, 41, 41, 7], 6, 2, dtype=dtype)
    for actual, expected in zip(both(causal_attention, *case, window), both(plain, *case, window), strict=True):
        assert_close(actual, expected, 1e-12 if dtype == torch.float64 else 1e-5)


def test_batches_of_samples(monkeypatch):
    """More samples than the scores of one product may belong to."""
    monkeypatch.setitem(reference.BATCH_SCORES, "cpu", 9 * 9 * 4 * 2)
    case = make([9] * 7)
    for actual, expected in zip(both(causal_attention, *case), both(plain, *case), strict=True):
        assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", BATCHES)
@pytest.mark.parametrize(("h", "g", "d"), [(4, 2, 6), (6, 2, 64), (3, 1, 8), (2, 2, 2)])
def test_error_is_at_most_the_formulas_in_the_same_dtype(h, g, d, lengths, dtype):
    assert_error_like_the_formulas(make(lengths, h, g, d, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharpness", [2, 3, 8])
def test_sharp_attention(sharpness, dtype):
    """Scores of some tens, as trained models have them: their exponentials forgive no rounding, and none overflows."""
    q, k, v, upstream, boundaries = make([BLOCK + 9] * 2, d=8, dtype=dtype)
    assert_error_like_the_formulas([q * sharpness, k * sharpness, v, upstream, boundaries], dtype)


def assert_error_like_the_formulas(case, dtype):
    *tensors, boundaries = case
    truth = both(plain, *(x.double() for x in tensors), boundaries)
    ours, theirs = both(causal_attention, *case), both(plain, *case)
    for name, actual, reference_, wanted in zip(("out", "dq", "dk", "dv"), ours, theirs, truth, strict=True):
        assert actual.isfinite().all(), name
        # A lone token's dq and dk are differences of equal numbers as large as its dv.
        assert_error_like(actual, reference_, wanted, dtype, name, floor=truth[3].norm().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_past_never_sees_the_future(dtype):
    """Not a bit of it, and no gradient flows back from before a token."""
    q, k, v, upstream, boundaries = make([BLOCK + 5], dtype=dtype)
    cut = BLOCK - 3
    healthy = both(causal_attention, q, k, v, upstream, boundaries)[0]
    k[cut:], v[cut:] = 1e3, 1e3
    assert torch.equal(causal_attention(q, k, v, boundaries)[:cut], healthy[:cut])
    upstream[cut:] = 0
    for name, gradient in zip("qkv", both(causal_attention, q, k, v, upstream, boundaries)[1:], strict=True):
        assert not gradient[cut:].any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sick", [0, 1, 2, 3])
@pytest.mark.parametrize("lengths", [[BLOCK + 2] * 3, [13, 15, 14]])
def test_nan_stays_in_its_sample(sick, lengths, dtype):
    *tensors, boundaries = make(lengths, dtype=dtype)
    healthy = both(causal_attention, *tensors, boundaries)
    second = slice(boundaries[1], boundaries[2])
    tensors[sick][second] = torch.nan
    for before, after in zip(healthy, both(causal_attention, *tensors, boundaries), strict=True):
        for sound in (slice(0, second.start), slice(second.stop, None)):
            assert torch.equal(after[sound], before[sound])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_again(dtype):
    case = make([30, 31, 200, BLOCK], dtype=dtype)
    assert all(map(torch.equal, both(causal_attention, *case), both(causal_attention, *case)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype):
    """Heads before tokens, slices of wider tensors, and an upstream gradient that is one number."""
    q, k, v, _, boundaries = make([11, 5], dtype=dtype)
    turned = [q.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([k, k], 2)[..., : k.shape[2]], v]
    ones = torch.ones((), dtype=dtype).expand(q.shape)
    expected = both(causal_attention, q, k, v, ones.contiguous(), boundaries)
    for actual, wanted in zip(both(causal_attention, *turned, ones, boundaries), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_every_sample_stands_in_one_rectangle():
    for lengths in BATCHES:
        boundaries = (0, *accumulate(lengths))
        shown = rectangles(boundaries)
        assert sorted(sample for part in shown for sample in part.samples) == list(pairwise(boundaries))
        for part in shown:
            padding = [part.length - (end - start) for start, end in part.samples]
            assert min(padding) == 0 and sum(padding) <= (MOST_PADDING if part.length < LONE else 0)
    assert [part.samples for part in rectangles((0, 0, 3, 3))] == [((0, 3),)]  # nothing stands for an empty sample


def test_only_q_k_and_v_are_saved():
    q, k, v, _, boundaries = make([20, 3], dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        causal_attention(*leaves, boundaries)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in leaves}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
def test_torch_accepts_the_operators(monkeypatch, dtype, window):
    forward, backward = recorded(monkeypatch, _causal_attention)
    both(causal_attention, *make([5, 9, 9], dtype=dtype), window)
    opcheck(_causal_attention, forward[0], backward[0])


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_compiled_equals_eager():
    case = make([5, 9, 9], dtype=torch.float32)

    def gated(q, k, v, boundaries):
        return causal_attention(2 * q, k, v, boundaries).sigmoid()

    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(both(compiled, *case), both(gated, *case), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (9, 3, 6)}, "divisor of H=4"),
        ({"v": (9, 2, 5)}, r"v \[9, 2, 5\]"),
        ({"k": (8, 2, 6), "v": (8, 2, 6)}, r"T=9"),
        ({"boundaries": (0, 5)}, r"0\.\.5 must be 0\.\.T=9"),
        ({"window": 0}, "window=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = {"q": (9, 4, 6), "k": (9, 2, 6), "v": (9, 2, 6)}
    settings = {"boundaries": (0, 9), **change}
    tensors = {name: torch.zeros(settings.pop(name, shape)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        causal_attention(**tensors, **settings)
