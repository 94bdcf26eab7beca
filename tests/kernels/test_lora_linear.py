"""The projections with a LoRA on each token range equal their formula, and stay within each range."""

import dataclasses

import pytest
import torch
from builders import assert_close, assert_error_like
from test_registration import opcheck, recorded
from torch.nn.functional import linear

from moe_peft.kernels.lora_linear.op import _lora_linear, lora_linear
from moe_peft.kernels.lora_linear.ranges import LoraRange
from moe_peft.kernels.recompute import Recomputable
from moe_peft.kernels.rms_norm.op import rms_norm
from moe_peft.kernels.swiglu.op import swiglu

pytestmark = pytest.mark.usefixtures("poisoned_memory", "cpu_code")

# (start, end, rank on each of three projections (0: no factors), masked) of every range among 11 tokens
LAYOUTS = {
    "whole": [(0, 11, (3, 0, 2), False)],
    "whole, masked": [(0, 11, (3, 5, 1), True)],
    "one token": [(5, 6, (2, 2, 0), True)],
    "gaps": [(1, 3, (1, 0, 0), False), (4, 5, (4, 2, 8), True), (8, 10, (7, 0, 3), False)],
    "side by side": [(0, 2, (2, 3, 1), True), (2, 9, (16, 4, 5), True), (9, 11, (5, 0, 2), False)],
    "out of order": [(7, 11, (2, 2, 2), False), (0, 4, (3, 1, 0), True)],
    "of one make": [(1, 4, (2, 0, 3), False), (4, 7, (2, 0, 3), False), (7, 10, (2, 0, 3), False)],
    "of one make, masked": [(0, 5, (3, 1, 0), True), (5, 10, (3, 1, 0), True)],
    "of one make, other lengths": [(0, 4, (2, 3, 1), False), (4, 7, (2, 3, 1), False), (7, 10, (2, 3, 1), False)],
    "of one make, other lengths, masked": [(1, 6, (2, 0, 1), True), (6, 10, (2, 0, 1), True)],
    "an empty range": [(4, 4, (5, 2, 0), True), (4, 11, (3, 0, 1), False)],
}
TOKENS = 11
OUTPUTS = {"one projection": (9,), "three projections": (9, 4, 7)}
PROJECTIONS = pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)


