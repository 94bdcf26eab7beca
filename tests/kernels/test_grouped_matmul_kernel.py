"""The grouped kernels equal float64 products, keep to their group's rows and repeat their bits."""

import pytest
import torch
from builders import assert_error_like

from moe_peft.kernels.grouped_matmul import kernel, reference
from moe_peft.kernels.grouped_matmul.op import grouped_matmul

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SPLITS = {
    "one row": [0, 0, 1, 0],
    "empty first and last": [0, 4, 0, 7, 0],
    "one group": [9],
    "no rows": [0, 0, 0],
    "tiles of one group and many": [65, 0, 1, 130, 64],
}


def make(sizes, inputs, outputs, device, dtype, weight_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    offsets = torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32)
    x, upstream = normal(sum(sizes), inputs), normal(sum(sizes), outputs)
    return x, normal(len(sizes), outputs, inputs).to(weight_dtype), offsets, upstream


def run(x, weights, offsets, upstream):
    y = kernel.grouped_matmul_forward(x, weights, offsets)
    dx = kernel.grouped_matmul_dx(upstream, weights, offsets)
    return y, dx, kernel.grouped_matmul_dw(upstream, x, offsets, weights.dtype)


def products(x, weights, offsets, upstream, dtype):
    """The formula group by group in another dtype."""
    x, weights, upstream = x.to(dtype), weights.to(dtype), upstream.to(dtype)
    spans = list(zip(offsets.tolist(), offsets[1:].tolist(), weights, strict=False))
    y = torch.cat([x[start:end] @ weight.T for start, end, weight in spans])
    dx = torch.cat([upstream[start:end] @ weight for start, end, weight in spans])
    return y, dx, torch.stack([upstream[start:end].T @ x[start:end] for start, end, _ in spans])


def check(case, dtype):
    plain, truth = products(*case, dtype), products(*case, torch.float64)
    for name, ours, theirs, true in zip(("y", "dx", "dW"), run(*case), plain, truth, strict=True):
        assert ours.dtype == (case[1].dtype if name == "dW" else dtype)
        assert ours.is_contiguous()
        assert ours.isfinite().all(), name
        assert_error_like(ours, theirs.to(ours.dtype), true, dtype, name)


@pytest.mark.parametrize(("inputs", "outputs"), [(13, 5), (1, 1), (70, 131)])
@pytest.mark.parametrize("split", SPLITS)
def test_product_and_gradients(split, inputs, outputs, kernel_device, kernel_dtype):
    check(make(SPLITS[split], inputs, outputs, kernel_device, kernel_dtype), kernel_dtype)


def test_weights_in_the_rows_dtype(kernel_device, kernel_dtype):
    case = make(SPLITS["empty first and last"], 16, 8, kernel_device, kernel_dtype, weight_dtype=kernel_dtype)
    check(case, kernel_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_large_group_is_summed_in_parts(dtype, kernel_device):
    case = make([3, 1030], 5, 3, kernel_device, torch.float32, weight_dtype=dtype)
    assert case[0].shape[0] // (256 * 2) > 1
    check(case, torch.float32)


def test_more_row_tiles_than_a_band(kernel_device):
    check(make([64] * 11 + [1] * 9, 5, 70, kernel_device, torch.float32), torch.float32)


def test_operands_of_any_layout(kernel_device):
    x, weights, offsets, upstream = make(SPLITS["empty first and last"], 13, 5, kernel_device, torch.float32)
    expected = run(x, weights, offsets, upstream)
    turned = (x.T.contiguous().T, weights.transpose(1, 2).contiguous().transpose(1, 2), offsets)
    for actual, wanted in zip(run(*turned, upstream.T.contiguous().T), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_same_bits_twice(kernel_device, kernel_dtype):
    case = make([5, 700, 0, 31], 33, 17, kernel_device, kernel_dtype)
    for first, second in zip(run(*case), run(*case), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("sick", ["x", "weights", "upstream"])
def test_nan_stays_in_its_group(sick, kernel_device):
    x, weights, offsets, upstream = make([3, 66, 5], 7, 5, kernel_device, torch.float32)
    healthy = run(x, weights, offsets, upstream)
    rows = slice(3, 69)
    {"x": x[rows], "weights": weights[1], "upstream": upstream[rows]}[sick].fill_(torch.nan)
    found = run(x, weights, offsets, upstream)
    others = [0, 1, 2, *range(69, 74)]
    assert any(value.isnan().any() for value in found)
    for i in (0, 1):
        assert torch.equal(found[i][others], healthy[i][others])
    assert torch.equal(found[2][[0, 2]], healthy[2][[0, 2]])


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [[2048] * 8, [0, 1, 5000, 127, 3000, 0, 129, 8127]])
def test_full_size_in_bfloat16(sizes):
    case = make(sizes, 1024, 3000, "cuda", torch.bfloat16)
    check(case, torch.bfloat16)
    x, weights, offsets, upstream = case
    x.requires_grad_()
    weights.requires_grad_()
    y = grouped_matmul(x, weights, offsets)
    y.backward(upstream)
    on_cpu = [tensor.detach().cpu() for tensor in (x, weights, offsets)]
    torch.testing.assert_close(y.detach().cpu(), reference.grouped_matmul_forward(*on_cpu), rtol=0.02, atol=0.5)
    assert x.grad.isfinite().all()
    assert weights.grad.isfinite().all()
