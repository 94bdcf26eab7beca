"""The segmented LoRA kernels equal the formula's float64 gradients, range by range, and repeat their bits."""

from dataclasses import replace

import pytest
import torch
from builders import assert_error_like

from moe_peft.kernels.lora_linear.kernel import lora_linear_backward, lora_linear_forward
from moe_peft.kernels.lora_linear.ranges import LoraRange

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (start, end, rank on each of the two projections (0: none), masked) of every range
LAYOUTS = {
    "one range": [(0, 21, (3, 3), False)],
    "one range, masked": [(0, 21, (8, 16), True)],
    "one token": [(5, 6, (2, 1), True)],
    "gaps, ranks": [(1, 4, (1, 3), False), (4, 5, (8, 0), True), (9, 20, (17, 40), True)],
    "out of order": [(17, 21, (8, 8), True), (0, 3, (40, 24), False), (3, 17, (16, 8), False)],
    "empty": [(4, 4, (5, 2), False), (6, 6, (3, 3), True), (6, 21, (0, 7), False)],
    "a range without factors": [(0, 7, (0, 0), True), (7, 21, (70, 2), False)],
}
TOKENS = 21
SIZES = {"odd": (13, (9, 5)), "one feature": (1, (1, 7)), "many tiles": (130, (67, 131))}


def make(layout, device, dtype, size="odd", *, tokens=TOKENS, bias=True, factor_dtype=torch.float32, seed=0):
    """x, weights, biases, ranges and upstream gradients; factors in a dtype of their own, all values of x's."""
    inputs, outputs = SIZES[size]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, to=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device, to)

    ranges = []
    for i, (start, end, ranks, masked) in enumerate(layout):
        factors = tuple(
            (normal(rank, inputs, to=factor_dtype), normal(out, rank, to=factor_dtype)) if rank else None
            for rank, out in zip(ranks, outputs, strict=True)
        )
        keep = (torch.rand(end - start, inputs, generator=generator) < 0.6).to(device, dtype) / 0.6
        ranges.append(LoraRange(start, end, factors, (0.5 + i, 1.25), keep if masked else None))
    weights = [normal(out, inputs) for out in outputs]
    biases = [normal(out) if bias else None for out in outputs]
    return normal(tokens, inputs), weights, biases, ranges, [normal(tokens, out) for out in outputs]


def formula(x, weights, biases, ranges, upstream, dtype):
    """Outputs, dx and every factor's gradient, by autograd in ``dtype``."""
    x = x.detach().to(dtype).requires_grad_()
    leaves = [
        [
            tuple(factor.detach().to(dtype).requires_grad_() for factor in pair) if pair else None
            for pair in part.factors
        ]
        for part in ranges
    ]
    outputs = []
    for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = x @ weight.to(dtype).T
        if bias is not None:
            y = y + bias.to(dtype)
        for part, pairs in zip(ranges, leaves, strict=True):
            if pairs[j] is not None:
                rows = x[part.start : part.end]
                seen = rows if part.mask is None else rows * part.mask.to(dtype)
                a, b = pairs[j]
                delta = part.scalings[j] * (seen @ a.T) @ b.T
                y = torch.cat([y[: part.start], y[part.start : part.end] + delta, y[part.end :]])
        outputs.append(y)
    torch.autograd.backward(outputs, [grad.to(dtype) for grad in upstream])
    return outputs, x.grad, [[tuple(f.grad for f in pair) if pair else None for pair in part] for part in leaves]


def kernel(x, weights, biases, ranges, upstream):
    outputs, lowered = lora_linear_forward(x, weights, biases, ranges)
    dx, grads = lora_linear_backward(upstream, x, weights, ranges, lowered, True)
    return outputs, dx, grads, lowered


def flat(outputs, dx, grads, *_):
    """Every result by name."""
    found = {f"y{j}": y.detach() for j, y in enumerate(outputs)} | {"dx": dx}
    for i, part in enumerate(grads):
        for j, pair in enumerate(part):
            if pair is not None:
                found |= {f"dA of range {i}, projection {j}": pair[0], f"dB of range {i}, projection {j}": pair[1]}
    return found


