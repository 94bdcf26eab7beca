"""Sparse LoRA: equal to plain LoRA with zeros in its factors, which nothing brings back; its pruning step by step."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import add_random_adapter, assert_close, random_run, run_step, tiny_model
from naive_model import NaiveModel
from safetensors.torch import load_file, save_file

from moe_peft import LoraConfig, SparseLoraConfig, load_adapter, save_adapter
from moe_peft.adapters.lora import PROJECTIONS
from moe_peft.adapters.sparse_lora import MovementPruning, SparseLora

RUN = random_run("qa", (5, 1, 7), seed=3, step=2, micro_batch=1)


def masks_of(model, name="qa"):
    return {key: mask for key, mask in model.adapter_buffers(name).items() if key.endswith(".mask")}


def mask_for(key, masks):
    return masks[key.replace(".weight", ".mask")]


def fill_masks(model, seed=0):
    """Masks of many shares of zeros, other than those of the config."""
    generator = torch.Generator().manual_seed(seed)
    for mask in masks_of(model).values():
        share = 0.2 + 0.6 * torch.rand((), generator=generator)
        mask.copy_(torch.rand(mask.shape, generator=generator) < share)


def zeros_wanted(count, sparsity):
    """The rule, in exact arithmetic: the nearest whole number, never all."""
    return min(round(Fraction(str(sparsity)) * count), count - 1)


@pytest.mark.parametrize("mask_type", ["random", "movement"])
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3, "use_rslora": True, "r": 3}], ids=["default", "other"])
def test_equals_plain_lora_of_the_masked_factors(mask_type, settings):
    """Forward and every gradient, in training with dropout; nothing acts of what the parameters hold where masked."""
    config = SparseLoraConfig(mask_type=mask_type, **settings)
    model = tiny_model(dtype=torch.float64).train()
    add_random_adapter(model, "qa", config, seed=5)
    fill_masks(model)
    masks = masks_of(model)
    naive = NaiveModel(model, "qa", config, seed=5)
    naive.weights = {
        key: (weight.detach() * mask_for(key, masks)).requires_grad_() for key, weight in naive.weights.items()
    }
    expected = naive(RUN)
    expected.loss.backward()
    state = model.adapter_state("qa")
    for key, weight in state.items():
        weight[~mask_for(key, masks)] = math.nan  # it acts nowhere
    (output,), found = run_step(model, RUN)
    moved = 0
    assert_close(output.logits, expected.logits, 1e-10, "logits")
    assert_close(output.loss, expected.loss, 1e-10, "loss")
    for key, gradient in naive.gradients().items():
        mask = mask_for(key, masks)
        assert 0 < mask.count_nonzero() < mask.numel()
        moved += gradient[~mask].count_nonzero().item()  # by plain LoRA, from zero
        assert_close(found["qa"][key], gradient * mask, 1e-10, key)
        assert not found["qa"][key][~mask].any()
    assert moved > 1000


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.7, 0.999])
def test_the_number_of_zeros_is_the_stated_one(sparsity):
    model = tiny_model()
    model.add_adapter("qa", SparseLoraConfig(sparsity=sparsity, r=5, init_lora_weights=False))
    masks = masks_of(model)
    for key, weight in model.adapter_state("qa").items():
        mask = mask_for(key, masks)
        assert (~mask).sum() == zeros_wanted(weight.numel(), sparsity), key
        assert torch.equal(weight == 0, ~mask), key


def test_a_random_mask_is_a_draw_of_the_seed_the_name_and_the_place():
    def drawn(seed, name="qa"):
        model = tiny_model()
        torch.manual_seed(7)
        before = torch.get_rng_state()
        model.add_adapter(name, SparseLoraConfig(), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return masks_of(model, name)

    masks = drawn(1)
    assert all(torch.equal(mask, masks[key]) for key, mask in drawn(1).items())
    for others in (drawn(2), drawn(1, "other")):
        assert not any(torch.equal(mask, masks[key]) for key, mask in others.items())
    of_one_shape = [mask for mask in masks.values() if mask.shape == (8, 24)]
    assert len({mask.numpy().tobytes() for mask in of_one_shape}) == len(of_one_shape) > 5


def test_what_is_kept_starts_as_plain_lora():
    model, other = tiny_model(), tiny_model()
    model.add_adapter("qa", SparseLoraConfig(), seed=3)
    other.add_adapter("qa", LoraConfig(), seed=3)
    masks, plain = masks_of(model), other.adapter_state("qa")
    for key, weight in model.adapter_state("qa").items():
        assert torch.equal(weight, plain[key] * mask_for(key, masks)), key


def naive_pruning(weights, gradients, sparsity, start, end, num_steps, lr):
    """Plain gradient descent with movement pruning, one entry after another: weights and zeros behind every step."""
    weights, score, pruned, found = list(weights), [0.0] * len(weights), set(), []
    for step, gradient in enumerate(gradients, start=1):
        for i in range(len(weights)):
            if i not in pruned:
                weights[i] -= lr * gradient[i]
                score[i] -= weights[i] * gradient[i]
        done = min(max((step / num_steps - start) / (end - start), 0.0), 1.0)
        wanted = zeros_wanted(len(weights), sparsity * (1 - (1 - done) ** 3))
        left = sorted((i for i in range(len(weights)) if i not in pruned), key=lambda i: (score[i], i))
        for i in left[: max(wanted - len(pruned), 0)]:
            pruned.add(i)
            weights[i] = 0.0
        found.append((list(weights), set(pruned)))
    return found


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.2, 0.7), (0.1, 0.15)])
def test_movement_pruning_step_by_step(start, end):
    """B begins at zero; the same optimizer would move what is masked."""
    generator = np.random.default_rng(0)
    num_steps, lr = 12, 0.1
    shapes = {"lora_A": (3, 5), "lora_B": (4, 3)}
    first = {"lora_A": generator.normal(size=15), "lora_B": np.zeros(12)}
    gradients = {factor: generator.normal(size=(num_steps, math.prod(shapes[factor]))) for factor in shapes}
    tensors = [torch.tensor(first[factor]).view(shapes[factor]) for factor in shapes]
    masks = [torch.ones(shape, dtype=torch.bool) for shape in shapes.values()]
    lora = SparseLora(*tensors, *masks, keeps_scores=True, scaling=1.0, dropout=0.0, seed=0)
    optimizer = torch.optim.SGD(lora.parameters(), lr=lr)
    pruning = MovementPruning([lora], 0.6, start, end, num_steps)
    expected = {
        factor: naive_pruning(first[factor], gradients[factor], 0.6, start, end, num_steps, lr) for factor in shapes
    }
    for step in range(1, num_steps + 1):
        for factor, shape in shapes.items():
            getattr(lora, factor).grad = torch.tensor(gradients[factor][step - 1]).view(shape)
        optimizer.step()
        pruning.after_step(step)
        for factor in shapes:
            weights, pruned = expected[factor][step - 1]
            mask = lora.mask_of(factor).flatten()
            assert {i for i in range(len(mask)) if not mask[i]} == pruned, (step, factor)
            # Where the naive one has nothing more to do with a pruned entry, this one got its gradient.
            np.testing.assert_allclose(getattr(lora, factor).detach().flatten(), weights, rtol=1e-12)
    assert [len(expected[factor][-1][1]) for factor in shapes] == [9, 7]


def test_momentum_and_weight_decay_bring_no_zero_back():
    lora = SparseLora(
        torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
        torch.zeros(5, 4),
        *(torch.ones(shape, dtype=torch.bool) for shape in ((4, 6), (5, 4))),
        keeps_scores=True,
        scaling=1.0,
        dropout=0.0,
        seed=0,
    )
    optimizer = torch.optim.AdamW(lora.parameters(), lr=0.1, weight_decay=0.3)
    pruning = MovementPruning([lora], 0.5, 0.0, 0.5, 10)
    zeros = torch.zeros(4, 6, dtype=torch.bool)
    for step in range(1, 11):
        optimizer.zero_grad()
        lora_a, lora_b = lora.low_rank()
        ((lora_b @ lora_a).sum() + lora_a.pow(2).sum() + lora_b.sum()).backward()
        optimizer.step()
        pruning.after_step(step)
        assert not lora.lora_A[zeros].any()
        zeros |= ~lora.mask_a_
        assert torch.equal(lora.lora_A == 0, zeros)
    assert zeros.sum() == 12
    moment = optimizer.state[lora.lora_A]["exp_avg"]
    assert moment[zeros].any(), "momentum was there to move them"


def saved(tmp_path, config):
    """A model with an adapter of random weights and masks, and its folder."""
    model = tiny_model()
    add_random_adapter(model, "qa", config)
    fill_masks(model, seed=1)
    save_adapter(model, "qa", tmp_path / "qa")
    return model, tmp_path / "qa"


@pytest.mark.parametrize("mask_type", ["random", "movement"])
def test_a_loaded_adapter_has_the_masks_and_the_bits(mask_type, tmp_path):
    model, folder = saved(tmp_path, SparseLoraConfig(r=3, mask_type=mask_type))
    other = tiny_model()
    load_adapter(other, folder)
    assert other.adapter_config("qa") == SparseLoraConfig(r=3, mask_type=mask_type, target_modules=PROJECTIONS)
    masks = masks_of(model)
    assert all(torch.equal(mask, masks[key]) for key, mask in masks_of(other).items())
    for key, weight in other.adapter_state("qa").items():
        assert torch.equal(weight, model.adapter_state("qa")[key] * mask_for(key, masks)), key
    assert torch.equal(run_step(other, RUN)[0][0].logits, run_step(model, RUN)[0][0].logits)
    save_adapter(other, "qa", tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_merging_adds_the_masked_product():
    model = tiny_model(dtype=torch.float64)
    config = SparseLoraConfig(r=3)
    add_random_adapter(model, "qa", config)
    linear = model.decoder_layers[0].mlp.up_proj
    lora = linear.loras_["qa"]
    weight, bias = lora.merged(linear.base_layer_.weight, None)
    delta = (lora.lora_B * lora.mask_b_) @ (lora.lora_A * lora.mask_a_) * (16 / 3)
    assert_close(weight, linear.base_layer_.weight + delta, 1e-12)
    assert bias is None


def change(folder, **tensors):
    path = Path(folder) / "adapter_model.safetensors"
    save_file({**load_file(path), **tensors}, path)


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_B"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3, dtype=torch.uint8), rf"{KEY}.mask is \[3\] of torch.uint8, but .* \[38, 3\] takes 15 bytes"),
        (torch.ones(15), r"is \[15\] of torch.float32, but"),
        (torch.zeros(15, dtype=torch.uint8), f"{KEY}.mask masks entries that are not zero in the factor"),
    ],
)
def test_a_mask_that_is_not_its_factors_is_refused(tensor, message, tmp_path):
    _, folder = saved(tmp_path, SparseLoraConfig(r=3))
    change(folder, **{f"{KEY}.mask": tensor})
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert model.adapter_names == []


REFUSED = [
    ({"sparsity": 1.0}, r"sparsity=1.0 must be in \[0, 1\)"),
    ({"sparsity": -0.1}, r"sparsity=-0.1 must be"),
    ({"sparsity": math.nan}, "sparsity=nan"),
    ({"mask_type": "movment"}, "mask_type='movment' must be one of random, movement; did you mean 'movement'"),
    ({"prune_start": 0.2}, "prune_start=0.2 changes nothing under mask_type='random'"),
    ({"prune_end": 0.2}, "prune_end=0.2 changes nothing under mask_type='random'"),
    ({"mask_type": "movement", "prune_start": 1.0}, r"prune_start=1.0 must be in \[0, 1\)"),
    ({"mask_type": "movement", "prune_start": -0.5}, r"prune_start=-0.5 must be in \[0, 1\)"),
    ({"mask_type": "movement", "prune_end": 0.1}, r"prune_end=0.1 must be in \(prune_start=0.1, 1\]"),
    ({"mask_type": "movement", "prune_end": 1.5}, r"prune_end=1.5 must be in \(prune_start=0.1, 1\]"),
    ({"r": 0}, "r=0 must be at least 1"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseLoraConfig(**fields)
