"""A router's choice is that of torch's softmax and topk, and its gradient autograd's."""

import pytest
import torch
from builders import assert_close
from test_registration import opcheck, recorded

from moe_peft.kernels.routing.op import _route, route

pytestmark = pytest.mark.usefixtures("poisoned_memory", "cpu_code")

SIZES = [(1, 1, 1), (300, 8, 2), (7, 64, 4), (9, 17, 17), (33, 5, 1), (600, 2, 1), (4, 100, 3)]


def plain(logits, top_k):
    probabilities = logits.softmax(dim=1)
    weights, experts = probabilities.topk(top_k, dim=1)
    return weights / weights.sum(dim=1, keepdim=True) if top_k > 1 else weights, experts


def both(function, logits, top_k, upstream):
    leaf = logits.clone().requires_grad_()
    weights, experts = function(leaf, top_k)
    weights.backward(upstream)
    return weights.detach(), experts, leaf.grad


def make(rows, size, top_k, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randn(rows, top_k, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_choice_weights_and_gradient(sizes, dtype):
    logits, upstream = make(*sizes, dtype=dtype)
    weights, experts, d_logits = both(route, logits, sizes[2], upstream)
    truth = both(plain, logits.double(), sizes[2], upstream.double())
    assert weights.dtype == d_logits.dtype == dtype
    assert torch.equal(experts, truth[1])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert_close(weights, truth[0], tolerance, "weights")
    assert_close(d_logits, truth[2], tolerance, "d_logits")


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_rows(top_k):
    weights, experts, d_logits = both(route, torch.zeros(0, 8), top_k, torch.zeros(0, top_k))
    assert (weights.shape, experts.shape, d_logits.shape) == ((0, top_k), (0, top_k), (0, 8))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradcheck(top_k):
    logits, _ = make(3, 4, top_k)
    assert torch.autograd.gradcheck(lambda x: route(x, top_k)[0], (logits.requires_grad_(),))


@pytest.mark.parametrize("top_k", [1, 2])
def test_large_logits_and_equal_ones(top_k):
    logits = torch.tensor([[1e4, -1e4, 0.0, 3.0], [-1e4, -1e4, -1e4, -1e4]])
    weights, experts = route(logits, top_k)
    assert weights.isfinite().all()
    assert experts[0, 0] == 0
    assert weights[1].tolist() == ([0.25] if top_k == 1 else [0.5, 0.5])
    assert len(set(experts[1].tolist())) == top_k


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_chooses_each_expert_once(bad):
    logits, upstream = make(20, 8, 2, torch.float32)
    healthy = both(route, logits, 2, upstream)
    logits[3, 5] = bad
    weights, experts, d_logits = both(route, logits, 2, upstream)
    others = [row for row in range(20) if row != 3]
    for found, theirs in zip((weights, experts, d_logits), healthy, strict=True):
        assert torch.equal(found[others], theirs[others])
    assert len(set(experts[3].tolist())) == 2
    assert experts.min() >= 0
    assert experts.max() < 8
    assert weights[3].isnan().any()


def test_a_row_does_not_see_the_others():
    logits, upstream = make(700, 8, 2, torch.float32)
    of_all = both(route, logits, 2, upstream)
    for start, end in ((0, 1), (255, 300), (699, 700)):
        for one, all_rows in zip(both(route, logits[start:end], 2, upstream[start:end]), of_all, strict=True):
            assert torch.equal(one, all_rows[start:end])


@pytest.mark.parametrize("top_k", [0, 9])
def test_a_top_k_that_cannot_be(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k} must be from 1 to the number of experts, 8"):
        route(torch.zeros(3, 8), top_k)


@pytest.mark.parametrize("top_k", [1, 2])
def test_torch_accepts_the_registration(top_k, monkeypatch):
    forward, backward = recorded(monkeypatch, _route)
    both(route, *make(5, 4, top_k, torch.float32)[:1], top_k, torch.ones(5, top_k))
    opcheck(_route, forward[0], backward[0])
