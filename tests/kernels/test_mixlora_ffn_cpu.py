"""The compiled mixture of experts on a CPU equals the loop over tokens and experts, in one walk and on any threads."""

import dataclasses
import itertools

import pytest
import torch
from builders import assert_close
from test_mixlora_ffn import PLACES, SUBSETS, both, make, ours, plain
from test_mixlora_ffn_group import cases_of, group

from moe_peft.kernels.compiled import compiled_library, references_only
from moe_peft.kernels.mixlora_ffn import cpu, reference
from moe_peft.kernels.mixlora_ffn.inputs import ExpertFactors, FfnGroup, FfnInputs, FfnPart

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def compiled(poisoned_memory):
    """Every test needs the compiler."""
    library = compiled_library()
    if library.functions is None:
        pytest.skip(library.problem)


def assert_as_good_as(actual, theirs, truth, dtype, what):
    """Our error is at most half more than the reference's, both against the truth, and half a rounding."""
    assert actual.dtype == theirs.dtype, what
    assert actual.isfinite().all(), what
    ours, allowed = ((side.double() - truth.double()).norm().item() for side in (actual, theirs))
    allowed = 1.5 * allowed + 0.5 * torch.finfo(dtype).eps * truth.norm().item()
    assert ours <= allowed, f"{what}: error {ours:.3e} above {allowed:.3e}"


def assert_equals_the_loop(case, tolerance=1e-5):
    found, truth = both(ours, case), both(plain, case.to(torch.float64))
    for name, expected in truth.items():
        if expected is None:  # of x, when no expert reads it
            assert found[name] is None
        else:
            assert_close(found[name], expected, tolerance, name)
    return found


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first if first[name] is not None)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("places", SUBSETS)
def test_float32_equals_the_loop(places, k, masked):
    assert_equals_the_loop(make(9, f=37, k=k, places=places, masked=masked).to(F32))


