"""A declared operation is the same through autograd in eager mode and through torch.library."""

import pytest
import torch

from moe_peft.kernels.registration import Differentiable, Operator


def recorded(monkeypatch, operation):
    """Two lists that fill with the operators' arguments of every forward and backward in eager mode."""
    forward, backward = [], []
    save, run = operation._save, operation.backward.run
    monkeypatch.setattr(operation, "_save", lambda args, results: forward.append(args) or save(args, results))
    monkeypatch.setattr(operation.backward, "run", lambda *args: backward.append(args) or run(*args))
    return forward, backward


def opcheck(operation, forward_arguments, backward_arguments, **tolerances):
    """What torch checks of an operator, of the forward with its gradients and of the backward."""

    def detached(item):
        if isinstance(item, list):
            return [detached(one) for one in item]
        return item.detach() if torch.is_tensor(item) else item

    torch.library.opcheck(operation.forward.opaque, tuple(forward_arguments), **tolerances)
    torch.library.opcheck(operation.backward.opaque, tuple(map(detached, backward_arguments)), **tolerances)


def weighted_sums(x, terms, weights, scaling, flags):
    """``scaling * (x + sum of the terms that have a weight)``, each term times its weight, and the number of them."""
    present = [term * weight for term, weight, flag in zip(terms, weights, flags, strict=True) if flag]
    return [scaling * sum(present, x), *(scaling * term for term in present), torch.tensor([len(present)])]


def d_weighted_sums(dy, d_terms, weights, scaling, flags, needs_dx):
    found, rest = [], iter(d_terms)
    for weight, flag in zip(weights, flags, strict=True):
        found.append(scaling * weight * (dy + next(rest)) if flag else torch.zeros_like(dy))
    return [*found, scaling * dy] if needs_dx else found


seen_needs = []


def save(arguments, results):
    _, _, weights, scaling, flags = arguments
    return [weights, scaling, flags, results[0].new_full(results[0].shape, 7)]  # a tensor of its own making


def differentiate(backward, kept, needs, grads):
    weights, scaling, flags, sevens = kept
    assert isinstance(weights, list)
    seen_needs.append(tuple(needs))
    some = next(grad for grad in grads if grad is not None)
    dy, *d_terms = (torch.zeros_like(some) if grad is None else grad for grad in grads[:-1])
    found = backward(dy * sevens / 7, d_terms, weights, scaling, flags, needs[0])
    return found[-1] if needs[0] else None, found[: len(flags)]


OPERATION = Differentiable(
    Operator(
        "weighted_sums_of_the_tests(Tensor x, Tensor[] terms, Tensor[] weights, float scaling, bool[] flags) "
        "-> Tensor[]",
        weighted_sums,
        lambda x, terms, weights, scaling, flags: [
            *(torch.empty_like(x) for _ in range(1 + sum(flags))),
            torch.empty(1, dtype=torch.int64),
        ],
    ),
    Operator(
        "weighted_sums_of_the_tests_backward(Tensor dy, Tensor[] d_terms, Tensor[] weights, float scaling, "
        "bool[] flags, bool needs_dx) -> Tensor[]",
        d_weighted_sums,
        lambda dy, d_terms, weights, scaling, flags, needs_dx: [
            torch.empty_like(dy) for _ in range(len(flags) + needs_dx)
        ],
    ),
    num_differentiated=2,
    save=save,
    differentiate=differentiate,
    constants=(-1,),
)
WAYS = {"eager": OPERATION, "opaque": OPERATION.forward.opaque}
BOTH = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def make(flags=(True, False, True), *, trained=(True, True, False, True)):
    """x, terms, weights, scaling and flags; ``trained`` says which of x and the terms are."""
    generator = torch.Generator().manual_seed(0)
    x, *terms = (torch.randn(3, 2, generator=generator).requires_grad_(one) for one in trained)
    weights = [torch.randn(3, 2, generator=generator) for _ in terms]
    return x, terms[: len(flags)], weights[: len(flags)], 0.5, list(flags)


