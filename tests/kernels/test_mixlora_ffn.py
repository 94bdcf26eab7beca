"""The combined algebra of the mixture equals a loop over tokens and experts."""

import dataclasses
import itertools

import pytest
import torch
from builders import assert_close, assert_error_like
from test_registration import opcheck, recorded

from moe_peft.kernels.mixlora_ffn.down import _down
from moe_peft.kernels.mixlora_ffn.inputs import ExpertFactors
from moe_peft.kernels.mixlora_ffn.op import _mixlora_ffn, mixlora_ffn
from moe_peft.kernels.recompute import Recomputable
from moe_peft.kernels.rms_norm.op import rms_norm
from moe_peft.kernels.swiglu.op import swiglu

pytestmark = pytest.mark.usefixtures("poisoned_memory", "cpu_code")

PLACES = ("gate", "up", "down")
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(PLACES, size)]
GRADS = ("x", "p1", "p3", "gates", *(f"{place}.{factor}" for place in PLACES for factor in ("lora_a", "lora_b")))


@dataclasses.dataclass
class Case:
    """The op's arguments by name, and the upstream gradients of h and delta."""

    arguments: dict
    upstream: tuple

    def to(self, dtype, adapter_dtype=None):
        def cast(value):
            if isinstance(value, ExpertFactors):
                return ExpertFactors(*(f.to(adapter_dtype or dtype) for f in (value.lora_a, value.lora_b)))
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if is_float else value

        arguments = {name: cast(value) for name, value in self.arguments.items()}
        arguments["gates"] = self.arguments["gates"].to(adapter_dtype or dtype)
        return Case(arguments, tuple(grad.to(dtype) for grad in self.upstream))


def make(n=7, d=5, f=6, e=4, k=2, r=3, *, places=PLACES, masked=True, only=None, seed=0):
    """A float64 case; ``only`` restricts the experts that anybody chooses."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def mask(features):
        return (torch.rand(n, features, generator=generator) < 0.7).double() / 0.7 if masked else None

    pool = torch.tensor(only if only is not None else range(e))
    experts = torch.stack([pool[torch.randperm(len(pool), generator=generator)[:k]] for _ in range(n)])
    sizes = {"gate": (d, f), "up": (d, f), "down": (f, d)}
    factors = {
        place: ExpertFactors(normal(e, r, sizes[place][0]) / d**0.5, normal(e, sizes[place][1], r) / r**0.5)
        if place in places
        else None
        for place in PLACES
    }
    arguments = {
        "x": normal(n, d),
        "p1": normal(n, f),
        "p3": normal(n, f),
        "gates": torch.rand(n, k, generator=generator, dtype=torch.float64),
        "experts": experts,
        **factors,
        "scaling": 1.7,
        "x_mask": mask(d),
        "h_mask": mask(f),
    }
    return Case(arguments, (normal(n, f), normal(n, d)))


def ours(x, *args, **kwargs):
    return mixlora_ffn(Recomputable(x), *args, **kwargs)


def plain(x, p1, p3, gates, experts, *, gate, up, down, scaling, x_mask, h_mask):
    """One token and one choice at a time; the op's h and delta."""

    def update(factors, expert, row):
        if factors is None:
            return 0.0
        return scaling * (factors.lora_b[expert].to(row.dtype) @ (factors.lora_a[expert].to(row.dtype) @ row))

    hidden, deltas = [], []
    for t in range(len(x)):
        h_sum, delta_sum = 0.0, 0.0
        seen = x[t] if x_mask is None else x[t] * x_mask[t]
        for slot, expert in enumerate(experts[t].tolist()):
            u1, u3 = p1[t] + update(gate, expert, seen), p3[t] + update(up, expert, seen)
            h = u1 * u1.sigmoid() * u3
            weight = gates[t, slot].to(x.dtype)
            h_sum = h_sum + weight * h
            delta_sum = delta_sum + weight * update(down, expert, h if h_mask is None else h * h_mask[t])
        hidden.append(h_sum)
        deltas.append(delta_sum)
    return torch.stack(hidden), torch.stack(deltas) if down is not None else None


