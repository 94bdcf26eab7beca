"""Every registered method by itself: its files, its coming and going, its noise, its dtype, its gradients."""

import copy
import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    add_random_adapter,
    assert_close,
    assert_relative,
    fuse,
    run_step,
    tiny_config,
    tiny_model,
)
from every_method import (
    CONFIGS,
    METHOD_OF,
    STD,
    dropout_fields,
    model_with,
    run_of,
    seed_of,
    without_dropout,
)
from torch import Tensor

from moe_peft import LlamaForCausalLM, load_adapter, save_adapter

EVERY = pytest.mark.parametrize("name", CONFIGS)


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder's files."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@EVERY
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    """To the bit in its logits, and the files written twice and written again after loading."""
    model = model_with([name])
    save_adapter(model, name, tmp_path / name)
    save_adapter(model, name, tmp_path / "again")
    assert files_of(tmp_path / name) == files_of(tmp_path / "again")
    fresh = tiny_model()
    assert load_adapter(fresh, tmp_path / name, seed=seed_of(name)) == name
    (expected,), (loaded,) = (one(fuse(run_of(name)), return_logits=True) for one in (model, fresh))
    assert torch.equal(loaded.logits, expected.logits)
    config = fresh.adapter_config(name)
    assert type(config) is type(CONFIGS[name])
    save_adapter(fresh, name, tmp_path / "loaded")
    loaded_files = files_of(tmp_path / "loaded")
    assert loaded_files["adapter_model.safetensors"] == files_of(tmp_path / name)["adapter_model.safetensors"]
    # What only training needs may be gone, but no second time.
    assert load_adapter(fresh, tmp_path / "loaded", "second") == "second"
    assert fresh.adapter_config("second") == config
    save_adapter(fresh, "second", tmp_path / "second")
    assert files_of(tmp_path / "second") == loaded_files


OTHER_BASES = {
    "wider": {"hidden_size": 32, "intermediate_size": 44},
    "deeper": {"num_hidden_layers": 3},
    "shallower": {"num_hidden_layers": 1},
}


@EVERY
def test_another_base_refuses_it(name: str, tmp_path: Path) -> None:
    save_adapter(model_with([name]), name, tmp_path / name)
    refused = []
    for base, changes in OTHER_BASES.items():
        other = tiny_model(tiny_config(**changes))
        before = names_of(other)
        try:
            load_adapter(other, tmp_path / name)
        except ValueError:
            assert other.adapter_names == []
            assert names_of(other) == before, "a refused adapter leaves nothing behind"
            refused.append(base)
    # Weights that stand before the first layer fit any number of layers.
    own = shapes_on(name, {})
    assert refused == [base for base, changes in OTHER_BASES.items() if shapes_on(name, changes) != own]
    assert "wider" in refused


def shapes_on(name: str, changes: dict[str, int]) -> dict[str, torch.Size] | str:
    """The shapes of an adapter's weights on a base; where it cannot be on that base, why."""
    model = tiny_model(tiny_config(**changes))
    try:
        model.add_adapter(name, CONFIGS[name])
    except ValueError as error:
        return str(error)
    return {key: weight.shape for key, weight in model.adapter_state(name).items()}


def logits_of(model: LlamaForCausalLM, name: str, step: int = 0) -> Tensor:
    """An adapter's logits at a step of its training."""
    run = dataclasses.replace(run_of(name), step=step)
    with torch.no_grad():
        (output,) = model(fuse(run), return_logits=True)
    return output.logits


@EVERY
def test_dropout_is_for_training_alone(name: str) -> None:
    config, model = CONFIGS[name], model_with([name])
    expected = logits_of(model, name)
    for step in (0, 1):
        assert torch.equal(logits_of(model, name, step), expected)
    plain = tiny_model()
    add_random_adapter(plain, name, without_dropout(config), seed=seed_of(name), std=STD)
    assert torch.equal(logits_of(plain, name), expected)
    first, again, second = (logits_of(model.train(), name, step) for step in (0, 0, 1))
    assert torch.equal(first, again)
    is_noisy = any(getattr(config, field) for field in NOISE_FIELDS if hasattr(config, field))
    is_noisy |= any(getattr(config, field) for field in dropout_fields(type(config)))
    assert is_noisy != torch.equal(first, second)
    assert is_noisy != torch.equal(first, expected)


NOISE_FIELDS = ["router_jitter_noise"]


@EVERY
def test_on_a_bfloat16_base_it_is_nearly_the_same(name: str) -> None:
    model = model_with([name], dtype=torch.bfloat16)
    wide = copy.deepcopy(model).float()  # with the rounded base weights
    (rounded,), steps = run_step(model, run_of(name))
    (exact,), wide_steps = run_step(wide, run_of(name))
    found, expected = steps[name], wide_steps[name]
    assert rounded.logits.isfinite().all()
    assert_close(rounded.loss, exact.loss, 0.03, "loss")
    assert_close(rounded.aux_loss, exact.aux_loss, 0.03, "aux loss")
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    for key, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        if CONFIGS[name].has_router:
            continue  # a token that rounding sends to another expert takes its gradient along
        assert_relative(gradient, expected[key], 0.2, key, floor=0.2 * total)