def make(layout, *, inputs=6, outputs=(9,), bias=True, dtype=torch.float64, adapter_dtype=None, seed=0):
    """The arguments of the op, every second projection with a bias if any, and the upstream gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    ranges = []
    for i, (start, end, ranks, masked) in enumerate(LAYOUTS[layout]):
        factors = tuple(
            (normal(rank, inputs, dtype=adapter_dtype or dtype), normal(size, rank, dtype=adapter_dtype or dtype))
            if rank
            else None
            for rank, size in zip(ranks, outputs, strict=False)
        )
        scalings = tuple(0.5 + i + j / 4 for j in range(len(outputs)))
        keep = torch.rand(end - start, inputs, generator=generator) < 0.6
        ranges.append(LoraRange(start, end, factors, scalings, keep.to(dtype) / 0.6 if masked else None))
    x, weights = normal(TOKENS, inputs), [normal(size, inputs) for size in outputs]
    biases = [normal(size) if bias and j % 2 == 0 else None for j, size in enumerate(outputs)]
    return x, weights, biases, ranges, [normal(TOKENS, size) for size in outputs]


def ours(x, weights, biases, ranges):
    return lora_linear(Recomputable(x), weights, biases, ranges)


def plain(x, weights, biases, ranges):
    """Token by token, with nothing but vectors."""
    outputs = []
    for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        rows = []
        for token in range(len(x)):
            y = weight @ x[token]
            if bias is not None:
                y = y + bias
            for part in ranges:
                if part.start <= token < part.end and part.factors[j] is not None:
                    lora_a, lora_b = (factor.to(x.dtype) for factor in part.factors[j])
                    seen = x[token] if part.mask is None else x[token] * part.mask[token - part.start]
                    y = y + part.scalings[j] * (lora_b @ (lora_a @ seen))
            rows.append(y)
        outputs.append(torch.stack(rows))
    return outputs


def mapped(ranges, function):
    """The ranges with every factor through the function."""
    return [
        dataclasses.replace(part, factors=tuple(pair and tuple(map(function, pair)) for pair in part.factors))
        for part in ranges
    ]


def factors_of(ranges):
    return [factor for part in ranges for pair in part.factors if pair is not None for factor in pair]


def both(function, x, weights, biases, ranges, upstream):
    """Outputs, then the gradients of x and of every factor: zeros where nothing reached it."""
    x = x.clone().requires_grad_()
    parts = mapped(ranges, lambda factor: factor.clone().requires_grad_())
    outputs = function(x, weights, biases, parts)
    torch.autograd.backward(outputs, upstream)
    leaves = [x, *factors_of(parts)]
    grads = [torch.zeros_like(leaf) if function is plain and leaf.grad is None else leaf.grad for leaf in leaves]
    return [*(y.detach() for y in outputs), *grads]


def every_tensor(case, function):
    """The case with every tensor through the function."""
    x, weights, biases, ranges, upstream = case
    parts = [
        dataclasses.replace(part, mask=function(part.mask) if part.mask is not None else None)
        for part in mapped(ranges, function)
    ]
    biases = [function(bias) if bias is not None else None for bias in biases]
    return function(x), [*map(function, weights)], biases, parts, [*map(function, upstream)]


def promoted(case, dtype):
    return every_tensor(case, lambda tensor: tensor.to(dtype))


def magnitudes(case):
    return every_tensor(case, torch.Tensor.abs)


@PROJECTIONS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_equals_the_formula(layout, bias, outputs):
    case = make(layout, bias=bias, outputs=outputs)
    found, expected = both(ours, *case), both(plain, *case)
    for i, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert actual.dtype == torch.float64
        assert actual.is_contiguous()
        assert_close(actual, wanted, 1e-12, f"{layout}, result {i}")


@PROJECTIONS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, outputs):
    x, weights, biases, ranges, _ = make(layout, inputs=3, outputs=outputs)

    def run(x, *factors):
        given = iter(factors)
        return tuple(ours(x, weights, biases, mapped(ranges, lambda _: next(given))))

    leaves = x, *factors_of(ranges)
    assert torch.autograd.gradcheck(run, tuple(leaf.requires_grad_() for leaf in leaves))


@pytest.mark.parametrize(("inputs", "outputs"), [(1, (1,)), (1, (7, 1)), (7, (1,)), (33, (17, 1, 40))])
def test_odd_sizes(inputs, outputs):
    case = make("side by side", inputs=inputs, outputs=outputs)
    for actual, wanted in zip(both(ours, *case), both(plain, *case), strict=True):
        assert_close(actual, wanted, 1e-12)


@PROJECTIONS
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("layout", ["whole, masked", "side by side"])
def test_error_is_at_most_the_formulas_in_the_same_dtype(layout, dtype, adapter_dtype, outputs):
    outputs = tuple(9 * size for size in outputs)
    case = make(layout, inputs=96, outputs=outputs, dtype=dtype, adapter_dtype=adapter_dtype)
    truth = both(plain, *promoted(case, torch.float64))
    found, theirs = both(ours, *case), both(plain, *case)
    num_wide = len(outputs) + 1
    assert [value.dtype for value in found] == [dtype] * num_wide + [adapter_dtype] * (len(found) - num_wide)
    # In float32 every order of a sum's terms rounds differently, by as much as the terms are large.
    terms = both(plain, *magnitudes(promoted(case, torch.float64)))
    for i, wanted in enumerate(truth):
        floor = terms[i].norm().item() if dtype == torch.float32 else 0.0
        assert_error_like(found[i], theirs[i], wanted, dtype, f"result {i}", floor)


@PROJECTIONS
def test_rows_outside_every_range_are_the_base_layers_own(outputs):
    x, weights, biases, ranges, _ = make("gaps", outputs=outputs, dtype=torch.float32)
    others = ours(x, weights, biases, mapped(ranges, lambda factor: torch.full_like(factor, torch.nan)))
    outside = [0, 3, 5, 6, 7, 10]
    for y, other, weight, bias in zip(ours(x, weights, biases, ranges), others, weights, biases, strict=True):
        assert torch.equal(y[outside], other[outside])
        assert_close(y[outside], linear(x, weight, bias)[outside], 1e-6)


def test_without_ranges_the_gradient_passes_through_the_base_layers():
    x, weights, biases, _, upstream = make("whole", outputs=(9, 4))
    (expected,) = both(plain, x, weights, biases, [], upstream)[2:]
    (actual,) = both(ours, x, weights, biases, [], upstream)[2:]
    assert_close(actual, expected, 1e-12)


@PROJECTIONS
@pytest.mark.parametrize("sick", ["x", "lora_a", "lora_b", "mask"])
def test_nan_stays_in_its_range(sick, outputs):
    case = make("side by side", outputs=outputs, dtype=torch.float32)
    healthy = both(ours, *case)
    x, _, _, ranges, _ = case
    rows, part = slice(2, 9), ranges[1]
    tensors = {
        "x": [x[rows]],
        "mask": [part.mask],
        "lora_a": [pair[0] for pair in part.factors],
        "lora_b": [pair[1] for pair in part.factors],
    }
    for tensor in tensors[sick]:
        tensor.fill_(torch.nan)
    found = both(ours, *case)
    others = [0, 1, 9, 10]
    for y, wanted in zip(found[: len(outputs)], healthy, strict=False):
        assert y[rows].isnan().all()
        assert torch.equal(y[others], wanted[others])
    dx, *factor_grads = found[len(outputs) :]
    assert torch.equal(dx[others], healthy[len(outputs)][others])
    own = {id(factor) for factor in factors_of([part])}
    for factor, grad, wanted in zip(factors_of(ranges), factor_grads, healthy[len(outputs) + 1 :], strict=True):
        assert id(factor) in own or torch.equal(grad, wanted)


def test_a_projections_nan_leaves_the_other_projections_alone():
    """Their ranks lie side by side in memory."""
    case = make("whole, masked", outputs=(9, 4, 7), dtype=torch.float32)
    healthy = both(ours, *case)
    for factor in case[3][0].factors[1]:
        factor.fill_(torch.nan)
    found = both(ours, *case)
    assert found[1].isnan().all()
    for i in (0, 2, 4, 5, 8, 9):  # y0, y2 and the gradients of their factors
        assert torch.equal(found[i], healthy[i])


@PROJECTIONS
def test_an_input_that_needs_no_gradient(outputs):
    """The first layer reads frozen embeddings: its factors are trained all the same, and dx is never computed."""
    x, weights, biases, ranges, upstream = make("gaps", outputs=outputs)
    expected = both(ours, x, weights, biases, ranges, upstream)[len(outputs) + 1 :]
    factors = [factor.requires_grad_() for factor in factors_of(ranges)]
    torch.autograd.backward(ours(x, weights, biases, ranges), upstream)
    assert x.grad is None
    for factor, wanted in zip(factors, expected, strict=True):
        assert_close(factor.grad, wanted, 1e-12)


def test_frozen_factors_pass_the_gradient_of_x():
    """An adapter that is used, not trained."""
    x, weights, biases, ranges, upstream = make("gaps", outputs=(9, 4))
    expected = both(plain, x, weights, biases, ranges, upstream)[2]
    torch.autograd.backward(ours(x.requires_grad_(), weights, biases, ranges), upstream)
    assert_close(x.grad, expected, 1e-12)
    assert all(factor.grad is None for factor in factors_of(ranges))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2)])
def test_an_output_that_nobody_used_has_no_part_in_the_gradients(used):
    x, weights, biases, ranges, upstream = make("side by side", outputs=(9, 4, 7))
    zeroed = [grad if j in used else torch.zeros_like(grad) for j, grad in enumerate(upstream)]
    expected = both(plain, x, weights, biases, ranges, zeroed)[3:]
    leaves = [tensor.requires_grad_() for tensor in (x, *factors_of(ranges))]
    outputs = ours(x, weights, biases, ranges)
    torch.autograd.backward([outputs[j] for j in used], [upstream[j] for j in used])
    for leaf, wanted in zip(leaves, expected, strict=True):
        assert_close(leaf.grad, wanted, 1e-12)


@PROJECTIONS
def test_the_arguments_are_left_alone(outputs):
    case = make("side by side", outputs=outputs)
    x, weights, biases, ranges, upstream = case
    optional = [*biases, *(part.mask for part in ranges)]
    tensors = [x, *weights, *upstream, *factors_of(ranges), *(t for t in optional if t is not None)]
    copies = [tensor.clone() for tensor in tensors]
    both(ours, *case)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


@PROJECTIONS
@pytest.mark.parametrize("upstream", ["expanded", "transposed"])
def test_upstream_gradients_of_any_layout(upstream, outputs):
    *case, grads = make("side by side", outputs=outputs)
    if upstream == "expanded":
        grads = [torch.ones(()).double().expand(TOKENS, size) for size in outputs]
    else:
        grads = [grad.T.contiguous().T for grad in grads]
    for actual, wanted in zip(both(ours, *case, grads), both(plain, *case, grads), strict=True):
        assert_close(actual, wanted, 1e-12)


def recipes(dtype):
    """What each recipe makes x from: the leaves, and a function of them."""
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(TOKENS, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))

    def normed(x):
        y, rstd = rms_norm(x, weight, 1e-6)
        return Recomputable(y, "rms_norm", (x, rstd, weight))

    weight = torch.randn(6, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "rms_norm": ((one,), normed),
        "swiglu": ((one, other), lambda gate, up: Recomputable(swiglu(gate, up), "swiglu", (gate, up))),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["rms_norm", "swiglu"])
def test_an_input_that_is_computed_again_has_the_same_gradients_to_the_bit(recipe, dtype):
    _, weights, biases, ranges, upstream = make("side by side", outputs=(9, 4, 7), dtype=dtype)
    sources, compute = recipes(dtype)[recipe]

    def run(keep):
        leaves = [source.clone().requires_grad_() for source in sources]
        parts = mapped(ranges, lambda factor: factor.clone().requires_grad_())
        x = compute(*leaves)
        torch.autograd.backward(lora_linear(keep(x), weights, biases, parts), upstream)
        return [leaf.grad for leaf in (*leaves, *factors_of(parts))]

    for actual, wanted in zip(run(lambda x: x), run(lambda x: Recomputable(x.value)), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("recipe", ["", "rms_norm", "swiglu"])
def test_what_is_computed_again_is_not_saved(recipe):
    _, weights, biases, ranges, _ = make("side by side", outputs=(9, 4, 7), dtype=torch.float32)
    sources, compute = recipes(torch.float32)[recipe or "swiglu"]
    x = compute(*(source.requires_grad_() for source in sources))
    parts = mapped(ranges, lambda factor: factor.requires_grad_())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        outputs = lora_linear(x if recipe else Recomputable(x.value), weights, biases, parts)
    found = {tensor.data_ptr() for tensor in saved}
    kept = x.sources if recipe else [x.value]
    masks = [part.mask for part in parts if part.mask is not None]
    allowed = {tensor.data_ptr() for tensor in (*kept, *weights, *masks, *factors_of(parts))}
    others = [tensor for tensor in saved if tensor.data_ptr() not in allowed]
    assert {tensor.data_ptr() for tensor in kept} <= found
    assert (x.value.data_ptr() in found) == (recipe == "")
    assert not {y.data_ptr() for y in outputs} & found
    assert sorted(tuple(tensor.shape) for tensor in others) == [(2, 6), (2, 7), (7, 25)]  # A (m * x) of each range


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("recipe", ["", "rms_norm", "swiglu"])
def test_torch_accepts_the_registration(recipe, dtype, adapter_dtype, monkeypatch):
    case = make("gaps", outputs=(9, 4, 7), dtype=dtype, adapter_dtype=adapter_dtype)
    _, weights, biases, ranges, upstream = case
    parts = mapped(ranges, lambda factor: factor.requires_grad_())
    sources, compute = recipes(dtype)[recipe or "swiglu"]
    x = compute(*sources)
    leaf = x.value.detach().requires_grad_()
    forward, backward = recorded(monkeypatch, _lora_linear)
    outputs = lora_linear(Recomputable(leaf, recipe, x.sources if recipe else ()), weights, biases, parts)
    torch.autograd.backward(outputs, upstream)
    opcheck(_lora_linear, forward[0], backward[0])


@PROJECTIONS
@pytest.mark.parametrize("layout", ["gaps", "out of order", "an empty range"])
def test_compiled_equals_eager(layout, outputs):
    case = make(layout, outputs=outputs, dtype=torch.float32)

    def around(gate, weights, biases, ranges):
        up = gate + 1
        return [
            2 * y for y in lora_linear(Recomputable(swiglu(gate, up), "swiglu", (gate, up)), weights, biases, ranges)
        ]

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(both(compiled, *case), both(around, *case), strict=True):
        assert torch.equal(actual, expected)


def test_compiled_without_ranges():
    case = make("whole", outputs=(9, 4), dtype=torch.float32)
    case = (*case[:3], [], case[4])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(both(compiled, *case), both(ours, *case), strict=True):
        assert torch.equal(actual, expected)


def test_a_tensor_that_was_changed_behind_the_backward_is_found_out():
    x, weights, biases, ranges, upstream = make("gaps", outputs=(9, 4))
    outputs = ours(x.requires_grad_(), weights, biases, ranges)
    ranges[1].mask.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(outputs, upstream)