def check(case, dtype):
    ours, plain, truth = (flat(*run) for run in (kernel(*case), formula(*case, dtype), formula(*case, torch.float64)))
    assert ours.keys() == truth.keys()
    terms = flat(*formula(*_magnitudes(case), torch.float64))
    for name, value in ours.items():
        assert value.isfinite().all(), name
        assert value.is_contiguous(), name
        reference = plain[name]
        if name[:2] in ("dA", "dB"):
            assert value.dtype == torch.float32
            reference = reference.to(torch.float32)
        # Inputs are standard normals: no result's terms are smaller than one on average. In float32 an error is a
        # matter of the order in which terms are added up, and so of how large these are.
        floor = terms[name].norm().item() if dtype == torch.float32 else value.numel() ** 0.5
        assert_error_like(value, reference, truth[name], dtype, name, floor=floor)


def _magnitudes(case):
    """The case with every number's sign dropped: its results are the sums of the terms' magnitudes."""
    x, weights, biases, ranges, upstream = case
    ranges = [
        replace(part, factors=tuple(pair and tuple(factor.abs() for factor in pair) for pair in part.factors))
        for part in ranges
    ]
    biases = [None if bias is None else bias.abs() for bias in biases]
    return x.abs(), [weight.abs() for weight in weights], biases, ranges, [grad.abs() for grad in upstream]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_every_gradient(layout, kernel_device, kernel_dtype):
    check(make(LAYOUTS[layout], kernel_device, kernel_dtype), kernel_dtype)


@pytest.mark.parametrize("size", ["one feature", "many tiles"])
def test_sizes(size, kernel_device, kernel_dtype):
    check(make(LAYOUTS["gaps, ranks"], kernel_device, kernel_dtype, size, bias=False), kernel_dtype)


def test_several_chunks_of_tokens(kernel_device):
    """The gradients of 300 tokens are sums of three partial ones, a neighbour's of one."""
    layout = [(3, 303, (3, 0), True), (303, 310, (8, 2), False)]
    check(make(layout, kernel_device, torch.float32, tokens=311), torch.float32)


def test_factors_in_the_inputs_dtype(kernel_device):
    case = make(LAYOUTS["out of order"], kernel_device, torch.float16, factor_dtype=torch.float16)
    _, _, grads, _ = kernel(*case)
    assert all(grad.dtype == torch.float16 for part in grads for pair in part for grad in pair)


def test_lowered_is_what_the_factors_saw(kernel_device):
    case = make(LAYOUTS["gaps, ranks"], kernel_device, torch.float32)
    x, ranges = case[0], case[3]
    *_, lowered = kernel(*case)
    for part, rows in zip(ranges, lowered, strict=True):
        stack = torch.cat([pair[0] for pair in part.factors if pair is not None])
        seen = x[part.start : part.end] * (1 if part.mask is None else part.mask)
        torch.testing.assert_close(rows, seen @ stack.T, rtol=1e-5, atol=1e-5)
    assert len({rows.untyped_storage().data_ptr() for rows in lowered}) == len(ranges)


def test_no_ranges(kernel_device):
    x, weights, biases, _, upstream = make([], kernel_device, torch.float32)
    outputs, lowered = lora_linear_forward(x, weights, biases, [])
    dx, grads = lora_linear_backward(upstream, x, weights, [], lowered, True)
    assert lowered == grads == []
    for y, weight, bias in zip(outputs, weights, biases, strict=True):
        assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(dx, sum(dy @ weight for dy, weight in zip(upstream, weights, strict=True)))


def test_no_dx(kernel_device):
    x, weights, biases, ranges, upstream = make(LAYOUTS["one range"], kernel_device, torch.float32)
    _, lowered = lora_linear_forward(x, weights, biases, ranges)
    dx, grads = lora_linear_backward(upstream, x, weights, ranges, lowered, False)
    assert dx is None
    _, expected = lora_linear_backward(upstream, x, weights, ranges, lowered, True)
    for (grad, _), (wanted, _) in zip(grads, expected, strict=True):
        assert torch.equal(grad[0], wanted[0])
        assert torch.equal(grad[1], wanted[1])