@BOTH
@pytest.mark.parametrize("used", [(0,), (2,), (0, 1, 2)])
def test_outputs_and_gradients_are_the_formulas(way, used):
    x, terms, weights, scaling, flags = make()
    results = [way(x, terms, weights, scaling, flags), weighted_sums(x, terms, weights, scaling, flags)]
    leaves = [x, terms[0], terms[2]]
    grads = [
        torch.autograd.grad([outputs[i] for i in used], leaves, [torch.full((3, 2), i + 2.0) for i in used])
        if 0 in used
        else torch.autograd.grad(outputs[2], leaves[2], torch.ones(3, 2))
        for outputs in results
    ]
    for actual, expected in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "trained", [(True, True, False, True), (False, True, False, False), (True, False, False, False)]
)
@pytest.mark.parametrize("flags", [(True, False, True), (False, False, False), ()])
def test_both_ways_give_the_same_bits_and_ask_for_the_same_gradients(flags, trained):
    found = []
    for way in WAYS.values():
        x, terms, *rest = make(flags, trained=trained)
        outputs = way(x, terms, *rest)
        leaves = [tensor for tensor in (x, *terms) if tensor.requires_grad]
        assert [output.requires_grad for output in outputs] == [bool(leaves)] * (len(outputs) - 1) + [False]
        seen_needs.clear()
        if leaves:
            sum((i + 1) * output.square().sum() for i, output in enumerate(outputs[:-1])).backward()
            assert seen_needs == [(trained[0], any(trained[1 : 1 + len(flags)]))]
        found.append([*outputs, *(leaf.grad for leaf in leaves)])
    for eager, opaque in zip(*found, strict=True):
        assert torch.equal(eager, opaque)


def test_without_a_gradient_to_compute_the_function_runs_alone(monkeypatch):
    monkeypatch.setattr(OPERATION, "_save", None)
    x, terms, *rest = make()
    with torch.no_grad():
        assert not OPERATION(x, terms, *rest)[0].requires_grad
    x, terms, weights, *rest = make(trained=(False,) * 4)
    weights[0].requires_grad_()  # none of the arguments that are differentiated
    assert not OPERATION(x, terms, weights, *rest)[0].requires_grad


@BOTH
def test_hooks_see_every_saved_tensor_and_nothing_else_is_kept(way):
    x, terms, weights, *rest = make()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor) or len(packed) - 1, lambda i: packed[i] * 3 if i == 0 else packed[i]
    ):
        output = way(x, terms, weights, *rest)[0]
    assert [tensor.data_ptr() for tensor in packed[:3]] == [weight.data_ptr() for weight in weights]
    assert len(packed) == 4
    (grad,) = torch.autograd.grad(output.sum(), terms[0])
    torch.testing.assert_close(grad, 0.5 * 3 * weights[0])


@BOTH
def test_a_saved_tensor_that_was_changed_is_found_out(way):
    x, terms, weights, *rest = make()
    output = way(x, terms, weights, *rest)[0]
    weights[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@BOTH
def test_an_argument_that_is_not_differentiated_gets_no_gradient(way):
    x, terms, weights, *rest = make()
    for weight in weights:
        weight.requires_grad_()
    way(x, terms, weights, *rest)[0].sum().backward()
    assert x.grad is not None
    assert all(weight.grad is None for weight in weights)


@BOTH
def test_gradients_of_gradients_are_refused(way):
    x, terms, weights, *rest = make()
    dy = torch.ones(3, 2, requires_grad=True)
    (dx,) = torch.autograd.grad(way(x, terms, weights, *rest)[0], x, dy, create_graph=True)
    torch.testing.assert_close(dx.detach(), torch.full((3, 2), 0.5))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


def test_torch_accepts_both_operators(monkeypatch):
    forward, backward = recorded(monkeypatch, OPERATION)
    OPERATION(*make())[0].sum().backward()
    opcheck(OPERATION, forward[0], backward[0])


def test_a_compiler_sees_the_operators():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def around(x, *terms):
        return OPERATION(x * 2, list(terms), *rest)[0] + 1

    x, terms, *rest = make()
    compiled = torch.compile(around, fullgraph=True, backend=backend)(x, *terms)
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert torch.ops.moe_peft.weighted_sums_of_the_tests.default in targets
    assert torch.equal(compiled, around(x, *terms))
    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")(x, *terms)
    for actual, expected in zip(
        torch.autograd.grad(compiled.sum(), (x, terms[0])),
        torch.autograd.grad(around(x, *terms).sum(), (x, terms[0])),
        strict=True,
    ):
        assert torch.equal(actual, expected)
