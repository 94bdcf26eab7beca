"""Several adapters' mixtures in one operation equal each adapter alone."""

import pytest
import torch
from builders import assert_close, assert_error_like
from test_mixlora_ffn import PLACES, SUBSETS, both, make, ours, plain
from test_registration import opcheck, recorded

from moe_peft.kernels.mixlora_ffn import op
from moe_peft.kernels.mixlora_ffn.inputs import ExpertFactors, FfnPart
from moe_peft.kernels.mixlora_ffn.op import _mixlora_ffn, mixlora_ffn_group
from moe_peft.kernels.recompute import Recomputable

pytestmark = pytest.mark.usefixtures("poisoned_memory", "cpu_code")


def group(cases):
    """The op of several cases together as a function of their arguments, and its inputs' leaves by case."""
    joined = {
        name: torch.cat([case.arguments[name] for case in cases]) for name in ("x", "p1", "p3", "gates", "experts")
    }
    leaves = {name: joined[name].requires_grad_() for name in ("x", "p1", "p3", "gates")}
    stacks = [
        {
            place: ExpertFactors(*(factor.clone().requires_grad_() for factor in (own.lora_a, own.lora_b)))
            for place in PLACES
            if (own := case.arguments[place]) is not None
        }
        for case in cases
    ]
    parts = []
    for case, own in zip(cases, stacks, strict=True):
        given, down_a = case.arguments, own["down"].lora_a if "down" in own else None
        masks = given["x_mask"], given["h_mask"]
        parts.append(FfnPart(len(given["x"]), own.get("gate"), own.get("up"), down_a, given["scaling"], *masks))
    downs = [own["down"] for own in stacks if "down" in own]
    x, p1, p3, gates = leaves.values()
    hidden, delta = mixlora_ffn_group(Recomputable(x), p1, p3, gates, joined["experts"], parts, downs)
    outputs = [hidden] if delta is None else [hidden, delta]
    torch.autograd.backward(outputs, [torch.cat([case.upstream[i] for case in cases]) for i in range(len(outputs))])
    rows = {"h": hidden.detach()} | ({} if delta is None else {"delta": delta.detach()})
    rows |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    cut = [len(case.arguments["x"]) for case in cases]
    found = [dict(zip(rows, own, strict=True)) for own in zip(*(t.split(cut) for t in rows.values()), strict=True)]
    for own, factors in zip(found, stacks, strict=True):
        own |= {
            f"{place}.{name}": getattr(f, name).grad for place, f in factors.items() for name in ("lora_a", "lora_b")
        }
    return found


def cases_of(lengths, dtype, **sizes):
    """Cases of one layout and different scalings; the second drops nothing."""
    cases = []
    for seed, n in enumerate(lengths):
        case = make(n, seed=seed, masked=seed != 1, **sizes).to(dtype, torch.promote_types(dtype, torch.float32))
        case.arguments["scaling"] = 0.5 + seed
        cases.append(case)
    return cases


@pytest.mark.parametrize("lengths", [(7,), (5, 5, 5), (1, 9, 4)], ids=str)
@pytest.mark.parametrize("places", SUBSETS)
def test_several_adapters_equal_each_alone(places, lengths):
    cases = cases_of(lengths, torch.float64, places=places)
    for found, case in zip(group(cases), cases, strict=True):
        expected = both(plain, case)
        for name, actual in found.items():
            assert_close(actual, expected[name], 1e-11, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
@pytest.mark.parametrize("places", [PLACES, ("gate",), ("down",)], ids=str)
def test_by_the_kernels(places, monkeypatch):
    """Which take one adapter after the other, interpreted."""
    monkeypatch.setattr(op, "runs_kernel", lambda x: True)
    cases = cases_of((5, 2, 9), torch.float32, places=places)
    for found, case in zip(group(cases), cases, strict=True):
        expected = both(plain, case.to(torch.float64))
        for name, actual in found.items():
            assert_close(actual, expected[name], 1e-5, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(24, 24), (7, 24)], ids=str)
def test_the_error_of_several_adapters_is_that_of_each_alone(lengths, dtype):
    cases = cases_of(lengths, dtype, d=48, f=64, r=8)
    for found, case in zip(group(cases), cases, strict=True):
        truth, alone = both(plain, case.to(torch.float64)), both(ours, case)
        for name, actual in found.items():
            assert_error_like(actual, alone[name], truth[name], dtype, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (3, 6, 2)], ids=str)
@pytest.mark.parametrize("spoilt", ["x", "p1", "gates", "h_mask", "gate", "up", "down"])
def test_a_nan_stays_with_its_adapter(spoilt, lengths, dtype):
    """To the bit, whatever one of them is made of."""
    cases = cases_of(lengths, dtype)
    expected = group(cases)
    value = cases[2].arguments[spoilt]
    for tensor in (value.lora_a, value.lora_b) if isinstance(value, ExpertFactors) else (value,):
        tensor.fill_(float("nan"))
    *others, spoilt_one = group(cases)
    assert any(tensor.isnan().any() for tensor in spoilt_one.values())
    for found, wanted in zip(others, expected, strict=False):
        for name, actual in found.items():
            assert torch.equal(actual, wanted[name]), name


@pytest.mark.parametrize("lengths", [(5, 5), (3, 6)], ids=str)
def test_torch_accepts_the_registration_of_several_adapters(lengths, monkeypatch):
    forward, backward = recorded(monkeypatch, _mixlora_ffn)
    group(cases_of(lengths, torch.bfloat16))
    opcheck(_mixlora_ffn, forward[0], backward[0])
