"""The linear layer with a LoRA on each token range equals its formula, and stays within each range."""

import pytest
import torch
from builders import assert_close, assert_error_like
from torch.nn.functional import linear

from moe_peft.kernels.lora_linear.op import lora_linear
from moe_peft.kernels.lora_linear.reference import LoraRange

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (start, end, rank, masked) of every range among 11 tokens
LAYOUTS = {
    "whole": [(0, 11, 3, False)],
    "whole, masked": [(0, 11, 3, True)],
    "one token": [(5, 6, 2, True)],
    "gaps": [(1, 3, 1, False), (4, 5, 4, True), (8, 10, 7, False)],
    "side by side": [(0, 2, 2, True), (2, 9, 16, True), (9, 11, 5, False)],
    "out of order": [(7, 11, 2, False), (0, 4, 3, True)],
}
TOKENS = 11


def make(layout, *, inputs=6, outputs=9, bias=True, dtype=torch.float64, adapter_dtype=None, seed=0):
    """The arguments of the op, and the upstream gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    ranges = []
    for i, (start, end, rank, masked) in enumerate(LAYOUTS[layout]):
        factors = (normal(*shape, dtype=adapter_dtype or dtype) for shape in ((rank, inputs), (outputs, rank)))
        keep = torch.rand(end - start, inputs, generator=generator) < 0.6
        mask = keep.to(dtype) / 0.6 if masked else None
        ranges.append(LoraRange(start, end, *factors, scaling=0.5 + i, mask=mask))
    x, weight = normal(TOKENS, inputs), normal(outputs, inputs)
    return x, weight, normal(outputs) if bias else None, ranges, normal(TOKENS, outputs)


def plain(x, weight, bias, ranges):
    """Token by token, with nothing but vectors."""
    rows = []
    for token in range(len(x)):
        y = weight @ x[token]
        if bias is not None:
            y = y + bias
        for part in ranges:
            if part.start <= token < part.end:
                seen = x[token] if part.mask is None else x[token] * part.mask[token - part.start]
                y = y + part.scaling * (part.lora_b.to(x.dtype) @ (part.lora_a.to(x.dtype) @ seen))
        rows.append(y)
    return torch.stack(rows)


def both(function, x, weight, bias, ranges, upstream):
    """Output, then the gradients of x and of every factor."""
    x = x.clone().requires_grad_()
    parts = [
        LoraRange(
            part.start,
            part.end,
            part.lora_a.clone().requires_grad_(),
            part.lora_b.clone().requires_grad_(),
            part.scaling,
            part.mask,
        )
        for part in ranges
    ]
    y = function(x, weight, bias, parts)
    y.backward(upstream)
    return [y.detach(), x.grad, *(factor.grad for part in parts for factor in (part.lora_a, part.lora_b))]


def promoted(case, dtype):
    """The same numbers in another dtype."""
    x, weight, bias, ranges, upstream = case
    parts = [
        LoraRange(
            part.start,
            part.end,
            part.lora_a.to(dtype),
            part.lora_b.to(dtype),
            part.scaling,
            part.mask.to(dtype) if part.mask is not None else None,
        )
        for part in ranges
    ]
    return x.to(dtype), weight.to(dtype), bias.to(dtype) if bias is not None else None, parts, upstream.to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_equals_the_formula(layout, bias):
    case = make(layout, bias=bias)
    found, expected = both(lora_linear, *case), both(plain, *case)
    for i, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert actual.dtype == torch.float64
        assert_close(actual, wanted, 1e-12, f"{layout}, result {i}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    x, weight, bias, ranges, _ = make(layout, inputs=3, outputs=4)
    factors = [factor.requires_grad_() for part in ranges for factor in (part.lora_a, part.lora_b)]

    def run(x, *factors):
        parts = [
            LoraRange(part.start, part.end, factors[2 * i], factors[2 * i + 1], part.scaling, part.mask)
            for i, part in enumerate(ranges)
        ]
        return lora_linear(x, weight, bias, parts)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *factors))


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 7), (7, 1), (33, 17)])
def test_odd_sizes(inputs, outputs):
    case = make("side by side", inputs=inputs, outputs=outputs)
    for actual, wanted in zip(both(lora_linear, *case), both(plain, *case), strict=True):
        assert_close(actual, wanted, 1e-12)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("layout", ["whole, masked", "side by side"])
def test_error_is_at_most_the_formulas_in_the_same_dtype(layout, dtype, adapter_dtype):
    case = make(layout, inputs=96, outputs=80, dtype=dtype, adapter_dtype=adapter_dtype)
    truth = both(plain, *promoted(case, torch.float64))
    ours, theirs = both(lora_linear, *case), both(plain, *case)
    assert [value.dtype for value in ours] == [dtype] * 2 + [adapter_dtype] * (2 * len(LAYOUTS[layout]))
    for i, wanted in enumerate(truth):
        assert_error_like(ours[i], theirs[i], wanted, dtype, f"result {i}")


def test_rows_outside_every_range_are_the_base_layers_own():
    x, weight, bias, ranges, _ = make("gaps", dtype=torch.float32)
    y = lora_linear(x, weight, bias, ranges)
    outside = [0, 3, 5, 6, 7, 10]
    assert torch.equal(y[outside], linear(x, weight, bias)[outside])
    assert torch.equal(lora_linear(x, weight, bias, []), linear(x, weight, bias))


@pytest.mark.parametrize("sick", ["x", "lora_a", "lora_b", "mask"])
def test_nan_stays_in_its_range(sick):
    case = make("side by side", dtype=torch.float32)
    healthy = both(lora_linear, *case)
    x, _, _, ranges, _ = case
    rows = slice(2, 9)
    (x[rows] if sick == "x" else getattr(ranges[1], sick)).fill_(torch.nan)
    y, dx, *factor_grads = both(lora_linear, *case)
    assert y[rows].isnan().all()
    others = [0, 1, 9, 10]
    assert torch.equal(y[others], healthy[0][others])
    assert torch.equal(dx[others], healthy[1][others])
    for i in (0, 1, 4, 5):
        assert torch.equal(factor_grads[i], healthy[2 + i])


def test_an_input_that_needs_no_gradient():
    """The first layer reads frozen embeddings: its factors are trained all the same, and dx is never computed."""
    x, weight, bias, ranges, upstream = make("gaps")
    expected = both(lora_linear, x, weight, bias, ranges, upstream)
    for part in ranges:
        part.lora_a.requires_grad_()
        part.lora_b.requires_grad_()
    lora_linear(x, weight, bias, ranges).backward(upstream)
    assert x.grad is None
    for i, factor in enumerate(factor for part in ranges for factor in (part.lora_a, part.lora_b)):
        assert_close(factor.grad, expected[2 + i], 1e-12)


def test_the_arguments_are_left_alone():
    case = make("side by side")
    x, weight, bias, ranges, upstream = case
    tensors = [
        x,
        weight,
        bias,
        upstream,
        *(t for part in ranges for t in (part.lora_a, part.lora_b, part.mask) if t is not None),
    ]
    copies = [tensor.clone() for tensor in tensors]
    both(lora_linear, *case)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("upstream", ["expanded", "transposed"])
def test_upstream_gradients_of_any_layout(upstream):
    x, weight, bias, ranges, _ = make("side by side")
    y_shape = (TOKENS, len(weight))
    grad = torch.ones(()).double().expand(y_shape) if upstream == "expanded" else torch.randn(y_shape[::-1]).double().T
    for actual, wanted in zip(
        both(lora_linear, x, weight, bias, ranges, grad), both(plain, x, weight, bias, ranges, grad), strict=True
    ):
        assert_close(actual, wanted, 1e-12)