def test_same_bits_twice(kernel_device, kernel_dtype):
    layout = [(3, 200, (3, 8), True), (200, 310, (17, 2), False)]
    case = make(layout, kernel_device, kernel_dtype, tokens=311)
    first, second = flat(*kernel(*case)), flat(*kernel(*case))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layouts_of_memory(kernel_device):
    """A transposed x, an expanded upstream gradient, and a mask that starts at an odd address."""
    x, weights, biases, ranges, upstream = make(LAYOUTS["out of order"], kernel_device, torch.float32)
    upstream = [upstream[0].T.contiguous().T, torch.ones((), device=kernel_device).expand_as(upstream[1])]
    mask = ranges[0].mask
    memory = torch.empty(mask.numel() + 1, device=kernel_device)
    memory[1:] = mask.flatten()
    odd = replace(ranges[0], mask=memory[1:].view_as(mask))
    case = (x, weights, biases, ranges, [grad.contiguous() for grad in upstream])
    expected = flat(*kernel(*case))
    actual = flat(*kernel(x.T.contiguous().T, weights, biases, [odd, *ranges[1:]], upstream))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("sick", ["x", "upstream", "lora_a", "lora_b", "mask"])
@pytest.mark.parametrize("layout", ["gaps, ranks", "out of order"])
def test_nan_stays_in_its_range(layout, sick, kernel_device):
    case = make(LAYOUTS[layout], kernel_device, torch.float32)
    healthy = flat(*kernel(*case))
    x, _, _, ranges, upstream = case
    part = ranges[2] if sick != "mask" else next(part for part in ranges if part.mask is not None)
    rows = slice(part.start, part.end)
    ill = {
        "x": [x[rows]],
        "upstream": [grad[rows] for grad in upstream],
        "lora_a": [pair[0] for pair in part.factors if pair is not None],
        "lora_b": [pair[1] for pair in part.factors if pair is not None],
        "mask": [part.mask],
    }[sick]
    for tensor in ill:
        tensor.fill_(torch.nan)
    found = flat(*kernel(*case))
    others = [t for t in range(TOKENS) if not part.start <= t < part.end]
    sick_range = next(i for i, other in enumerate(ranges) if other is part)
    assert any(value.isnan().any() for value in found.values())
    for name, value in found.items():
        if name[0] == "y" or name == "dx":
            assert torch.equal(value[others], healthy[name][others]), name
        elif f"range {sick_range}," not in name:
            assert torch.equal(value, healthy[name]), name


def test_a_projections_nan_leaves_the_other_projection_alone(kernel_device):
    """Their ranks lie side by side in memory and are lowered by one product."""
    case = make(LAYOUTS["gaps, ranks"], kernel_device, torch.float32)
    healthy = flat(*kernel(*case))
    case[3][2].factors[0][0].fill_(torch.nan)
    found = flat(*kernel(*case))
    assert found["y0"].isnan().any()
    for name in ("y1", "dA of range 2, projection 1", "dB of range 2, projection 1"):
        assert torch.equal(found[name], healthy[name]), name


@pytest.mark.gpu
def test_full_size_in_bfloat16(kernel_device):
    """Eight adapters of different ranks on gate and up of a 7B layer, against torch in the same dtype."""
    ends = [0, 311, 1000, 1001, 1500, 2048, 3000, 3500, 4096]
    ranks = [(16, 16), (8, 8), (64, 32), (4, 4), (1, 3), (17, 40), (128, 128), (8, 0)]
    layout = [(ends[i], ends[i + 1], ranks[i], i % 2 == 0) for i in range(8)]
    SIZES["7B"] = (4096, (11008, 11008))
    check(make(layout, kernel_device, torch.bfloat16, "7B", tokens=4096, bias=False), torch.bfloat16)