def both(function, case):
    """Outputs and every gradient by name."""
    arguments = {}
    leaves = {}
    for name, value in case.arguments.items():
        if isinstance(value, ExpertFactors):
            pair = [getattr(value, factor).clone().requires_grad_() for factor in ("lora_a", "lora_b")]
            leaves |= {f"{name}.lora_a": pair[0], f"{name}.lora_b": pair[1]}
            arguments[name] = ExpertFactors(*pair)
        elif name in GRADS:
            leaves[name] = arguments[name] = value.clone().requires_grad_()
        else:
            arguments[name] = value
    hidden, delta = function(**arguments)
    outputs = [hidden] if delta is None else [hidden, delta]
    torch.autograd.backward(outputs, list(case.upstream[: len(outputs)]))
    found = {"h": hidden.detach()} | ({} if delta is None else {"delta": delta.detach()})
    return found | {name: leaf.grad for name, leaf in leaves.items()}


def assert_equal_sides(case, tolerance=1e-11):
    found, theirs = both(ours, case), both(plain, case)
    assert found.keys() == theirs.keys()
    for name, actual in found.items():
        expected = theirs[name]
        if name == "x" and actual is None:  # nothing reads x without experts on gate or up
            assert expected is None
            continue
        assert_close(actual, expected, tolerance, name)
    return found


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("places", SUBSETS)
def test_float64_equals_the_loop(places, k, masked):
    assert_equal_sides(make(k=k, places=places, masked=masked))


