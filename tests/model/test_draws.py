"""Masks and noise: the same bits for a key on every CPU, drawn without a wait on a GPU."""

import pytest
import torch

from moe_peft.model.draws import dropout_mask, generator_for, uniform_noise

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [2.0**-24, 0.05, 0.1, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(700, 301), (1, 1), (0, 5)])
def test_a_cpu_mask_is_a_comparison_of_uniform_float32_draws(dtype, p, shape):
    mask = dropout_mask(shape, p, like=torch.empty(0, dtype=dtype), key=(3, "qa"))
    keep = torch.rand(shape, dtype=torch.float32, generator=generator_for(3, "qa")) >= p
    assert mask.dtype == dtype
    assert torch.equal(mask, keep.to(dtype) / (1 - p))


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_drawn_in_its_own_dtype(dtype):
    noise = uniform_noise((300, 41), 0.8, 1.2, like=torch.empty(0, dtype=dtype), key=(3, "qa"))
    expected = torch.empty(300, 41, dtype=dtype).uniform_(0.8, 1.2, generator=generator_for(3, "qa"))
    assert noise.dtype == dtype
    assert torch.equal(noise, expected)
    assert 0.8 <= noise.min() < 0.81 and 1.19 < noise.max() <= 1.2


@pytest.mark.gpu
def test_a_gpu_draws_for_itself_and_makes_nobody_wait():
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    state = torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, again, other = (dropout_mask((300, 41), 0.25, like=like, key=(1, word)) for word in ("a", "a", "b"))
        noise = [uniform_noise((300, 41), 0.8, 1.2, like=like, key=(1, word)) for word in ("a", "a", "b")]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cuda.get_rng_state(), state), "the global generator is left alone"
    for drawn, repeated, differs in ((first, again, other), noise):
        assert drawn.is_cuda and drawn.dtype == torch.bfloat16
        assert torch.equal(drawn, repeated)
        assert not torch.equal(drawn, differs)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).bfloat16().item()}
    assert first.float().mean().item() == pytest.approx(1.0, abs=0.05)
