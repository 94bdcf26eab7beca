"""The gated product equals its formula, forward and both gradients, and keeps nothing but its inputs."""

import pytest
import torch
from builders import assert_close, assert_error_like

from moe_peft.kernels.swiglu.op import swiglu

pytestmark = pytest.mark.usefixtures("poisoned_memory", "cpu_code")

SHAPES = [(7, 9), (1, 64), (2, 3, 5), (1, 1), (33, 200), (0, 8)]
NAMES = ("h", "dgate", "dup")


def make(shape, dtype=torch.float64):
    """gate, up and the upstream gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return (4 * gate).to(dtype), up.to(dtype), upstream.to(dtype)


def plain(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def todays(gate, up):
    return torch.nn.functional.silu(gate) * up


def both(function, gate, up, upstream):
    """Output and gradients of gate and up."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    h = function(gate, up)
    h.backward(upstream)
    return h.detach(), gate.grad, up.grad


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_formula(shape):
    case = make(shape)
    for actual, expected, what in zip(both(swiglu, *case), both(plain, *case), NAMES, strict=True):
        assert actual.dtype == torch.float64
        assert actual.shape == shape
        if actual.numel():
            assert_close(actual, expected, 1e-13, what)


def test_gradcheck():
    gate, up, _ = make((4, 5))
    assert torch.autograd.gradcheck(swiglu, (gate.requires_grad_(), up.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(33, 200), (5, 3, 7), (1, 40)])
def test_error_is_at_most_that_of_torchs_silu_in_the_same_dtype(shape, dtype):
    case = make(shape, dtype)
    truth = both(plain, *(tensor.double() for tensor in case))
    for actual, theirs, wanted, what in zip(both(swiglu, *case), both(todays, *case), truth, NAMES, strict=True):
        assert_error_like(actual, theirs, wanted, dtype, what)


def test_a_gate_far_from_zero_is_shut_or_open():
    gate = torch.tensor([-200.0, -90.0, 90.0, 200.0])
    up = torch.tensor([2.0, 3.0, 5.0, 7.0])
    h, dgate, dup = both(swiglu, gate, up, torch.ones(4))
    assert_close(h, torch.tensor([0.0, 0.0, 450.0, 1400.0]), 1e-6)
    assert_close(dgate, torch.tensor([0.0, 0.0, 5.0, 7.0]), 1e-6)
    assert_close(dup, torch.tensor([0.0, 0.0, 90.0, 200.0]), 1e-6)


@pytest.mark.parametrize("sick", range(3))
def test_nan_stays_in_its_row(sick):
    case = make((5, 9), torch.float32)
    healthy = both(swiglu, *case)
    case[sick][2] = torch.nan
    others = [0, 1, 3, 4]
    for actual, expected in zip(both(swiglu, *case), healthy, strict=True):
        assert torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("layout", ["halves of one product", "transposed", "expanded gradient"])
def test_any_layout(layout):
    gate, up, upstream = make((6, 8), torch.float32)
    expected = both(swiglu, gate, up, upstream)
    if layout == "expanded gradient":
        expected = both(swiglu, gate, up, torch.ones(6, 8))
        upstream = torch.ones(()).expand(6, 8)
    elif layout == "transposed":
        gate, up, upstream = (tensor.T.contiguous().T for tensor in (gate, up, upstream))
    else:
        gate, up = torch.cat([gate, up], dim=1).chunk(2, dim=1)
    leaves = [tensor.detach().requires_grad_() for tensor in (gate, up)]
    h = swiglu(*leaves)
    h.backward(upstream)
    for actual, wanted in zip((h, *(leaf.grad for leaf in leaves)), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_the_arguments_are_left_alone_and_alone_are_saved():
    gate, up, upstream = make((6, 8), torch.bfloat16)
    copies = [tensor.clone() for tensor in (gate, up, upstream)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        h = swiglu(gate.requires_grad_(), up.requires_grad_())
    h.backward(upstream)
    assert [tensor.data_ptr() for tensor in saved] == [gate.data_ptr(), up.data_ptr()]
    for tensor, copy in zip((gate, up, upstream), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_gate_and_up_that_do_not_match_are_refused():
    gate, up, _ = make((3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"up \[2, 8\] .* \[3, 8\]"):
        swiglu(gate, up[:2])
    with pytest.raises(ValueError, match=r"torch.bfloat16 must be .* torch.float32"):
        swiglu(gate, up.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_accepts_the_registration(dtype):
    gate, up, upstream = make((3, 2, 8), dtype)
    torch.library.opcheck(torch.ops.moe_peft.swiglu_backward.default, (upstream, gate, up))
    torch.library.opcheck(
        torch.ops.moe_peft.swiglu.default, (gate.clone().requires_grad_(), up.clone().requires_grad_())
    )


def test_compiled_equals_eager():
    case = make((6, 8), torch.float32)

    def around(gate, up):
        return swiglu(gate * 2, up) + up

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(both(compiled, *case), both(around, *case), strict=True):
        assert torch.equal(actual, expected)