@pytest.mark.parametrize(
    "sizes",
    [
        {"n": 1},
        {"n": 1, "e": 1, "k": 1, "r": 1},
        {"d": 1, "f": 1},
        {"e": 1, "k": 1},
        {"e": 64, "k": 3, "n": 5},
        {"e": 5, "k": 5},
        {"n": 33, "d": 17, "f": 29, "r": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("places", [PLACES, ("down",), ("up",)])
def test_odd_sizes(sizes, places):
    assert_equal_sides(make(**sizes, places=places))


@pytest.mark.parametrize("places", SUBSETS)
def test_gradcheck(places):
    case = make(3, 2, 3, 3, 2, 2, places=places)
    fixed = dict(case.arguments)
    leaves = {name: fixed[name] for name in ("x", "p1", "p3", "gates")}
    leaves |= {f"{place}.{f}": getattr(fixed[place], f) for place in places for f in ("lora_a", "lora_b")}

    def run(*values):
        given = dict(zip(leaves, values, strict=True))
        pairs = {place: ExpertFactors(given[f"{place}.lora_a"], given[f"{place}.lora_b"]) for place in places}
        plain_leaves = {name: given[name] for name in ("x", "p1", "p3", "gates")}
        hidden, delta = ours(**{**fixed, **plain_leaves, **pairs})
        return hidden if delta is None else (hidden, delta)

    assert torch.autograd.gradcheck(run, tuple(leaf.requires_grad_() for leaf in leaves.values()))


@pytest.mark.parametrize("places", SUBSETS)
def test_experts_that_nobody_chose_have_zero_gradients(places):
    found = assert_equal_sides(make(e=6, only=(1, 4), places=places))
    for place in places:
        for factor in ("lora_a", "lora_b"):
            gradient = found[f"{place}.{factor}"]
            assert not gradient[[0, 2, 3, 5]].any()
            assert gradient[1].any()
            assert gradient[4].any()


def test_a_weight_of_zero_still_has_its_gradient():
    """A choice that weighs nothing trains no expert, but its weight is told what it would have brought."""
    case = make()
    case.arguments["gates"][:, 1] = 0
    found = assert_equal_sides(case)
    assert found["gates"][:, 1].any()


@pytest.mark.parametrize("large", ["p1", "p3"])
def test_large_activations(large):
    """silu's tails: nothing overflows."""
    case = make()
    case.arguments[large].mul_(2000)
    assert_equal_sides(case)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("places", [PLACES, ("gate", "up"), ("down",)])
def test_error_is_at_most_the_loops_in_the_same_dtype(places, dtype, adapter_dtype):
    case = make(24, 48, 64, 4, 2, 8, places=places).to(dtype, adapter_dtype)
    truth = both(plain, case.to(torch.float64))
    found, theirs = both(ours, case), both(plain, case)
    for name, expected in truth.items():
        if expected is not None:
            assert_error_like(found[name], theirs[name], expected, dtype, name)


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone(output):
    """A loss that looks at h alone, or at delta alone, has the gradients of that one."""
    case = make()
    zero = torch.zeros_like(case.upstream[1 - output])
    expected = both(plain, Case(case.arguments, (case.upstream[0], zero) if output == 0 else (zero, case.upstream[1])))
    down = case.arguments["down"]
    leaves = {name: case.arguments[name] for name in ("x", "p1", "p3", "gates")} | {"down.lora_a": down.lora_a}
    leaves |= {f"{place}.lora_b": case.arguments[place].lora_b for place in ("gate", "up")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    ours(**case.arguments)[output].backward(case.upstream[output])
    for name, leaf in leaves.items():
        assert_close(leaf.grad, expected[name], 1e-11, name)


def test_upstream_gradients_of_any_layout():
    case = make()
    case.upstream = (torch.ones((), dtype=torch.float64).expand(7, 6), case.upstream[1].T.contiguous().T)
    assert_equal_sides(case)


def test_the_arguments_are_left_alone():
    case = make()
    before = case.to(torch.float64)
    copies = {name: value.clone() for name, value in before.arguments.items() if isinstance(value, torch.Tensor)}
    both(ours, case)
    for name, value in copies.items():
        assert torch.equal(case.arguments[name], value), name


def test_no_tensor_of_all_experts_features_is_kept():
    """What backward needs holds nothing of the size of a choice's features: N x F twice (p1, p3), not 2 + 3K times."""
    n, f, k = 50, 64, 4
    case = make(n, 8, f, 6, k, 2, masked=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tuple(tensor.shape)) or tensor, lambda t: t
    ):
        arguments = case.arguments | {"p1": case.arguments["p1"].requires_grad_()}
        ours(**arguments)
    assert sum(shape == (n, f) for shape in saved) <= 2
    assert max(torch.Size(shape).numel() for shape in saved) == n * f


def recipes(dtype, n=7, d=5):
    """What each recipe makes x from: the leaves, and a function of them."""
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = torch.randn(d, generator=generator, dtype=torch.float64).to(dtype)

    def normed(x):
        y, rstd = rms_norm(x, weight, 1e-6)
        return Recomputable(y, "rms_norm", (x, rstd, weight))

    return {
        "rms_norm": ((one,), normed),
        "swiglu": ((one, other), lambda gate, up: Recomputable(swiglu(gate, up), "swiglu", (gate, up))),
    }


@pytest.mark.parametrize("places", [PLACES, ("up",), ("down",)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["rms_norm", "swiglu"])
def test_an_input_that_is_computed_again_has_the_same_gradients_to_the_bit(recipe, dtype, places):
    sources, compute = recipes(dtype)[recipe]
    case = make(places=places).to(dtype)

    def run(keep):
        leaves = [source.clone().requires_grad_() for source in sources]
        found = both(lambda x, *args, **kwargs: mixlora_ffn(keep(compute(*leaves)), *args, **kwargs), case)
        return found | {f"source {i}": leaf.grad for i, leaf in enumerate(leaves)}

    again, kept = run(lambda x: x), run(lambda x: Recomputable(x.value))
    assert again.keys() == kept.keys()
    for name, wanted in kept.items():
        assert torch.equal(again[name], wanted) if wanted is not None else again[name] is None, name


@pytest.mark.parametrize("places", [PLACES, ("gate",), ("down",)])
@pytest.mark.parametrize("recipe", ["", "rms_norm", "swiglu"])
def test_what_is_computed_again_is_not_saved(recipe, places):
    sources, compute = recipes(torch.float32)[recipe or "swiglu"]
    x = compute(*(source.requires_grad_() for source in sources))
    arguments = make(places=places).to(torch.float32).arguments | {"x": x if recipe else Recomputable(x.value)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        mixlora_ffn(**arguments)
    found = {tensor.data_ptr() for tensor in saved}
    read = places != ("down",)  # the down experts do not read x
    assert (x.value.data_ptr() in found) == (read and recipe == "")
    assert all((source.data_ptr() in found) == (read and recipe != "") for source in x.sources)


def test_a_tensor_that_was_changed_behind_the_backward_is_found_out():
    case = make()
    hidden, _ = ours(**case.arguments | {"p1": case.arguments["p1"].requires_grad_()})
    case.arguments["p3"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


def test_x_that_needs_no_gradient():
    """The experts are trained all the same."""
    case = make()
    expected = both(plain, case)
    stacks = {place: case.arguments[place] for place in PLACES}
    leaves = {
        f"{place}.{name}": getattr(stack, name) for place, stack in stacks.items() for name in ("lora_a", "lora_b")
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    torch.autograd.backward(ours(**case.arguments), case.upstream)
    assert case.arguments["x"].grad is None
    for name, leaf in leaves.items():
        assert_close(leaf.grad, expected[name], 1e-11, name)


@pytest.mark.parametrize("places", [PLACES, ("gate", "up"), ("up",), ("down",)])
@pytest.mark.parametrize("recipe", ["", "rms_norm"])
def test_torch_accepts_the_registration(recipe, places, monkeypatch):
    case = make(places=places, masked=recipe == "").to(torch.bfloat16, torch.float32)
    (source,), compute = recipes(torch.bfloat16)["rms_norm"]
    sources = compute(source).sources if recipe else ()
    forward, backward = recorded(monkeypatch, _mixlora_ffn)
    down_forward, down_backward = recorded(monkeypatch, _down)

    def run(x, *args, **kwargs):
        return mixlora_ffn(Recomputable(x, recipe, sources), *args, **kwargs)

    both(run, case)
    opcheck(_mixlora_ffn, forward[0], backward[0])
    if "down" in places:
        lowered, *others = down_forward[0]
        opcheck(_down, [lowered.detach().requires_grad_(), *others], down_backward[0])


@pytest.mark.parametrize("places", [PLACES, ("up",), ("down",)])
def test_compiled_equals_eager(places):
    case = make(places=places).to(torch.float32)

    def around(x, p1, *args, **kwargs):
        up = x + 1
        return mixlora_ffn(Recomputable(swiglu(x, up), "swiglu", (x, up)), p1 * 2, *args, **kwargs)

    compiled, eager = both(torch.compile(around, fullgraph=True, backend="aot_eager"), case), both(around, case)
    assert compiled.keys() == eager.keys()
    for name, expected in eager.items():
        if name == "x" and "gate" not in places and "up" not in places:
            assert not any(found is not None and found.any() for found in (compiled[name], expected))
        else:
            assert torch.equal(compiled[name], expected), name


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("x", lambda x: x.float(), "x of torch.float32 must be of the dtype of p1, torch.float64"),
        ("x", lambda x: x[:, :3], r"gate.lora_a \[4, 3, 5\] must be \[4, 3, 3\]|x_mask \[7, 5\] must be \[7, 3\]"),
        ("p3", lambda p3: p3[:2], r"p3 \[2, 6\] must be \[7, 6\]"),
        ("gates", lambda gates: gates[:, :1], r"gates \[7, 1\] must be \[7, 2\]"),
        ("h_mask", lambda mask: mask[:, :1], r"h_mask \[7, 1\] must be \[7, 6\]"),
        ("down", lambda pair: ExpertFactors(pair.lora_a[:, :1], pair.lora_b), r"down.lora_b|gate.lora_a|down.lora_a"),
    ],
)
def test_tensors_that_do_not_fit_each_other(name, spoil, message):
    case = make()
    case.arguments[name] = spoil(case.arguments[name])
    with pytest.raises(ValueError, match=message):
        ours(**case.arguments)
