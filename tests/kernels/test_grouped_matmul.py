"""Rows times their group's matrix equal the formula, gradients included, on torch's fast path and off it."""

import pytest
import torch
from builders import assert_close, assert_error_like
from test_registration import opcheck, recorded

from moe_peft.kernels.grouped_matmul import reference
from moe_peft.kernels.grouped_matmul.op import _grouped_matmul, grouped_matmul, sort_by_group

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SPLITS = {
    "one row": [0, 0, 1, 0],
    "empty first and last": [0, 4, 0, 7, 0],
    "one group": [9],
    "uneven": [1, 2, 3, 40, 17],
}


def make(sizes, inputs=7, outputs=5, *, dtype=torch.float64, weight_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, to=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(to)

    offsets = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    x, upstream = normal(sum(sizes), inputs), normal(sum(sizes), outputs)
    return x, normal(len(sizes), outputs, inputs, to=weight_dtype or dtype), offsets, upstream


def plain(x, weights, offsets):
    """Row by row, with nothing but vectors."""
    groups = torch.repeat_interleave(torch.arange(len(weights)), offsets.diff())
    rows = [weights[group].to(x.dtype) @ row for group, row in zip(groups.tolist(), x, strict=True)]
    return torch.stack(rows)


def both(function, x, weights, offsets, upstream):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = function(x, weights, offsets)
    y.backward(upstream)
    return y.detach(), x.grad, weights.grad


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 5), (1, 1), (8, 4), (4, 9)])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_formula(split, inputs, outputs, dtype):
    case = make(SPLITS[split], inputs, outputs, dtype=dtype)
    names = ("y", "dx", "dW")
    for name, actual, wanted in zip(names, both(grouped_matmul, *case), both(plain, *case), strict=True):
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert_close(actual, wanted, 1e-12 if dtype == torch.float64 else 1e-5, name)


@pytest.mark.parametrize("inputs", [7, 8])
def test_no_rows(inputs):
    y, dx, dw = both(grouped_matmul, *make([0, 0, 0], inputs, 8, dtype=torch.float32))
    assert y.shape == (0, 8)
    assert dx.shape == (0, inputs)
    assert torch.equal(dw, torch.zeros(3, 8, inputs))


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 5), (8, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_like_that_of_mm_in_the_same_dtype(inputs, outputs, dtype):
    case = make(SPLITS["uneven"], inputs, outputs, dtype=dtype)

    def by_mm(x, weights, offsets):
        return torch.cat([x[offsets[g] : offsets[g + 1]] @ weights[g].T for g in range(len(weights))])

    truth = both(plain, case[0].double(), case[1].double(), case[2], case[3].double())
    for ours, theirs, true in zip(both(grouped_matmul, *case), both(by_mm, *case), truth, strict=True):
        assert_error_like(ours, theirs, true, dtype)


def test_wider_weights_get_a_gradient_of_their_own_dtype():
    case = make(SPLITS["uneven"], 8, 16, dtype=torch.bfloat16, weight_dtype=torch.float32)
    y, dx, dw = both(grouped_matmul, *case)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "inputs", "outputs", "fast"),
    [
        (torch.float32, 8, 12, True),
        (torch.bfloat16, 8, 16, True),
        (torch.float16, 8, 16, True),
        (torch.float64, 8, 16, False),
        (torch.bfloat16, 4, 16, False),
        (torch.bfloat16, 8, 12, False),
    ],
)
def test_torchs_grouped_mm_runs_where_it_can(dtype, inputs, outputs, fast, monkeypatch):
    calls = []
    torchs = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *args, **kw: calls.append(1) or torchs(*args, **kw))
    both(grouped_matmul, *make(SPLITS["uneven"], inputs, outputs, dtype=dtype))
    assert len(calls) == (3 if fast else 0)


def test_rows_that_start_at_an_odd_address():
    x, weights, offsets, upstream = make(SPLITS["uneven"], 8, 16, dtype=torch.float32)
    memory = torch.empty(x.numel() + 1)
    memory[1:] = x.flatten()
    odd = memory[1:].view_as(x)
    assert odd.data_ptr() % 16
    assert_close(reference.grouped_matmul_forward(odd, weights, offsets), plain(x, weights, offsets), 1e-5)
    dw = reference.grouped_matmul_dw(upstream, odd, offsets, torch.float32)
    assert_close(dw, both(plain, x, weights, offsets, upstream)[2], 1e-5)


def test_operands_of_any_layout():
    x, weights, offsets, upstream = make(SPLITS["uneven"], 8, 16, dtype=torch.float32)
    expected = both(plain, x, weights, offsets, upstream)
    turned = x.T.contiguous().T, weights.transpose(1, 2).contiguous().transpose(1, 2)
    expanded = torch.ones(()).expand_as(upstream)
    for actual, wanted in zip(both(grouped_matmul, *turned, offsets, upstream), expected, strict=True):
        assert_close(actual, wanted, 1e-5)
    for actual, wanted in zip(
        both(grouped_matmul, *turned, offsets, expanded), both(plain, x, weights, offsets, expanded), strict=True
    ):
        assert_close(actual, wanted, 1e-5)


