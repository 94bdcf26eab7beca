"""The Triton kernel of the cross-entropy equals the softmax written out, as closely as its dtype lets the reference."""

import pytest
import torch
from builders import assert_close, assert_error_like

from moe_peft.kernels.linear_cross_entropy import kernel
from moe_peft.kernels.linear_cross_entropy.reference import linear_cross_entropy_forward as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(n, d, v, dtype, device, *, scale=1.0):
    generator = torch.Generator().manual_seed(n + v)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).mul_(scale)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64)
    targets = torch.randint(v, (n,), generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def truth(hidden, weight, targets):
    """In float64: nll and its gradient."""
    log_p = (hidden.double() @ weight.double().T).log_softmax(1)
    onehot = torch.nn.functional.one_hot(targets, weight.shape[0])
    return -log_p.gather(1, targets[:, None]).squeeze(1), (log_p.exp() - onehot) @ weight.double()


@pytest.mark.parametrize(("n", "d", "v"), [(1, 1, 1), (1, 3, 2), (7, 5, 37), (3, 16, 64), (5, 24, 131), (0, 4, 9)])
def test_equals_the_softmax(n, d, v, kernel_dtype, kernel_device, monkeypatch):
    monkeypatch.setattr(kernel, "MAX_BLOCK", 32)
    case = make(n, d, v, kernel_dtype, kernel_device)
    found = kernel.linear_cross_entropy_forward(*case, True)
    assert found[0].dtype == torch.float32
    for name, actual, plain, wanted in zip(
        ("nll", "gradient"), found, reference(*case, True), truth(*case), strict=True
    ):
        assert actual.isfinite().all(), name
        assert_error_like(actual, plain, wanted, kernel_dtype, name, floor=float(n > 0))


def test_chunks(kernel_device, monkeypatch):
    """One row in the last of them; the buffer is used again."""
    case = make(7, 5, 11, torch.float32, kernel_device)
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 3 * 11 * 4)
    for actual, wanted in zip(kernel.linear_cross_entropy_forward(*case, True), truth(*case), strict=True):
        assert_close(actual, wanted, 1e-5)


def test_without_a_gradient(kernel_device):
    case = make(4, 5, 11, torch.float32, kernel_device)
    nll, gradient = kernel.linear_cross_entropy_forward(*case, False)
    assert gradient.shape == (0, 5)
    assert torch.equal(nll, kernel.linear_cross_entropy_forward(*case, True)[0])


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_extreme_logits(scale, kernel_device, monkeypatch):
    monkeypatch.setattr(kernel, "MAX_BLOCK", 16)
    case = make(5, 8, 50, torch.float32, kernel_device, scale=scale)
    for actual, wanted in zip(kernel.linear_cross_entropy_forward(*case, True), truth(*case), strict=True):
        assert_close(actual, wanted, 1e-5)


def test_a_row_keeps_its_nan(kernel_device):
    hidden, weight, targets = make(5, 8, 50, torch.float32, kernel_device)
    expected = kernel.linear_cross_entropy_forward(hidden, weight, targets, True)
    hidden[2] = torch.nan
    rest = [0, 1, 3, 4]
    for actual, before in zip(
        kernel.linear_cross_entropy_forward(hidden, weight, targets, True), expected, strict=True
    ):
        assert actual[2].isnan().all()
        assert torch.equal(actual[rest], before[rest])


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32_000, 128_256])
def test_full_size(vocab):
    case = make(5000, 256, vocab, torch.bfloat16, "cuda", scale=0.1)
    found = kernel.linear_cross_entropy_forward(*case, True)
    again = kernel.linear_cross_entropy_forward(*case, True)
    assert all(map(torch.equal, found, again))
    for actual, plain, wanted in zip(found, reference(*case, True), truth(*case), strict=True):
        assert_error_like(actual, plain, wanted, torch.bfloat16)