SIZES = [
    {"n": 1},
    {"n": 1, "e": 1, "k": 1, "r": 1, "f": 1},
    {"n": 40, "r": 8, "f": 64},
    {"n": 40, "d": 64, "r": 8, "f": 64},  # x is read where it lies
    {"n": 25, "d": 200, "r": 7, "f": 33},  # several chunks of the model's columns, too
    {"n": 21, "r": 16, "f": 96},
    {"n": 19, "r": 15, "f": 37},  # 8 + 4 + 2 + 1 ranks
    {"n": 70, "e": 2, "k": 1, "r": 2, "f": 19, "only": (1,)},  # several tiles of one expert, and an odd one
    {"n": 12, "r": 3, "f": 600},  # several chunks, the last one narrower
    {"n": 300, "r": 4, "f": 20},  # several blocks of tokens
    {"n": 5, "e": 64, "k": 3},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("places", [PLACES, ("gate",), ("down",)], ids=str)
def test_odd_sizes(sizes, places):
    assert_equals_the_loop(make(**sizes, places=places).to(F32))


@pytest.mark.parametrize("sizes", SIZES[2:10], ids=str)
@pytest.mark.parametrize("adapter_dtype", [F32, BF16])
@pytest.mark.parametrize("places", [PLACES, ("gate", "up"), ("down",)], ids=str)
def test_the_error_in_bfloat16_is_at_most_the_references(places, adapter_dtype, sizes):
    case = make(**sizes, places=places).to(BF16, adapter_dtype)
    found, truth = both(ours, case), both(plain, case.to(torch.float64))
    with references_only():
        theirs = both(ours, case)
    for name, expected in truth.items():
        if expected is not None:
            assert_as_good_as(found[name], theirs[name], expected, BF16, name)


@pytest.mark.parametrize("lengths", [(7,), (5, 5, 5), (1, 40, 4)], ids=str)
@pytest.mark.parametrize("places", SUBSETS)
def test_several_adapters_equal_each_alone(places, lengths):
    cases = cases_of(lengths, F32, places=places, f=37)
    for found, case in zip(group(cases), cases, strict=True):
        truth = both(plain, case.to(torch.float64))
        for name, actual in found.items():
            assert_close(actual, truth[name], 1e-5, name)


@pytest.mark.parametrize("lengths", [(24, 24), (7, 40, 3)], ids=str)
def test_the_error_of_several_adapters_in_bfloat16(lengths):
    cases = cases_of(lengths, BF16, d=48, f=72, r=8)
    found = group(cases)
    with references_only():
        theirs = group(cases)
    for own, their_own, case in zip(found, theirs, cases, strict=True):
        truth = both(plain, case.to(torch.float64))
        for name, actual in own.items():
            assert_as_good_as(actual, their_own[name], truth[name], BF16, name)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_threads_change_no_bit(dtype):
    cases = cases_of((300, 40), dtype, f=600, r=8, e=6)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(group(cases))
    for more in found[1:]:
        assert all(map(same, found[0], more))


@pytest.mark.parametrize("spoilt", list(itertools.product(PLACES, ("lora_a", "lora_b"))), ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_nan_stays_with_those_who_chose_its_expert(spoilt, dtype):
    case = make(40, f=70, e=5, r=8).to(dtype, F32)
    healthy = both(ours, case)
    place, name = spoilt
    getattr(case.arguments[place], name)[3].fill_(torch.nan)
    found = both(ours, case)
    touched = (case.arguments["experts"] == 3).any(1)
    assert touched.any() and not touched.all()
    assert found["gates"][touched].isnan().any()
    assert found["delta"][touched].isnan().any()
    for what in ("h", "delta", "x", "p1", "p3", "gates"):
        assert torch.equal(found[what][~touched], healthy[what][~touched]), what
    others = [0, 1, 2, 4]  # what they learn from tokens that also chose the spoilt one is their own slot's
    for what in (f"{place}.{factor}" for place in ("gate", "up") for factor in ("lora_a", "lora_b")):
        assert torch.equal(found[what][others], healthy[what][others]), what


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_an_expert_that_nobody_chose_may_be_nan_and_learns_nothing(dtype):
    case = make(40, f=70, e=5, only=(0, 1, 4), r=8).to(dtype, F32)
    healthy = both(ours, case)
    for place, name in itertools.product(PLACES, ("lora_a", "lora_b")):
        getattr(case.arguments[place], name)[2:4] = torch.nan
    found = both(ours, case)
    assert same(found, healthy)
    for place, factor in itertools.product(PLACES, ("lora_a", "lora_b")):
        assert not found[f"{place}.{factor}"][2:4].any()


def test_a_weight_that_is_infinite_or_an_activation_that_is_stays_in_its_row():
    case = make(9, f=37, masked=False).to(F32)
    healthy = both(ours, case)
    case.arguments["p1"][2, 36] = torch.inf
    case.arguments["gates"][5] = torch.inf
    found = both(ours, case)
    others = [0, 1, 3, 4, 6, 7, 8]
    assert not found["h"][5].isfinite().any()
    assert not found["h"][2, 36].isfinite() and found["h"][2, :36].isfinite().all()
    for what in ("h", "delta", "x", "p1", "p3", "gates"):
        assert torch.equal(found[what][others], healthy[what][others]), what


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("large", ["p1", "p3"])
def test_large_activations(large, sign):
    case = make(9, f=37).to(F32)
    case.arguments[large].mul_(sign * 2000)
    found, truth = both(ours, case), both(plain, case.to(torch.float64))
    for name, expected in truth.items():
        assert_close(found[name], expected, 1e-5, name)


def as_group(cases):
    """What the op makes of the cases, and gradients of h and C."""
    names = ("x", "p1", "p3", "gates", "experts")
    parts = []
    for case in cases:
        given = {name: case.arguments[name] for name in case.arguments if name != "down"}
        down = case.arguments["down"]
        inputs = FfnInputs(**given, down_a=None if down is None else down.lora_a)
        parts += FfnGroup.of_one(inputs).parts
    joined = FfnGroup(*(torch.cat([case.arguments[name] for case in cases]) for name in names), parts)
    generator = torch.Generator().manual_seed(9)
    shapes = joined.p1.shape, (joined.p1.shape[0], joined.num_experts * joined.rank)
    dhidden, dlowered = (torch.randn(shape, generator=generator).to(joined.p1.dtype) for shape in shapes)
    return joined, dhidden, dlowered if parts[0].down_a is not None else None


def tensors_of(gradients):
    """All of a group's gradients, None where there is none."""
    rows = [gradients.dx, gradients.dp1, gradients.dp3, gradients.dgates]
    of_parts = [
        grad
        for part in gradients.parts
        for grad in (*(part.gate or (None, None)), *(part.up or (None, None)), part.down_a)
    ]
    return rows + of_parts


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("places", SUBSETS)
def test_what_is_kept_and_what_comes_back_has_the_references_layout(places, dtype):
    mixture, dhidden, dlowered = as_group(cases_of((6, 1, 9), dtype, places=places, f=37))
    found, theirs = (side.group_forward(mixture) for side in (cpu, reference))
    grads, their_grads = (side.group_backward(mixture, dhidden, dlowered, *theirs[2:]) for side in (cpu, reference))
    both_sides = list(zip((*found, *tensors_of(grads)), (*theirs, *tensors_of(their_grads)), strict=True))
    for own, expected in both_sides:
        assert (own is None) == (expected is None)
        if own is not None:
            assert own.shape == expected.shape and own.dtype == expected.dtype and own.is_contiguous()
    if found[1] is not None:
        assert torch.equal(found[1] == 0, theirs[1] == 0)
    storages = [own.untyped_storage().data_ptr() for own, _ in both_sides[4:] if own is not None]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("lengths", [(0,), (0, 5), (5, 0, 3)], ids=str)
def test_an_adapter_without_tokens(lengths, dtype):
    cases = cases_of([max(n, 1) for n in lengths], dtype, f=37)
    for case, n in zip(cases, lengths, strict=True):
        rows = ("x", "p1", "p3", "gates", "experts", "x_mask", "h_mask")
        case.arguments |= {name: case.arguments[name][:n] for name in rows if case.arguments[name] is not None}
    mixture, dhidden, dlowered = as_group(cases)
    hidden, lowered, a1, a3 = cpu.group_forward(mixture)
    theirs = reference.group_forward(mixture)
    grads = cpu.group_backward(mixture, dhidden, dlowered, a1, a3)
    their_grads = reference.group_backward(mixture, dhidden, dlowered, a1, a3)
    tolerance = 1e-5 if dtype == F32 else 5e-2
    pairs = zip((hidden, lowered, *tensors_of(grads)), (*theirs[:2], *tensors_of(their_grads)), strict=True)
    for own, expected in pairs:
        assert own.shape == expected.shape
        if own.numel():
            assert_close(own, expected, tolerance)
    for part, n in zip(grads.parts, lengths, strict=True):
        assert n or not any(grad.any() for grad in (*part.gate, *part.up, part.down_a))


def test_any_layout():
    case = make(9, f=37).to(F32)
    expected = both(ours, case)
    arguments = case.arguments
    turned = {name: arguments[name].T.contiguous().T for name in ("x", "p1", "p3", "gates", "experts", "h_mask")}
    for place in PLACES:
        stacks = (arguments[place].lora_a, arguments[place].lora_b)
        turned[place] = ExpertFactors(*(stack.permute(2, 0, 1).contiguous().permute(1, 2, 0) for stack in stacks))
    upstream = tuple(grad.T.contiguous().T for grad in case.upstream)
    found = both(ours, dataclasses.replace(case, arguments=arguments | turned, upstream=upstream))
    for name, wanted in expected.items():
        assert_close(found[name], wanted, 1e-6, name)


@pytest.mark.parametrize(("dtype", "is_compiled"), [(F32, True), (BF16, True), (torch.float64, False)])
def test_the_operation_runs_what_is_compiled(dtype, is_compiled, monkeypatch):
    called = []
    for name in ("group_forward", "group_backward"):
        run = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, run=run, name=name: called.append(name) or run(*args))
    both(ours, make().to(dtype))
    assert called == (["group_forward", "group_backward"] if is_compiled else [])


def test_parts_tell_their_tokens():
    """A part's mask begins with the part's own first token."""
    cases = cases_of((3, 5), F32, f=37)
    mixture, *_ = as_group(cases)
    hidden, lowered, *_ = cpu.group_forward(mixture)
    alone = [cpu.group_forward(FfnGroup.of_one(inputs)) for inputs in mixture.one_by_one()]
    assert all(isinstance(part, FfnPart) for part in mixture.parts)
    assert_close(hidden, torch.cat([own[0] for own in alone]), 1e-6)
    assert_close(lowered, torch.cat([own[1] for own in alone]), 1e-6)


@pytest.mark.parametrize("wrong", [5, -1, 2**40])
def test_an_expert_that_there_is_not(wrong):
    case = make(9, e=5).to(F32)
    case.arguments["experts"][7, 1] = wrong
    with pytest.raises(IndexError, match="an index is out of range"):
        both(ours, case)
