"""What is computed again is what was there: whole to the bit, in parts to rounding."""

import pytest
import torch
from builders import assert_close

from moe_peft.kernels.recompute import Recomputable, recomputed
from moe_peft.kernels.rms_norm.op import rms_norm
from moe_peft.kernels.swiglu.op import swiglu

pytestmark = pytest.mark.usefixtures("poisoned_memory", "cpu_code")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RECIPES = ["", "rms_norm", "swiglu"]


def make(recipe, dtype=torch.float32, *, tokens=7, features=9):
    """A recomputable of that recipe."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(tokens, features, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    if recipe == "rms_norm":
        weight = torch.randn(features, generator=generator, dtype=torch.float64).to(dtype)
        y, rstd = rms_norm(one.requires_grad_(), weight, 1e-6)
        return Recomputable(y, recipe, (one, rstd, weight))
    if recipe == "swiglu":
        return Recomputable(swiglu(one.requires_grad_(), other), recipe, (one, other))
    return Recomputable(one)


def again(x):
    return recomputed(x.recipe, x.kept if x.recipe else [x.value])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [7, 1, 0])
def test_the_value_to_the_bit(recipe, dtype, tokens):
    x = make(recipe, dtype, tokens=tokens)
    value = again(x)
    assert value.dtype == dtype
    assert not value.requires_grad
    assert torch.equal(value, x.value)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("lengths", [[7], [3, 4], [1, 0, 5, 1]])
def test_parts(recipe, lengths):
    x = make(recipe)
    parts = x.split(lengths)
    assert [len(part.value) for part in parts] == lengths
    assert torch.equal(torch.cat([part.value for part in parts]), x.value)
    assert_close(torch.cat([again(part) for part in parts]), x.value, 1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_some_rows(recipe):
    x = make(recipe)
    rows = x.rows(torch.tensor([5, 0, 2]))
    assert torch.equal(rows.value, x.value[[5, 0, 2]])
    assert_close(again(rows), rows.value, 1e-6)
    assert x.rows(None) is x


def test_the_gradient_flows_through_the_value_alone():
    x = make("swiglu", torch.float64)
    gate, up = x.sources
    (part, _) = x.split([3, 4])
    (expected,) = torch.autograd.grad(torch.nn.functional.silu(gate)[:3].mul(up[:3]).sum(), gate)
    (actual,) = torch.autograd.grad(part.value.sum(), gate)
    assert_close(actual, expected, 1e-12)
    assert not any(source.requires_grad for source in x.kept)
