"""Within ``batch_invariant`` a token's results have the same bits, whatever stands beside it."""

import pytest
import torch

from moe_peft.kernels import products
from moe_peft.kernels.invariance import batch_invariant, is_batch_invariant
from moe_peft.kernels.lora_linear.op import lora_linear
from moe_peft.kernels.lora_linear.ranges import LoraRange
from moe_peft.kernels.lora_linear.teams import teams
from moe_peft.kernels.products import ROWS_AT_A_TIME, add_matmul_, linear, matmul
from moe_peft.kernels.recompute import Recomputable
from moe_peft.kernels.rectangles import rectangles

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 3, 16, ROWS_AT_A_TIME, ROWS_AT_A_TIME + 1, 300]
SHAPES = [(576, 192), (100, 72), (7, 33)]  # I, O


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_a_product_does_not_see_the_others(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inner, outer = shape
    weight, bias = randn(outer, inner, dtype=dtype), randn(outer, dtype=dtype)
    x = randn(1000, inner, dtype=dtype, seed=1)
    start = 37

    def results(rows: torch.Tensor) -> list[torch.Tensor]:
        total = torch.ones(rows.shape[0], outer, dtype=dtype)
        add_matmul_(total, rows, weight.T)
        return [linear(rows, weight, bias), linear(rows, weight), matmul(rows, weight.T.contiguous()), total]

    with batch_invariant():
        everything = results(x)
        for length in LENGTHS:
            for one, of_all in zip(results(x[start : start + length]), everything, strict=True):
                assert torch.equal(one, of_all[start : start + length])
    for one, plain in zip(everything, results(x), strict=True):
        # Roundings of a sum of this many terms add up like the steps of a random walk.
        allowed = inner**0.5 * torch.finfo(dtype).eps
        assert (one.double() - plain.double()).norm() <= allowed * plain.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(5, 5, 5), (40, 40), (130, 3), (17, 90, 200)])
def test_an_adapter_learns_the_same_beside_others(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Factors of one make, whose ranges would share batched products otherwise."""
    inner, outer, rank = 96, 72, 4
    weights = [randn(outer, inner, dtype=dtype), randn(40, inner, dtype=dtype, seed=1)]
    x, upstream = randn(sum(lengths), inner, dtype=dtype, seed=2), randn(sum(lengths), outer, dtype=dtype, seed=3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    edges = [sum(lengths[:i]) for i in range(len(lengths) + 1)]

    def trained(parts: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        start, end = edges[parts[0]], edges[parts[-1] + 1]
        factors = [
            (
                randn(rank, inner, dtype=wide, seed=10 + i).requires_grad_(),
                randn(outer, rank, dtype=wide, seed=20 + i).requires_grad_(),
            )
            for i in parts
        ]
        ranges = [
            LoraRange(edges[i] - start, edges[i + 1] - start, (pair, None), (0.5, 0.0), None)
            for i, pair in zip(parts, factors, strict=True)
        ]
        rows = x[start:end].clone().requires_grad_()
        first, second = lora_linear(Recomputable(rows), weights, [None, None], ranges)
        (first * upstream[start:end]).sum().add(second.sum()).backward()
        assert rows.grad is not None
        return rows.grad, [factor.grad for pair in factors for factor in pair if factor.grad is not None]

    with batch_invariant():
        dx, gradients = trained(list(range(len(lengths))))
        for i in range(len(lengths)):
            own_dx, own = trained([i])
            assert torch.equal(own_dx, dx[edges[i] : edges[i + 1]])
            assert len(own) == 2 and all(map(torch.equal, own, gradients[2 * i : 2 * i + 2]))


def test_products_take_whole_tiles_and_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a library happens to round alike, nothing above would fail without it."""
    seen = []
    honest = products._whole_product
    monkeypatch.setattr(products, "_whole_product", lambda x, *rest: seen.append(x.shape[0]) or honest(x, *rest))
    with batch_invariant():
        linear(randn(300, 8, dtype=torch.float32), randn(4, 8, dtype=torch.float32))
        assert seen == [ROWS_AT_A_TIME] * 3
        pair = randn(2, 8, dtype=torch.float32), randn(4, 2, dtype=torch.float32)
        ranges = [LoraRange(0, 5, (pair,), (1.0,), None), LoraRange(5, 10, (pair,), (1.0,), None)]
        assert [len(team.parts) for team in teams(ranges, torch.bfloat16)] == [1, 1]
    assert [len(team.parts) for team in teams(ranges, torch.bfloat16)] == [2]
    assert [len(one.samples) for one in rectangles((0, 5, 10), apart=True)] == [1, 1]


def test_it_ends_with_its_block() -> None:
    with pytest.raises(KeyError), batch_invariant():
        assert is_batch_invariant()
        raise KeyError
    assert not is_batch_invariant()