def test_gradcheck():
    x, weights, offsets, _ = make([2, 0, 3], 3, 2)
    assert torch.autograd.gradcheck(grouped_matmul, (x.requires_grad_(), weights.requires_grad_(), offsets))


@pytest.mark.parametrize("frozen", ["x", "weights"])
def test_no_gradient_is_computed_in_vain(frozen, monkeypatch):
    x, weights, offsets, upstream = make(SPLITS["uneven"])
    (weights if frozen == "x" else x).requires_grad_()
    unwanted = "grouped_matmul_dx" if frozen == "x" else "grouped_matmul_dw"
    monkeypatch.setattr(reference, unwanted, lambda *args: pytest.fail(unwanted))
    grouped_matmul(x, weights, offsets).backward(upstream)
    assert (x if frozen == "x" else weights).grad is None


@pytest.mark.parametrize("sick", ["x", "weights", "upstream"])
@pytest.mark.parametrize("inputs", [7, 8])
def test_nan_stays_in_its_group(sick, inputs):
    x, weights, offsets, upstream = make(SPLITS["uneven"], inputs, 16, dtype=torch.float32)
    healthy = both(grouped_matmul, x, weights, offsets, upstream)
    rows = slice(3, 6)  # group 2
    {"x": x[rows], "weights": weights[2], "upstream": upstream[rows]}[sick].fill_(torch.nan)
    found = both(grouped_matmul, x, weights, offsets, upstream)
    others = [row for row in range(len(x)) if row not in (3, 4, 5)]
    assert any(value.isnan().any() for value in found)
    for i in (0, 1):
        assert torch.equal(found[i][others], healthy[i][others])
    assert torch.equal(found[2][[0, 1, 3, 4]], healthy[2][[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outputs", [5, 8])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_torch_accepts_the_operators(dtype, outputs, trained, monkeypatch):
    x, weights, offsets, upstream = make([2, 0, 5], 8, outputs, dtype=dtype, weight_dtype=torch.float32)
    forward, backward = recorded(monkeypatch, _grouped_matmul)
    grouped_matmul(x.requires_grad_(trained[0]), weights.requires_grad_(trained[1]), offsets).backward(upstream)
    opcheck(_grouped_matmul, forward[0], backward[0])


def test_compiled_equals_eager():
    def mixture(x, weights, ids):
        order, offsets = sort_by_group(ids, len(weights))
        return torch.zeros_like(x).index_copy(0, order, grouped_matmul(x[order], weights, offsets).sin())

    x, weights, _, upstream = make([6, 0, 5], 8, 8, dtype=torch.float32)
    ids = torch.tensor([2, 0, 0, 2, 0, 2, 0, 0, 2, 2, 0])
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager")
    case = (x, weights, ids, upstream)
    for actual, wanted in zip(both(compiled, *case), both(mixture, *case), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_sort_by_group(dtype):
    ids = torch.tensor([[3, 0], [0, 5], [3, 3], [0, 1]], dtype=dtype)
    order, offsets = sort_by_group(ids, 7)
    assert order.tolist() == [1, 2, 6, 7, 0, 4, 5, 3]
    assert offsets.tolist() == [0, 3, 4, 4, 7, 7, 8, 8]
    assert offsets.dtype == torch.int32


def test_sort_of_no_rows():
    order, offsets = sort_by_group(torch.empty(0, 2, dtype=torch.int64), 3)
    assert order.shape == (0,)
    assert offsets.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 6)}, r"x \(9, 6\) and weights \(2, 5, 7\)"),
        ({"x": torch.zeros(7)}, r"x \(7,\)"),
        ({"weights": torch.zeros(5, 7)}, r"weights \(5, 7\)"),
        ({"weights": torch.zeros(0, 5, 7)}, "at least 1"),
        ({"offsets": torch.zeros(2, dtype=torch.int32)}, r"offsets \(2,\)"),
        ({"offsets": torch.tensor([0, 4, 9])}, "dtype torch.int64"),
        ({"x": torch.zeros(9, 7, dtype=torch.int64)}, "floating"),
        ({"offsets": torch.zeros(3, dtype=torch.int32, device="meta")}, "meta"),
        ({"offsets": torch.tensor([0, 4, 8], dtype=torch.int32)}, r"\[0, 4, 8\].*9"),
        ({"offsets": torch.tensor([1, 4, 9], dtype=torch.int32)}, r"\[1, 4, 9\]"),
        ({"offsets": torch.tensor([0, 10, 9], dtype=torch.int32)}, "ascend"),
    ],
)
def test_refusals(change, message):
    arguments = {
        "x": torch.zeros(9, 7),
        "weights": torch.zeros(2, 5, 7),
        "offsets": torch.tensor([0, 4, 9], dtype=torch.int32),
    }
    grouped_matmul(**arguments)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**arguments | change)
