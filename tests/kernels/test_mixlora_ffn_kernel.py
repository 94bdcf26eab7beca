"""The fused mixture's Triton kernels equal a loop over tokens and experts, in both variants."""

import dataclasses
import itertools

import pytest
import torch
from builders import assert_error_like, assert_relative

from moe_peft.kernels.mixlora_ffn import plan, reference
from moe_peft.kernels.mixlora_ffn.inputs import ExpertFactors, FfnInputs

kernel = pytest.importorskip("moe_peft.kernels.mixlora_ffn.kernel")

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PLACES = ("gate", "up", "down")
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(PLACES, size)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BOTH = pytest.mark.usefixtures("variant")


@pytest.fixture(params=[False, True], ids=["dense", "sorted"])
def variant(request, monkeypatch):
    """Both variants, whatever the shape."""
    monkeypatch.setattr(plan, "prefers_sorted", lambda *shape: request.param)


@dataclasses.dataclass
class Case:
    """What the op is given, and the upstream gradients of h and C."""

    inputs: FfnInputs
    dhidden: torch.Tensor
    dlowered: torch.Tensor | None

    def mapped(self, function):
        """Every tensor but the experts' indices through the function."""

        def convert(value):
            if isinstance(value, ExpertFactors):
                return ExpertFactors(function(value.lora_a), function(value.lora_b))
            return function(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        fields = {field.name: convert(getattr(self.inputs, field.name)) for field in dataclasses.fields(FfnInputs)}
        return Case(FfnInputs(**fields), convert(self.dhidden), convert(self.dlowered))


def make(n=7, d=5, f=6, e=4, k=2, r=3, *, places=PLACES, masked=False, only=None, dtype, device, seed=0):
    """A case in one dtype, gates and adapters in float32; ``only`` restricts the experts that anybody chooses."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    def stack(place, shape):
        return normal(*shape, dtype=torch.float32) / shape[2] ** 0.5 if place in places else None

    def pair(place):
        a, b = stack(place, (e, r, d)), stack(place, (e, f, r))
        return None if a is None else ExpertFactors(a, b)

    def mask(features):
        dropped = torch.rand(n, features, generator=generator) < 0.5
        return dropped.to(device, dtype) * 2 if masked else None

    pool = torch.tensor(only if only is not None else range(e))
    weights = torch.rand(n, e, generator=generator)
    experts = pool[weights[:, : len(pool)].argsort(dim=1)[:, :k]].to(device)
    gates = torch.rand(n, k, generator=generator).to(device)
    inputs = FfnInputs(
        x=normal(n, d),
        p1=normal(n, f),
        p3=normal(n, f),
        gates=gates,
        experts=experts,
        gate=pair("gate"),
        up=pair("up"),
        down_a=stack("down", (e, r, f)),
        scaling=1.7,
        x_mask=mask(d),
        h_mask=mask(f),
    )
    return Case(inputs, normal(n, f), normal(n, e * r) if "down" in places else None)


def run(module, case):
    """Outputs and gradients of a pair of functions by name; those that are None are left out."""
    hidden, lowered, a1, a3 = module.mixlora_ffn_forward(case.inputs)
    found = module.mixlora_ffn_backward(case.inputs, case.dhidden, case.dlowered, a1, a3)
    gate, up = found.gate or (None, None), found.up or (None, None)
    named = {"h": hidden, "C": lowered, "x": found.dx, "p1": found.dp1, "p3": found.dp3, "gates": found.dgates}
    named |= {"gate.a": gate[0], "gate.b": gate[1], "up.a": up[0], "up.b": up[1], "down.a": found.down_a}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def truth(case):
    """The same by float64 autograd of one token and one choice at a time."""
    case = case.mapped(lambda tensor: tensor.detach().cpu().double().clone().requires_grad_())
    given, chosen = case.inputs, case.inputs.experts.tolist()
    s, hidden, lowered = given.scaling, [], []
    for t, (x, p1, p3) in enumerate(zip(given.x, given.p1, given.p3, strict=True)):
        if given.x_mask is not None:
            x = x * given.x_mask[t]
        stacks = (given.gate and given.gate.lora_a, given.up and given.up.lora_a, given.down_a)
        num_experts = next(len(stack) for stack in stacks if stack is not None)
        h_sum, c = torch.zeros_like(p1), [torch.zeros(1, dtype=torch.float64)] * num_experts
        for slot, e in enumerate(chosen[t]):
            u1 = p1 + s * given.gate.lora_b[e] @ given.gate.lora_a[e] @ x if given.gate else p1
            u3 = p3 + s * given.up.lora_b[e] @ given.up.lora_a[e] @ x if given.up else p3
            h = given.gates[t, slot] * u1 * torch.sigmoid(u1) * u3
            h_sum = h_sum + h
            if given.down_a is not None:
                h = h if given.h_mask is None else h * given.h_mask[t]
                c[e] = given.down_a[e] @ h
        hidden.append(h_sum)
        lowered.append(c)
    found = {"h": torch.stack(hidden)}
    loss = (found["h"] * case.dhidden).sum()
    if given.down_a is not None:
        rank = given.down_a.shape[1]
        found["C"] = torch.stack([torch.cat([part.expand(rank) for part in c]) for c in lowered])
        loss = loss + (found["C"] * case.dlowered).sum()
    loss.backward()
    leaves = {"p1": given.p1, "p3": given.p3, "gates": given.gates, "down.a": given.down_a}
    for name, stack in (("gate", given.gate), ("up", given.up)):
        if stack is not None:
            leaves |= {"x": given.x, f"{name}.a": stack.lora_a, f"{name}.b": stack.lora_b}
    return found | {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}


def assert_true(case, tolerance=None):
    ours, expected = run(kernel, case), truth(case)
    assert ours.keys() == expected.keys()
    tolerance = tolerance or TOLERANCE[case.inputs.p1.dtype]
    for name, tensor in ours.items():
        assert tensor.is_contiguous(), name
        assert_relative(tensor.cpu(), expected[name], tolerance, name)
    return ours


@BOTH
@pytest.mark.parametrize("places", SUBSETS, ids="-".join)
def test_every_subset_of_projections(places, kernel_device):
    case = make(places=places, masked=True, dtype=torch.float32, device=kernel_device)
    assert_true(case)


@BOTH
@pytest.mark.parametrize(
    "sizes",
    [
        {"n": 1},
        {"n": 1, "e": 1, "k": 1, "r": 1, "d": 1, "f": 1},
        {"n": 5, "e": 3, "k": 3, "r": 8},
        {"n": 33, "d": 7, "f": 3, "e": 8, "k": 1, "r": 17},
        {"n": 33, "d": 9, "f": 37, "e": 3, "k": 2, "r": 8, "masked": True},
        {"n": 3, "f": 67, "e": 8, "k": 3, "r": 1},
        {"n": 5, "d": 3, "f": 3, "e": 4, "k": 4, "r": 17, "masked": True},
    ],
    ids=str,
)
def test_odd_sizes(sizes, kernel_device):
    """Ranges of features, more than one block of columns, tiles that nobody is in."""
    assert_true(make(**sizes, dtype=torch.float32, device=kernel_device))


@BOTH
def test_every_dtype(kernel_device, kernel_dtype):
    case = make(9, 20, 35, 4, 2, 8, masked=True, dtype=kernel_dtype, device=kernel_device)
    ours = assert_true(case)
    for name, tensor in ours.items():
        is_fp32 = name == "gates" or "." in name
        assert tensor.dtype == (torch.float32 if is_fp32 else kernel_dtype), name


@BOTH
@pytest.mark.parametrize("splits", [2, 5])
def test_ranges_of_tokens(splits, kernel_device, monkeypatch):
    """Weight gradients as sums of ranges' sums, some of which are empty."""
    monkeypatch.setattr(plan, "token_splits", lambda num_programs, num_blocks: splits)
    case = make(70, 3, 5, 2, 1, 2, masked=True, dtype=torch.float32, device=kernel_device)
    assert_true(case)


@BOTH
def test_experts_that_nobody_chose_have_zero_gradients(kernel_device):
    found = assert_true(make(e=6, only=(1, 4), dtype=torch.float32, device=kernel_device))
    for name, gradient in found.items():
        if "." in name:
            assert not gradient[[0, 2, 3, 5]].any(), name
            assert gradient[1].any(), name


@BOTH
def test_a_weight_of_zero_still_has_its_gradient(kernel_device):
    case = make(dtype=torch.float32, device=kernel_device)
    case.inputs.gates[:, 1] = 0
    assert assert_true(case)["gates"][:, 1].any()


@BOTH
def test_tensors_of_any_layout(kernel_device):
    """Rows of one wider tensor, transposed ones, and expanded ones."""
    case = make(n=6, f=6, d=5, masked=True, dtype=torch.float32, device=kernel_device)
    given = case.inputs
    wide = torch.cat([given.p1, given.p3], dim=1)
    turned = [tensor.T.contiguous().T for tensor in (given.x, given.gates, given.experts, given.h_mask)]
    x, gates, experts, h_mask = turned
    case.inputs = dataclasses.replace(
        given, x=x, p1=wide[:, :6], p3=wide[:, 6:], gates=gates, experts=experts, h_mask=h_mask
    )
    case.dhidden = torch.ones((), device=kernel_device).expand(6, 6)
    case.dlowered = case.dlowered.T.contiguous().T
    assert_true(case)


@BOTH
def test_bits_repeat(kernel_device, kernel_dtype):
    case = make(9, 5, 34, 3, 1, masked=True, dtype=kernel_dtype, device=kernel_device)
    first, second = (run(kernel, case) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@BOTH
def test_no_tokens(kernel_device):
    case = make(n=0, masked=True, dtype=torch.float32, device=kernel_device)
    one = run(kernel, make(n=1, masked=True, dtype=torch.float32, device=kernel_device))
    for name, tensor in run(kernel, case).items():
        rows = one[name].shape[0] if "." in name else 0
        assert tensor.shape == (rows, *one[name].shape[1:]), name
        assert not tensor.any(), name


@BOTH
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
def test_large_activations(kernel_device):
    """silu's tails: nothing overflows."""
    case = make(dtype=torch.float32, device=kernel_device)
    case.inputs.p1.mul_(2000)
    case.inputs.p3.mul_(2000)
    assert_true(case)


@BOTH
def test_nothing_came_of_c(kernel_device):
    case = make(dtype=torch.float32, device=kernel_device)
    zero = dataclasses.replace(case, dlowered=torch.zeros_like(case.dlowered))
    without = run(kernel, dataclasses.replace(case, dlowered=None))
    assert "down.a" not in without
    for name, expected in run(kernel, zero).items():
        if name != "down.a":
            assert_relative(without[name], expected.double(), 1e-6, name)


@BOTH
def test_outputs_share_no_memory(kernel_device):
    found = run(kernel, make(dtype=torch.float32, device=kernel_device))
    storages = [tensor.untyped_storage().data_ptr() for tensor in found.values()]
    assert len(set(storages)) == len(storages)


def test_projections_of_different_ranks_are_refused(kernel_device):
    case = make(dtype=torch.float32, device=kernel_device)
    case.inputs = dataclasses.replace(case.inputs, down_a=case.inputs.down_a[:, :1])
    with pytest.raises(ValueError, match=r"\(4, 1\), \(4, 3\)"):
        kernel.mixlora_ffn_forward(case.inputs)


@pytest.mark.parametrize(
    ("n", "e", "k", "block"), [(1, 1, 1, 4), (50, 5, 2, 4), (40, 64, 3, 16), (64, 4, 1, 16), (7, 3, 3, 2)]
)
def test_tiles_hold_one_set_of_experts(n, e, k, block):
    experts = torch.rand(n, e, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :k]
    order, starts = plan.tiles_by_set(experts, e, block)
    assert sorted(order.tolist()) == list(range(n))
    assert len(starts) == plan.most_tiles(n, e, k, block) + 1
    assert starts[0] == 0
    assert starts[-1] == n
    for begin, end in itertools.pairwise(starts.tolist()):
        assert 0 <= end - begin <= block
        assert len({frozenset(experts[token].tolist()) for token in order[begin:end]}) <= 1


def test_pairs_by_expert():
    experts = torch.tensor([[3, 0], [0, 1], [1, 3]])
    order, starts = plan.pairs_by_expert(experts, 4)
    assert order.tolist() == [1, 2, 3, 4, 0, 5]
    assert starts.tolist() == [0, 2, 4, 4, 6]


def test_the_variant_follows_the_shape():
    assert not plan.prefers_sorted(512, 8, 2, 16)
    assert plan.prefers_sorted(16384, 8, 2, 16)
    assert not plan.prefers_sorted(16384, 8, 2, 1)  # few columns anyway
    assert not plan.prefers_sorted(16384, 64, 4, 16)  # every token would be a tile of its own
    assert not plan.prefers_sorted(16384, 8, 8, 16)  # one set, all columns
    assert not plan.prefers_sorted(16384, 65, 1, 16)  # more experts than a set has bits


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@BOTH
def test_full_size(masked):
    """Against the plain PyTorch reference in the same dtype, both compared with it in float64."""
    case = make(2048, 2048, 5632, 8, 2, 16, masked=masked, dtype=torch.bfloat16, device="cuda")
    expected, theirs = run(reference, case.mapped(torch.Tensor.double)), run(reference, case)
    for name, ours in run(kernel, case).items():
        assert_error_like(ours, theirs[name], expected[name], torch.bfloat16, name)