def names_of(model: LlamaForCausalLM) -> list[str]:
    """Every module, parameter and buffer."""
    return [name for kind in (model.named_modules, model.named_parameters, model.named_buffers) for name, _ in kind()]


def drawn(name: str, seed: int) -> dict[str, Tensor]:
    """What a fresh adapter starts with."""
    model = tiny_model()
    model.add_adapter("fresh", CONFIGS[name], seed=seed)
    return state_of(model, "fresh")


def state_of(model: LlamaForCausalLM, name: str) -> dict[str, Tensor]:
    """Copies of an adapter's weights and buffers."""
    return {key: value.clone() for key, value in {**model.adapter_state(name), **model.adapter_buffers(name)}.items()}


@EVERY
def test_it_comes_and_goes_without_a_trace(name: str) -> None:
    model = tiny_model()
    before, states = names_of(model), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    model.add_adapter("fresh", CONFIGS[name], seed=3)
    state = state_of(model, "fresh")
    assert names_of(model) != before
    assert {weight.dtype for weight in model.adapter_parameters("fresh")} == {torch.float32}
    assert all(weight.requires_grad for weight in model.adapter_parameters("fresh"))
    assert all(weight.is_contiguous() for weight in model.adapter_parameters("fresh"))  # as fused optimizers need it
    model.remove_adapter("fresh")
    assert names_of(model) == before
    assert model.adapter_names == []
    torch.manual_seed(5)
    model.add_adapter("fresh", CONFIGS[name], seed=3)
    assert_same_bits(state_of(model, "fresh"), state)
    model.remove_adapter("fresh")
    torch.set_rng_state(states[0])
    model.add_adapter("fresh", CONFIGS[name], seed=3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert_same_bits(drawn(name, 3), state)
    # What is constant from the start, or comes from the base weights, has no draw to differ in.
    is_drawn = name != "lora-pissa" and any(
        value.dim() and value.numel() > 1 and (value != value.flatten()[0]).any() for value in state.values()
    )
    other = drawn(name, 4)
    assert is_drawn == any(not torch.equal(other[key], value) for key, value in state.items())


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


# Weights whose gradient is not, and should not be, that of the forward.
NO_DERIVATIVE = {
    "dora": ("lora_A", "lora_B"),  # the norm is held fixed, as in the paper
    "quantized_lora": ("lora_A", "lora_B"),  # rounding has none: straight through
}
STEP = 1e-5


@EVERY
def test_gradients_are_those_of_the_forward(name: str) -> None:
    """Central differences in float64 along random directions, over all weights and over each kind of them."""
    model = model_with([name], training=True, dtype=torch.float64)
    run, state = run_of(name), model.adapter_state(name)
    unfit = NO_DERIVATIVE.get(METHOD_OF[name], ())
    keys = [key for key in state if not any(part in key for part in unfit)]
    _, found = run_step(model, run)
    generator = torch.Generator().manual_seed(seed_of(name))
    for kind, members in {"all": keys, **by_kind(keys)}.items() if keys else ():
        directions = unit_direction({key: state[key] for key in members}, generator)
        expected = sum(float((found[name][key] * way).sum()) for key, way in directions.items())
        size = math.sqrt(sum(float(found[name][key].square().sum()) for key in members))
        losses = [loss_beside(model, run, state, directions, step) for step in (STEP, -STEP)]
        difference = (losses[0] - losses[1]) / (2 * STEP)
        # A random direction meets but a part of the gradient.
        error, allowed = (
            abs(difference - expected),
            1e-5 * max(size / math.sqrt(sum(way.numel() for way in directions.values())), 1e-3),
        )
        assert error <= allowed, f"{kind}: {difference} is not {expected}"


def unit_direction(weights: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Random tensors of these shapes, of norm one together: small enough a step that no token changes its experts."""
    drawn = {key: torch.randn(weight.shape, generator=generator).double() for key, weight in weights.items()}
    norm = torch.stack([way.norm() for way in drawn.values()]).norm()
    return {key: way / norm for key, way in drawn.items()}


def by_kind(keys: list[str]) -> dict[str, list[str]]:
    """Weights by their names without numbers."""
    kinds: dict[str, list[str]] = {}
    for key in keys:
        kinds.setdefault(".".join(part for part in key.split(".") if not part.isdigit()), []).append(key)
    return kinds


def loss_beside(
    model: LlamaForCausalLM, run: Any, state: dict[str, Tensor], directions: dict[str, Tensor], step: float
) -> float:
    """The run's whole loss with the weights moved, after which they are put back."""
    before = {key: state[key].clone() for key in directions}
    with torch.no_grad():
        for key, way in directions.items():
            state[key].add_(way, alpha=step)
        (output,) = model(fuse(run))
        for key, value in before.items():
            state[key].copy_(value)
    return float(output.loss + output.aux_loss)
