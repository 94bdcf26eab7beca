"""Products equal torch's, through whichever library they go."""

import pytest
import torch
from builders import assert_error_like, assert_relative

from moe_peft.kernels import products

SIZES = [
    (130, 31, 17),
    (1, 1, 1),
    (1, 7, 3),
    (7, 1, 5),
    (3, 5, 1),
    (13, 31, 17),
    (33, 64, 65),
    (129, 257, 63),
]  # rows, I, O
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "x transposed", "weight transposed", "both transposed", "columns", "rows"]


def make(rows, inner, outer, dtype=torch.float64):
    """x, weight and bias."""
    generator = torch.Generator().manual_seed(rows + 10 * inner + 100 * outer)
    shapes = (rows, inner), (outer, inner), (outer,)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def laid_out(tensor, layout):
    """The same values in memory of another order."""
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "columns":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=1).flatten(0, 1)[::2]
    if layout == "rows":
        return torch.cat([torch.full_like(tensor, torch.nan), tensor], dim=1)[:, tensor.shape[1] :]
    return tensor


def arranged(x, weight, layout):
    """Both operands as a layout of LAYOUTS names them."""
    if layout in ("columns", "rows"):
        return laid_out(x, layout), laid_out(weight, layout)
    of_x = "transposed" if layout in ("x transposed", "both transposed") else ""
    of_weight = "transposed" if layout in ("weight transposed", "both transposed") else ""
    return laid_out(x, of_x), laid_out(weight, of_weight)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_error_is_that_of_torchs_own_linear(size, dtype, with_bias):
    x, weight, bias = make(*size, dtype)
    bias = bias if with_bias else None
    truth = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    floor = (x.double().abs() @ weight.double().abs().T).norm().item()
    y = products.linear(x, weight, bias)
    assert_error_like(y, torch.nn.functional.linear(x, weight, bias), truth, dtype, "linear", floor)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_any_layout_of_the_operands(size, dtype, layout):
    x, weight, bias = make(*size, dtype)
    tolerance = 8 * torch.finfo(dtype).eps
    floor = (x.double().abs() @ weight.double().abs().T).norm().item()
    product = x.double() @ weight.double().T
    own_x, own_weight = arranged(x, weight, layout)
    for actual, expected, what in (
        (products.linear(own_x, own_weight, bias), product + bias.double(), "linear"),
        (products.matmul_t(own_x, own_weight), product, "matmul_t"),
        (products.matmul(own_x, own_weight.T), product, "matmul"),
    ):
        assert actual.dtype == dtype
        assert_relative(actual, expected, tolerance, what, floor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_expanded_operand(dtype):
    """The gradient of a sum is one number that fills a matrix."""
    x = torch.full((), 0.5, dtype=dtype).expand(5, 7)
    _, weight, bias = make(5, 7, 3, dtype)
    expected = 0.5 * weight.double().sum(dim=1).expand(5, 3)
    assert_relative(products.matmul_t(x, weight), expected, 8 * torch.finfo(dtype).eps)
    assert_relative(products.matmul(x, weight.T), expected, 8 * torch.finfo(dtype).eps)
    assert_relative(products.linear(x, weight, bias), expected + bias.double(), 8 * torch.finfo(dtype).eps)
    row = weight[:1].expand(5, 7)
    assert_relative(products.matmul_t(x, row), 0.5 * row.double().sum(dim=1).expand(5, 5), 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(0, 7, 3), (4, 7, 0), (4, 0, 3), (0, 0, 3)])
def test_nothing_to_multiply(size, dtype):
    x, weight, bias = make(*size, dtype)
    y = products.linear(x, weight, bias)
    assert y.shape == (size[0], size[2])
    assert torch.equal(y, bias.expand(size[0], size[2]))
    assert torch.equal(products.matmul(x, weight.T), torch.zeros(size[0], size[2], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row(dtype):
    x, weight, bias = make(13, 31, 17, dtype)
    healthy = products.linear(x, weight, bias)
    x[4] = torch.nan
    sick = products.linear(x, weight, bias)
    others = [i for i in range(13) if i != 4]
    assert sick[4].isnan().all()
    assert torch.equal(sick[others], healthy[others])


def test_the_result_is_memory_of_its_own_in_which_one_may_add():
    x, weight, bias = make(6, 7, 3, torch.float32)
    copies = x.clone(), weight.clone(), bias.clone()
    y = products.linear(x, weight, bias)
    assert y.is_contiguous()
    y.add_(1)
    assert all(torch.equal(now, before) for now, before in zip((x, weight, bias), copies, strict=True))


def test_without_onednn_torch_multiplies(monkeypatch):
    x, weight, bias = make(6, 7, 3, torch.float32)
    monkeypatch.setattr(products, "hasattr", lambda *_: False, raising=False)
    assert torch.equal(products.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_product_is_added_to_what_is_there(size, dtype):
    x, weight, _ = make(*size, dtype)
    before = torch.randn(size[0], size[2], generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    truth = before.double() + x.double() @ weight.double().T
    floor = (before.double().abs() + x.double().abs() @ weight.double().abs().T).norm().item()
    found = before.clone()
    products.add_matmul_(found, x, weight.T)
    assert_error_like(found, before + x @ weight.T, truth, dtype, "sum", floor)


def test_float32_products_of_bfloat16_values_stay_those_of_float32():
    a, b = (torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(i)).bfloat16().float() for i in (1, 2))
    with products.products_of_16_bits(torch.bfloat16):
        found = a @ b.mT
    truth = a.double() @ b.double().mT
    floor = (a.double().abs() @ b.double().abs().mT).norm().item()
    assert_error_like(found, a @ b.mT, truth, torch.float32, "product", floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_the_switch_of_products_goes_back(dtype, before):
    switch = torch.backends.mkldnn.matmul
    at_first = switch.fp32_precision
    switch.fp32_precision = before
    try:
        with pytest.raises(RuntimeError, match="from inside"), products.products_of_16_bits(dtype):
            assert switch.fp32_precision == ("bf16" if dtype == torch.bfloat16 else before)
            raise RuntimeError("from inside")
        assert switch.fp32_precision == before
    finally:
        switch.fp32_precision = at_first


@pytest.mark.parametrize("inner", [3, 8, 19, 31, 34, 38, 61, 64, 98, 100])
@pytest.mark.parametrize("rows", [5, 150])
def test_a_row_that_is_not_finite_reaches_no_other_row(rows, inner):
    """oneDNN reads past rows of some lengths where the CPU has AMX (see ``products.SAFE_LENGTH``)."""
    x, weight, _ = make(rows, inner, 61, torch.bfloat16)
    sick = x.clone()
    sick[rows // 2] = torch.nan
    others = torch.arange(rows) != rows // 2
    out, sick_out = (torch.zeros(rows, 61, dtype=torch.bfloat16) for _ in range(2))
    products.add_matmul_(out, x, weight.T.contiguous())
    products.add_matmul_(sick_out, sick, weight.T.contiguous())
    for healthy, after in (
        (products.linear(x, weight), products.linear(sick, weight)),
        (products.matmul(x, weight.T.contiguous()), products.matmul(sick, weight.T.contiguous())),
        (out, sick_out),
    ):
        assert torch.equal(after[others], healthy[others])
        assert after[rows // 2].isnan().all()
