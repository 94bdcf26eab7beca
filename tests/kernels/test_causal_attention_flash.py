"""Flash attention on a GPU equals the products in float32, and is deterministic without leaving a trace of it."""

from itertools import accumulate

import pytest
import torch
from builders import assert_relative

from moe_peft.kernels.causal_attention import flash, op
from moe_peft.kernels.causal_attention.op import causal_attention

LENGTHS = [1, 7, 128, 1000, 7]


def make(dtype, *, h=6, g=2, d=64, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(sum(lengths), heads, d, generator=generator) for heads in (h, g, g, h)]
    return [x.to(dtype) for x in tensors], (0, *accumulate(lengths))


def both(q, k, v, upstream, boundaries, window=None, **settings):
    """Output and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = causal_attention(*leaves, boundaries, window, **settings)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 100, 5000])
@pytest.mark.parametrize(("h", "g", "d"), [(6, 2, 64), (4, 4, 128), (8, 1, 40)])
def test_equals_the_products_in_float32(dtype, window, h, g, d):
    tensors, boundaries = make(dtype, h=h, g=g, d=d)
    found = both(*(x.cuda() for x in tensors), boundaries, window)
    expected = both(*(x.float() for x in tensors), boundaries, window)
    floor = expected[3].norm().item()
    for name, actual, wanted in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert actual.dtype == dtype
        assert_relative(actual.cpu(), wanted, 2e-3 if dtype == torch.float16 else 1.5e-2, name, floor)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 64), (torch.bfloat16, 12)])
def test_what_flash_attention_does_not_take(dtype, d, window):
    tensors, boundaries = make(dtype, d=d)
    found = both(*(x.cuda() for x in tensors), boundaries, window)
    expected = both(*(x.float() for x in tensors), boundaries, window)
    for name, actual, wanted in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert_relative(
            actual.cpu(), wanted, 1e-4 if dtype == torch.float32 else 1.5e-2, name, expected[3].norm().item()
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_again(dtype):
    tensors, boundaries = make(dtype, lengths=[4096, 1000, 30])
    tensors = [x.cuda() for x in tensors]
    first = both(*tensors, boundaries)
    for _ in range(5):
        assert all(map(torch.equal, both(*tensors, boundaries), first))


@pytest.mark.gpu
def test_given_boundaries_on_the_device():
    tensors, boundaries = make(torch.bfloat16)
    tensors = [x.cuda() for x in tensors]
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device="cuda")
    for actual, expected in zip(
        both(*tensors, boundaries, cu_seqlens=cu_seqlens), both(*tensors, boundaries), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
def test_the_faster_way_is_as_right():
    tensors, boundaries = make(torch.bfloat16)
    tensors = [x.cuda() for x in tensors]
    for actual, expected in zip(
        both(*tensors, boundaries, deterministic=False), both(*tensors, boundaries), strict=True
    ):
        assert_relative(actual, expected, 1e-2)


@pytest.mark.gpu
def test_nan_stays_in_its_sample_on_the_gpu():
    tensors, boundaries = make(torch.bfloat16)
    tensors = [x.cuda() for x in tensors]
    healthy = both(*tensors, boundaries)
    sick = slice(boundaries[2], boundaries[3])
    for tensor in tensors:
        tensor[sick] = torch.nan
    for before, after in zip(healthy, both(*tensors, boundaries), strict=True):
        assert torch.equal(after[: sick.start], before[: sick.start])
        assert torch.equal(after[sick.stop :], before[sick.stop :])


@pytest.mark.parametrize("given", [True, False])
def test_backward_gets_what_forward_had_and_returned(monkeypatch, given):
    """Also where there is no GPU: flash attention's output, log-sum-exp and boundaries, and the settings."""
    (q, k, v, upstream), boundaries = make(torch.float32, lengths=[2, 7])
    out, log_z = q + 1, torch.rand(q.shape[1], q.shape[0])
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32) if given else None
    forward, backward = [], []
    monkeypatch.setattr(op, "flash_takes", lambda q: True)
    monkeypatch.setattr(op, "flash_forward", lambda *args: forward.append(args) or (out.clone(), log_z.clone()))
    monkeypatch.setattr(op, "flash_backward", lambda *args: backward.append(args) or (args[0] * 2, k * 3, v * 4))
    found = both(q, k, v, upstream, boundaries, 5, cu_seqlens=cu_seqlens, deterministic=False)
    seen = q, k, v, torch.tensor(boundaries, dtype=torch.int32)
    expected = [(seen, (boundaries, 5)), ((upstream, q, k, v, out, log_z, seen[3]), (boundaries, 5, False))]
    for (args,), (tensors, settings) in zip((forward, backward), expected, strict=True):
        assert all(map(torch.equal, args[: len(tensors)], tensors))
        assert args[len(tensors) :] == settings
    assert all(map(torch.equal, found, (out, upstream * 2, k * 3, v * 4)))
    assert not given or forward[0][3] is cu_seqlens


class Calls:
    """Stands for torch's backward operation: which setting it ran under, and with what."""

    def __call__(self, *args, **options):
        self.args, self.options = args, options
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
        return args[1], args[2], args[3]


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("window", [None, 3, 9])
def test_the_setting_stands_for_one_call(monkeypatch, before, wanted, window):
    """Also where there is no GPU: how the operation is called, and that nobody else's setting is changed."""
    calls = Calls()
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", calls)
    (q, k, v, upstream), boundaries = make(torch.float32, lengths=[2, 7])
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        flash.flash_backward(upstream, q, k, v, q, q[:0], None, boundaries, window, wanted)
        after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert after == before
    assert calls.deterministic == (wanted or before[0])
    assert not calls.warned_only
    assert calls.args[8:12] == (7, 7, 0.0, True)
    assert calls.options == ({"window_size_left": 2, "window_size_right": 0} if window == 3 else {})
